"""What sppo_rlhf_tldr.py needs at GPT-J's size: a model of its memory and time, checked against small models that are measured.

    python benchmark/studies/scale_tldr.py                   # 1 and 2 layers of GPT-J's width on this CPU, minutes; 8 GB
    python benchmark/studies/scale_tldr.py --predict-only    # the table for a GPU alone
    python benchmark/studies/scale_tldr.py --device cuda --layers 28 --dtype bfloat16 --trajectories 64 --minibatch-size 16 \\
        --accumulation 4 --epochs 4 --prompt 500 --response 50

The model counts parameters (on torch's meta device, so nothing is downloaded or allocated), bytes, and operations: a pass of N
parameters over a token is 2 N operations, its backward pass through a frozen base 2 N more (no gradients of weights), and
checkpointing computes the forward pass again; generation reads all weights, keys and values once a token. Phases are those of
the script's `time/...`. Measured times are shown beside what the model predicts at the rates of this machine's matrix products,
many rows and few; the measured peak of tensors beyond the base beside the predicted one. A process holds more than its tensors:
what the allocator keeps, libraries' buffers. Nothing else should run. Writes benchmark/results/scale-tldr/, on a GPU
scale-tldr-gpu/.
"""

import itertools
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
try:
    import numpy as np
    import torch
    import transformers
    import tyro
    from accelerate import Accelerator
    from peft import LoraConfig

    import sppo_rlhf_tldr as tldr
    from benchmark.studies.git_commit import git_commit
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    print(
        f"{Path(__file__).name}: error: needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs",
        file=sys.stderr,
    )
    sys.exit(2)

PHASES = ("generate", "score", "forward", "update")
GIB = 2**30


@dataclass
class Args:
    layers: tuple[int, ...] = (1, 2)
    """numbers of layers to measure, each in a process of its own"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to measure"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the base's weights"""
    trajectories: int = 4
    """trajectories of an update"""
    minibatch_size: int = 4
    """trajectories of a minibatch"""
    accumulation: int = 1
    """parts of a minibatch"""
    epochs: int = 1
    """passes over the trajectories"""
    prompt: int = 250
    """tokens of a prompt"""
    response: int = 25
    """tokens of a summary"""
    checkpointing: bool = True
    """as the script does where memory is short; without, an update's prompts pass once for response and reference"""
    predict_only: bool = False
    """measure nothing"""
    child: bool = False
    """measure one number of layers in this process, and print it as JSON; what the others call"""


def gptj(layers: int) -> transformers.GPTJConfig:
    """GPT-J 6B's configuration, transformers' default one, with so many layers and no dropout."""
    return transformers.GPTJConfig(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def settings(args: Args) -> tldr.Args:
    """The script's arguments for a measurement: the paper's but for the sizes."""
    return tldr.Args(
        trajectories_per_update=args.trajectories,
        minibatch_size=args.minibatch_size,
        gradient_accumulation=args.accumulation,
        update_epochs=args.epochs,
        max_prompt_length=args.prompt,
        response_length=args.response,
        min_response_length=args.response,
        dtype=args.dtype,
        gradient_checkpointing=args.checkpointing,
        reward_max_length=args.prompt + args.response,
        reward_text="{text}",
    )


def count(layers: int, lora_r: int) -> dict[str, int]:
    """Parameters of the layers and final norm (body), of one vocabulary matrix (embedding, and as many in the head), of an
    adapter."""
    with torch.device("meta"):
        lm = transformers.GPTJForCausalLM(gptj(layers))
        whole, head = sum(p.numel() for p in lm.parameters()), sum(p.numel() for p in lm.lm_head.parameters())
        embedding = lm.transformer.wte.weight.numel()
        agent = tldr.Agent(lm)
        agent.add("policy", LoraConfig(r=lora_r), head=False)
        adapter = sum(p.numel() for p in tldr.trained_parameters(agent).values())
    return {"body": whole - head - embedding, "embedding": embedding, "head": head, "adapter": adapter}


def predict(layers: int, args: tldr.Args, own_reward_base: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes by what they hold; by phase, operations of one update of the script on one device.

    What autograd keeps of a layer, a row of length T: its input before and after the norm, q and k (in float32, as GPT-J
    multiplies them), v, d each; four tensors of 4 d within the feed-forward's activation; the weights of all heads, T x T, in
    float32. The first layer keeps little: nothing before its adapters is trained. The activation's derivative holds three more
    of 4 d, and three of d are the gradients on their way; with checkpointing there are no logits any more by then.

    In generation prompts pass a layer whole: in its activation four tensors of 4 d and four of d, a mask and the weights of the
    heads of two layers are there at once; or, in attention, the heads' scores twice in float32.
    """
    config, n = gptj(layers), count(layers, args.lora_r)
    width = {"float32": 4, "bfloat16": 2}[args.dtype]
    length, d, heads = args.max_prompt_length + args.response_length, config.n_embd, config.n_head
    rows = args.minibatch_size // args.gradient_accumulation  # of a part
    copies = 1 + bool(args.reference_nll_coef)  # of a prompt in the policy's pass, with the response and with the reference
    vectors, weights = copies * length, copies * length**2
    if not args.gradient_checkpointing:  # the prompt passes once
        vectors = args.max_prompt_length + copies * args.response_length
        weights = args.max_prompt_length**2 + copies * args.response_length * length
    # in 4 bits, 64 weights of the layers share a float32 scale; embedding and head stay as they are
    base = n["body"] * ((0.5 + 4 / 64) if args.load_in_4bit else width) + (n["embedding"] + n["head"]) * width
    layer = rows * (vectors * ((3 + 16) * d * width + 2 * d * 4) + heads * weights * 4)
    kept = layers * rows * vectors * d * width + layer if args.gradient_checkpointing else max(1, layers - 1) * layer
    logits = 3 * copies * rows * args.response_length * config.vocab_size * 4
    prompts = args.trajectories_per_update * args.max_prompt_length
    activation = (20 * d + (min(layers, 2) * heads + 1) * args.max_prompt_length) * width
    attention = 5 * d * width + 2 * heads * args.max_prompt_length * 4
    memory = {
        "base": base,
        "base of the reward model": base if own_reward_base else 0,
        "head in float32": 0 if width == 4 else n["head"] * 4,
        "adapters, gradients, AdamW": (2 * n["adapter"] + d) * 16 + n["adapter"] * 4,
        "generation: keys and values": 2 * layers * args.trajectories_per_update * length * d * width,
        "generation: prompts in a layer": prompts * max(activation, attention),
        "update: layers": kept,
        "update: gradients or logits": max(rows * vectors * 15 * d * width, logits - layer * args.gradient_checkpointing),
    }
    tokens = args.trajectories_per_update * length
    a_pass = tokens * (2 * n["body"] + 4 * layers * d * length)
    logits = args.trajectories_per_update * args.response_length * 2 * n["head"]
    passes = 3 if args.gradient_checkpointing else 2  # forward, backward, forward again
    operations = {
        "generate": a_pass + logits,
        "score": a_pass,
        "forward": 3 * a_pass + 2 * logits,
        "update": args.update_epochs * ((1 + vectors / length) * a_pass * passes + copies * logits * 2),
    }
    return memory, operations


def times(layers: int, args: tldr.Args, rate: float, stream: float) -> dict[str, float]:
    """Seconds by phase at so many operations a second, and bytes a second where each token waits for all weights."""
    memory, operations = predict(layers, args, own_reward_base=False)
    n, width = count(layers, args.lora_r), {"float32": 4, "bfloat16": 2}[args.dtype]
    read = (n["body"] + n["head"]) * width + memory["generation: keys and values"]
    seconds = {phase: operations[phase] / rate for phase in PHASES}
    return {**seconds, "generate": seconds["generate"] + args.response_length * read / stream}


def activations(memory: dict[str, float]) -> float:
    """Bytes beyond what lasts at the worst moment, in generation or in the update."""
    return max(sum(size for name, size in memory.items() if name.startswith(phase)) for phase in ("generation", "update"))


def lasting(memory: dict[str, float]) -> float:
    """Bytes that are there all the time: weights, gradients, AdamW."""
    return sum(size for name, size in memory.items() if not name.startswith(("generation", "update")))


class Numbers:
    """Stands for a tokenizer: a text is its token ids in decimals."""

    eos_token_id, added_tokens_decoder = 50256, {}

    def __call__(self, texts: list[str], add_special_tokens: bool = False):
        return transformers.BatchEncoding({"input_ids": [[int(word) for word in text.split()] for text in texts]})

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def peak_of_tensors(function, device: torch.device) -> int:
    """The most bytes of tensors at once beyond those that there were before, while function() runs (slower, on a CPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # freed ones are negative
    return max(itertools.accumulate(sizes, initial=0))


def measure(args: Args) -> dict:
    """One rollout and one update, after one of each for warm-up, with random weights and the reward on the same base; then once
    more for the peak of memory, which counts adapters, their gradients and AdamW's state as what was there before."""
    device = torch.device(args.device)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with device:
        lm = transformers.GPTJForCausalLM(gptj(args.layers[0])).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    agent, size = tldr.Agent(lm), settings(args)
    for name in ("policy", "value", "reward"):
        config = LoraConfig(r=size.lora_r, lora_alpha=size.lora_alpha, lora_dropout=size.lora_dropout)
        agent.add(name, config, head=name != "policy")
    if args.checkpointing:
        agent.lm.activation_checkpointing_enable({"use_reentrant": False})
    agent.shares_prompts = not args.checkpointing
    agent.to(device).eval()
    optimizer = torch.optim.AdamW(tldr.trained_parameters(agent).values(), lr=size.learning_rate, fused=True)
    accelerator, rng = Accelerator(cpu=args.device == "cpu"), np.random.default_rng(0)
    prompts = torch.from_numpy(rng.integers(100, 50_000, (args.trajectories, args.prompt)))
    uniforms = torch.from_numpy(rng.random((args.trajectories, args.response)))
    clock = {}

    def iteration() -> None:
        batch, seconds = tldr.rollout(agent, agent, Numbers(), prompts, uniforms, size, accelerator)
        advantages, returns = tldr.advantages_and_returns(batch, size)
        references = prompts[:, : args.response].to(device)
        batch |= {"advantages": advantages, "returns": returns, "references": references}
        begin = time.perf_counter()
        tldr.update(agent, optimizer, accelerator, size, batch, 0)
        clock.update(seconds, **{"time/update": time.perf_counter() - begin})

    iteration()
    iteration()
    seconds = {name: clock[f"time/{name}"] for name in PHASES}
    return {"seconds": seconds, "bytes": peak_of_tensors(iteration, device)}


def matmul_seconds(rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of a product of GPT-J's kind: so many tokens, 4,096 to 16,384; the best of five."""
    x, weight = torch.randn(rows, 4096, dtype=dtype, device=device), torch.randn(16_384, 4096, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        y = x @ weight.T
        y.flatten()[0].item()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def main(args: Args) -> None:
    if args.child:
        print(json.dumps(measure(args)))
        return
    lines, content = [], {"settings": asdict(args), "measured": []}
    if not args.predict_only:
        device = torch.device(args.device)
        content["commit"] = git_commit()
        content["versions"] = {"python": platform.python_version(), **{name: version(name) for name in tldr.PACKAGES}}
        dtype = getattr(torch, args.dtype)
        content["operations a second"] = rate = 2 * 512 * 4096 * 16_384 / matmul_seconds(512, device, dtype)
        weights = 4096 * 16_384 * dtype.itemsize
        content["bytes a second"] = stream = weights / matmul_seconds(args.trajectories, device, dtype)
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        lines += [
            f"{name}: {rate / 1e9:.0f} GFLOP/s in {args.dtype} products of 512 rows, {stream / 1e9:.1f} GB/s of weights in "
            f"products of {args.trajectories}; {args.trajectories} x ({args.prompt} + {args.response}) tokens, "
            f"minibatch {args.minibatch_size}, {args.epochs} epoch(s). Measured (predicted):",
            "",
            "| layers | " + " | ".join(PHASES) + " | whole | peak of tensors beyond base and adapters |",
            "|---" * (len(PHASES) + 3) + "|",
        ]
        for layers in args.layers:
            command = [sys.executable, __file__, "--child", "--layers", str(layers)]
            for name, value in asdict(args).items():
                if name == "checkpointing":
                    command += ["--checkpointing" if value else "--no-checkpointing"]
                elif name not in ("layers", "child", "predict_only"):
                    command += [f"--{name.replace('_', '-')}", str(value)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            memory, _ = predict(layers, settings(args), own_reward_base=False)
            predicted = times(layers, settings(args), rate, stream)
            cells = [f"{found['seconds'][phase]:.2f} s ({predicted[phase]:.2f})" for phase in PHASES]
            wholes = sum(found["seconds"].values()), sum(predicted.values())
            sizes = found["bytes"] / GIB, activations(memory) / GIB
            lines.append(
                f"| {layers} | {' | '.join(cells)} | {wholes[0]:.2f} s ({wholes[1]:.2f}) | "
                f"{sizes[0]:.2f} GiB ({sizes[1]:.2f}) |"
            )
            content["measured"].append({"layers": layers, **found, "predicted": predicted, "predicted bytes": memory})
            print(lines[-1], flush=True)
    _, operations = predict(28, tldr.Args(), own_reward_base=False)
    shares = ", ".join(f"{name} {value / 1e15:.1f}" for name, value in operations.items())
    lines += [
        "",
        "Predicted, not measured: GPT-J 6B (28 layers), the paper's settings, one GPU, an update of 64 x (500 + 50) tokens: "
        f"{sum(operations.values()) / 1e15:.1f} x 10^15 operations ({shares}), in bfloat16 "
        f"{sum(times(28, tldr.Args(), 1e14, 1e12).values()):.0f} s at 100 TFLOP/s and 1 TB/s, and these bytes:",
        "",
        "| base | weights | + generation | + update | peak |",
        "|---|---|---|---|---|",
    ]
    for label, own, paper in (
        ("bfloat16, one for policy and reward", False, tldr.Args()),
        ("bfloat16, one each", True, tldr.Args()),
        ("4 bits, one each (the paper)", True, tldr.Args(load_in_4bit=True)),
        ("float32, one for policy and reward", False, tldr.Args(dtype="float32")),
    ):
        memory, _ = predict(28, paper, own)
        parts = [sum(size for name, size in memory.items() if name.startswith(kind)) for kind in ("generation", "update")]
        sizes = (lasting(memory), *parts, lasting(memory) + activations(memory))
        lines.append(f"| {label} | {' | '.join(f'{size / GIB:.1f} GiB' for size in sizes)} |")
    print("\n".join(lines))
    if not args.predict_only:
        folder = Path(__file__).parents[1] / f"results/scale-tldr{'-gpu' if args.device == 'cuda' else ''}"
        folder.mkdir(exist_ok=True)
        (folder / "report.md").write_text("\n".join(lines) + "\n")
        (folder / "measured.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
