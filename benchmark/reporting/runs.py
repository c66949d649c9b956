"""Finished runs as one table, a line a run: from run folders, csv files and W&B; and what must not differ among them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from reporting import arms
from reporting.arms import ARM, FREE, LENGTHS, called, differences, fail, label, name_of, settings

EVALUATION = {"sppo_rlhf_imdb.py": "eval/", "sppo_rlhf_tldr.py": "test/"}  # the last one is of the trained policy


def flatten(result: dict) -> dict:
    """A result.json as a line of W&B's table of runs: arguments by their own names, versions as versions.NAME.

    An argument that our script did not have when it made the run has its default, which is what the script did then.
    """
    row = {key: value for key, value in result.items() if isinstance(value, str | int | float)}
    for key, value in (arms.defaults(result["script"]) | result["args"]).items():
        if key != "env_id":
            row[key] = value if value is None or isinstance(value, str | int | float) else json.dumps(value)
    row["returns"] = " ".join(f"{value:.6g}" for value in result.get("returns") or [])
    for when in ("before", "after", "versions"):  # before, after: what RLHF scripts measure beside the score
        row |= {f"{when}.{name}": value for name, value in (result.get(when) or {}).items()}
    return row


def grid_of(folder: Path) -> dict:
    """What run.py wrote of the grid above this run's folder: grid.script and grid.baseline; {} if there is none."""
    for path in [parent / "grid.json" for parent in list(folder.resolve().parents)[:4]]:
        if path.exists():
            return {f"grid.{key}": value for key, value in json.loads(path.read_text()).items() if value}
    return {}


def read_folder(source: Path, left_out: Counter) -> pd.DataFrame:
    """The finished runs below a folder, one line a run; counts the others in `left_out`."""
    rows = []
    for folder in sorted({path.parent for name in ("args.json", "result.json") for path in source.rglob(name)}):
        finished = (folder / "result.json").exists()
        path = folder / ("result.json" if finished else "args.json")
        try:
            row = flatten(json.loads(path.read_text()))
            arm = called(row, label(row))
            if finished:
                about = {name: row[name] for name in ("run_id", "env_id", "seed")}
                rows.append({**row, **about, "Name": folder.name, "folder": str(folder), **grid_of(folder)})
            else:
                left_out["not finished", arm] += 1
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            fail(f"{path}: expected a {path.name} of one of the scripts ({error!r:.80})")
    return pd.DataFrame(rows)


def read_csv(source: Path) -> pd.DataFrame:
    """runs.csv of a report."""
    try:
        texts = dict.fromkeys(("run_id", "exp_name", "grid.script", "grid.baseline"), str)  # an arm may be called 10
        table = pd.read_csv(source, float_precision="round_trip", dtype=texts)
        return table.dropna(subset=["script", "run_id", "env_id", "seed", "score"])
    except (OSError, ValueError, KeyError) as error:
        fail(f"{source}: expected a folder with finished runs, or runs.csv of a report ({str(error).splitlines()[0]})")


def read_wandb(project: str, left_out: Counter) -> pd.DataFrame:
    """The finished runs of a W&B project, one line each; counts the others of these scripts in `left_out`."""
    import wandb

    rows = []
    try:
        for run in wandb.Api().runs(project, lazy=False):
            if not {"script", "env_id", "seed"} <= run.config.keys():  # another program's
                continue
            last, prefix = run.summary_metrics, EVALUATION.get(run.config["script"], "none")
            args = {name: value for name, value in run.config.items() if name not in ("earlier", "versions")}
            measured = {name.removeprefix(prefix): value for name, value in last.items() if name.startswith(prefix)}
            scores = {name: last[name] for name in arms.RECORD & last.keys()}
            row = flatten(scores | run.config | {"args": args, "after": measured})
            rollout = args.get("num_envs", 1) * args.get("num_steps", 1)  # runs end with a whole one
            length = args.get("total_timesteps", args.get("iterations", 0) * args.get("trajectories_per_update", 0))
            if run.state == "finished" and last.get("global_step", 0) + rollout > length:
                rows.append({**row, "run_id": run.id, "env_id": args["env_id"], "Name": run.name, "wandb": run})
            else:
                left_out["not finished", called(row, label(row))] += 1
    except (ValueError, wandb.Error) as error:
        fail(f"--wandb {project}: expected ENTITY/PROJECT that your login may read ({str(error).splitlines()[0]})")
    return pd.DataFrame(rows)


def load_runs(sources: tuple[Path, ...], wandb: str | None = None) -> pd.DataFrame:
    """One line a run; those of local folders have their folder in the column `folder`, those of W&B its Run in `wandb`.

    Of a run that is there twice the line with a folder counts, else the one that has got further. Columns made here: `script`
    is the grid's, under which runs are compared (`run_script`: the one that ran), `method` what the settings make of a run,
    `arm` what it is called, `paper` the paper's name for it. attrs: lines of text on what is left out.
    """
    left_out = Counter()
    tables = [read_folder(source, left_out) if source.is_dir() else read_csv(source) for source in sorted(sources)]
    runs = pd.concat([*tables, read_wandb(wandb, left_out)] if wandb else tables, ignore_index=True)
    if not len(runs) or pd.to_numeric(runs.score, errors="coerce").isna().all():
        got = " ".join(map(str, [*sources, wandb or ""]))
        fail(f"{got}: no finished run with a score there; expected some result.json below (or name a runs.csv itself)")
    for name in ("seed", "alpha", "beta", "Z", "score", "global_step", "seconds"):
        runs[name] = pd.to_numeric(runs[name], errors="coerce") if name in runs else np.nan
    runs = runs.assign(scored=np.isfinite(runs.score), local=runs.folder.notna() if "folder" in runs else False)
    runs = runs.sort_values(["local", "scored", "global_step"], ascending=False, kind="stable")
    runs = runs.drop_duplicates("run_id").sort_index(ignore_index=True)
    runs = runs.assign(noise=runs.noise.fillna("none") if "noise" in runs else "none", Z=runs.Z.fillna(-1.0))
    left_out.update(("without a score", called(run, label(run))) for run in runs[~runs.scored].to_dict("records"))
    runs = name_arms(runs[runs.scored].drop(columns=["scored", "local"]).reset_index(drop=True))
    runs["steps"] = pd.to_numeric(runs.reindex(columns=LENGTHS).bfill(axis=1).iloc[:, 0])
    runs.attrs["left out"] = [f"{why}: {arm} ({count})" for (why, arm), count in sorted(left_out.items())]
    return runs


def name_arms(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds env, method, paper, given (the arm's name) and arm: the name with the weight in which its runs of a row differ."""
    rows = runs.to_dict("records")
    runs = runs.assign(method=[label(run) for run in rows], run_script=runs.script, env=runs.env_id.str.removeprefix("ALE/"))
    runs = runs.assign(paper=[arms.paper_name(run) for run in rows], given=[name_of(run) for run in rows])
    new = sorted(settings(runs) - {name for script in arms.FAMILIES for name in arms.defaults(script)})
    runs.loc[runs[new].notna().any(axis=1), "paper"] = None  # an argument that somebody gave one of our scripts
    for i in [i for i in runs.index if runs.method[i].startswith("control ") and not arms.is_control(runs, runs.loc[i])]:
        runs.loc[i, "method"] = f"{runs.method[i].removeprefix('control ')} α {runs.alpha[i]:g}"
    runs["arm"] = [called(run, run["method"]) for run in runs.to_dict("records")]
    if "grid.script" in runs:
        runs["script"] = runs["grid.script"].fillna(runs.script)
    # one beta (of controls: one alpha) an arm and row is the arm itself; if any row has several, they are told apart in all
    for name, sign in (("beta", "β"), ("alpha", "α")):
        several = runs.groupby(["script", "env", "noise", "arm"])[name].transform("nunique") > 1
        several = several.groupby([runs.script, runs.arm]).transform("any")
        runs.loc[several, "arm"] += runs[several][name].map((f" {sign} " + "{:g}").format)
    return runs


def find_mixture(runs: pd.DataFrame) -> list[str]:
    """What differs among runs that a table would compare: versions anywhere, lengths within a row, settings within an arm.

    Arms without a name must be alike in all but what makes an arm; those of a grid differ in what its author wrote.
    """
    found = []
    for (script, env, noise), row in runs.groupby(["script", "env", "noise"]):
        where = f"{env}, noise {noise}"
        steps = sorted(row.steps.dropna().unique())
        found += [f"{where}: lengths {', '.join(f'{step:,.0f}' for step in steps)}"] if len(steps) > 1 else []
        counts = row.groupby(["arm", "seed"]).size()
        found += [f"{where}, {script}: {n} runs of {arm} with seed {seed}" for (arm, seed), n in counts[counts > 1].items()]
        names = settings(runs) - {*ARM, *FREE} - ({"noise_prob", "noise_std"} if noise == "none" else set())
        unnamed = differences(row[row.given.isna()], names)
        found += [f"{where}, {script}: {name} {', '.join(values)}" for name, values in unnamed.items()]
        for arm, same in row.groupby("arm"):
            of_arm = differences(same, names - set(unnamed) | set(ARM))
            found += [f"{where}, {script}, {arm}: {name} {', '.join(values)}" for name, values in of_arm.items()]
    for script, same in runs.groupby("run_script"):
        versions = {name for name in runs.columns if name.startswith("versions.")}
        found += [f"{script}: {name} {', '.join(values)}" for name, values in differences(same, versions).items()]
    return found
