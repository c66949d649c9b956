"""SBX's PPO, which is Stable-Baselines3's in JAX, as sb3_peer.py runs SB3's: a peer of speed.py, for speed alone.

    pip install sbx-rl==0.28.0      # see requirements-peers.txt
    python benchmark/studies/sbx_peer.py --peer-of dsppo_continuous.py --env-id Walker2d-v4 --total-timesteps 20480

SB3's environments, normalisation and loop; SBX's networks (of the same sizes, with a vector of log standard deviations), update
and random numbers. It saves no checkpoints. With --num-threads 1 XLA gets one thread.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

if "--num-threads 1" in " ".join(sys.argv):  # before JAX starts
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

try:
    import sb3_peer
    from sbx import PPO
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    install = "pip install -r benchmark/studies/requirements-peers.txt"
    print(f"{Path(__file__).name}: error: needs {error.name}; expected what `{install}` installs", file=sys.stderr)
    sys.exit(2)


def make_model(args, seed: int, device) -> PPO:
    """As sb3_peer.py's for continuous tasks; tanh is SBX's default."""
    return PPO(
        "MlpPolicy",
        sb3_peer.make_envs(args, args.num_envs, seed),
        learning_rate=lambda left: args.learning_rate * (left if args.anneal_lr else 1.0),
        n_steps=args.num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.update_epochs,
        clip_range=args.clip_coef,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        normalize_advantage=args.norm_adv,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "optimizer_kwargs": {"eps": args.adam_eps}},
        seed=seed,
    )


if __name__ == "__main__":
    sb3_peer.SCRIPT, sb3_peer.LIBRARY, sb3_peer.SCRIPTS = (
        Path(__file__).name,
        f"SBX {version('sbx-rl')}",
        ["dsppo_continuous.py"],
    )
    sb3_peer.make_model, sb3_peer.Loop.save = make_model, lambda loop: None
    sb3_peer.main(sys.argv[1:])
