"""How far PPO's first update ends from SPPO's when only some of the four settings are divided by w = alpha + beta (fact 5).

    python benchmark/studies/four_settings.py --env-id Alien

One rollout of a game with noisy rewards, then one update (four epochs of four minibatches) from the same first weights, in the
same order of the minibatches, by SPPO and by PPO with the settings named. The number is the norm of the difference between
the two movements of all weights, over the norm of SPPO's; mean and range over the seeds.
"""

import contextlib
import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
try:
    import torch
    import tyro

    import sppo_atari
    from benchmark.studies.git_commit import git_commit
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    print(
        f"{Path(__file__).name}: error: needs {error.name}; expected what `pip install -r benchmark/requirements.txt` installs",
        file=sys.stderr,
    )
    sys.exit(2)

FOUR = ("vf_coef", "ent_coef", "max_grad_norm", "adam_eps")
W = 10.5  # alpha 0.5, beta 10


@dataclass
class Args:
    env_id: str = "Alien"
    """the game"""
    seeds: int = 3
    """seeds 1 to this one"""


class FirstUpdateError(Exception):
    """Ends the training where its first update begins."""


def first_rollout(args: sppo_atari.Args) -> tuple[sppo_atari.Agent, torch.Tensor, tuple]:
    """The agent, the clip range and the batch that the run's first `update` gets."""
    run = SimpleNamespace(checkpoint=None, device=torch.device("cpu"), signals=[], global_step=0)
    update = sppo_atari.update

    def stop(agent, optimizer, loss_fn, args, clip_coef, batch):
        raise FirstUpdateError(agent, clip_coef, batch)

    sppo_atari.update = stop
    with contextlib.ExitStack() as run.cleanup:
        try:
            sppo_atari.train(args, run)
        except FirstUpdateError as stopped:
            return stopped.args
        finally:
            sppo_atari.update = update


def differences(args: sppo_atari.Args) -> dict[str, float]:
    """By what is divided: the difference from SPPO's movement, as a share of it."""
    first, clip_coef, batch = first_rollout(args)

    def movement(args, order=0):
        agent = copy.deepcopy(first)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
        torch.manual_seed(order)
        sppo_atari.update(agent, optimizer, sppo_atari.gradient_step, args, clip_coef, batch)
        moved = [(new - old).flatten() for new, old in zip(agent.parameters(), first.parameters(), strict=True)]
        return torch.cat(moved).detach().double()

    sppo = movement(args)

    def difference(names, order=0):
        divided = {name: getattr(args, name) / W for name in names}
        return ((movement(replace(args, alpha=1.0, beta=0.0, **divided), order) - sppo).norm() / sppo.norm()).item()

    return {
        "all four": difference(FOUR),
        **{f"all but `{left_out}`": difference([name for name in FOUR if name != left_out]) for left_out in FOUR},
        "`vf_coef` and `ent_coef`": difference(FOUR[:2]),
        "`max_grad_norm` and `adam_eps`": difference(FOUR[2:]),
        "none: PPO": difference(()),
        "all four, with another order of the minibatches": difference(FOUR, order=1),
    }


def main(own: Args) -> None:
    found = []
    for seed in range(1, own.seeds + 1):
        args = sppo_atari.Args(
            env_id=own.env_id, alpha=0.5, beta=10.0, noise="bsc", seed=seed, num_threads=torch.get_num_threads()
        )
        found.append(differences(args))
    commit = git_commit()
    what = f"{own.env_id}, noise bsc, α 0.5, β 10; first update; {own.seeds} seeds"
    print(f"{what}; torch {torch.__version__}; {torch.get_num_threads()} threads; commit {commit}\n")
    print("| divided by w | difference from SPPO / its movement |\n|---|---|")
    for name in found[0]:
        values = [each[name] for each in found]
        print(f"| {name} | {sum(values) / len(values):.2g} ({min(values):.2g} to {max(values):.2g}) |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
