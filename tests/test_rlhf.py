"""sppo_rlhf_imdb.py piece by piece: padding, sampling, statistics, advantages, losses; against plain loops and other code."""

import copy
import math

import numpy as np
import pytest
import rlhf_assets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

import sppo_rlhf_imdb as imdb
from sppo_rlhf_imdb import PAD, Agent, Args

TOKENIZER = rlhf_assets.make_tokenizer()
V, EOS = len(TOKENIZER), TOKENIZER.eos_token_id
SIZES = {"max_prompt_length": 7, "response_length": 6, "min_response_length": 0, "cuda": False}


@pytest.fixture(autouse=True)
def one_thread():
    """All that networks this small need, and far faster than two where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_args(**changed):
    return Args(**{**SIZES, "trajectories_per_update": 8, "minibatch_size": 4, **changed})


def make_agent(lora_r=0, seed=0):
    """With weights and values that are not near 0, and dropout in its configuration."""
    agent = Agent(rlhf_assets.make_lm(V, dropout=0.5, seed=seed), lora_r)
    torch.manual_seed(seed + 1)
    torch.nn.init.normal_(agent.value_head.weight)
    return agent


def make_tokens(rows=8, seed=0):
    """[rows, 13]: prompts of 3 to 7 tokens, responses of 1 to 6, of which all but the whole ones end with EOS."""
    rng = np.random.default_rng(seed)
    tokens = np.full((rows, 13), PAD)
    for row in tokens:
        prompt, response = rng.integers(3, 8), rng.integers(1, 7)
        row[7 - prompt : 7 + response] = rng.integers(5, V, prompt + response)
        if response < 6:
            row[7 + response - 1] = EOS
    return torch.from_numpy(tokens)


def by_hand(agent, row, temperature=1.0):
    """Log-probabilities and values of one row's response, from an unpadded pass of the whole model."""
    start = (row[:7] != PAD).sum()
    ids = row[row != PAD]
    out = agent.lm(ids[None], output_hidden_states=True)
    logprobs = F.log_softmax(out.logits[0].double() / temperature, -1)
    n = len(ids) - start
    chosen = logprobs[start - 1 : -1][torch.arange(n), ids[start:]]
    return chosen, agent.value_head(out.hidden_states[-1][0, start - 1 : -1]).squeeze(-1), logprobs[start - 1 : -1]


# --- the forward pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_equals_unpadded_passes_of_the_whole_model(temperature):
    agent, tokens = make_agent(), make_tokens()
    logprobs, values, entropies = agent(tokens, 7, temperature, with_entropy=True)
    hand = [by_hand(agent, row, temperature) for row in tokens]
    torch.testing.assert_close(logprobs.double(), torch.cat([h[0] for h in hand]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, torch.cat([h[1] for h in hand]), atol=1e-5, rtol=1e-5)
    whole = torch.cat([h[2] for h in hand])
    torch.testing.assert_close(entropies.double(), -(whole.exp() * whole).sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_changes_nothing(family):
    """The same prompts padded by 0 and by 17: log-probabilities, values, loss, and what is sampled."""
    agent = make_agent()
    if family == "llama":  # rotary positions, SmolLM2's kind
        import transformers

        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
        )  # fmt: skip
        agent = Agent(transformers.LlamaForCausalLM(config))
        torch.nn.init.normal_(agent.value_head.weight)
    tokens = make_tokens()
    padded = torch.cat([torch.full((8, 17), PAD), tokens], dim=1)
    for one, other in zip(agent(tokens, 7, 1.0)[:2], agent(padded, 24, 1.0)[:2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    rest = [torch.randn(8, 6), torch.randn(8, 6), torch.randn(8, 6), torch.randn(8, 6), make_tokens(seed=3)[:, 7:]]
    args = make_args(reference_nll_coef=0.1, ent_coef=0.1)
    losses = [imdb.minibatch_loss(agent, args, 1.0, 1.0, rows, *rest)[0] for rows in (tokens, padded)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    uniforms = torch.rand(8, 6, dtype=torch.float64)
    one, other = (imdb.generate(agent, rows[:, :-6], uniforms, [EOS], args) for rows in (tokens, padded))
    assert torch.equal(one, other)


def test_eos_is_learned_and_what_stands_behind_it_is_not():
    agent = make_agent()
    tokens, old_logprobs, old_values, advantages, returns, references = make_minibatch(agent)
    ends = tokens[:, 7:] == EOS
    behind = tokens[:, 7:] == PAD
    assert ends.any() and behind.any() and PAD < 0
    args = make_args(vf_coef=0.0, reference_nll_coef=0.0)
    of_eos = gradient(agent, args, tokens, old_logprobs, old_values, ends.float(), returns, references)
    assert of_eos.norm() > 1e-3
    rest = (tokens, old_logprobs, old_values, advantages, returns, references)
    changed = (tokens, *(x + 7.0 * behind for x in rest[1:5]), references)
    args = make_args()
    assert torch.equal(gradient(agent, args, *rest), gradient(agent, args, *changed))


def test_bf16_layers_keep_float32_logits():
    """A constant added to all logits leaves log pi as it is; bf16 logits near 100 would be off by up to a quarter."""
    tokens, agent = make_tokens(), make_agent()
    exact = agent(tokens, 7, 1.0)[0]
    agent.bf16 = True
    rounded = agent(tokens, 7, 1.0)[0]
    assert rounded.dtype == torch.float32 and 1e-5 < (rounded - exact).abs().max() < 0.3
    logits = agent.logits(torch.randn(50, 32), 1.0)
    assert logits.dtype == torch.float32
    shifted = make_agent()
    shifted.bf16 = True
    shifted.lm.lm_head = torch.nn.Linear(32, V)
    with torch.no_grad():
        shifted.lm.lm_head.weight.copy_(agent.lm.lm_head.weight)
        shifted.lm.lm_head.bias.fill_(-100.0)
    torch.testing.assert_close(shifted(tokens, 7, 1.0)[0], rounded, atol=1e-4, rtol=1e-4)


# --- generation -------------------------------------------------------------------------------------------------------


def test_sample_follows_the_distribution_of_the_top_k():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)) * 2
    for top_k in (0, 5):
        tokens = imdb.sample(logits.expand(40_000, -1), torch.rand(40_000, dtype=torch.float64), top_k)
        kept = logits[0].topk(top_k or 30).indices
        expected = torch.zeros(30).index_copy(0, kept, logits[0, kept].softmax(-1)) * 40_000
        counts = tokens.bincount(minlength=30)
        assert (counts[expected == 0] == 0).all()
        often = expected > 5
        chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
        assert chi2 < often.sum() + 5 * math.sqrt(2 * often.sum())  # mean and five standard deviations


def test_sample_inverts_the_distribution_even_at_its_ends(monkeypatch):
    """Of all tokens without sorting them, so in the order of the vocabulary."""
    logits = torch.tensor([[0.2, 0.5, 0.0, 0.3]]).log().expand(4, -1)
    uniforms = torch.tensor([0.0, 0.21, 0.71, 1 - 2**-53], dtype=torch.float64)
    assert imdb.sample(logits, uniforms, 3).tolist() == [1, 1, 3, 0]
    monkeypatch.setattr(torch.Tensor, "topk", lambda *_: pytest.fail("sorted"))
    assert imdb.sample(logits, uniforms, 0).tolist() == [0, 1, 3, 3]


def test_cached_generation_equals_whole_passes():
    """A loop without a cache, without padding, one prompt at a time, from the same uniform numbers."""
    agent, args = make_agent(), make_args(top_k=20, temperature=0.9, min_response_length=2)
    prompts = make_tokens()[:, :7]
    uniforms = torch.rand(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    uniforms[0, :] = 1 - 1e-9
    got = imdb.generate(agent, prompts, uniforms, [EOS], args)
    ends = 0
    for row in range(8):
        ids, response = prompts[row][prompts[row] != PAD], []
        for t in range(6):
            logits = agent.lm(ids[None]).logits[0, -1].double() / 0.9
            if t < 2:
                logits[EOS] = -math.inf
            top = logits.topk(20)
            cumulative = top.values.softmax(-1).cumsum(-1)
            token = int(top.indices[min(int(torch.searchsorted(cumulative, uniforms[row, t])), 19)])
            response.append(token)
            ids = torch.cat([ids, torch.tensor([token])])
            if token == EOS:
                ends += 1
                break
        assert got[row].tolist() == response + [PAD] * (6 - len(response))


def test_generation_stops_at_eos_and_not_before_the_minimum():
    agent, prompts = make_agent(), make_tokens()[:, :7]
    uniforms = torch.full((8, 6), 1e-9, dtype=torch.float64)  # always the likeliest
    with torch.no_grad():
        agent.lm.transformer.ln_f.weight.zero_()  # the same logits everywhere
        agent.lm.transformer.ln_f.bias.copy_(agent.lm.lm_head.weight[EOS] * 100)
    for minimum, length in ((0, 1), (3, 4), (6, 6)):
        got = imdb.generate(agent, prompts, uniforms, [EOS], make_args(min_response_length=minimum))
        assert ((got != PAD).sum(-1) == length).all()
        assert ((got == EOS).sum(-1) == (minimum < 6)).all()
        if minimum < 6:
            assert (got[:, minimum] == EOS).all() and (got[:, minimum + 1 :] == PAD).all()


def test_the_score_function_of_top_k_sampling_is_not_zero_in_the_mean():
    """What the docstring says: over sampled tokens the mean of grad log pi is grad log m, m the probability of the top k;
    with all tokens it is 0."""
    logits = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logprobs = logits.log_softmax(-1)
    uniforms = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for top_k in (4, 0):
        counts = imdb.sample(logits.detach().expand(100_000, -1), uniforms, top_k).bincount(minlength=12)
        (mean,) = torch.autograd.grad((counts.double() / 100_000) @ logprobs, logits, retain_graph=True)
        mass = logprobs[logits.topk(top_k or 12).indices].exp().sum()
        (expected,) = torch.autograd.grad(mass.log(), logits, retain_graph=True)
        assert (mean - expected).abs().max() < 5 * 0.5 / math.sqrt(100_000)
        assert (expected.norm() > 0.1) == (top_k == 4)


# --- whitening and advantages -----------------------------------------------------------------------------------------


def test_whitening_equals_a_loop():
    torch.manual_seed(0)
    x, real = torch.randn(5, 7) * 3 + 2, torch.rand(5, 7) < 0.6
    kept = np.array([x[i, j] for i in range(5) for j in range(7) if real[i, j]])
    whitened = imdb.whiten(x, real)
    for i in range(5):
        for j in range(7):
            expected = (x[i, j] - kept.mean()) / kept.std() if real[i, j] else 0
            assert whitened[i, j].item() == pytest.approx(float(expected), abs=1e-5)


def make_batch(seed=0):
    torch.manual_seed(seed)
    tokens = make_tokens(seed=seed)
    real = tokens[:, 7:] != PAD
    logprobs, ref_logprobs, values = ((torch.randn(8, 6) - offset) * real for offset in (2, 2, 0))
    return {
        "tokens": tokens, "logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values,
        "scores": torch.rand(8), "empty": torch.zeros(8), "unfinished": torch.zeros(8),
    }  # fmt: skip


def test_advantages_by_hand():
    """One trajectory after another: the KL penalty at each token, the score at the last, nothing behind it."""
    batch, args = make_batch(), make_args(kl_coef=0.3, gamma=0.9, gae_lambda=0.8)
    advantages, returns = imdb.advantages_and_returns(batch, args)
    for row in range(8):
        n = int((batch["tokens"][row, 7:] != PAD).sum())
        rewards = [-0.3 * (batch["logprobs"][row, t] - batch["ref_logprobs"][row, t]).item() for t in range(n)]
        rewards[-1] += batch["scores"][row].item()
        values = [*batch["values"][row, :n].tolist(), 0.0]
        for t in range(n):
            deltas = [rewards[k] + 0.9 * values[k + 1] - values[k] for k in range(t, n)]
            advantage = sum((0.9 * 0.8) ** k * delta for k, delta in enumerate(deltas))
            assert advantages[row, t].item() == pytest.approx(advantage, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(advantage + values[t], abs=1e-5)
        assert (advantages[row, n:] == 0).all() and (returns[row, n:] == 0).all()


def test_describe_counts_empty_and_unfinished_responses():
    batch = make_batch()
    batch["tokens"][:, 7:] = PAD
    batch["tokens"][0, 7] = EOS  # empty
    batch["tokens"][1, 7:9] = torch.tensor([9, EOS])
    batch["tokens"][2:, 7:] = 9  # never ends
    batch["empty"][0], batch["unfinished"][2:] = 1, 1
    real = batch["tokens"][:, 7:] != PAD
    batch["logprobs"], batch["ref_logprobs"] = batch["logprobs"] * real, batch["ref_logprobs"] * real
    stats = imdb.describe(batch, make_args(kl_coef=0.5))
    assert stats["empty_share"] == pytest.approx(1 / 8) and stats["unfinished_share"] == pytest.approx(6 / 8)
    assert stats["empty_score"] == pytest.approx(batch["scores"][0].item())
    assert stats["unfinished_score"] == pytest.approx(batch["scores"][2:].mean().item())
    assert stats["response_length"] == pytest.approx((1 + 2 + 6 * 6) / 8)
    k1, k3 = 0.0, 0.0
    for row in range(8):
        for t in range(6):
            if real[row, t]:
                logratio = (batch["logprobs"] - batch["ref_logprobs"])[row, t].item()
                k1 += logratio / 8
                k3 += (math.exp(-logratio) - 1 + logratio) / 8
    assert stats["kl"] == pytest.approx(k1, abs=1e-4) and stats["kl_k3"] == pytest.approx(k3, rel=1e-4)
    assert stats["rlhf_reward"] == pytest.approx(batch["scores"].mean().item() - 0.5 * k1, abs=1e-4)
    assert "empty_score" not in imdb.describe({**batch, "empty": torch.zeros(8)}, make_args())


# --- the loss ---------------------------------------------------------------------------------------------------------


def gradient(agent, args, *batch):
    agent.zero_grad()
    loss, _ = imdb.minibatch_loss(agent, args, 1.0, 1.0, *batch)
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in agent.parameters() if parameter.grad is not None]).double()


def make_minibatch(agent, off=0.3, seed=0):
    """Old log-probabilities a little off the policy's own, so that the clip cuts some."""
    torch.manual_seed(seed)
    tokens = make_tokens(seed=seed)
    real = tokens[:, 7:] != PAD
    old_logprobs, old_values = torch.zeros(8, 6), torch.zeros(8, 6)
    with torch.no_grad():
        logprobs, values, _ = agent(tokens, 7, 1.0)
    old_logprobs[real] = logprobs + off * torch.randn(len(logprobs))
    old_values[real] = values + off * torch.randn(len(values))
    return tokens, old_logprobs, old_values, torch.randn(8, 6) * real, torch.randn(8, 6) * real, make_tokens(seed=9)[:, 7:]


def test_fact_2_over_a_vocabulary():
    """The gradient of SPPO is (alpha + beta |Z|) times PPO's, through the whole language model."""
    agent = make_agent()
    batch = make_minibatch(agent)
    alone = {"vf_coef": 0.0, "reference_nll_coef": 0.0}
    ppo = gradient(agent, make_args(alpha=1.0, beta=0.0, **alone), *batch)
    sppo = gradient(agent, make_args(alpha=0.5, beta=0.4, Z=-1.5, **alone), *batch)
    torch.testing.assert_close(sppo, (0.5 + 0.4 * 1.5) * ppo, atol=1e-6 * ppo.norm().item(), rtol=1e-4)
    assert ppo.norm() > 1e-3
    _, stats = imdb.minibatch_loss(agent, make_args(), 1.0, 1.0, *batch)
    assert 0.1 < stats["losses/clipfrac"] < 0.9


def test_loss_and_its_parts_by_hand():
    agent = make_agent()
    tokens, old_logprobs, old_values, advantages, returns, references = batch = make_minibatch(agent)
    args = make_args(ent_coef=0.03, alpha=0.5, beta=0.4)
    loss, stats = imdb.minibatch_loss(agent, args, 1.0, 1.0, *batch)
    ppo, rppo, value, entropy, n = 0.0, 0.0, 0.0, 0.0, 0
    for i in range(8):
        logprobs, values, whole = (x.detach().double() for x in by_hand(agent, tokens[i]))
        for t in range(len(logprobs)):
            p, old, a = logprobs[t].exp().item(), old_logprobs[i, t].double().exp().item(), advantages[i, t].item()
            r = p / old
            cut = min(max(r, 0.8), 1.2)
            ppo -= min(a * r, a * cut)
            rppo += a * ((1 - p) / old - 1 / old) if a * r <= a * cut else 0  # without the constant, which has no gradient
            v, old_v, target = values[t].item(), old_values[i, t].item(), returns[i, t].item()
            near = old_v + min(max(v - old_v, -0.2), 0.2)
            value += 0.5 * max((v - target) ** 2, (near - target) ** 2)
            entropy -= (whole[t].exp() * whole[t]).sum().item()
            n += 1
    nll = np.mean([-x for i in range(8) for x in by_hand(agent, torch.cat([tokens[i, :7], references[i]]))[0].tolist()])
    for name, expected in (
        ("policy_loss", ppo / n),
        ("reverse_loss", rppo / n),
        ("value_loss", value / n),
        ("entropy", entropy / n),
    ):
        assert stats[f"losses/{name}"].item() == pytest.approx(expected, rel=1e-4), name
    assert stats["losses/reference_nll"].item() == pytest.approx(nll, rel=1e-5)
    expected = 0.5 * ppo / n + 0.4 * rppo / n + 0.5 * value / n - 0.03 * entropy / n + 0.1 * nll
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_first_minibatch_has_ratio_one_and_the_reference_kl_zero():
    agent, args = make_agent(), make_args(temperature=0.7)
    reference = copy.deepcopy(agent)
    assert not agent.training and agent.lm.config.attn_pdrop == 0.5  # dropout would show
    reward = (rlhf_assets.make_classifier(V).eval(), TOKENIZER, 1)
    prompts = make_tokens()[:, :7]
    uniforms = torch.rand(8, 6, dtype=torch.float64)
    batch, clock = imdb.rollout(agent, reference, reward, TOKENIZER, prompts, uniforms, args, Accelerator(cpu=True))
    assert set(clock) == {"time/generate", "time/score", "time/forward"}
    zeros = torch.zeros(4, 6)
    _, stats = imdb.minibatch_loss(
        agent, args, 1.0, 1.0, batch["tokens"][2:6], batch["logprobs"][2:6], zeros, zeros, zeros, make_tokens(4)[:, 7:]
    )
    assert abs(stats["losses/old_approx_kl"]) < 1e-6 and stats["losses/clipfrac"] == 0 and stats["losses/approx_kl"] < 1e-9
    torch.testing.assert_close(batch["logprobs"], batch["ref_logprobs"], atol=1e-6, rtol=0)
    for row in range(8):
        logprobs, values, _ = by_hand(agent, batch["tokens"][row], 0.7)
        torch.testing.assert_close(batch["logprobs"][row, : len(logprobs)].double(), logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch["values"][row, : len(values)], values, atol=1e-5, rtol=1e-5)
        assert (batch["logprobs"][row, len(logprobs) :] == 0).all()
        text = TOKENIZER.decode([t for t in batch["tokens"][row].tolist() if t not in (PAD, EOS)])
        inputs = TOKENIZER(text, return_tensors="pt")
        score = reward[0](**inputs).logits.softmax(-1)[0, 1]
        assert batch["scores"][row].item() == pytest.approx(score.item(), abs=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_an_update_does_not_depend_on_how_its_minibatches_are_cut(parts):
    """Rows of different length in each part; one whole pass against parts, by the weights that come out."""
    weights = []
    for accumulation in (1, parts):
        agent = make_agent()
        tokens, old_logprobs, old_values, advantages, returns, references = make_minibatch(agent)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)  # unlike Adam it shows the gradient's size
        args = make_args(gradient_accumulation=accumulation, update_epochs=2, max_grad_norm=100.0)
        batch = (tokens, old_logprobs, old_values, advantages, returns, references)
        stats = imdb.update(agent, optimizer, Accelerator(cpu=True), args, batch, 0)
        weights.append((torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]), stats))
    (one, stats), (other, other_stats) = weights
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert (one - torch.cat([p.detach().flatten() for p in make_agent().parameters()])).abs().max() > 1e-3
    for name, value in stats.items():
        if "grad_share" not in name:  # of the first part
            assert other_stats[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_shares_of_the_gradient_in_every_tenth_iteration():
    """By hand: each part's own gradient at the first minibatch, its inner product with the sum over the sum's square."""
    shares = {}
    for iteration in (0, 1, 10):
        agent = make_agent()
        batch = make_minibatch(agent)
        args = make_args(update_epochs=1, minibatch_size=8, ent_coef=0.3, max_grad_norm=1e-3)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
        stats = imdb.update(agent, optimizer, Accelerator(cpu=True), args, batch, iteration)
        shares[iteration] = {name: value for name, value in stats.items() if "grad_share" in name}
        assert stats["losses/grad_clipped"] == 1.0 and stats["losses/grad_norm"] > 1e-3
    assert not shares[1] and shares[0] == pytest.approx(shares[10]) and len(shares[0]) == 4

    def grad(**weights):
        only = make_args(**{**dict.fromkeys(("alpha", "beta", "vf_coef", "ent_coef", "reference_nll_coef"), 0.0), **weights})
        loss, _ = imdb.minibatch_loss(agent, only, 1.0, 1.0, *batch)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))]).double()

    parts = [grad(alpha=args.alpha, beta=args.beta), grad(vf_coef=args.vf_coef), grad(ent_coef=0.3)]
    parts.append(grad(reference_nll_coef=args.reference_nll_coef))
    total = sum(parts)
    expected = [(part @ total / (total @ total)).item() for part in parts]
    assert list(shares[0].values()) == pytest.approx(expected, rel=1e-3) and sum(expected) == pytest.approx(1)
    assert stats["losses/grad_norm"] == pytest.approx(total.norm().item(), rel=1e-3)


@pytest.mark.parametrize(
    "parts", [("vf_coef", "ent_coef", "reference_nll_coef", "max_grad_norm"), ("vf_coef", "ent_coef", "max_grad_norm")]
)
def test_the_recipe_divides_the_reference_loss_too(parts):
    """README: SPPO(0.5, 0.4) is PPO with these divided by w = 0.9, eps too; without the reference loss's weight it is not."""
    weights = []
    first = torch.cat([p.detach().flatten() for p in make_agent().parameters()])
    for alpha, beta, w in ((0.5, 0.4, 1.0), (1.0, 0.0, 0.9)):
        agent = make_agent()
        batch = make_minibatch(agent)
        settings = {"vf_coef": 0.5, "ent_coef": 0.03, "reference_nll_coef": 0.1, "max_grad_norm": 0.5}
        settings = {name: value / w if name in parts else value for name, value in settings.items()}
        optimizer = torch.optim.AdamW(agent.parameters(), lr=1e-3, eps=1e-5 / w, weight_decay=0.1)
        args = make_args(alpha=alpha, beta=beta, update_epochs=3, minibatch_size=4, **settings)
        imdb.update(agent, optimizer, Accelerator(cpu=True), args, batch, 0)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]) - first)
    difference = ((weights[0] - weights[1]).norm() / weights[0].norm()).item()
    assert difference < 2e-3 if len(parts) == 4 else difference > 1e-2, difference


# --- LoRA -------------------------------------------------------------------------------------------------------------


def test_lora_trains_adapters_and_head_alone_and_the_reference_is_the_base():
    base, agent = make_agent(), make_agent(lora_r=4)
    trained = [name for name, parameter in agent.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name or "value_head" in name for name in trained)
    tokens = make_tokens()
    assert torch.equal(agent(tokens, 7, 1.0)[0], base(tokens, 7, 1.0)[0])  # B starts at 0
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    changed = agent(tokens, 7, 1.0)[0]
    assert (changed - base(tokens, 7, 1.0)[0]).abs().max() > 0.1
    with agent.lm.disable_adapter():
        assert torch.equal(agent(tokens, 7, 1.0)[0], base(tokens, 7, 1.0)[0])
    agent.lm = agent.lm.merge_and_unload()
    torch.testing.assert_close(agent(tokens, 7, 1.0)[0], changed, atol=1e-4, rtol=1e-4)


# --- texts and scores -------------------------------------------------------------------------------------------------


def test_encode_halves_the_words():
    args = make_args(max_prompt_length=5, response_length=50)
    texts = ["a great film with the worst plot", "film", "", "很好看的电影"]
    prompts, references = imdb.encode(texts, TOKENIZER, args)
    ids = TOKENIZER("a great film").input_ids
    assert prompts[0].tolist() == ([PAD] * 5 + ids)[-5:]
    half = TOKENIZER(" with the worst plot").input_ids
    assert references[0].tolist() == [*half, EOS] + [PAD] * (49 - len(half))
    assert prompts[1].tolist() == [PAD] * 4 + TOKENIZER("fi").input_ids
    assert prompts[2].tolist() == [PAD] * 4 + [EOS]  # nothing: EOS, where texts begin
    assert imdb.decode(torch.cat([prompts, references], 1)[:3], TOKENIZER) == ["great film with the worst plot", "film", " "]
    whole, _ = imdb.encode(texts, TOKENIZER, make_args(max_prompt_length=50))
    assert imdb.decode(whole, TOKENIZER)[3] == "很好看"  # without spaces, half of the characters
    given, _ = imdb.encode(texts, TOKENIZER, make_args(max_prompt_length=50, prompts="file", evaluate="run"))
    assert imdb.decode(given, TOKENIZER) == [texts[0], "film", "", texts[3]]
    long = " ".join(["great"] * 40)
    prompts, references = imdb.encode([long], TOKENIZER, make_args(response_length=3))
    assert prompts[0].tolist() == TOKENIZER(" ".join(["great"] * 20)).input_ids[-7:]
    assert references[0].tolist() == TOKENIZER(" " + " ".join(["great"] * 20)).input_ids[:3]  # cut: no EOS


def test_scores_do_not_depend_on_the_batch():
    model = rlhf_assets.make_classifier(V).eval()
    texts = rlhf_assets.reviews(9)
    whole = imdb.score(texts, model, TOKENIZER, 1, make_args(reward_batch_size=4))
    for text, score in zip(texts, whole.tolist(), strict=True):
        logits = model(**TOKENIZER(text, return_tensors="pt", truncation=True)).logits[0]
        assert score == pytest.approx((logits[1].exp() / logits.exp().sum()).item(), abs=1e-5)
    assert whole.std() > 0.05


def test_of_a_text_that_is_too_long_the_response_is_scored(tmp_path):
    rlhf_assets.write_assets(tmp_path)
    names = {"policy": "policy", "tokenizer": "policy", "reward_model": "reward"}
    paths = {name: str(tmp_path / folder) for name, folder in names.items()}
    *_, (model, tokenizer, label), _ = imdb.load_models(make_args(reward_label="positive", **paths), torch.device("cpu"))
    long = " ".join(rlhf_assets.GOOD * 10)  # more than the 64 positions of the classifier
    scores = imdb.score([f"{long} awful terrible worst", f"{long} wonderful best great"], model, tokenizer, label, make_args())
    assert (scores[0] - scores[1]).abs() > 0.01


def test_judge_equals_scikit_learn():
    texts = rlhf_assets.reviews(60)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    classifier = LogisticRegression().fit(vectorizer.fit_transform(texts), [i % 2 for i in range(60)])
    pairs = zip(vectorizer.get_feature_names_out(), vectorizer.idf_, classifier.coef_[0], strict=True)
    judge = {"intercept": classifier.intercept_[0], "terms": {term: [idf, weight] for term, idf, weight in pairs}}
    new = ["What a GREAT film, great cast", "the worst; awful", "", "words it has never seen", "a b c", "great great great"]
    expected = classifier.predict_proba(vectorizer.transform(new))[:, 1]
    assert [imdb.judge_score(text, judge) for text in new] == pytest.approx(expected.tolist())


def test_perplexity_equals_windows_with_labels():
    """Against the model's own loss with everything but the new tokens masked, in windows of 64 that move by 32."""
    agent, texts = make_agent(), rlhf_assets.reviews(12)
    ids = []
    for text in texts:
        ids += [*TOKENIZER(text).input_ids, EOS]
    assert imdb.perplexity(agent, [5]) == 1.0
    expected = imdb.perplexity(agent, ids[:151])
    ids = torch.tensor(ids[:151])
    total, done = 0.0, 0
    for end in (33, 65, 97, 129, 151):
        window = ids[max(0, end - 64) : end][None]
        labels = torch.where(torch.arange(max(0, end - 64), end) > done, window[0], -100)[None]
        total += agent.lm(window, labels=labels).loss.item() * (labels[0, 1:] != -100).sum().item()
        done = end - 1
    assert expected == pytest.approx(math.exp(total / 150), rel=1e-4)


def test_reviews_are_split_80_to_20_by_the_seed(tmp_path):
    rlhf_assets.write_assets(tmp_path)
    args = make_args(dataset=str(tmp_path / "reviews.jsonl"), eval_episodes=8)
    texts = imdb.load_texts(args)
    assert len(texts["train"]) == 64 and sorted(texts["train"] + texts["test"]) == sorted(rlhf_assets.reviews())
    assert imdb.load_texts(args) == texts
    assert imdb.load_texts(make_args(dataset=args.dataset, eval_episodes=8, seed=2))["train"] != texts["train"]


def test_both_perplexities_of_an_evaluation(tmp_path):
    """Ours has EOS between the reviews; that of the paper's Table 3 two newlines."""
    agent, args = make_agent(lora_r=2), make_args(perplexity_tokens=100, eval_episodes=4)
    reward = (rlhf_assets.make_classifier(V).eval(), TOKENIZER, 1)
    texts = rlhf_assets.reviews(20)
    result, samples = imdb.evaluate(agent, agent, reward, TOKENIZER, texts, args, Accelerator(cpu=True))
    ids = [token for text in texts for token in (*TOKENIZER(text).input_ids, EOS)][:101]
    joined = TOKENIZER("\n\n".join(texts)).input_ids[:101]
    assert result["perplexity"] == imdb.perplexity(agent, ids)
    assert result["perplexity_released"] == imdb.perplexity(agent, joined) != result["perplexity"]
    scores = [row["score"] for row in samples]
    assert len(scores) == 4 and result["score_stderr"] == pytest.approx(np.std(scores, ddof=1) / 2, rel=1e-5)
