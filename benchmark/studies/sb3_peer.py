"""Stable-Baselines3's PPO and A2C as a run of ours: the peer of one of our scripts, with its command line and its run folder.

    python benchmark/studies/sb3_peer.py --peer-of sppo_atari.py --env-id RoadRunner --total-timesteps 200000
    python benchmark/studies/sb3_peer.py --peer-of dsa2c_continuous.py --env-id Hopper-v4 --seed 3
    python benchmark/studies/sb3_peer.py --resume runs/Hopper-v4__sb3_a2c__3__1700000000

The same network, optimiser, schedules and minibatches as the script's with `--alpha 1 --beta 0` (and `--num-bins 0` for
continuous tasks: SB3's policy is Gaussian), with SB3's own environments (Atari: `make_atari_env`, one Python process, noop
reset, episodic life, fire reset, clipped reward; else DummyVecEnv and VecNormalize) and its own training loop. All else is the
script's: run folder, curves, checkpoints, W&B, result.json. So run.py takes it as an arm (benchmark/grids/sb3.toml), and
report.py puts it beside the other arms. An option that SB3 has nothing for (`--beta`, `--noise`) is refused.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

try:
    import ale_py
    import gymnasium as gym
    import numpy as np
    import torch
    import tyro
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    install = "pip install -r benchmark/requirements.txt"  # sbx_peer.py imports this file, too
    print(f"{Path(sys.argv[0]).name}: error: needs {error.name}; expected what `{install}` installs", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, LIBRARY = Path(__file__).name, f"Stable-Baselines3 {version('stable-baselines3')}"
SCRIPTS = ("sppo_atari.py", "sa2c_atari.py", "dsppo_continuous.py", "dsa2c_continuous.py")
# What SB3 follows of their arguments; all others stay as they are
FOLLOWED = """env_id seed total_timesteps learning_rate adam_eps rmsprop_alpha rmsprop_eps num_envs num_steps anneal_lr gamma
gae_lambda update_epochs minibatch_size norm_adv clip_coef ent_coef vf_coef max_grad_norm eval_episodes track wandb_project_name
wandb_entity exp_name run_dir resume checkpoint_interval log_interval num_threads cuda
torch_deterministic"""


@dataclass
class Args:
    """What the runs of a grid differ in. Every other argument is the script's own: --peer-of dsppo_continuous.py --help."""

    peer_of: str = "sppo_atari.py"
    """the script whose baseline this is, with its arguments and defaults"""
    env_id: str = "Alien"
    """environment, as for the script"""
    seed: int = 1
    """seed of everything random"""
    total_timesteps: int = 5_000_000
    """environment steps, rounded down to whole iterations"""
    exp_name: str = "sb3_ppo"
    """name of the experiment, of A2C sb3_a2c"""
    run_dir: str = "runs"
    """folder in which the run folder is made"""
    resume: str | None = None
    """continue the run in this folder with its own arguments"""
    num_threads: int = 0
    """CPU threads of torch; 0: the script's default"""


def load_script(name: str):
    """A copy of our script for this file alone, with SB3 in the place of the algorithm."""
    spec = importlib.util.spec_from_file_location(f"peer_of_{Path(name).stem}", ROOT / name)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    about = {"peer_of": name, "library": LIBRARY}

    class Run(script.Run):
        def write(self, name, data):
            if name.endswith(".json"):  # args.json, result.json
                data = json.dumps(json.loads(data) | about, indent=2).encode()
            super().write(name, data)

    script.SCRIPT, script.ABOUT, script.Run, script.train, script.evaluate = SCRIPT, about, Run, train, evaluate
    check = script.check
    script.check = lambda args: (check_followed(args), check(args))
    return script


def make_envs(args, num_envs: int, seed: int) -> VecEnv:
    """SB3's own stack: `AtariWrapper`s with four frames stacked, or observations and rewards normalised."""
    script = sys.modules[type(args).__module__]
    if "atari" in script.ABOUT["peer_of"]:
        gym.register_envs(ale_py)
        name, _ = script.resolve_env(args.env_id)
        return VecFrameStack(make_atari_env(f"{name}NoFrameskip-v4", n_envs=num_envs, seed=seed), n_stack=4)
    _, env_id = script.resolve_env(args.env_id)
    return VecNormalize(make_vec_env(env_id, n_envs=num_envs, seed=seed), gamma=args.gamma)


def make_model(args, seed: int, device: torch.device) -> PPO | A2C:
    """With the settings of `args`, whose defaults are those of benchmark/paper/hyperparameters.toml."""
    script = sys.modules[type(args).__module__].ABOUT["peer_of"]
    atari, ppo = "atari" in script, "ppo" in script
    policy = {} if atari else {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh}
    if ppo:
        policy["optimizer_kwargs"] = {"eps": args.adam_eps}
        of_ppo = {
            "batch_size": args.minibatch_size,
            "n_epochs": args.update_epochs,
            "clip_range": lambda left: args.clip_coef * (left if args.anneal_lr and atari else 1.0),
        }
    else:
        policy["optimizer_class"] = RMSpropTFLike if atari else torch.optim.RMSprop
        policy["optimizer_kwargs"] = {"alpha": args.rmsprop_alpha, "eps": args.rmsprop_eps}
        of_ppo = {}
    return (PPO if ppo else A2C)(
        "CnnPolicy" if atari else "MlpPolicy",
        make_envs(args, args.num_envs, seed),
        learning_rate=lambda left: args.learning_rate * (left if args.anneal_lr else 1.0),
        n_steps=args.num_steps,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        normalize_advantage=args.norm_adv,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        policy_kwargs=policy,
        seed=seed,
        device=device,
        **of_ppo,
    )


class Loop(BaseCallback):
    """What the script's train() does after an iteration: curves, checkpoints, an end in order on a signal."""

    def __init__(self, args, run):
        super().__init__()
        self.args, self.run, self.stopping = args, run, False
        self.step = run.start_step  # of the last whole iteration
        self.episodes, self.begin = [], time.perf_counter()

    def _on_rollout_start(self) -> None:
        self.end_iteration()

    def _on_step(self) -> bool:
        # SB3's Monitor sits below the wrappers that cut, clip and scale: raw returns of whole episodes
        self.episodes += [info["episode"] for info in self.locals["infos"] if "episode" in info]
        return not self.stopping

    def _on_training_end(self) -> None:
        self.end_iteration()

    def end_iteration(self) -> None:
        if self.num_timesteps == self.step or self.stopping:  # nothing yet, or a rollout that a signal has cut
            return
        self.step, args, run = self.num_timesteps, self.args, self.run
        batch_size = args.num_envs * args.num_steps
        iteration, self.stopping, run.global_step = self.step // batch_size, bool(run.signals), self.step
        last = iteration == args.total_timesteps // batch_size
        if last or self.stopping or iteration % getattr(args, "log_interval", 1) == 0:
            stats = {"charts/learning_rate": self.model.lr_schedule(self.model._current_progress_remaining)}
            if self.episodes:
                stats["charts/episodic_return"] = np.mean([episode["r"] for episode in self.episodes])
                stats["charts/episodic_length"] = np.mean([episode["l"] for episode in self.episodes])
            run.log(stats, time.perf_counter() - self.begin)
            self.episodes, self.begin = [], time.perf_counter()
        if last or self.stopping or iteration % args.checkpoint_interval == 0:
            self.save()

    def save(self) -> None:
        policy = self.model.policy
        state = {"agent": policy.state_dict(), "optimizer": policy.optimizer.state_dict()}
        self.run.save(**state, **moments(self.model))


def moments(model: PPO | A2C) -> dict[str, list]:
    """The running statistics of VecNormalize, as plain numbers."""
    envs = model.get_vec_normalize_env()
    found = {"obs_stats": envs.obs_rms, "return_stats": envs.ret_rms} if envs else {}
    return {name: [rms.mean.tolist(), rms.var.tolist(), float(rms.count)] for name, rms in found.items()}


def restore(model: PPO | A2C, checkpoint: dict) -> None:
    model.policy.load_state_dict(checkpoint["agent"])
    model.policy.optimizer.load_state_dict(checkpoint["optimizer"])
    model.num_timesteps = checkpoint["global_step"]
    if envs := model.get_vec_normalize_env():
        for rms, name in ((envs.obs_rms, "obs_stats"), (envs.ret_rms, "return_stats")):
            mean, var, rms.count = checkpoint[name]
            rms.mean, rms.var = np.array(mean), np.array(var)


def train(args, run) -> None:
    """The script's train() with SB3's loop. A resumed run begins with fresh environments, as the script's does."""
    if args.track:
        run.wandb.config.update(sys.modules[type(args).__module__].ABOUT)
    model = make_model(args, args.seed + run.start_step, run.device)
    run.cleanup.callback(model.env.close)
    if run.checkpoint:
        restore(model, run.checkpoint)
    loop = Loop(args, run)
    # whole rollouts, as in our scripts: SB3 would round up, and an annealed learning rate would end below 0
    left = args.total_timesteps - args.total_timesteps % (args.num_envs * args.num_steps) - run.start_step
    if left:  # else the run was killed after its last checkpoint
        model.learn(left, callback=loop, reset_num_timesteps=not run.checkpoint)
    run.finish(run.evaluate(model))


def evaluate(model: PPO | A2C, args, device, video=None, stop=()) -> list[float]:
    """Raw returns of `eval_episodes` whole episodes on fresh environments; actions sampled on Atari, greedy elsewhere."""
    envs = make_envs(args, 1, args.seed + 10_000)
    if isinstance(envs, VecNormalize):  # frozen
        envs.obs_rms, envs.training, envs.norm_reward = model.get_vec_normalize_env().obs_rms, False, False
    greedy = isinstance(envs, VecNormalize)
    returns, _ = evaluate_policy(model, envs, args.eval_episodes, deterministic=greedy, return_episode_rewards=True)
    envs.close()
    return [float(value) for value in returns]


def parse_args(argv: list[str]):
    """The Args of the script that --peer-of names, with its baseline's defaults; of the run's own script with --resume."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--peer-of", choices=SCRIPTS, default=SCRIPTS[0])
    parser.add_argument("--resume")
    known, rest = parser.parse_known_args(argv)
    if known.resume:
        with contextlib.suppress(OSError, ValueError):  # which the script's own parser says
            known.peer_of = json.loads(Path(known.resume, "args.json").read_text()).get("peer_of", known.peer_of)
        rest += ["--resume", known.resume]
    script = load_script(known.peer_of)
    return (
        script.parse_args(rest)
        if known.resume
        else tyro.cli(script.Args, args=rest, default=baseline(script), description=__doc__)
    )


def baseline(script):
    """The arguments of the script's baseline, with a name of their own."""
    args = script.Args(alpha=1.0, beta=0.0, exp_name="sb3_ppo" if "ppo" in script.ABOUT["peer_of"] else "sb3_a2c")
    return replace(args, num_bins=0) if hasattr(args, "num_bins") else args


def check_followed(args) -> None:
    """Refuses what SB3 cannot do of what the arguments ask for."""
    script = sys.modules[type(args).__module__]
    for name, value in asdict(baseline(script)).items():
        given = getattr(args, name)
        if given != value and name not in FOLLOWED.split():
            raise script.BadInput(f"--{name.replace('_', '-')} {given}: expected {value}, as SB3's run follows no other")


def check(args) -> None:
    """What the script refuses, and `check_followed`."""
    sys.modules[type(args).__module__].check(args)


def main(argv: list[str]) -> None:
    """As the script's command line: a message and exit status 2 for bad input."""
    try:
        arguments = parse_args(argv)
        sys.modules[type(arguments).__module__].main(arguments)
    except (ValueError, gym.error.Error, FloatingPointError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


if __name__ == "__main__":
    main(sys.argv[1:])
