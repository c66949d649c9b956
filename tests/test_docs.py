"""README and docs/ say what is true: links, flags, commands, logged names, code that they name, numbers, each once."""

import ast
import csv
import importlib
import json
import re
import shlex
import sys
import tomllib
from dataclasses import asdict, fields, replace
from itertools import combinations
from pathlib import Path

import pytest
import rlhf_assets
import tldr_assets
import tyro
from helpers import ENV, ROOT, no_process_outlives_its_test, only, run, scalars, unchanged_process  # noqa: F401

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
CONTROL = ("sppo_atari", "sa2c_atari", "dsppo_continuous", "dsa2c_continuous")
RLHF = ("sppo_rlhf_imdb", "sppo_rlhf_tldr")
RESULTS = ROOT / "benchmark/results"
each_page = pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)


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


def test_pages_are_few_short_and_linked():
    lines = {page.name: page.read_text().splitlines() for page in (README, *DOCS)}
    assert len(lines["README.md"]) <= 140 and len(DOCS) <= 8
    assert sum(len(lines[page.name]) for page in DOCS) <= 1700
    assert not [(name, line) for name, of in lines.items() for line in of if len(line) > 128]
    assert all(f"(docs/{page.name})" in README.read_text() for page in DOCS)


def anchors(page):
    """What GitHub makes of the headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-") for heading in headings}


def test_links_resolve():
    for page in (README, *DOCS, *ROOT.glob("[A-Z]*.md"), *ROOT.glob("benchmark/**/README.md")):
        for target in re.findall(r"\]\(([^()\s]+)\)", prose(page)):
            if not re.match(r"https?:|\.\./\.\./actions/", target):  # the latter are pages of the repository's host
                path, _, anchor = target.partition("#")
                found = (page.parent / path).resolve() if path else page
                assert found.exists(), (page, target)
                assert not anchor or anchor in anchors(found), (page, target)


def measured(page):
    """The chances and means with their intervals, and the ratios of speed, of a page."""
    text = " ".join(page.read_text().split())
    intervals = re.findall(r"[\d.,]+ \([\d.,e-]+ to [\d.,e-]+\)", text)
    return {*intervals, *re.findall(r"[\d,.]*\d ± [\d,.]*\d", text), *re.findall(r"\d\.\d+ ?[x\xd7](?= )", text)} - {"1.00 x"}


def test_an_interval_a_mean_or_a_speed_ratio_stands_on_one_page():
    for one, other in combinations((README, *DOCS), 2):
        assert not measured(one) & measured(other), (one.name, other.name)
    assert len(measured(README)) > 10 and len(measured(ROOT / "docs/results.md")) > 100  # the pattern finds them


# --- flags and commands -----------------------------------------------------------------------------------------------

# pip's, TensorBoard's, accelerate's, Slurm's, CleanRL's; of the loss that your-own-loss.md adds
FOREIGN = {"--no-deps", "--logdir", "--num_processes", "--array", "--cpus-per-task", "--time", "--signal", "--help"}
FOREIGN |= {"--clip-vloss", "--spo-coef", "--strict"}


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
        if path == "my_loss.py":  # test_docs_your_own_loss.py runs it
            continue
        module = script(path, monkeypatch)
        if not hasattr(module, "Args"):
            assert all(word in (ROOT / path).read_text() for word in words), path
        elif module.__name__ == "run" and not words[0].startswith(("my_", "GRID")):
            args = tyro.cli(module.Args, args=words)
            assert module.select(module.cells(args.grid), args.filter), words
        elif module.__name__ in (*CONTROL, *RLHF) and {"--resume", "--evaluate"} & set(words):  # of a run as it expects it
            folder = tmp_path / words[words.index("--resume" if "--resume" in words else "--evaluate") + 1]
            folder.mkdir(parents=True)
            (folder / "args.json").write_text(json.dumps({"script": path, "args": asdict(module.Args()), "run_id": "1"}))
            with monkeypatch.context() as patch:
                patch.chdir(tmp_path)
                module.parse_args(words)
        else:
            tyro.cli(module.Args, args=words)


def test_the_runs_of_the_papers_tables_are_run_pys(monkeypatch):
    grids = script("benchmark/run.py", monkeypatch)
    text = (ROOT / "docs/usage.md").read_text()
    rows = re.findall(r"(?m)^\|[^|]*\| `([\w-]+)(?: --filter (\S+))?` \| ([\d,]+) \|", text)
    rows += re.findall(r"run\.py ([\w-]+) --filter (\S+) .*# (\d+) runs", text)
    assert len(rows) == 11
    for name, chosen, runs in rows:
        assert len(grids.select(grids.cells(name), chosen)) == int(runs.replace(",", "")), name


def test_betas_by_task_are_the_papers():
    settings = tomllib.loads((ROOT / "benchmark/paper/hyperparameters.toml").read_text())["continuous"]
    (rows,) = [rows for head, *rows in tables((ROOT / "docs/usage.md").read_text()) if head[1] == "DSPPO"]
    assert [row[0] for row in rows] == settings["tasks"]
    for task, *cells in rows:
        for name, (plain, noisy, steps) in (("ppo", cells[:3]), ("a2c", cells[3:])):
            own = settings[name]
            for cell, betas in ((plain, own["beta"]["none"]), (noisy, own["beta"]["gaussian"])):
                assert float(cell) == betas.get(task, betas.get("default")), task
            length = own["total_timesteps"]
            assert int(steps.replace(",", "")) == (length[task] if isinstance(length, dict) else length), task


@pytest.mark.training
def test_cartpole_scores_what_the_readme_says(tmp_path):
    (words,) = [words for path, words in commands(README) if "CartPole-v1" in words]
    run("dsppo_continuous.py", *words, "--run-dir", tmp_path, env=ENV)
    low, high = re.search(r"scores (\d+) of (\d+), with five of five seeds", README.read_text()).groups()
    assert int(low) <= json.loads((only(tmp_path) / "result.json").read_text())["score"] <= int(high)


# --- logged names -----------------------------------------------------------------------------------------------------

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
            found |= {row[0].strip("`"): set().union(*(GROUPS[group] for group in row[1].split(", "))) for row in rows}
    for name in [name for name in found if name.startswith("eval/") and "sppo_rlhf_tldr" in found[name]]:
        found[name.replace("eval/", "test/")] = {"sppo_rlhf_tldr"}  # as the page says
    return found


@pytest.mark.parametrize("name", [*CONTROL, *RLHF])
def test_every_logged_name_is_in_metrics_md(name, tmp_path):
    if name in CONTROL:
        words = f"{TINY[name]} --eval-episodes 1 --num-threads 1".split()
    else:
        assets = rlhf_assets if name == "sppo_rlhf_imdb" else tldr_assets
        words = [*assets.arguments(assets.write_assets(tmp_path / "assets")), "--iterations", 2, "--eval-interval", 1]
        words += ["--ent-coef", 0.01, "--reference-nll-coef", 0.1]
    module = importlib.import_module(name)
    with unchanged_process():
        module.main(module.parse_args([*map(str, words), "--run-dir", str(tmp_path / "runs")]))
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
    named = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", text)
    assert len(named) >= len(items)
    known = {}
    for path in {path for path, _ in named}:
        nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
        known[path] = {getattr(node, attribute, None) for node in nodes for attribute in ("name", "id", "attr")}
    for path, names in named:
        assert set(re.findall(r"\w+", names)) <= known[path], path


def test_the_environment_and_the_notebook_line_of_usage_md(tmp_path, monkeypatch):
    text = (ROOT / "docs/usage.md").read_text()
    (module,) = re.findall(r"(?ms)^```python\n(# mytask\.py\n.*?)^```$", text)
    (tmp_path / "mytask.py").write_text(module)
    words = "--env-id mytask:Reach-v0 --num-steps 128 --total-timesteps 256 --eval-episodes 2"
    assert words.split(" --num")[0] in text
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = importlib.import_module("dsppo_continuous")
    with unchanged_process():
        module.main(module.parse_args(words.split()))
    assert len(json.loads((only(tmp_path / "runs") / "result.json").read_text())["returns"]) == 2
    line = re.search(r"`import dsppo_continuous as d; d\.main\((.*?)\)`", text).group(1)
    args = eval(line, {"d": module})  # the page's own words
    assert args == replace(module.Args(), env_id="CartPole-v1", total_timesteps=80_000)
    assert {field.name for field in fields(args)} >= {"wandb_project_name", "wandb_entity"}  # which runs.md names


# --- numbers ----------------------------------------------------------------------------------------------------------


def read(path, noise):
    """The rows of a csv file; noise: of the runs with noise, `without`, or None for those of all."""
    rows = csv.DictReader(path.open())
    return [row for row in rows if noise is None or (noise == "without") == (row["noise"] == "none")]


def test_cells_of_results_md_are_those_of_the_csv_files():
    """Each score, published score and chance, by its folder, arm, noise and other arm."""
    checked = 0
    for text in re.split(r"(?m)^##+ ", (ROOT / "docs/results.md").read_text()):
        folder = re.search(r"\[Folder\]\(\.\./(benchmark/results/[\w-]+)/report\.md\)", text)
        for head, *rows in [table for table in tables(text) if table[0][0] != "task"] if folder else ():
            noise = None
            for i, title in enumerate(head):
                *tag, title = title.split(": ")
                noise = tag[0] if tag else noise  # of this column and those right of it
                files = (ROOT / folder.group(1) / name for name in ("cells.csv", "aggregates.csv"))
                cells, chances = (read(path, noise) if path.exists() else [] for path in files)  # no chances of one seed
                for row in rows:
                    if title and title not in ("score", "the paper's") and not title.endswith(" is above"):
                        runs = [run for run in read(ROOT / folder.group(1) / "runs.csv", noise) if run["exp_name"] == row[0]]
                        scores = [f"{float(run['score']):,.0f}" for run in sorted(runs, key=lambda run: int(run["seed"]))]
                        report = (ROOT / folder.group(1) / "report.md").read_text().split("While training")[1]
                        shown = [row[i]] if row[i] in (", ".join(scores), *re.findall(r"[\d,]+ ± [\d,]+", report)) else []
                    elif title.endswith(" is above"):
                        pairs = [row for row in chances if row["what"].startswith("P(") and title[:-9].lower() == row["arm"]]
                        found = [
                            [f"{float(pair[name]):.2f}" for name in ("value", "low", "high")]
                            for pair in pairs
                            if row[0].lower() == pair["other"]
                        ]
                        shown = [f"{value} ({low} to {high})" for value, low, high in found]
                    else:
                        names = ("mean", "stderr") if title == "score" else ("paper_mean", "paper_stderr")
                        own = [cell for cell in cells if row[0].lower() == cell["arm"] and cell[names[0]]]
                        shown = [
                            " ± ".join(f"{float(cell[name]):,.{digits}f}" for name in names if cell[name])
                            for cell in own
                            for digits in (0, 1)
                        ]
                    if title and row[i]:
                        assert row[i] in shown, (folder.group(1), title, row)
                        checked += 1
    assert checked > 250
    cells = {cell["arm"]: f"{float(cell['mean']):,.0f}" for cell in read(RESULTS / "atari-ppo-stargunner/cells.csv", "bsc")}
    said = re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    assert f"our SPPO scores {cells['sppo']} and our PPO {cells['ppo']}, two seeds" in said


def test_the_table_of_tasks_in_results_md_is_that_of_its_report():
    """Each mean, error and published score, and in how many tasks DSPPO's mean is the higher one."""
    (text,) = [part for part in (ROOT / "docs/results.md").read_text().split("\n## ") if "| task | DPPO |" in part]
    cells = {(cell["task"], cell["arm"]): cell for cell in read(RESULTS / "continuous-ppo-full/cells.csv", None)}
    ((_, *rows),) = tables(text)
    assert {(row[0], arm) for row in rows for arm in ("dppo", "dsppo")} == set(cells)
    for task, *shown in rows:
        for arm, ours, papers in (("dppo", *shown[:2]), ("dsppo", *shown[2:4])):
            for value, names in ((ours, ("mean", "stderr")), (papers, ("paper_mean", "paper_stderr"))):
                numbers = [float(cells[task, arm][name]) for name in names if cells[task, arm][name]]
                assert value in [" ± ".join(f"{number:,.{digits}f}" for number in numbers) for digits in (0, 1)], (task, arm)
    above = sum(float(cells[row[0], "dsppo"]["mean"]) > float(cells[row[0], "dppo"]["mean"]) for row in rows)
    assert f"in {above} of {len(rows)} tasks" in " ".join(text.split())


def test_figures_of_the_oldest_studies_are_those_of_their_reports():
    """RLHF, and the runs beside Stable-Baselines3: means of the seeds."""
    means = set()
    for path in RESULTS.glob("learning-*/report.md"):
        means |= {cell.split(" (")[0] for rows in tables(path.read_text()) for row in rows for cell in row}
    text = (ROOT / "docs/results.md").read_text().split("## RLHF, ")[1]
    cells = [cell for _, *rows in tables(text) for row in rows for cell in row[1:] if cell]
    assert len(cells) > 40 and not set(cells) - means, set(cells) - means


STUDIES = {  # page: its studies, and which of their cells stand in it (ratios to SB3: in the README; phases are rounded there)
    "loss.md": ("four-settings", r"\d"),
    "speed.md": ("s[cp]*", r" to |\d s$|iB$"),
}


@pytest.mark.parametrize("page", STUDIES)
def test_figures_of_studies_are_those_of_their_reports(page):
    """Each figure of a study's report stands in the page: none is lost, none is mistyped."""
    studies, kept = STUDIES[page]
    found = {cell for rows in tables((ROOT / "docs" / page).read_text()) for row in rows for cell in row}
    count = 0
    for path in RESULTS.glob(f"{studies}/*.md"):
        for head, *rows in tables(path.read_text()):
            for row in rows if path.parent.name != "speed" or path.name != "report.md" else []:
                cells = [cell.split(" (all)")[0] for name, cell in zip(head, row, strict=True) if name not in ("", "seeds")]
                for cell in [cell for cell in cells if re.search(kept, cell)]:
                    assert cell in found or f"{cell}, float32" in found or cell == "0", (path, cell)
                    count += 1
    assert count >= 8


def test_ratios_of_the_readme_are_quotients_of_the_medians_of_speed_md():
    medians, arm = {}, None
    for head, *rows in tables((ROOT / "docs/speed.md").read_text()):
        if head[2:3] == ["steps/s, median (quartiles)"]:
            for task, name, steps, _ in rows:
                arm = task or arm
                medians.setdefault((head[3], arm), {})[name.split(" (")[0]] = float(steps.split(" ")[0].replace(",", ""))
    ((_, *rows),) = [rows for rows in tables(README.read_text()) if "H200" in "".join(rows[0])]
    found = 0
    for name, *cells in rows:
        for i, cell in enumerate(cells):
            arm = name.split(",")[0]
            of = [v for (kind, _), v in medians.items() if arm in v and (kind == "peak memory") == (i < 2)]
            if cell:
                steps, ratio = re.fullmatch(r"([\d,]+), (\d\.\d\d) \xd7 SB3", cell).groups()
                (of,) = of
                assert (
                    float(steps.replace(",", "")) == of[arm + (" --compile" if "bf16" in arm else " with --compile") * (i % 2)]
                )
                assert float(ratio) == pytest.approx(float(steps.replace(",", "")) / of["Stable-Baselines3"], rel=5e-3)
                found += 1
    assert found == 12


def test_the_python_versions_are_those_of_the_headers():
    assert "3.11, 3.12 or 3.13" in README.read_text()
    assert re.search(r'(?m)^# requires-python = ">=3.11,<3.14"$', (ROOT / "sppo_atari.py").read_text())
