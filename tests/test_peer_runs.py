"""Whole training runs beside Stable-Baselines3's: the same first weights, actions and minibatches give the same last weights.

What is SB3's is only what chance decides. Rewards, normalisation, episode ends, values, advantages, losses, gradients,
the optimiser and their order are the script's own main(), from beginning to end.
"""

import importlib

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from helpers import only, unchanged_process
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

pytestmark = pytest.mark.quick

COMMON = {"gamma": 0.99, "max_grad_norm": 0.5, "vf_coef": 0.5, "ent_coef": 0.0, "seed": 7, "device": "cpu"}


def hopper():
    """Episodes of 25 steps at most, so that some are cut off and some end in a fall."""
    return TimeLimit(gymnasium.make("Hopper-v5").env.env, 25)


class Record(BaseCallback):
    actions = None

    def _on_training_start(self):
        self.actions = []

    def _on_step(self):
        self.actions.append(self.locals["actions"].copy())
        return True


def layers(agent, policy):
    """[(ours, SB3's)]"""
    ours = [layer for network in (agent.actor, agent.critic) for layer in network if hasattr(layer, "weight")]
    actor, critic = policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net
    return list(zip(ours, [actor[0], actor[2], policy.action_net, critic[0], critic[2], policy.value_net], strict=True))


@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_a_run_with_the_peers_chance_ends_at_the_peers_weights(algorithm, tmp_path, monkeypatch):
    num_envs, num_steps, iterations = (1, 192, 3) if algorithm == "ppo" else (4, 8, 30)
    envs = VecNormalize(make_vec_env(hopper, n_envs=num_envs, seed=7), gamma=0.99)
    # one dict for each peer: A2C writes its optimiser, RMSprop, into the dict that it is given
    common = COMMON | {"policy_kwargs": {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh}}
    if algorithm == "ppo":
        settings = {"learning_rate": 3e-4, "n_steps": 192, "batch_size": 64, "n_epochs": 4, "gae_lambda": 0.95}
        peer = PPO("MlpPolicy", envs, clip_range=0.2, **settings, **common)
    else:
        peer = A2C("MlpPolicy", envs, learning_rate=7e-4, n_steps=8, rms_prop_eps=1e-5, **common)
    assert type(peer.policy.optimizer) is (torch.optim.Adam if algorithm == "ppo" else torch.optim.RMSprop)
    first = {name: weights.clone() for name, weights in peer.policy.state_dict().items()}
    orders, permutation = [], np.random.permutation

    def recorded(count):
        orders.append(permutation(count))
        return orders[-1]

    record = Record()
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "permutation", recorded)
        peer.learn(num_envs * num_steps * iterations, callback=record)
    last = {name: weights.clone() for name, weights in peer.policy.state_dict().items()}
    peer.policy.load_state_dict(first)

    script = importlib.import_module("dsppo_continuous" if algorithm == "ppo" else "dsa2c_continuous")
    seeds, actions, flatten = iter(range(7, 7 + num_envs)), iter(record.actions), script.flatten_parameters

    def make_env(args, _):
        env, seed = hopper(), next(seeds)
        reset = env.reset
        env.reset = lambda **given: reset(seed=seed) if "seed" in given else reset()
        return script.PlainEnv(env)

    def with_the_peers_weights(agent):
        for layer, other in layers(agent, peer.policy):
            layer.load_state_dict(other.state_dict())
        return flatten(agent)

    args = {"env_id": "Hopper-v5", "num_bins": 0, "alpha": 1.0, "beta": 0.0, "num_envs": num_envs, "num_steps": num_steps}
    args |= {"total_timesteps": num_envs * num_steps * iterations, "eval_episodes": 0, "run_dir": str(tmp_path)}
    args |= {"minibatch_size": 64, "update_epochs": 4} if algorithm == "ppo" else {}
    monkeypatch.setattr(script, "check", lambda args: None)  # it plays a step
    monkeypatch.setattr(script, "make_env", make_env)
    monkeypatch.setattr(script, "flatten_parameters", with_the_peers_weights)
    monkeypatch.setattr(script, "act", lambda *_: next(actions))
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.from_numpy(orders.pop(0)))
    with unchanged_process():
        script.main(script.Args(**args))
    assert next(actions, None) is None
    if algorithm == "ppo":
        assert orders == []

    checkpoint = torch.load(only(tmp_path) / "checkpoint.pt", weights_only=True)
    for name, theirs in (("obs_stats", envs.obs_rms), ("return_stats", envs.ret_rms)):  # the same episodes
        mean, var, _ = checkpoint[name]
        np.testing.assert_allclose(mean, theirs.mean, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(var, theirs.var, rtol=1e-6, atol=1e-9)
    agent = script.Agent(11, [0] * 3)
    agent.load_state_dict(checkpoint["agent"])
    peer.policy.load_state_dict(last)
    for layer, other in layers(agent, peer.policy):
        torch.testing.assert_close(layer.state_dict(), other.state_dict(), atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(agent.log_std.detach(), peer.policy.log_std.detach(), atol=2e-5, rtol=1e-3)
    moved = (peer.policy.action_net.weight - first["action_net.weight"]).abs().max()
    assert moved > 1e-3  # twenty times and more what is allowed to differ
