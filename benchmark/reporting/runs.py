"""Finished runs as one table, a line a run: from run folders, csv files and W&B; and what must not differ among them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from reporting import arms
from reporting.arms import ARM, FREE, LENGTHS, differences, fail, label, name_of, settings


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
            arm = name_of(row) or label(row)
            if finished:
                about = {name: row[name] for name in ("run_id", "env_id", "seed")}
                rows.append({**row, **about, "Name": folder.name, "folder": str(folder), **grid_of(folder)})
            else:
                left_out["not finished", arm] += 1
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            fail(f"{path}: expected a {path.name} of one of the scripts ({error!r:.80})")
    return pd.DataFrame(rows)


def read_csv(source: Path, left_out: Counter) -> tuple[pd.DataFrame, list[str]]:
    """The finished runs of a table, as this script writes it or W&B exports it, and the names of the settings that it lacks.

    Refuses a table whose arms cannot be told apart."""
    try:
        texts = dict.fromkeys(("run_id", "ID", "exp_name", "grid.script", "grid.baseline"), str)  # an arm may be called 10
        table = pd.read_csv(source, float_precision="round_trip", dtype=texts)
    except (OSError, ValueError) as error:
        fail(f"{source}: expected a folder with finished runs, or a csv with a line a run ({str(error).splitlines()[0]})")
    own = table["ID"] if "ID" in table else pd.Series([f"{source}:{i}" for i in table.index], dtype=str)
    table["run_id"] = table["run_id"].fillna(own) if "run_id" in table else own
    scripts = dict(list(table.groupby("script"))) if "script" in table else {}
    missing = {"script", "env_id", "seed", "score", *(() if scripts else ("alpha", "beta"))} - set(table)
    for script in scripts:
        missing |= (({*arms.TELLING, *LENGTHS} & set(arms.defaults(script))) or {"exp_name"}) - set(table)
    if missing:
        names = ", ".join(sorted(missing))
        fail(f"{source}: no column {names}; expected what the scripts log to W&B, with all settings that tell arms apart")
    lacks, keep = set(), pd.Series(True, table.index)
    for script, rows in scripts.items():
        known = {"env_id": "", "seed": 1} | (arms.defaults(script) or {"exp_name": ""})
        lacks |= set(known) - {*table, *FREE}
        for name in known.keys() & set(table):
            default, values = known[name], rows[name]
            try:
                if isinstance(default, bool):  # W&B writes true
                    values = values.map(lambda value: {"true": True, "false": False}[str(value).lower()], na_action="ignore")
                elif isinstance(default, int | float):
                    values = pd.to_numeric(values)
            except (ValueError, KeyError) as error:
                fail(f"{source}: {name} of {script}: {error}; expected one of its settings")
            if values.isna().any() and (name in ("env_id", "seed", "exp_name", *LENGTHS) or name in arms.TELLING):
                fail(f"{source}: line {values.isna().idxmax() + 2}: no {name}; expected the setting of this run of {script}")
            if isinstance(default, bool | int | float):
                table[name] = table[name].astype(object)
                table.loc[rows.index, name] = values.astype(object)
        empty = pd.Series(np.nan, rows.index)
        step, total = (pd.to_numeric(rows.get(name, empty), errors="coerce") for name in ("global_step", "total_timesteps"))
        batch = [rows.get(name, known.get(name, 1)) for name in ("num_envs", "num_steps")]  # runs end at a whole rollout
        unfinished = rows.get("State", empty).fillna("finished").ne("finished") | (step + batch[0] * batch[1] <= total)
        left_out.update(("not finished", name_of(run) or label(run)) for run in rows[unfinished].to_dict("records"))
        keep[rows.index[unfinished]] = False
    return table[keep].infer_objects(), sorted(lacks)


def load_runs(sources: tuple[Path, ...]) -> pd.DataFrame:
    """One line a run; those of local folders have their folder in the column `folder`. The order of the sources is nothing.

    Of a run that is there twice the line with a folder counts, else the one that has got further. Columns made here: `script`
    is the grid's, under which runs are compared (`run_script`: the one that ran), `method` what the settings make of a run,
    `arm` what it is called, `paper` the paper's name for it. attrs: lines of text on what is left out or unknown.
    """
    tables, left_out, lacks = [], Counter(), []
    for source in sorted(sources, key=lambda source: (not source.is_dir(), str(source))):
        if source.is_dir():
            tables.append(read_folder(source, left_out))
        else:
            table, lack = read_csv(source, left_out)
            tables.append(table)
            lacks += [f"{source.name} lacks {', '.join(lack)}"] if lack else []
    runs = pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
    if runs.empty:
        fail(
            f"{' '.join(map(str, sources))}: no finished run there; expected some result.json below (or name a runs.csv itself)"
        )
    for name in ("seed", "alpha", "beta", "Z", "score", "global_step", "seconds"):
        runs[name] = pd.to_numeric(runs[name], errors="coerce") if name in runs else np.nan
    known = runs[["script", "env_id", "seed"]].notna().all(axis=1) & runs.script.astype(str).str.endswith(".py")
    others, runs = int((~known).sum()), runs[known]
    runs = runs.assign(scored=np.isfinite(runs.score), local=runs.folder.notna() if "folder" in runs else False)
    runs = runs.sort_values(["local", "scored", "global_step"], ascending=False, kind="stable").drop(columns="local")
    twice = int(runs.duplicated("run_id").sum())
    runs = runs.drop_duplicates("run_id").sort_index(ignore_index=True)
    runs = runs.assign(noise=runs.noise.fillna("none") if "noise" in runs else "none", Z=runs.Z.fillna(-1.0))
    runs = name_arms(runs)
    left_out.update(("without a score", arm) for arm in runs[~runs.scored].arm)
    runs = runs[runs.scored].drop(columns="scored").reset_index(drop=True)
    if runs.empty:
        fail(f"{' '.join(map(str, sources))}: no run there has a score; expected some finished ones")
    runs = tell_apart(runs)
    runs["steps"] = pd.to_numeric(runs.reindex(columns=LENGTHS).bfill(axis=1).iloc[:, 0])
    for name in [name for name in runs if name.startswith(("eval/", "test/"))]:  # W&B's summary has the last values
        of = runs.script.eq("sppo_rlhf_imdb.py" if name.startswith("eval/") else "sppo_rlhf_tldr.py")
        after = f"after.{name.split('/', 1)[1]}"
        runs[after] = runs.get(after, pd.Series(np.nan, runs.index)).fillna(runs[name].where(of))
    lines = [f"{why}: {arm} ({count})" for (why, arm), count in sorted(left_out.items())]
    runs.attrs = {"left out": lines, "others": others, "twice": twice, "lacks": sorted(set(lacks))}
    return runs


def name_arms(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds env, method, paper, given (the arm's name), named and arm: the given name, else the method."""
    rows = runs.to_dict("records")
    runs = runs.assign(method=[label(run) for run in rows], run_script=runs.script, env=runs.env_id.str.removeprefix("ALE/"))
    runs = runs.assign(paper=[arms.paper_name(run) for run in rows], given=[name_of(run) for run in rows])
    new = sorted(settings(runs) - {name for script in arms.FAMILIES for name in arms.defaults(script)})
    runs.loc[runs[new].notna().any(axis=1), "paper"] = None  # an argument that somebody gave one of our scripts
    # beside runs without a name, an arm of run.py's own grids is called by its method, as they are
    of_ours = runs.script.isin(arms.FAMILIES) & runs.get("grid.script", pd.Series(np.nan, runs.index)).isna()
    give_way = of_ours & runs.given.isin(arms.GRID_ARMS) & runs.given[of_ours].isna().any()
    return runs.assign(named=runs.given.notna() & ~give_way, arm=runs.given.fillna(runs.method))


def tell_apart(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds to an arm's name the weight in which its runs of one environment differ: one name would hide that."""
    for i in [i for i in runs.index if runs.method[i].startswith("control ") and not arms.is_control(runs, runs.loc[i])]:
        runs.loc[i, "method"] = f"{runs.method[i].removeprefix('control ')} α {runs.alpha[i]:g}"
    runs.loc[~runs.named, "arm"] = runs[~runs.named].method
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
        unnamed = differences(row[~row.named], names)
        found += [f"{where}, {script}: {name} {', '.join(values)}" for name, values in unnamed.items()]
        for arm, same in row.groupby("arm"):
            of_arm = differences(same, names - set(unnamed) | set(ARM))
            found += [f"{where}, {script}, {arm}: {name} {', '.join(values)}" for name, values in of_arm.items()]
    for script, same in runs.groupby("run_script"):
        versions = {name for name in runs.columns if name.startswith("versions.")}
        found += [f"{script}: {name} {', '.join(values)}" for name, values in differences(same, versions).items()]
    return found
