"""The straightforward loop that sppo_rlhf_imdb.py is measured against: same script, arguments and losses, but

* text comes from transformers' own `generate`, without the KV cache;
* logits are computed for every position of prompt and response, and a softmax of them for the reverse loss beside the
  log-softmax for the ratio, [B, T, V] each;
* AdamW is torch's default one.

    python benchmark/studies/rlhf_peer.py --offline --iterations 2 --eval-episodes 0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
try:
    import torch

    import sppo_rlhf_imdb as imdb
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    print(
        f"{Path(__file__).name}: error: needs {error.name}; expected what `pip install -r requirements.txt` installs",
        file=sys.stderr,
    )
    sys.exit(2)


@torch.no_grad()
def generate(agent, prompts, uniforms, ends, args):
    """Continuations, PAD behind EOS; transformers draws its own random numbers."""
    real = prompts != imdb.PAD
    tokens = agent.lm.generate(
        input_ids=prompts.clamp(min=0), attention_mask=real.long(), do_sample=True, use_cache=False,
        temperature=args.temperature, top_k=args.top_k or agent.lm.config.vocab_size, top_p=1.0,
        max_new_tokens=args.response_length, min_new_tokens=args.min_response_length, eos_token_id=ends, pad_token_id=ends[0],
    )  # fmt: skip
    responses = torch.full_like(uniforms, imdb.PAD, dtype=torch.int64)
    responses[:, : tokens.shape[1] - prompts.shape[1]] = tokens[:, prompts.shape[1] :]
    ended = torch.isin(responses, torch.tensor(ends)).long()
    behind = ended.cumsum(-1) - ended > 0
    return responses.masked_fill(behind, imdb.PAD)


def forward(agent, tokens, prompt_length, temperature, with_entropy=False):
    """As Agent.forward; leaves the probability of all other tokens, which `symmetric_ppo_loss` takes up, behind."""
    real = tokens != imdb.PAD
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    out = agent.lm(tokens.clamp(min=0), attention_mask=real.long(), position_ids=positions, output_hidden_states=True)
    logits, hidden = out.logits[:, :-1] / temperature, out.hidden_states[-1][:, :-1]
    chosen = tokens[:, 1:].clamp(min=0).unsqueeze(-1)
    kept = real[:, prompt_length:]
    logprobs = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)[:, prompt_length - 1 :][kept]
    values = agent.value_head(hidden).squeeze(-1)[:, prompt_length - 1 :][kept]
    forward.others = 1 - logits.softmax(-1).gather(-1, chosen).squeeze(-1)[:, prompt_length - 1 :][kept]
    return logprobs, values, None


def symmetric_ppo_loss(logprobs, old_logprobs, advantages, clip_coef, Z, literal_signs):
    """Eq. 3 and 8, with the sum over the other tokens from the second softmax."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    kept = advantages * ratio <= clipped
    policy_loss = -torch.minimum(advantages * ratio, clipped).mean()
    reverse_loss = (-advantages * Z * forward.others / old_logprobs.exp() * kept).mean()
    return policy_loss, reverse_loss, {"approx_kl": (ratio - 1 - ratio.log()).mean().detach()}


if __name__ == "__main__":
    imdb.generate, imdb.symmetric_ppo_loss = generate, symmetric_ppo_loss
    imdb.Agent.forward = forward
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda parameters, fused, **settings: adamw(parameters, **settings)
    imdb.main(imdb.parse_args())
