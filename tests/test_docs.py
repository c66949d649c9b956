"""README and docs/ say what is true: links, flags, defaults, commands, logged names, code that they name, numbers."""

import ast
import csv
import importlib
import itertools
import json
import re
import shlex
import statistics
import sys
import tomllib
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import rlhf_assets
import tldr_assets
import tyro
from helpers import ENV, ROOT, no_process_outlives_its_test, only, run, scalars, unchanged_process  # noqa: F401

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTROL = ("sppo_atari", "sa2c_atari", "dsppo_continuous", "dsa2c_continuous")
RLHF = ("sppo_rlhf_imdb", "sppo_rlhf_tldr")
RESULTS = ROOT / "benchmark/results"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page):
    """The page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def tables(text):
    """Each table as rows of cells, its rule left out."""
    for block in re.findall(r"(?m)(?:^\|.*\|$\n?)+", text):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        yield [row for row in rows if set("".join(row)) - set("- :")]


def script(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str((ROOT / path).parent), str(ROOT), *sys.path])
    return importlib.import_module(Path(path).stem)


# --- the pages --------------------------------------------------------------------------------------------------------


@each_page
def test_pages_are_short_and_linked(page):
    lines = page.read_text().splitlines()
    assert len(lines) <= 250
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 128]
    assert page.name == "README.md" or re.search(rf"\]\((docs/)?{re.escape(page.name)}", "".join(map(prose, PAGES)))


def anchors(page):
    """What GitHub makes of the headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("benchmark/**/README.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    text = prose(page)
    targets = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r"(?m)^\[[^\]]+\]: (\S+)$", text)
    assert targets or page.parent.name == "results"
    for target in targets:
        if re.match(r"https?:|\.\./\.\./actions/", target):  # the latter are pages of the repository's host
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_worst_sentences_are_gone():
    text = " ".join(" ".join(page.read_text().split()) for page in PAGES)
    for words in (
        "what tells is",
        "chance parts them",
        "weights enough",
        "whose minutes differ",
        "it tells the value of a state",
        "divides a constant factor",
        "a summary's worth",
        "in such of",
    ):
        assert words not in text


# --- flags and commands -----------------------------------------------------------------------------------------------

# pip's, TensorBoard's, accelerate's, torchrun's, Slurm's; names that hints are about; a former script's
FOREIGN = {"--no-deps", "--logdir", "--num_processes", "--nproc-per-node", "--array", "--cpus-per-task", "--time", "--signal"}
FOREIGN |= {"--requeue", "--n-steps", "--num-minibatches", "--lr", "--help", "--arms"}
FOREIGN |= {"--clip-vloss"}  # CleanRL's
FOREIGN |= {"--spo-coef"}  # of the loss that your-own-loss.md adds


def commands(page):
    """(script, arguments) of each command in the page, in blocks and between backticks."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```$", page.read_text())
    lines = [line.split(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    lines += [span for span in spans if re.match(r"(\.venv/bin/)?python3? \S+\.py|uv run", span)]
    for line in lines:
        for part in re.split(r"&&|;", line):
            found = re.search(r"(?:python3?|torchrun|accelerate launch|uv run)\b.*?\s(\S+\.py)(.*)", part)
            if found and "--help" not in part:
                yield found.group(1), shlex.split(re.sub(r"\$\(.*?\)|\$\w+", "1", found.group(2)))


@each_page
def test_flags_exist(page):
    known = set(FOREIGN)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmark/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name == "Args":
                known |= {f"--{field.target.id.replace('_', '-')}" for field in node.body if isinstance(field, ast.AnnAssign)}
    text = re.sub(r"\]\([^)]*\)|https?:\S+", "", page.read_text())
    named = set(re.findall(r"(?<![\w-])--(?:Z\b|[a-z][\w-]*)", text)) - {"--anneal_lr"}  # W&B's form, named as one that fails
    assert not {flag for flag in named if flag not in known and flag.replace("--no-", "--", 1) not in known}


@each_page
def test_commands_parse(page, monkeypatch, tmp_path):
    for path, words in commands(page):
        assert (ROOT / path).exists(), path
        module = script(path, monkeypatch)
        if module.__name__ not in (*CONTROL, *RLHF):
            if not hasattr(module, "Args"):
                assert not words, path
                continue
            args = tyro.cli(module.Args, args=words)
            if module.__name__ == "run" and not args.grid.startswith(("my_", "GRID")):
                with monkeypatch.context() as patch:
                    patch.chdir(ROOT)
                    assert module.select(module.cells(args.grid), args.filter)
            continue
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", [path])
            for flag in {"--resume", "--evaluate"} & set(words):  # a run as the command expects it
                folder = tmp_path / words[words.index(flag) + 1]
                folder.mkdir(parents=True, exist_ok=True)
                record = {"script": path, "args": asdict(module.Args()), "run_id": "1"}
                (folder / "args.json").write_text(json.dumps(record))
            for name in ("check_env", "check_tracking"):
                patch.setattr(module, name, lambda args: None, raising=False)
            args = module.parse_args(words, module.OFFLINE if "--offline" in words else module.Args())
            if not getattr(args, "load_in_4bit", False):  # which needs a GPU
                module.check_args(args)


def test_the_counts_of_reproduce_are_run_pys(monkeypatch):
    grids = script("benchmark/run.py", monkeypatch)
    page = ROOT / "docs/reproduce.md"
    dry, wet = [
        len(grids.select(grids.cells(words[0]), words[2])) for path, words in commands(page) if words[1:2] == ["--filter"]
    ]
    assert f"The first line prints {dry} commands" in page.read_text() and f"The second does {wet} runs" in page.read_text()
    for name, chosen, runs in re.findall(
        r"(?m)^\|[^|]*\| `run\.py ([\w-]+)(?: --filter (\S+))?[^`]*` \| ([\d,]+) \|", page.read_text()
    ):
        assert len(grids.select(grids.cells(name), chosen)) == int(runs.replace(",", "")), name


def shown(value):
    """A default as the tables write it."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value


@pytest.mark.parametrize(("page", "scripts"), [("control.md", CONTROL), ("rlhf-flags.md", RLHF)])
def test_flag_tables_are_the_arguments(page, scripts):
    modules = [importlib.import_module(name) for name in scripts]
    columns = [defaults for module in modules for defaults in (module.Args(), getattr(module, "OFFLINE", None)) if defaults]
    found = {}
    for head, *rows in tables((ROOT / "docs" / page).read_text()):
        if head[0] == "flag" and head[-1] == "what":
            found |= {row[0].strip("`").removeprefix("--").replace("-", "_"): row[1:-1] for row in rows}
    assert found.keys() == {field.name for module in modules for field in fields(module.Args)}
    groups = {}  # of the page: heading -> its arguments; of the scripts: as --help shows them
    for title, text in re.findall(r"(?ms)^#{2,3} ([^\n]*)$(.*?)(?=^#{2,3} |\Z)", (ROOT / "docs" / page).read_text()):
        groups[title.lower()] = set(re.findall(r"(?m)^\| `--([\w-]+)` \|", text))
    for module in modules:
        title = None
        for field in fields(module.Args):
            title = module.GROUPS.get(field.name, title)
            assert field.name.replace("_", "-") in groups[title], (module.__name__, field.name, title)
    for name, cells in found.items():
        if any(cells):  # some have names and paths, which stand elsewhere
            assert cells == [shown(getattr(defaults, name, "-")) for defaults in columns], name
    if page == "rlhf-flags.md":
        (paths,) = [rows for head, *rows in tables((ROOT / "docs" / page).read_text()) if head[1] == "default"]
        for flag, default, offline in paths:
            task, name = flag.split(" ")
            module = modules[task == "TL;DR"]
            name = name.strip("`").removeprefix("--").replace("-", "_")
            cells = [shown(getattr(defaults, name)) for defaults in (module.Args(), module.OFFLINE)]
            assert [default.replace("\\", ""), offline.replace("\\", "")] == cells, flag


def test_betas_by_task_are_the_papers():
    settings = tomllib.loads((ROOT / "benchmark/paper/hyperparameters.toml").read_text())["continuous"]
    (rows,) = [rows for head, *rows in tables((ROOT / "docs/control.md").read_text()) if head[1] == "DSPPO"]
    assert [row[0] for row in rows] == settings["tasks"]
    for task, *cells in rows:
        for name, (plain, noisy, steps) in (("ppo", cells[:3]), ("a2c", cells[3:])):
            own = settings[name]
            for cell, betas in ((plain, own["beta"]["none"]), (noisy, own["beta"]["gaussian"])):
                assert float(cell) == betas.get(task, betas.get("default")), task
            length = own["total_timesteps"]
            assert number(steps) == (length[task] if isinstance(length, dict) else length), task


# --- logged names -----------------------------------------------------------------------------------------------------

NAME = r"`((?:charts|losses|objective|eval|test|time)/[\w]+)`"
GROUPS = {
    "all": {*CONTROL, *RLHF},
    "control": set(CONTROL),
    "Atari": {"sppo_atari", "sa2c_atari"},
    "continuous": {"dsppo_continuous", "dsa2c_continuous"},
    "PPO": {"sppo_atari", "dsppo_continuous", *RLHF},
    "RLHF": set(RLHF),
    "IMDB": {"sppo_rlhf_imdb"},
    "TL;DR": {"sppo_rlhf_tldr"},
}
INTERVAL = "--eval-interval"
TINY = {  # long enough for a game to end, and for shares of the gradient
    "sppo_atari": "--env-id Breakout --noise bsc --num-envs 2 --num-steps 256 --update-epochs 1 --total-timesteps 512",
    "sa2c_atari": "--env-id Breakout --noise bsc --num-envs 2 --log-interval 30 --checkpoint-interval 30 --total-timesteps 600",
    "dsppo_continuous": "--env-id InvertedDoublePendulum --noise gaussian --num-steps 64 --total-timesteps 128",
    "dsa2c_continuous": "--env-id InvertedDoublePendulum --noise gaussian --log-interval 8 --checkpoint-interval 8 "
    "--total-timesteps 256",
}


def documented():
    """name -> the scripts that log it, by docs/metrics.md."""
    found = {}
    for head, *rows in tables((ROOT / "docs/metrics.md").read_text()):
        if head[:2] == ["name", "in"]:
            for row in rows:
                name = re.fullmatch(NAME, row[0]).group(1)
                found[name] = set().union(*(GROUPS[group] for group in row[1].split(", ")))
    for name in [name for name in found if name.startswith("eval/") and "sppo_rlhf_tldr" in found[name]]:
        found[name.replace("eval/", "test/")] = {"sppo_rlhf_tldr"}  # as the page says
    return found


@pytest.mark.parametrize("name", [*CONTROL, *RLHF])
def test_every_logged_name_is_in_metrics_md(name, tmp_path):
    if name in CONTROL:
        words = f"{TINY[name]} --eval-episodes 1 --num-threads 1".split()
    else:
        assets = rlhf_assets if name == "sppo_rlhf_imdb" else tldr_assets
        words = [*assets.arguments(assets.write_assets(tmp_path / "assets")), "--iterations", 2, INTERVAL, 1]
        words += ["--ent-coef", 0.01, "--reference-nll-coef", 0.1]
        if name == "sppo_rlhf_imdb":
            (tmp_path / "judge.json").write_text(json.dumps({"intercept": 0.0, "terms": {"film": [1.0, 1.0]}}))
            words += ["--judge", tmp_path / "judge.json"]
    module = importlib.import_module(name)
    with unchanged_process():
        args = module.parse_args([*map(str, words), "--run-dir", str(tmp_path / "runs")], module.Args())
        module.check_args(args)
        module.main(args)
    logged = set(scalars(only(tmp_path / "runs")))
    expected = {metric for metric, scripts in documented().items() if name in scripts}
    assert logged <= expected, "not in the page"
    # what a tiny run need not have: empty or unfinished texts
    assert {metric for metric in expected - logged if "empty_score" not in metric and "unfinished_score" not in metric} == set()


# --- code that the pages name -----------------------------------------------------------------------------------------


def test_differences_name_code_that_is_there():
    text = " ".join((ROOT / "docs/differences.md").read_text().split())
    items = re.findall(r"(?<=\s)(\d+)\. \*\*", text)
    assert items == [str(number) for number in range(1, len(items) + 1)] and len(items) > 40
    assert f"[{len(items)} implementation details](docs/differences.md)" in (ROOT / "README.md").read_text()
    named = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", text)
    assert len(named) >= len(items)
    for path, names in named:
        tree = ast.parse((ROOT / path).read_text())
        known = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        known |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        known |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert set(re.findall(r"\w+", names)) <= known, path


def test_the_environment_of_control_md_is_learned(tmp_path):
    text = (ROOT / "docs/control.md").read_text()
    (module,) = re.findall(r"(?ms)^```python\n(# mytask\.py\n.*?)^```$", text)
    (tmp_path / "mytask.py").write_text(module)
    words = "--env-id mytask:Reach-v0 --num-steps 128 --total-timesteps 256 --eval-episodes 2"
    assert words.split(" --num")[0] in text
    run("dsppo_continuous.py", *words.split(), "--run-dir", tmp_path / "runs", cwd=tmp_path, env=ENV)
    assert len(json.loads((only(tmp_path / "runs") / "result.json").read_text())["returns"]) == 2


# --- numbers ----------------------------------------------------------------------------------------------------------


def number(text):
    return float(text.replace(",", ""))


def sections(page):
    """(heading, text) of a page's parts."""
    return re.findall(r"(?ms)^## (.*?)$(.*?)(?=^## |\Z)", page.read_text())


# A page's arms and chances, so that a table whose head has changed is not passed over
SCORES = {
    "results-ppo.md": (32, 50),
    "results-ppo-atari.md": (23, 29),
    "results-follow-up.md": (17, 14),
    "results-a2c.md": (27, 17),
}


@pytest.mark.parametrize("page", SCORES)
def test_scores_are_those_of_runs_csv(page):
    """Mean, standard error, each seed's score, the last tenth of training and the chances, from the committed csv files."""
    checked = chances = 0
    for _, text in sections(ROOT / "docs" / page):
        folder = re.search(r"\(\.\./benchmark/results/([\w-]+)/report\.md\)", text)
        if not folder:
            continue
        folder = RESULTS / folder.group(1)
        runs = list(csv.DictReader((folder / "runs.csv").open()))
        aggregates = {
            f"{float(row['value']):.2f} ({float(row['low']):.2f} to {float(row['high']):.2f})"
            for row in csv.DictReader((folder / "aggregates.csv").open())
            if row["what"].startswith("P(")
        }
        curves = {}
        for row in csv.DictReader((folder / "curves.csv").open()):
            if row["tag"] == "charts/episodic_return":
                for identity in row.keys() - {"tag", "step"}:
                    if row[identity]:
                        curves.setdefault(identity, []).append((int(row["step"]), float(row[identity])))
        arms = {}
        for row in runs:
            names = ("noise", "alpha", "beta", "norm_adv", "num_bins", "reverse_prob", "mean_weight")
            key = tuple(row.get(name) for name in (*names, "vf_coef", "ent_coef", "max_grad_norm"))
            arms.setdefault(key, {})[int(row["seed"])] = (float(row["score"]), row["run_id"])
        found = []
        for scores in arms.values():
            values = [scores[seed][0] for seed in sorted(scores)]
            last = [
                [value for step, value in curves[identity] if step > 0.9 * max(curves[identity])[0]]
                for _, identity in scores.values()
            ]
            last = [statistics.mean(values) for values in last]
            error = statistics.stdev(values) / len(values) ** 0.5
            tenth = (statistics.mean(last), statistics.stdev(last) / len(last) ** 0.5)
            found.append((statistics.mean(values), error, values, *tenth))
        for head, *rows in tables(text):
            if head[:3] == ["arm", "score", "each seed's"]:
                for row in rows:
                    mean, error = map(number, row[1].split(" ± "))
                    seeds = [number(cell) for cell in row[2].split(", ")]
                    digits = 1 if "." in row[1] else 0
                    match = [each for each in found if [round(value) for value in each[2]] == seeds]
                    assert len(match) == 1, row
                    assert round(match[0][0], digits) == mean and round(match[0][1], digits) == error, row
                    tenth = [number(cell) for cell in row[3].split(" ± ")]
                    digits = 1 if "." in row[3] else 0
                    assert tenth == pytest.approx(match[0][3:], rel=0, abs=0.501 * 10**-digits), (row, match[0][3:])
                    checked += 1
            elif not head[0] or head[0].startswith("chance"):
                for cell in [cell for row in rows for cell in row[1:] if " to " in cell]:
                    assert cell in aggregates, cell
                    chances += 1
    assert (checked, chances) == SCORES[page]


def test_chances_of_results_md_are_those_of_the_runs():
    """Each chance of the table, with its interval, by its algorithm, task, length, other arm and noise."""
    pairs = {}  # (algorithm, task, length, first seed, noised) -> {arm: {other: its cell}}, arms in lower case
    for path in RESULTS.glob("*/aggregates.csv"):
        runs = list(csv.DictReader(path.with_name("runs.csv").open()))
        (setting,) = {(run["env_id"], run["total_timesteps"]) for run in runs}
        setting = (*setting, str(min(int(run["seed"]) for run in runs)))
        for row in csv.DictReader(path.open()):
            if row["what"].startswith("P("):
                key = (row["script"].split("_")[0].removesuffix(".py"), *setting, row["noise"] != "none")
                cell = f"{float(row['value']):.2f} ({float(row['low']):.2f} to {float(row['high']):.2f})"
                arms = pairs.setdefault(key, {})
                assert arms.setdefault(row["arm"].lower(), {}).setdefault(row["other"].lower(), cell) == cell, (path, row)
    ((head, *rows),) = [rows for rows in tables((ROOT / "docs/results.md").read_text()) if "its control, none" in rows[0]]
    count = 0
    for row in rows:
        arm, task, seed, steps = re.fullmatch(r"(.+), (\w+?)(?: again, seeds (\d) to \d+)? \(([\d,]+)\)", row[0]).groups()
        arm = arm.lower().replace("factored (β 10)", "factored")
        task = "InvertedDoublePendulum" if task == "IDP" else task
        for title, cell in zip(head[1:], row[1:], strict=True):
            found = [
                arms
                for (algorithm, env, length, first, noised), arms in pairs.items()
                if algorithm == arm.split()[0] and env.startswith(task)
                if length == steps.replace(",", "") and first == (seed or "1")
                if noised == title.endswith(", noise")
            ]
            if cell in ("not run", "none exists"):
                assert cell == "none exists" or not found, (row[0], title)
                continue
            (arms,) = found
            ((others),) = [arms[name] for name in (arm, f"{arm} β {10 if title.endswith(', noise') else 0.2}") if name in arms]
            baseline = arm.split()[0].replace("sp", "p").replace("sa", "a")
            (other,) = [
                name
                for name in others
                if name.split()[0] == "control" or name == baseline
                if ("control" in title) == ("control" in name)
            ]
            assert cell == others[other], (row[0], title)
            count += 1
    assert count >= 30


def test_every_interval_in_the_prose_is_in_a_report():
    """Chances and interquartile means, outside the tables too, and scores with errors: each is in a report's csv file."""
    reported = {
        tuple(f"{float(row[name]):.2f}" for name in ("value", "low", "high"))
        for path in RESULTS.glob("*/aggregates.csv")
        for row in csv.DictReader(path.open())
    }
    for page in ("README.md", *(f"docs/results{name}.md" for name in ("", "-ppo", "-ppo-atari", "-follow-up", "-a2c"))):
        text = " ".join((ROOT / page).read_text().split())
        found = re.findall(r"(\d\.\d\d)(?: \(|, )(\d\.\d\d) to (\d\.\d\d)\)", text)
        assert found and not set(found) - reported, page
    cells = [row for path in RESULTS.glob("*/cells.csv") for row in csv.DictReader(path.open()) if row["stderr"]]
    means = {tuple(f"{float(row[name]):,.{digits}f}" for name in ("mean", "stderr")) for row in cells for digits in (0, 1)}
    for page in ("README.md", "docs/results.md"):
        found = re.findall(r"([\d,.]+) ± ([\d,.]*\d)", " ".join((ROOT / page).read_text().split()))
        assert found and not set(found) - means, page


STUDIES = {  # page: its studies, and which of their cells stand in the page as they are (times of phases are rounded there)
    "results-sb3.md": ("learning-[abg]*", r"\d"),
    "results-rlhf.md": ("learning-[it]*", r"\d"),
    "loss.md": ("four-settings", r"\d"),
    "speed.md": ("s[cp]*", r" to |\d [sx]$|iB|\)$"),
}


@pytest.mark.parametrize("page", STUDIES)
def test_figures_of_studies_are_those_of_their_reports(page):
    """Each figure of a study's report stands in the page: none is lost, none is mistyped."""
    studies, kept = STUDIES[page]
    found = {cell for row in itertools.chain(*tables((ROOT / "docs" / page).read_text())) for cell in row}
    count = 0
    for path in RESULTS.glob(f"{studies}/*.md"):
        for head, *rows in tables(path.read_text()):
            for row in rows if path.parent.name != "speed" or path.name != "report.md" else []:
                cells = [cell.split(" (all)")[0] for name, cell in zip(head, row, strict=True) if name not in ("", "seeds")]
                for cell in [cell for cell in cells if re.search(kept, cell)]:
                    assert cell in found or f"{cell}, float32" in found or cell == "0", (path, cell)
                    count += 1
    assert count >= 8


def test_the_readmes_figures_are_those_of_the_pages():
    readme = {head[1]: rows for head, *rows in tables((ROOT / "README.md").read_text()) if len(head) > 1}
    results = (ROOT / "docs/results.md").read_text()
    for row in readme["against its baseline"]:
        for cell in row[1:]:
            assert cell in results, cell
    speed = (ROOT / "docs/speed.md").read_text()
    for row in readme["steps/s"]:
        for figure in re.findall(r"\d[\d,]*\.?\d*", " ".join(row[1:])):
            assert figure in speed, figure


def test_the_python_versions_are_those_of_the_headers():
    assert "3.11, 3.12 or 3.13" in (ROOT / "README.md").read_text()
    header = re.search(r"(?m)^# requires-python = (.*)$", (ROOT / "sppo_atari.py").read_text()).group(1)
    assert tomllib.loads(f"python = {header}")["python"] == ">=3.11,<3.14"
    assert is_dataclass(importlib.import_module("sppo_atari").Args)
