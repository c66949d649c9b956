"""Saves a view of a Weights & Biases project: a line an arm, coloured as in report.py's pictures, and the curves that matter.

    python benchmark/dashboard.py ENTITY/PROJECT             # prints the address of the view
    python benchmark/dashboard.py ENTITY/PROJECT --dry-run   # prints its panels and asks nobody

Runs are grouped by env_id and exp_name: each line is the mean of an arm's seeds, its band their standard error. What the names
mean is in docs/metrics.md. Colours are given to the arms that the project has: run it again when new arms are there. Each call
saves a new view.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

INSTALL = "pip install -r benchmark/requirements.txt"
try:
    import pandas as pd
    import tyro
    import wandb
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from reporting.arms import FAMILIES, defaults, label
    from reporting.figures import styles
except ModuleNotFoundError as error:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    print(f"{Path(__file__).name}: error: needs {error.name}; expected what `{INSTALL}` installs", file=sys.stderr)
    sys.exit(2)

X = "global_step"  # environment steps; RLHF: episodes
SECTIONS = {  # section -> (title of a panel, what it shows)
    "Returns": {
        "return over 100 games": "charts/episodic_return_100",
        "score": "eval/episodic_return",
        "length of a game": "charts/episodic_length",
    },
    "Is the update healthy?": {
        "KL of the new from the old policy": "losses/approx_kl",
        "share of clipped samples": "losses/clipfrac",
        "explained variance": "losses/explained_variance",
        "entropy": "losses/entropy",
        "value loss": "losses/value_loss",
    },
    "What the gradient is made of": {
        "policy's share": "losses/grad_share_policy",
        "value's share": "losses/grad_share_value",
        "entropy's share": "losses/grad_share_entropy",
        "norm before the clip": "losses/grad_norm",
        "share of steps that the clip cuts": "losses/grad_clipped",
    },
    "Signs and noise (Figure 2)": {
        "advantages whose sign normalisation changes": "charts/adv_sign_change",
        "flipped rewards (bsc)": "charts/noise_rate",
        "standard deviation of the noise (gaussian)": "charts/noise_std",
    },
    "Videos": {"evaluations": "videos/eval"},
    "Scores and KL (RLHF)": {
        "score in training": "objective/scores",
        "KL to the reference": "objective/kl",
        "score less KL": "objective/rlhf_reward",
        "score on validation texts": "eval/score",
        "score on test posts": "test/score",
    },
    "Length and language (RLHF)": {
        "length in tokens": "objective/response_length",
        "share of empty texts": "objective/empty_share",
        "perplexity of the references": "eval/perplexity",
    },
}


@dataclass
class Args:
    project: tyro.conf.Positional[str]
    """ENTITY/PROJECT in W&B"""
    name: str = "Symmetric RL"
    """name of the view"""
    dry_run: bool = False
    """print the panels and ask nobody"""


def panel(title: str, metric: str):
    if metric.startswith("videos/"):
        return wr.MediaBrowser(title=title, media_keys=[metric])
    return wr.LinePlot(title=title, x=X, y=[metric], groupby_aggfunc="mean", groupby_rangefunc="stderr")


def colours(configs: list[dict]) -> dict:
    """(env_id, exp_name) -> the colour of report.py's pictures, of all arms in these runs' configurations."""
    runs = []
    for config in configs:
        if config.get("script") and config.get("env_id") and config.get("exp_name"):
            method = label(defaults(config["script"]) | config)
            names = {"script": config["script"], "env_id": config["env_id"]}
            runs.append({**names, "arm": config["exp_name"], "method": method if config["script"] in FAMILIES else "mine"})
    found = {}
    for _, same in pd.DataFrame(runs).drop_duplicates().groupby("script") if runs else ():
        style = styles(same.drop_duplicates("arm"))
        found |= {ws.GroupPath(run.env_id, run.arm): style[run.arm]["color"] for run in same.itertuples()}
    return found


def main(args: Args) -> None:
    entity, _, project = args.project.partition("/")
    if not project or "/" in project:
        print(f"dashboard.py: error: {args.project}: expected ENTITY/PROJECT", file=sys.stderr)
        sys.exit(2)
    if args.dry_run:
        for section, panels in SECTIONS.items():
            print(section, *(f"  {title}: {metric}" for title, metric in panels.items()), sep="\n")
        return
    configs = [run.config for run in wandb.Api().runs(args.project, lazy=False)]
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=args.name,
        sections=[
            ws.Section(name=section, panels=[panel(*each) for each in panels.items()], is_open=section == "Returns")
            for section, panels in SECTIONS.items()
        ],
        settings=ws.WorkspaceSettings(x_axis=X, max_runs=30),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config("env_id"), ws.Config("exp_name")], group_colors=colours(configs)),
    )
    workspace.save()
    print(workspace.url)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
