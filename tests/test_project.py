"""The project's own promises: pins, copied helpers, copied data, the README's commands.

python tests/test_project.py --fix    # after a change of a helper: write it into every script that has it
"""

import ast
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
OWN = {"Args", "update", "train", "name_arm", "check"}  # what each script has in a form of its own
# what the control scripts of one family of environments share, and the other family has in another form
FAMILY = {"Agent", "act", "evaluate", "gradient_step", "load_agent", "load_policy"}
FAMILY |= {"minibatch_loss", "resolve_env", "rollout_loss"}
# What differs between the RLHF scripts: a classifier and a trained model there, adapters on one base here
RLHF_OWN = {"Agent", "encode", "evaluate", "load_models", "load_texts", "rollout", "save_policy", "score"}
RLHF_OWN |= {"trained_parameters", "check_task", "load_reward"}
# above Operations, and in all: a line more has to earn its place
LINES = {"atari": (410, 754), "continuous": (520, 895), "imdb": (546, 1218), "tldr": (638, 1383)}


def pins(path):
    """What `pip install -r path` asks for, with the files that it includes."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    included = [pins(path.parent / line.removeprefix("-r ")) for line in lines if line.startswith("-r ")]
    return {line for line in lines if line and not line.startswith("-r")}.union(*included)


def pep723(script):
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", script.read_text()).group(1)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in block.splitlines(keepends=True)))


def test_there_are_scripts():
    names = {script.name for script in SCRIPTS}
    assert {"sa2c_atari.py", "sppo_atari.py", "dsa2c_continuous.py", "dsppo_continuous.py", "sppo_rlhf_imdb.py"} <= names
    assert "sppo_rlhf_tldr.py" in names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_pep_723_header_has_the_pins_of_requirements_txt(script):
    header = pep723(script)
    assert header["requires-python"] == ">=3.11,<3.14"
    assert set(header["dependencies"]) <= pins(ROOT / "requirements.txt")
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    named = {re.split("==", pin)[0].replace("-", "_") for pin in header["dependencies"]}
    assert imported - sys.stdlib_module_names <= named
    # used by torch, by imageio and by gymnasium
    assert named - imported <= {"tensorboard", "imageio_ffmpeg", "mujoco", "box2d", "pygame_ce"}


@pytest.mark.parametrize(("file", "number"), [("requirements.txt", 6), ("requirements-control.txt", 4)])
def test_a_requirements_file_has_what_its_scripts_need_and_no_more(file, number):
    scripts = [script for script in SCRIPTS if number == 6 or "_rlhf_" not in script.name]
    assert len(scripts) == number
    assert pins(ROOT / file) == set().union(*(pep723(script)["dependencies"] for script in scripts))


def test_every_pin_is_exact_and_has_its_reason():
    nested = (*ROOT.glob("*/requirements.txt"), *ROOT.glob("benchmark/*/requirements*.txt"))
    for path in (*ROOT.glob("requirements*.txt"), *nested):
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+ +# .{8,}", line), line


def copied(source, name):
    """What the script `name` with this source shares with others: {(what, scripts): text}. Helpers of one name, and the
    sections whose headline says "the same in", whole.
    """
    lines, found, in_sections = source.splitlines(keepends=True), {}, set()
    group = "rlhf" if "_rlhf_" in name else "control"
    headlines = [i for i, line in enumerate(lines) if re.match(r"# (---|===) ", line)] + [len(lines)]
    for start, end in itertools.pairwise(headlines):
        if "(the same in " in lines[start]:
            found[lines[start].strip("# -\n"), group] = "".join(lines[start:end])
            in_sections |= set(range(start, end))
    for node in ast.parse(source).body:
        own = OWN | (RLHF_OWN if group == "rlhf" else set())
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in own and node.lineno not in in_sections:
            family = group == "control" and node.name in FAMILY
            key = (
                node.name,
                Path(name).stem.split("_")[1]
                if family
                else "all"
                if node.name in ("compute_gae", "symmetric_ppo_loss")
                else group,
            )
            start = min(each.lineno for each in (node, *node.decorator_list))
            found[key] = "".join(lines[start - 1 : node.end_lineno])
    return found


def copies(root):
    """{(what, scripts): {script: text}}"""
    found = {}
    for script in sorted(root.glob("*.py")):
        for key, text in copied(script.read_text(), script.name).items():
            found.setdefault(key, {})[script] = text
    return found


def fix(root):
    """Writes what was changed since the last commit, and where that is not one text the newest, into every other script."""
    written = {script: script.stat().st_mtime for script in root.glob("*.py")}
    for key, texts in copies(root).items():
        changed = {}
        for script, text in texts.items() if len(set(texts.values())) > 1 else ():
            head = subprocess.run(["git", "show", f"HEAD:./{script.name}"], cwd=root, capture_output=True, text=True).stdout
            if copied(head, script.name).get(key) != text:
                changed[script] = text
        for source in sorted(changed, key=written.get)[-1:]:
            others = [script for script in texts if texts[script] != texts[source]]
            for script in others:
                script.write_text(script.read_text().replace(texts[script], texts[source]))
            print(f"{key[0]}: {source.name} -> {', '.join(script.name for script in others)}")


def test_what_scripts_share_is_identical_to_the_character():
    found = copies(ROOT)
    sizes = {key: len(texts) for key, texts in found.items()}
    assert sizes["run folder (the same in the four control scripts)", "control"] == 4 and sizes["compute_gae", "all"] == 6
    assert (
        sizes["symmetric_ppo_loss", "all"] == sizes["layer_init", "control"] == 4 == 2 * sizes["symmetric_a2c_loss", "control"]
    )
    assert sizes["Agent", "atari"] == sizes["evaluate", "continuous"] == sizes["make_bins", "control"] == 2
    for key, texts in found.items():
        assert len(set(texts.values())) == 1, (
            f"{key} differs; `python tests/test_project.py --fix` writes the newest everywhere"
        )


def test_fix_writes_a_changed_helper_into_every_script_that_has_it(tmp_path):
    for path in (*SCRIPTS, Path(__file__)):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    for words in ("init", "add .", "-c user.name=a -c user.email=b commit -m x"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True, capture_output=True)
    before = {script.name: (tmp_path / script.name).read_text() for script in SCRIPTS}

    def edit(name, old, new, age):
        text = (tmp_path / name).read_text()
        assert text.count(old) == 1
        (tmp_path / name).write_text(text.replace(old, new))
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))

    gae = "    alive = 1.0 - dones\n"
    edit(
        "sa2c_atari.py", "once more quits now", "once more ends it now", 0
    )  # in the section, in a script that is edited thrice
    edit("sa2c_atari.py", "restarts within the same step", "restarts in the same step", 0)
    edit("sa2c_atari.py", gae, "    alive = 1 - dones\n", 10)
    edit("dsa2c_continuous.py", gae, "    alive = 1 - 1.0 * dones\n", 5)  # newer, so it wins
    edit("dsa2c_continuous.py", "two hidden layers of 64", "2 hidden layers of 64", 5)
    edit("dsppo_continuous.py", '"""DSPPO: PPO over bins', '"""DSPPO: PPO on bins', 0)  # its own
    command = [sys.executable, "tests/test_project.py", "--fix"]
    said = [subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert said[1] == ""
    assert sorted(said[0].splitlines()) == [
        "Agent: dsa2c_continuous.py -> dsppo_continuous.py",
        "compute_gae: dsa2c_continuous.py -> "
        "dsppo_continuous.py, sa2c_atari.py, sppo_atari.py, sppo_rlhf_imdb.py, sppo_rlhf_tldr.py",
        "make_envs: sa2c_atari.py -> sppo_atari.py",
        "run folder (the same in the four control scripts): "
        "sa2c_atari.py -> dsa2c_continuous.py, dsppo_continuous.py, sppo_atari.py",
    ]
    for name, text in before.items():
        text = text.replace(gae, "    alive = 1 - 1.0 * dones\n").replace("two hidden layers of 64", "2 hidden layers of 64")
        text = text.replace("restarts within the same step", "restarts in the same step").replace(
            "DSPPO: PPO over", "DSPPO: PPO on"
        )
        if "_rlhf_" not in name:
            text = text.replace("once more quits now", "once more ends it now")
        assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_the_algorithm_in_few_lines_and_then_operations(script):
    source = script.read_text()
    above, below = re.split(r"(?m)^# === Operations: nothing below changes what is learned =+$", source)
    most_above, most = LINES[script.stem.split("_")[-1]]
    assert above.count("\n") + 1 <= most_above and source.count("\n") <= most
    assert "\ndef train(args, run" in above and "\ndef main(args):" in below and "advantages" not in below
    (train,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "train")
    assert train.end_lineno - train.lineno + 1 <= 120
    assert not [node for node in ast.walk(train) if isinstance(node, ast.FunctionDef | ast.Lambda) and node is not train]


def test_operations_of_the_rlhf_scripts_are_one_text():
    sources = [script.read_text() for script in SCRIPTS if "_rlhf_" in script.name]
    ends = [re.split(r"(?m)^# --- run folder \(the same in both RLHF scripts\) -*$", source) for source in sources]
    assert len(sources) == 2 and all(len(parts) == 2 for parts in ends)
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_import_nothing_of_the_project(script):
    own = {path.stem for path in SCRIPTS} | {"benchmark", "tests"}
    for node in ast.walk(ast.parse(script.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not own & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_argument_has_a_help_text(script):
    """In its line, after the default."""
    lines = script.read_text().splitlines()
    (args,) = (node for node in ast.parse(script.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    given = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    assert len(given) > 30
    for node in given:
        assert re.search(r"  # \S.{7,}$", lines[node.end_lineno - 1]), node.target.id


@pytest.mark.parametrize(
    ("script", "family", "algorithm"),
    [
        ("sppo_atari", "atari", "ppo"),
        ("sa2c_atari", "atari", "a2c"),
        ("dsppo_continuous", "continuous", "ppo"),
        ("dsa2c_continuous", "continuous", "a2c"),
    ],
)
def test_defaults_are_the_papers(script, family, algorithm):
    settings = tomllib.loads((ROOT / "benchmark/paper/hyperparameters.toml").read_text())[family]
    args = vars(importlib.import_module(script).Args())
    for name, value in settings[algorithm].items():
        if isinstance(value, dict):  # by task or by noise; the default is Hopper without noise
            value = value["none"] if name == "beta" else value
            value = value.get("Hopper-v4", value.get("default")) if isinstance(value, dict) else value
        assert args[name] == value, name
    for name in {"total_timesteps", "alpha", "Z", "num_bins"} & settings.keys():
        assert args[name] == settings[name], name
    noise = settings["noise"]
    assert args["noise_prob" if family == "atari" else "noise_std"] == noise.get("crossover", noise.get("std"))
    assert args["norm_adv"] == (algorithm == "ppo") and args["anneal_lr"] == (script == "sppo_atari")
    assert args["noise"] == "none" and args["env_id"] == ("Alien" if family == "atari" else "Hopper")


def test_defaults_of_the_imdb_script_are_the_papers():
    settings = tomllib.loads((ROOT / "benchmark/paper/hyperparameters.toml").read_text())["rlhf"]["imdb"]
    args = vars(importlib.import_module("sppo_rlhf_imdb").Args())
    assert args["eval_interval"] == settings.pop("eval_every")
    assert {name for name in settings if name not in args} == {"prompt", "metrics"}  # prose
    for name in settings.keys() & args.keys():
        assert args[name] == settings[name], name
    assert args["min_response_length"] == 48 and args["reward_label"] == "1" and args["weight_decay"] == 1e-6


def test_defaults_of_the_tldr_script_are_the_papers():
    settings = tomllib.loads((ROOT / "benchmark/paper/hyperparameters.toml").read_text())["rlhf"]["tldr"]
    args = vars(importlib.import_module("sppo_rlhf_tldr").Args())
    lora = settings.pop("lora")
    assert lora["dropout"] == 0.1
    lora["dropout"] = 0.0  # the released code switches it off before each forward pass
    assert {f"lora_{name}": value for name, value in lora.items()} == {
        name: args[name] for name in args if name[:5] == "lora_" and name != "lora_target_modules"
    }
    assert {name for name in settings if name not in args} == {"prompt", "metrics"}  # prose
    assert settings.pop("reward_model") == f"{args['reward_base']} + adapter {args['reward_adapter']}"
    assert args["reward_model"] is None  # a whole one would take their place
    assert settings.pop("reward_text").startswith(args["reward_text"].replace("{text}", "{prompt and summary}"))
    for name in settings.keys() & args.keys():
        assert args[name] == settings[name], name
    assert args["reward_max_length"] == 550 and args["weight_decay"] == 0.01 and args["top_k"] == 50
    assert args["eval_episodes"] == 100 and args["test_episodes"] == 500


def test_ci_runs_the_readmes_test_command():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    install, train, install_tests, test = re.findall(
        r"(?m)^(?:python3 -m venv .*|\.venv/bin/python .*(?:50000|pytest))$", readme
    )
    assert install.startswith("python3 -m venv .venv && .venv/bin/pip install -r ")
    assert train.startswith(".venv/bin/python sppo_atari.py --env-id Alien --beta 10 --noise bsc")
    for part in [*install_tests.split(" && "), test]:
        assert part.replace("pip install", "pip install --quiet") in ci or part in ci


def test_citation_names_the_software_the_licence_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    assert citation["authors"] and all("name" in author or "family-names" in author for author in citation["authors"])
    assert (ROOT / "LICENSE").read_text().startswith(f"{citation['license']} License")
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Byun", "Perrault"] and paper["year"] == 2025
    (arxiv,) = paper["identifiers"]
    number = arxiv["value"].removeprefix("arXiv:")
    assert number == "2405.17618" and all(number in script.read_text() for script in SCRIPTS)


def test_ci_workflow_calls_ci_run_on_versions_that_the_scripts_take():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["steps"][-1] == {"run": "bash .ci/run"}
    assert set(job["strategy"]["matrix"]["python"]) <= {"3.11", "3.12", "3.13"}


def test_issue_templates_ask_for_args_json():
    templates = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"))
    assert len(templates) == 2
    for template in templates:
        _, header, body = template.read_text().split("---\n", 2)
        assert yaml.safe_load(header).keys() >= {"name", "about"} and "args.json" in body


def test_contributing_names_files_and_tests_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"(?:tests|benchmark|\.ci)/[\w./]*\w", text)
    assert len(paths) >= 4 and all((ROOT / path).exists() for path in paths)
    for name in re.findall(r"`(\w+)`", text):  # Args, update, minibatch_loss ...
        assert any(re.search(rf"\b{name}\b", script.read_text()) for script in [*SCRIPTS, ROOT / "pyproject.toml"]), name


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(__doc__)
    fix(ROOT)
