"""The recipes of docs/loss.md, executed from the page, in Stable-Baselines3 and TRL and in an update like CleanRL's.

And fact 8 in float64: GRPO with the symmetric term, the mask that it needs, and the losses that are not covered.
"""

import copy
import functools
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from helpers import ROOT
from test_four_settings import ARGS, difference, exact_clip, train

import sppo_atari

quick = pytest.mark.quick
BLOCKS = re.findall(r"(?ms)^```(?:python|sh)\n(.*?)^```$", (ROOT / "docs/loss.md").read_text())
SB3, CLEANRL, TRL, VERL = BLOCKS
W = 10.5  # 0.5 + 10


@quick
def test_a_recipe_is_six_lines_and_the_readme_prints_the_same():
    for block in BLOCKS:
        lines = [line for line in block.splitlines() if line and not re.match("import |from |gymnasium.register", line)]
        assert len(lines) <= 6
    readme = re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / "README.md").read_text())
    assert all(block == SB3 for block in readme if "stable_baselines3" in block)


# --- Stable-Baselines3 ------------------------------------------------------------------------------------------------


@quick
def test_stable_baselines3s_recipe_is_sppo(monkeypatch):
    """Three rollouts of eight games and three updates by SB3's own PPO.learn(), against SPPO(0.5, 10) on these rollouts.

    In float64: in float32, rounding alone opens or closes a ReLU after a few steps, on some machines.
    """
    from stable_baselines3 import PPO

    given, rollouts, orders, permutation = {}, [], [], np.random.permutation
    small = {"n_steps": 8, "batch_size": 16, "n_epochs": 2}

    class SmallPPO(PPO):
        """PPO with a small rollout, stopped after three; what it is called with, learned from and initialised to is kept."""

        def __init__(self, policy, env, **settings):
            given.update(settings, policy=policy, num_envs=env.num_envs, frames=env.observation_space.shape)
            super().__init__(policy, env, **(settings | small), seed=1, device="cpu")
            self.policy.double()
            monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what both turn their observations into
            given["weights"] = copy.deepcopy(self.policy)

        def learn(self, total_timesteps):
            given["total_timesteps"] = total_timesteps
            batch = self.n_envs * self.n_steps
            return super().learn(total_timesteps, callback=lambda *_: self.num_timesteps <= 3 * batch)

        def train(self):
            left, buffer = self._current_progress_remaining, self.rollout_buffer
            parts = (buffer.observations, buffer.actions, buffer.log_probs, buffer.advantages, buffer.returns)
            obs, *rest = (torch.from_numpy(part.copy()).transpose(0, 1).flatten(0, 1) for part in parts)
            rollouts.append((left, obs, *(part.flatten() for part in rest)))
            super().train()

    def recorded(count):
        orders.append(permutation(count))
        return orders[-1]

    monkeypatch.setattr("stable_baselines3.PPO", SmallPPO)
    monkeypatch.setattr(np.random, "permutation", recorded)
    names = {}
    exec(SB3, names)
    sb3 = names["model"]
    sb3.env.close()

    paper = tomllib.loads((ROOT / "benchmark/paper/hyperparameters.toml").read_text())["atari"]
    ppo = paper["ppo"]
    assert given["policy"] == "CnnPolicy" and given["frames"] == (84, 84, 4) and given["num_envs"] == ppo["num_envs"]
    assert (given["n_steps"], given["n_epochs"], given["batch_size"]) == (128, ppo["update_epochs"], ppo["minibatch_size"])
    assert given["total_timesteps"] == paper["total_timesteps"] and ppo["num_steps"] == 128
    assert [given["learning_rate"](left) for left in (1, 0.5, 0)] == [ppo["learning_rate"], ppo["learning_rate"] / 2, 0]
    assert [given["clip_range"](left) for left in (1, 0.5, 0)] == [ppo["clip_coef"], ppo["clip_coef"] / 2, 0]
    assert (sb3.gamma, sb3.gae_lambda, sb3.clip_range_vf) == (ppo["gamma"], ppo["gae_lambda"], None)

    theirs, first = sb3.policy, given["weights"]
    agent = sppo_atari.Agent(sb3.action_space.n).double()

    def pairs(policy):
        cnn, linear = policy.features_extractor.cnn, policy.features_extractor.linear[0]
        yield from zip(
            (cnn[0], cnn[2], cnn[4], linear, policy.action_net, policy.value_net),
            (*(agent.network[i] for i in (0, 2, 4, 7)), agent.actor, agent.critic),
            strict=True,
        )

    for module, ours in pairs(first):
        ours.load_state_dict(module.state_dict())
    args = sppo_atari.Args(alpha=0.5, beta=10.0, minibatch_size=16, update_epochs=2)
    assert names["w"] == args.alpha + args.beta * -args.Z
    optimizer = torch.optim.Adam(agent.parameters(), eps=args.adam_eps)
    ordered = iter(orders)
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.from_numpy(next(ordered)))
    assert len(rollouts) == 3 and len(orders) == 6
    for left, obs, actions, *rest in rollouts:
        optimizer.param_groups[0]["lr"] = left * args.learning_rate
        clip_coef = torch.tensor(left * args.clip_coef, dtype=torch.float64)
        sppo_atari.update(agent, optimizer, sppo_atari.gradient_step, args, clip_coef, (obs, actions.long(), *rest))
    for module, ours in pairs(theirs):
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, module.get_parameter(name), atol=1e-7, rtol=0)
    assert (theirs.action_net.weight - first.action_net.weight).abs().max() > 1e-3


# --- CleanRL ----------------------------------------------------------------------------------------------------------


@dataclass
class CleanRL:
    """The arguments of cleanrl/ppo_atari.py that the recipe sets, or that its update reads, with CleanRL's defaults."""

    env_id: str = "BreakoutNoFrameskip-v4"
    total_timesteps: int = 10_000_000
    num_minibatches: int = 4
    update_epochs: int = 4
    clip_coef: float = 0.1
    clip_vloss: bool = True
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    learning_rate: float = 2.5e-4


def fast_adam(parameters, args):
    """Fast enough for the values to leave CleanRL's clip."""
    return torch.optim.Adam(parameters, lr=1e-2, eps=args.adam_eps)


def cleanrl_update(settings, alpha=1.0, beta=0.0, eps=1e-5):
    """An update like CleanRL's: half a mean square as value loss, clipped or not. `alpha` and `beta` weight Eq. 3 and 8."""

    def update(agent, optimizer, step_fn, args, clip_coef, batch):
        obs, actions, old_logprobs, all_advantages, all_returns = batch
        eps_low, eps_high = 1 - settings.clip_coef, 1 + settings.clip_coef
        optimizer.param_groups[0]["eps"] = eps
        with torch.no_grad():
            old_values = agent(obs)[1]
        for _ in range(settings.update_epochs):
            for indices in torch.randperm(len(obs)).split(len(obs) // settings.num_minibatches):
                all_logprobs, values = agent(obs[indices])
                logprobs = all_logprobs.gather(-1, actions[indices, None]).squeeze(-1)
                ratio = (logprobs - old_logprobs[indices]).exp()
                advantages, returns = all_advantages[indices], all_returns[indices]
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(eps_low, eps_high))
                kept = advantages * ratio <= advantages * ratio.clamp(eps_low, eps_high)
                reverse_loss = kept * advantages * (1 - logprobs.exp()) / old_logprobs[indices].exp()  # Z = -1
                errors = (values - returns).square()
                if settings.clip_vloss:
                    moved = (values - old_values[indices]).clamp(-settings.clip_coef, settings.clip_coef)
                    errors = torch.max(errors, (old_values[indices] + moved - returns).square())
                entropy = -(all_logprobs.exp() * all_logprobs).sum(-1).mean()
                loss = (alpha * policy_loss + beta * reverse_loss).mean() - settings.ent_coef * entropy
                optimizer.zero_grad()
                (loss + settings.vf_coef * 0.5 * errors.mean()).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), settings.max_grad_norm)
                optimizer.step()

    return update


@quick
def test_cleanrls_recipe_is_sppo(tmp_path):
    """Its line of `sed` changes CleanRL's line; its flags are CleanRL's; the update has SPPO's weights after 64 steps."""
    path = tmp_path / "cleanrl/ppo_atari.py"
    path.parent.mkdir()
    path.write_text("    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)\n")
    edit, command = CLEANRL.replace("\\\n", "").splitlines()
    subprocess.run(["bash", "-ec", edit], cwd=tmp_path, check=True)
    python, script, *flags = shlex.split(command)
    assert (python, script) == ("python", "cleanrl/ppo_atari.py")
    settings = tyro.cli(CleanRL, args=flags)
    names = {"optim": torch.optim, "agent": nn.Linear(1, 1), "args": settings}
    exec(path.read_text().strip(), names)
    eps = names["optimizer"].defaults["eps"]
    assert eps == 1e-5 / W

    sppo = replace(ARGS, alpha=0.5, beta=10.0, minibatch_size=32)
    movement = train(sppo, fast_adam)
    assert difference(train(sppo, fast_adam, cleanrl_update(settings, eps=eps)), movement) < 1e-5
    paper = CleanRL(vf_coef=1.0, clip_vloss=False)  # PPO with the paper's settings
    assert difference(train(sppo, fast_adam, cleanrl_update(paper)), movement) > 0.3
    halved = replace(settings, vf_coef=settings.vf_coef / 2)  # the paper's vf_coef / w, without CleanRL's factor
    assert difference(train(sppo, fast_adam, cleanrl_update(halved, eps=eps)), movement) > 0.05


@quick
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_cleanrl_with_the_symmetric_term_is_its_ppo_with_four_settings_divided(clip_vloss, monkeypatch):
    """With CleanRL's own defaults, whatever its value loss: every term but the policy's is divided."""
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", exact_clip)
    plain = CleanRL(clip_vloss=clip_vloss)
    four = replace(plain, **{name: getattr(plain, name) / W for name in ("vf_coef", "ent_coef", "max_grad_norm")})
    movement = train(ARGS, fast_adam, cleanrl_update(plain, alpha=0.5, beta=10.0))
    assert difference(train(ARGS, fast_adam, cleanrl_update(four, eps=1e-5 / W)), movement) < 1e-12
    assert difference(train(ARGS, fast_adam, cleanrl_update(plain)), movement) > 0.3


# --- TRL --------------------------------------------------------------------------------------------------------------


def with_the_symmetric_term(trainer, alpha, beta):
    """`trainer` with alpha times its loss of Eq. 3 and beta times the reverse loss of Eq. 8, beside its other terms."""

    class Symmetric(trainer):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = inputs["completion_mask"]
            attention = torch.cat([inputs["prompt_mask"], mask], dim=1)
            logps, *_ = self._get_per_token_logps_and_entropies(model, ids, attention, mask.shape[1])
            advantages = inputs["advantages"][:, None]
            if "old_per_token_logps" in inputs:  # "dapo", the default: a mean over the tokens of all that was generated at once
                old_logps = inputs["old_per_token_logps"]
                weights = mask.double() * self.args.steps_per_generation / inputs["num_items_in_batch"].double()
            else:
                logps, old_logps = (logps * mask).sum(1, keepdim=True), inputs["old_logps"][:, None]
                weights = 1 / len(mask)
            surrogate = advantages * (logps - old_logps).exp()
            clipped = advantages * (logps - old_logps).exp().clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
            policy_loss = -torch.min(surrogate, clipped)
            reverse_loss = (surrogate <= clipped) * advantages * (1 - logps.exp()) / old_logps.exp()  # Z = -1
            extra = (alpha - 1) * policy_loss + beta * reverse_loss
            return super()._compute_loss(model, inputs) + (extra * weights).sum()

    return Symmetric


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trls_recipes_are_the_symmetric_loss(tmp_path, monkeypatch):
    """GRPO and RLOO, 20 steps of AdamW each, on completions that each arm samples itself: TRL is untouched in all but one arm.

    The model is a random GPT-2 of two layers. It is in float64, but TRL's last layer, log-probabilities and rewards are in
    float32: some 1e-5 of the movement is rounding.
    """
    import datasets
    import rlhf_assets
    import trl

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = rlhf_assets.make_tokenizer()
    model = rlhf_assets.make_lm(len(tokenizer), dropout=0.0).double()
    model.save_pretrained(tmp_path)
    first = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    tokenizer.save_pretrained(tmp_path)
    prompts = ("a great film", "an awful movie", "the best story", "i have seen")
    dataset = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    small = {"output_dir": str(tmp_path / "out"), "model_init_kwargs": {"dtype": "auto"}, "use_cpu": True, "bf16": False}
    small |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 20}
    small |= {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    small |= {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}

    def movements(recipe, alpha=None, beta=None, scale=1.0):
        """Of GRPO's and RLOO's weights by the recipe's training. `alpha`, `beta`: with the symmetric term added to TRL."""

        def reward(completion_ids, **_):
            return [scale * (sum(token % 7 for token in ids) / len(ids) - 2) for ids in completion_ids]

        names = {"model": str(tmp_path), "reward": reward, "dataset": dataset}
        own = {"GRPO": {"scale_rewards": "none"}, "RLOO": {"beta": 0.05 * scale}}  # 0.05, the default, is in the reward
        with monkeypatch.context() as patch:
            for name, settings in own.items():
                patch.setattr(trl, f"{name}Config", functools.partial(getattr(trl, f"{name}Config"), **small, **settings))
                if alpha:
                    trainer = with_the_symmetric_term(getattr(trl, f"{name}Trainer"), alpha, beta)
                    patch.setattr(trl, f"{name}Trainer", trainer)
            exec(recipe, names)
        for trainer in (names["grpo"], names["rloo"]):
            defaults = (trainer.args.max_grad_norm * names["w"], trainer.args.adam_epsilon * names["w"])
            assert defaults == pytest.approx((1.0, 1e-8))  # of eps alone the weights show too little
            trainer.train()
            last = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
            assert last.dtype == torch.float64
            yield last - first

    (found,) = re.findall(r"(?m)^w = ([\d.]+) \+ ([\d.]+)", TRL)
    alpha, beta = map(float, found)
    plain_recipe = re.sub(r"(?m)^w = .*$", "w = 1", TRL)
    arms = (TRL,), (plain_recipe, alpha, beta), (plain_recipe, None, None, alpha + beta), (plain_recipe,)
    for found, symmetric, scaled, plain in zip(*(list(movements(*arm)) for arm in arms), strict=True):
        assert difference(symmetric, found) < 1e-4
        assert difference(scaled, found) < 1e-4
        assert difference(plain, found) > 0.005


# --- GRPO in float64, and verl ----------------------------------------------------------------------------------------

MEANS = {  # of the tokens' losses [B, T] under a mask
    "tokens": lambda losses, mask: (losses * mask).sum() / mask.sum(),
    "sequences": lambda losses, mask: ((losses * mask).sum(1) / mask.sum(1)).mean(),
    "constant": lambda losses, mask: (losses * mask).sum() / 100,
}


def surrogates(ratio, advantages, low=0.2, high=0.28):
    return advantages * ratio, advantages * ratio.clamp(1 - low, 1 + high)  # "clip-higher"


def grpo(ratio, logprobs, advantages):
    return -torch.min(*surrogates(ratio, advantages))


def dual_clip(ratio, logprobs, advantages, limit=3.0):
    """verl's: where A < 0 a token's loss is at most -A clip_ratio_c."""
    losses = grpo(ratio, logprobs, advantages)
    return torch.where(advantages < 0, torch.min(losses, -advantages * limit), losses)


def delta(ratio, logprobs, advantages, limit=3.0):
    """TRL's two-sided clip: the ratio outside the clip is at most `delta`."""
    return -torch.min(advantages * ratio.clamp(max=limit), surrogates(ratio, advantages)[1])


def cispo(ratio, logprobs, advantages):
    return -ratio.clamp(max=1.28).detach() * advantages * logprobs


def sapo(ratio, logprobs, advantages):
    temperature = torch.where(advantages > 0, 1.0, 1.05)
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


def reverse(ratio, old_logprobs, advantages, mask):
    """Eq. 8 with Z = -1, sample by sample: A (1 - pi) / pi_old where `mask`."""
    return mask * advantages * (1 - ratio * old_logprobs.exp()) / old_logprobs.exp()


def papers_mask(ratio, advantages):
    surrogate, clipped = surrogates(ratio, advantages)
    return surrogate <= clipped


def tokens(seed):
    """32 sequences of 6 tokens: states, actions, an old policy that is off by some, advantages of sequences, lengths."""
    rng = torch.Generator().manual_seed(seed)
    obs = torch.randn(32, 6, 5, generator=rng, dtype=torch.float64)
    actions = torch.randint(7, (32, 6), generator=rng)
    shift = 0.7 * torch.randn(32, 6, generator=rng, dtype=torch.float64)
    advantages = torch.randn(32, 1, generator=rng, dtype=torch.float64)
    mask = (torch.arange(6) < torch.randint(1, 7, (32, 1), generator=rng)).double()
    return obs, actions, shift, advantages, mask


def policy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 7)).double()


def train_grpo(mean, alpha, beta, kl_coef, ent_coef, max_grad_norm, eps, scale=1.0):
    """40 steps of AdamW on four batches. Returns the weights' movement."""
    model, reference = policy(), policy()
    first = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=eps, weight_decay=0.1)
    for seed in range(4):
        obs, actions, shift, advantages, mask = tokens(seed)
        advantages = scale * advantages
        with torch.no_grad():
            old_logprobs, reference_logprobs = (
                F.log_softmax(net(obs), -1).gather(-1, actions[..., None]).squeeze(-1) for net in (model, reference)
            )
            old_logprobs += shift
        for _ in range(10):
            all_logprobs = F.log_softmax(model(obs), -1)
            logprobs = all_logprobs.gather(-1, actions[..., None]).squeeze(-1)
            ratio = (logprobs - old_logprobs).exp()
            losses = alpha * grpo(ratio, logprobs, advantages)
            losses = losses + beta * reverse(ratio, old_logprobs, advantages, papers_mask(ratio, advantages))
            k3 = (reference_logprobs - logprobs).exp() - (reference_logprobs - logprobs) - 1
            entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
            loss = MEANS[mean](losses + kl_coef * k3, mask) - ent_coef * MEANS["tokens"](entropy, mask)
            optimizer.zero_grad()
            loss.backward()
            exact_clip(list(model.parameters()), max_grad_norm)
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) - first


@quick
@pytest.mark.parametrize("mean", MEANS)
def test_fact_8_grpo_with_the_symmetric_term_is_grpo_with_four_settings_divided(mean):
    settings = {"kl_coef": 0.04, "ent_coef": 0.01, "max_grad_norm": 1.0, "eps": 1e-4}
    movement = train_grpo(mean, 0.5, 10.0, **settings)
    four = {name: value / W for name, value in settings.items()}
    assert difference(train_grpo(mean, 1.0, 0.0, **four), movement) < 1e-12
    assert difference(train_grpo(mean, 1.0, 0.0, **settings, scale=W), movement) < 1e-12  # advantages times w
    for name in settings:
        assert difference(train_grpo(mean, 1.0, 0.0, **(four | {name: settings[name]})), movement) > 0.01, name


@quick
def test_fact_8_without_kl_entropy_clip_and_eps_it_is_grpo():
    nothing = {"kl_coef": 0.0, "ent_coef": 0.0, "max_grad_norm": 1e12, "eps": 1e-30}
    plain = train_grpo("tokens", 1.0, 0.0, **nothing)
    assert difference(train_grpo("tokens", 0.5, 10.0, **nothing), plain) < 1e-12
    for name, value in (("max_grad_norm", 1.0), ("eps", 1e-4)):  # what is left of the four at TRL's defaults
        one = nothing | {name: value}
        assert difference(train_grpo("tokens", 0.5, 10.0, **one), train_grpo("tokens", 1.0, 0.0, **one)) > 0.01, name


def off_by(loss, mask, alpha=0.5, beta=10.0):
    """How far the gradient of alpha L + beta L_rev is from w times L's, as a share of the latter; many tokens are cut."""
    model = policy()
    obs, actions, shift, advantages, _ = tokens(0)
    logprobs = F.log_softmax(model(obs), -1).gather(-1, actions[..., None]).squeeze(-1)
    old_logprobs = logprobs.detach() - 2 * shift
    ratio = (logprobs - old_logprobs).exp()
    losses = loss(ratio, logprobs, advantages)
    if mask == "the loss's own":  # where the loss has a gradient
        kept = torch.autograd.grad(losses.sum(), logprobs, retain_graph=True)[0] != 0
    else:
        kept = papers_mask(ratio, advantages)
    total = (alpha * losses + beta * reverse(ratio, old_logprobs, advantages, kept)).mean()
    found, own = (
        torch.cat([grad.flatten() for grad in torch.autograd.grad(each, list(model.parameters()), retain_graph=True)])
        for each in (total, W * losses.mean())
    )
    return difference(found, own)


@quick
def test_the_mask_is_that_of_the_losss_own_clip():
    """With a second clip the paper's mask lets tokens through that the loss has cut: verl's recipe stands on its own mask."""
    assert off_by(grpo, "the paper's") < 1e-12
    for loss in (dual_clip, delta):
        assert off_by(loss, "the loss's own") < 1e-12
        assert off_by(loss, "the paper's") > 0.5


@quick
@pytest.mark.parametrize("loss", [cispo, sapo])
@pytest.mark.parametrize("mask", ["the paper's", "the loss's own"])
def test_losses_that_are_not_covered(loss, mask):
    """CISPO and SAPO have no gradient of -A r under a mask: the symmetric term gives them another direction."""
    assert off_by(loss, mask) > 0.1


@quick
def test_verls_recipe_is_its_defaults_divided():
    """Not run: its numbers alone, from verl's defaults."""
    (w,) = re.findall(r"w = [\d.]+ \+ [\d.]+ = ([\d.]+)", VERL)
    found = dict(re.findall(r"\+?actor_rollout_ref\.actor\.([\w.]+)=([\d.e-]+)", VERL))
    defaults = {"kl_loss_coef": 0.001, "entropy_coeff": 0.0, "grad_clip": 1.0, "optim.override_optimizer_config.eps": 1e-8}
    assert {name: float(value) for name, value in found.items()} == {
        name: pytest.approx(value / float(w), rel=0.005) for name, value in defaults.items()
    }
    assert "use_kl_loss=True" in VERL and "not run" in VERL.splitlines()[0]
