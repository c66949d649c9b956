"""sppo_atari.py with EnvPool's games in the place of ALE's own vector environment: a peer of speed.py, for speed alone.

    pip install envpool==1.2.5      # see requirements-peers.txt
    python benchmark/studies/envpool_peer.py --env-id Alien --alpha 1 --beta 0 --total-timesteps 10240

The network, the update, the loop and the command line are the script's. EnvPool resets a game in a step of its own after the
game's last one, where ALE's vector environment does both in one step; the loop learns from that step, too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
try:
    import envpool
    import numpy as np

    import sppo_atari as script
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    install = "pip install -r benchmark/studies/requirements-peers.txt"
    print(f"{Path(__file__).name}: error: needs {error.name}; expected what `{install}` installs", file=sys.stderr)
    sys.exit(2)


class Games:
    """EnvPool's games behind the interface that the script has for ALE's: a lost life ends an episode, the game goes on."""

    def __init__(self, rom, num_envs, args, **preprocessing):
        self.game, self.num_envs = f"{script.resolve_env(args.env_id)[0]}-v5", num_envs
        self.options = {
            "num_threads": min(args.num_threads, num_envs),
            "repeat_action_probability": args.repeat_action_probability,
            "reward_clip": False,
            "episodic_life": False,
            "noop_max": 30,
            "use_fire_reset": True,
        }
        self.single_action_space = envpool.make_spec(self.game).action_space

    def reset(self, seed=None):
        seed = int(np.ravel(seed)[0]) if seed is not None else 0
        self.envs = envpool.make(self.game, env_type="gymnasium", num_envs=self.num_envs, seed=seed, **self.options)
        obs, info = self.envs.reset()
        self.lives = info["lives"]
        return obs, {"over": np.zeros(self.num_envs, dtype=bool)}

    def step(self, actions):
        obs, rewards, terminated, truncated, info = self.envs.step(actions)
        lost = info["lives"] < self.lives
        self.lives = info["lives"]
        return obs, rewards, terminated | lost, truncated, {"over": terminated | truncated, "final_obs": obs}

    def close(self):
        pass


if __name__ == "__main__":
    script.SCRIPT, script.make_envs = Path(__file__).name, Games
    script.games_over = lambda dones, info, last_info: info["over"]
    script.main(script.parse_args(sys.argv[1:]))
