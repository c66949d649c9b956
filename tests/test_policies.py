"""The committed policies play as well as their README says, stay as they are, and the notebook plays one."""

import contextlib
import io
import itertools
import json
import re
import shutil
import sys

import gymnasium
import imageio
import numpy as np
import pytest
from helpers import ROOT, only, scalars, unchanged_process
from PIL import Image

import dsppo_continuous

POLICIES = ROOT / "benchmark/results/policies"
FOLDERS = sorted(path for path in POLICIES.iterdir() if path.is_dir())
LANDER = POLICIES / "LunarLanderContinuous-v3"


@pytest.fixture
def folder(request, tmp_path):
    """A copy, so that no test changes what is committed."""
    names = shutil.ignore_patterns("videos", ".lock")
    return shutil.copytree(POLICIES / request.param, tmp_path / request.param, ignore=names)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_or_three_small_policies_with_all_that_identifies_them():
    assert 2 <= len(FOLDERS) <= 3 and LANDER in FOLDERS
    for folder in FOLDERS:
        files = contents(folder)
        assert {"args.json", "result.json", "checkpoint.pt"} <= {str(path) for path in files}
        size = sum(len(data) for path, data in files.items() if path.parts[0] != "videos")
        assert size < 300_000
        about, result = (json.loads((folder / name).read_text()) for name in ("args.json", "result.json"))
        assert all(result[name] == value for name, value in about.items())
        assert re.fullmatch("[0-9a-f]{40}", about["commit"])  # not dirty
        paper = vars(dsppo_continuous.Args(env_id=about["args"]["env_id"], total_timesteps=about["args"]["total_timesteps"]))
        own = {"seed", "exp_name", "wandb_project_name"}  # their defaults have changed since
        assert {name: about["args"][name] for name in paper.keys() - own} == {name: paper[name] for name in paper.keys() - own}


def test_the_readme_has_the_numbers_of_the_results():
    readme = (POLICIES / "README.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines() if line.startswith("| [")]
    assert [row[0] for row in rows] == [f"[{folder.name}]({folder.name})" for folder in FOLDERS]
    for row, folder in zip(rows, FOLDERS, strict=True):
        result = json.loads((folder / "result.json").read_text())
        score = f"{result['score']:,.1f} ± {result['score_stderr']:.1f}"
        assert row[1:4] == [str(result["args"]["seed"]), f"{result['global_step']:,}", score]
        assert result["commit"].startswith(row[4].strip("`")) and len(row[4]) >= 9


def command(*words):
    """The script in this process: as from the command line, with a warning for the arguments of an earlier version."""
    with unchanged_process(), pytest.warns(UserWarning, match="ignored arguments of an earlier version: .*wandb_group"):
        dsppo_continuous.main(dsppo_continuous.parse_args(list(map(str, words))))


@pytest.mark.parametrize("folder", [path.name for path in FOLDERS], indirect=True)
def test_a_committed_policy_solves_its_task_and_has_finished(folder, capsys):
    """By Gymnasium's threshold, in other episodes than result.json's. No exact numbers: another CPU may round otherwise."""
    before = contents(folder)
    command("--evaluate", folder, "--seed", 7, "--eval-episodes", 5)
    returns = json.loads(capsys.readouterr().out.split("returns ")[1])
    assert len(returns) == 5 and np.median(returns) > gymnasium.spec(folder.name).reward_threshold
    command("--resume", folder)
    steps = f"{json.loads((folder / 'result.json').read_text())['global_step']:,}"
    assert f"{folder} has finished its {steps} steps; a larger --total-timesteps continues it" in capsys.readouterr().out
    assert contents(folder) == before


@pytest.mark.parametrize("folder", [LANDER.name], indirect=True)
def test_a_larger_total_timesteps_trains_it_further_and_it_is_filmed_without_a_screen(folder, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    done = json.loads((folder / "result.json").read_text())["global_step"]
    command("--resume", folder, "--total-timesteps", done + 2048, "--eval-episodes", 1, "--capture-video")
    assert json.loads((folder / "result.json").read_text())["global_step"] == done + 2048
    history = scalars(folder)
    assert [step for step, _ in history["losses/value_loss"]] == [done + 2048]
    assert history["charts/episodic_return"][0][1] > 0  # as an agent does that has not lost what it knew
    assert imageio.get_reader(only(folder / "videos")).count_frames() > 50


def test_the_moving_picture_is_small_and_moves():
    path = ROOT / "docs/policy.gif"
    assert path.stat().st_size < 1_000_000
    frames = imageio.mimread(path)
    assert len(frames) > 50 and all(frame.shape[:2] == frames[0].shape[:2] for frame in frames)
    moved = [np.any(a != b) for a, b in itertools.pairwise(frames)]
    assert np.mean(moved) > 0.9
    assert Image.open(path).info["loop"] == 0  # for ever


def cells(kind):
    notebook = json.loads((ROOT / "docs/play.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def play(monkeypatch, namespace, sources):
    """Runs code cells in one namespace, in the notebook's folder, as Jupyter does but without a kernel."""
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", [*sys.path])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for source in sources:
            exec(compile(source, "play.ipynb", "exec"), namespace)
    return printed.getvalue()


def test_the_notebook_plays_the_policy_and_sb3_gets_the_four_settings(monkeypatch):
    namespace = {}
    printed = play(monkeypatch, namespace, ["".join(cell["source"]) for cell in cells("code")])
    score = json.loads((LANDER / "result.json").read_text())["score"]
    assert f"score {score:.0f} ±" in printed
    assert namespace["episode_return"] > 200 and f"return {namespace['episode_return']:.1f}" in printed
    assert len(namespace["frames"]) > 50 and namespace["frames"][0].shape == (400, 600, 3)
    model = namespace["model"]  # w is 20.5
    assert model.num_timesteps == 2048
    settings = (model.vf_coef, model.ent_coef, model.max_grad_norm, model.policy.optimizer.param_groups[0]["eps"])
    assert settings == pytest.approx((0.024390, 0.00048780, 0.024390, 4.8780e-7), rel=1e-4)


def test_without_sb3_the_notebook_says_so_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)  # as if it were not installed
    printed = play(monkeypatch, {}, ["".join(cells("code")[-1]["source"])])
    assert printed.count("\n") == 1
    assert printed.startswith("Stable-Baselines3 is not installed: pip install stable-baselines3==")
    assert printed.split("install ")[-1].strip() in (ROOT / "tests/requirements.txt").read_text()


def test_the_notebook_is_committed_with_its_pictures_and_without_errors():
    assert (ROOT / "docs/play.ipynb").stat().st_size < 300_000
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [cell["execution_count"] for cell in cells("code")] == list(range(1, len(cells("code")) + 1))
