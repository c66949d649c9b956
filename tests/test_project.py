"""The project's own promises: pins, copied helpers, copied data, the README's commands."""

import ast
import importlib
import itertools
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
OWN = {"Args", "update", "train"}  # what each script has in a form of its own
CONTROL_OWN = {"Args", "update", "train", "check_env", "load_agent", "load_policy", "resolve_env"}
FAMILY = {"Agent", "act", "evaluate", "minibatch_loss", "rollout_loss", "rollout"}  # and what those of other environments have
# What differs between the RLHF scripts: a classifier and a trained model there, adapters on one base here
RLHF_OWN = {"Agent", "encode", "evaluate", "load_models", "load_texts", "rollout", "save_policy", "score"}
RLHF_OWN |= {"trained_parameters", "check_task", "load_reward"}


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


def helpers(scripts, own):
    """name (for what is of one family of environments, name and family) -> its copies as (script, text)."""
    found = {}
    for script in scripts:
        source = script.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in own:
                key = (node.name, script.stem.split("_")[1]) if node.name in FAMILY else node.name
                found.setdefault(key, []).append((script.name, ast.get_source_segment(source, node)))
    return found


def test_helpers_of_one_name_are_identical_to_the_character():
    rlhf = [script for script in SCRIPTS if "_rlhf_" in script.name]
    control = [script for script in SCRIPTS if "_rlhf_" not in script.name]
    found = [helpers(control, CONTROL_OWN), helpers(rlhf, OWN | RLHF_OWN)]
    assert len(found[0]["compute_gae"]) == len(found[0]["Run"]) == 4 and len(found[1]["compute_gae"]) == 2
    assert len(found[0]["symmetric_ppo_loss"]) == len(found[0]["symmetric_a2c_loss"]) == 2
    assert len(found[0][("Agent", "atari")]) == len(found[0][("evaluate", "continuous")]) == 2
    both = (
        "symmetric_ppo_loss compute_gae grad_shares write_atomically write_json git_commit keep_freed_memory say fail one_line"
    )
    for name in (*both.split(), "flag", "require", "read_command_line", "parse_args", "load_checkpoint", "check_tracking"):
        assert len({text for part in found for _, text in part[name]}) == 1, name  # in all scripts that have it
    for name, copies in itertools.chain.from_iterable(part.items() for part in found):
        for (file, text), (other_file, other_text) in itertools.combinations(copies, 2):
            assert text == other_text, f"{name} differs between {file} and {other_file}"


def test_operations_of_the_control_scripts_are_one_text():
    sources = [script.read_text() for script in SCRIPTS if "_rlhf_" not in script.name]
    assert len(sources) == 4
    ends = [re.split(r"(?m)^# --- run: one text in the control scripts from here on -*$", source) for source in sources]
    assert all(len(parts) == 2 for parts in ends)
    assert len({end for _, end in ends}) == 1 and len(ends[0][1].splitlines()) > 400
    for source in sources:  # the algorithm, with its loop, stands above the line, and main() below it
        above, below = re.split(r"(?m)^# === Operations: nothing below changes what is learned =+$", source)
        assert "\ndef train(args, run):" in above and "\ndef main(args):" in below and "advantages" not in below
        (train,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "train")
        assert train.end_lineno - train.lineno + 1 <= 110
        assert not [node for node in ast.walk(train) if isinstance(node, ast.FunctionDef | ast.Lambda) and node is not train]


def test_operations_of_the_rlhf_scripts_are_one_text():
    sources = [script.read_text() for script in SCRIPTS if "_rlhf_" in script.name]
    ends = [re.split(r"(?m)^# --- run folder \(the same in both RLHF scripts\) -*$", source) for source in sources]
    assert len(sources) == 2 and all(len(parts) == 2 for parts in ends)
    assert ends[0][1] == ends[1][1]
    for source in sources:
        above, below = re.split(r"(?m)^# === Operations: nothing below changes what is learned =+$", source)
        assert "\ndef train(args, run, " in above and "\ndef main(args):" in below and "advantages" not in below
        (train,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "train")
        assert train.end_lineno - train.lineno + 1 <= 110
        assert not [node for node in ast.walk(train) if isinstance(node, ast.FunctionDef | ast.Lambda) and node is not train]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_import_nothing_of_the_project(script):
    own = {path.stem for path in SCRIPTS} | {"benchmark", "tests"}
    for node in ast.walk(ast.parse(script.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not own & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_argument_has_a_docstring(script):
    (args,) = (node for node in ast.parse(script.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    for field, docstring in itertools.pairwise(args.body[1:]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(docstring, ast.Expr) and isinstance(docstring.value.value, str), field.target.id


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
    assert all(arxiv["value"] in script.read_text() for script in SCRIPTS)


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
