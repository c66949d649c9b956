"""What an arm is called, what its settings make of it, and in what arms differ."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd

BENCHMARK = Path(__file__).resolve().parents[1]
FAMILIES = {  # our scripts: family and algorithm in paper/hyperparameters.toml
    "sppo_atari.py": ("atari", "ppo"),
    "sa2c_atari.py": ("atari", "a2c"),
    "dsppo_continuous.py": ("continuous", "ppo"),
    "dsa2c_continuous.py": ("continuous", "a2c"),
    "sppo_rlhf_imdb.py": ("rlhf", "imdb"),
    "sppo_rlhf_tldr.py": ("rlhf", "tldr"),
}
BASELINES = ("PPO", "A2C", "DPPO", "DA2C")
SYMMETRIC = ("SPPO", "SA2C", "DSPPO", "DSA2C")
# names of arms in run.py's grids of the paper's tables
GRID_ARMS = ("ppo", "ppo_raw", "sppo", "a2c", "a2c_half", "sa2c", "dppo", "dsppo", "da2c", "da2c_half", "dsa2c", "control")
DEFAULT_NAME = (  # an --exp-name that a script makes of its settings
    r"d?(ppo|a2c|s(ppo|a2c)_a[\d.e-]+_b[\d.e-]+)(_a[\d.e-]+)?(_(raw|norm|literal|factored|mean|bsc|gaussian|Z|\d+bins)[\w.-]*)?"
)
# Arguments that runs of one row may differ in: what makes an arm, what names a run, and what is no other experiment
ARM = ("alpha", "beta", "Z", "num_bins", "reverse_prob", "norm_adv", "literal_signs", "mean_weight")
LENGTHS = ("total_timesteps", "iterations")  # one of them is a script's; compared apart
FREE = {
    *("seed", "env_id", "noise", "exp_name", "run_dir", "resume", "track", "wandb_project_name", "wandb_entity", "prompts"),
    *("wandb_group", "wandb_tags", "evaluate", "capture_video", "save_model", "checkpoint_interval", "log_interval"),
    *("eval_interval", "eval_every", "num_threads", *LENGTHS),
}
MACHINE = {"cuda", "torch_deterministic", "bf16", "compile", "eval_episodes", "max_episode_steps"}  # not the paper's to set
RECORD = {  # columns that are no argument of a script
    *("score", "score_stderr", "returns", "global_step", "seconds", "steps_per_second", "script", "run_id", "commit", "device"),
    *("Name", "folder", "wandb", "env", "arm", "given", "method", "paper", "steps", "run_script", "env_id", "seed"),
}


def fail(message: str):
    print(f"report.py: error: {message}", file=sys.stderr)
    sys.exit(2)


@functools.cache
def defaults(script: str) -> dict:
    """The arguments of one of our scripts with their defaults; {} for any other script."""
    if script not in FAMILIES:
        return {}
    tree = ast.parse((BENCHMARK.parent / script).read_text())
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = (field for found in classes for field in found.body if isinstance(field, ast.AnnAssign))
    return {field.target.id: ast.literal_eval(field.value) for field in fields}


@functools.cache
def hyperparameters() -> dict:
    return tomllib.loads((BENCHMARK / "paper/hyperparameters.toml").read_text())


def settings(runs: pd.DataFrame) -> set[str]:
    """The columns that are arguments of a script: all that are not measured, without a dot in their names."""
    return {name for name in runs if re.fullmatch(r"\w+", name)} - RECORD


def name_of(run: dict) -> str | None:
    """The arm's name, which run.py gives as --exp-name; None where it is a script's default: its own name or the arm's."""
    name = run.get("exp_name")
    stems = {Path(script).stem for script in (*FAMILIES, run["script"])}
    default = run["script"] in FAMILIES and name not in GRID_ARMS and re.fullmatch(DEFAULT_NAME, str(name))
    return None if not isinstance(name, str) or name in stems or default else name


def label(run: dict) -> str:
    """What a run's settings make of it; of a script that is not ours, whose loss nobody knows here, what its arm is called."""
    if run["script"] not in FAMILIES:
        weights = [f"{sign} {run[key]:g}" for key, sign in (("alpha", "α"), ("beta", "β")) if not pd.isna(run.get(key))]
        name = name_of(run) or " ".join([Path(run["script"]).stem, *weights])
        return name.upper() if name.upper() in (*BASELINES, *SYMMETRIC) else name
    algorithm = "A2C" if "a2c" in run["script"] else "PPO"
    discrete = "D" if "continuous" in run["script"] and run["num_bins"] else ""
    if run["beta"] and run.get("mean_weight") is not True:
        name = f"{discrete}S{algorithm}"
        name += " factored" if run.get("reverse_prob") == "factored" else ""
        name += " literal" if run.get("literal_signs") is True else ""
    else:
        name = f"{'control ' if run['beta'] or run['alpha'] != 1 else ''}{discrete}{algorithm}"
    default = algorithm == "PPO"
    if bool(run.get("norm_adv", default)) != default:
        name += " raw" if default else " normalised"
    name += f" Z {run['Z']:g}" if run.get("Z", -1) != -1 and run["beta"] else ""
    name += f" {run['num_bins']:g} bins" if discrete and run["num_bins"] != 11 else ""
    return name + (f" {run['exp_name']}" if str(run.get("exp_name")).startswith("reweighted") else "")


def called(run: dict, method: str) -> str:
    """The arm's name; without one what run.py's grids call such an arm: control for control DPPO, ppo_raw for PPO raw."""
    if (name := name_of(run)) or run["script"] not in FAMILIES:
        return name or method
    name = re.sub(r"^\w+", lambda word: word[0].lower(), re.sub("^control D?(PPO|A2C)", "control", method))
    return name.replace("ppo raw", "ppo_raw").replace("a2c α 0.5", "a2c_half").replace("a2c factored", "a2c-factored")


def paper_name(run: dict) -> str | None:
    """The paper's name for a run of one of our scripts with the paper's settings, of any length; None for any other run."""
    family, algorithm = FAMILIES.get(run["script"], (None, None))
    if family not in ("atari", "continuous"):
        return None
    paper, expected = hyperparameters()[family], defaults(run["script"])
    env, noise = re.sub(r"^ALE/(.*)-v5$", r"\1", run["env_id"]), run["noise"]
    if env not in paper.get("games", paper.get("tasks")) or noise not in ("none", paper["noise"]["kind"]):
        return None
    if (algorithm, env) == ("a2c", "Swimmer-v4"):
        expected = expected | {"gamma": 0.9999}
    betas = paper[algorithm]["beta"][noise]
    beta = betas if isinstance(betas, float) else betas.get(env, betas.get("default"))
    weights, own = (run["alpha"], run["beta"]), {"alpha", "beta", "num_bins", "norm_adv"}
    changed = any(
        shown(run.get(name)) != shown(expected[name])
        for name in expected.keys() - FREE - MACHINE - own
        if noise != "none" or not name.startswith("noise_")
    )
    raw = bool(run["norm_adv"]) != expected["norm_adv"]
    discrete = "" if family == "atari" else {11: "D", 0: ""}.get(run["num_bins"])
    if changed or discrete is None or (raw and (run["script"], weights) != ("sppo_atari.py", (1, 0))):
        return None
    if weights == (1, 0):  # on Atari normalised or not: which of them the paper's table has is not known
        return discrete + algorithm.upper()
    symmetric = weights == (paper["alpha"], beta) and (discrete or family == "atari")
    return f"{discrete}S{algorithm.upper()}" if symmetric else None


def is_control(runs: pd.DataFrame, run: pd.Series) -> bool:
    """Whether the run's alpha is alpha + beta |Z| of symmetric runs in its environment, or if none is there, in another.

    A2C's is the one with --mean-weight, whose beta is above 0: no alpha alone has SA2C's gradient (fact 3).
    """
    if "a2c" in run.script:
        return bool(run.beta > 0)
    alike = runs[(runs.script == run.script) & (runs.noise == run.noise) & (runs.beta > 0)]
    alike = alike[alike.env == run.env] if run.env in alike.env.values else alike
    return bool(np.isclose(alike.alpha + alike.beta * abs(alike.Z), run.alpha).any())


def differences(runs: pd.DataFrame, names: set[str]) -> dict[str, list[str]]:
    """Those of the columns `names` with more than one value, and these; no value is one, too."""
    found = {name: runs[name].map(shown).unique() for name in sorted(names & set(runs.columns))}
    return {name: sorted(values) for name, values in found.items() if len(values) > 1}


def shown(value) -> str:
    """A setting as text: None of a result.json and the empty field that it is in a csv alike, 1 and 1.0, too."""
    if pd.isna(value):
        return "none"
    return f"{value:.9g}" if isinstance(value, int | float | np.number) and not isinstance(value, bool) else str(value)


def what_differs(runs: pd.DataFrame) -> dict[str, str]:
    """Arm -> (α 0.5, β 10, mean_weight): its weights and, of the settings in which the arms differ, those that are not the
    script's default (of a script that is not ours: not the first arm's), unless the arm's name tells them."""
    roles, texts = roles_of(runs), {}
    arms = order(list(roles), roles)
    names = set().union(*(differences(row, settings(runs) - {"num_bins"} - FREE) for _, row in runs.groupby("env")))
    names = [name for name in ("alpha", "beta", *sorted(names - {"alpha", "beta"})) if name in runs]
    values = {arm: {name: sorted(set(runs[runs.arm == arm][name].map(shown))) for name in names} for arm in arms}
    usual = {name: [shown(value)] for name, value in defaults(runs.script.iloc[0]).items()}
    for arm in arms:
        parts = []
        for name, own in values[arm].items():
            sign, weight = {"alpha": "α", "beta": "β"}.get(name, name), name in ("alpha", "beta")
            told = own != ["none"] and len(own) <= 3 and f"{sign} " not in arm
            if told and (weight or own != usual.get(name, values[arms[0]][name])):
                own = [f"{float(value):.3g}" if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", value) else value for value in own]
                switch = {"True": sign, "False": f"no {sign}"}.get(" or ".join(own))
                parts.append(switch or f"{sign} {' or '.join(own)}")
        texts[arm] = f" ({', '.join(parts)})" if parts else ""
    return texts


def roles_of(runs: pd.DataFrame) -> dict[str, str]:
    """Arm -> what its settings make of it, with "baseline" before it if the grid names it as that."""
    roles = dict(zip(runs.arm, runs.method, strict=True))
    if "grid.baseline" in runs:  # by the name in the grid, to which the arm's own may have added a setting
        for arm in runs[runs["grid.baseline"].notna() & (runs["grid.baseline"] == runs.given)].arm.unique():
            roles[arm] = f"baseline {roles[arm]}"
    return roles


def order(arms: list[str], roles: dict[str, str] | None = None) -> list[str]:
    """Baselines first, then what is compared with them, then controls; β 2 before β 10."""

    def key(arm: str) -> tuple:
        role = (roles or {}).get(arm, arm)
        parts = re.split(r"(\d+\.?\d*)", arm)  # texts and numbers by turns
        place = -1 if role.startswith("baseline ") else BASELINES.index(role) if role in BASELINES else 9
        return role.startswith("control"), place, [float(part) if i % 2 else part for i, part in enumerate(parts)]

    return sorted(arms, key=key)


def is_reference(role: str) -> bool:
    """What others are compared with: baselines and controls, raw or normalised ones too; not a baseline with an odd alpha."""
    return role.startswith(("baseline ", "control")) or (role.split()[0] in BASELINES and " α " not in role)
