"""The committed policies play as well as their README says, stay as they are, and the notebook plays one."""

import itertools
import json
import re
import shutil
import warnings

import gymnasium
import imageio
import numpy as np
import pytest
import torch
from helpers import ROOT, only, scalars, unchanged_process
from PIL import Image

import dsppo_continuous
import sppo_atari

POLICIES = ROOT / "benchmark/results/policies"
STARGUNNER = POLICIES / "StarGunner"
FOLDERS = sorted(path for path in POLICIES.iterdir() if path.is_dir() and path != STARGUNNER)
LANDER = POLICIES / "LunarLanderContinuous-v3"


@pytest.fixture
def folder(request, tmp_path):
    """A copy, so that no test changes what is committed."""
    names = shutil.ignore_patterns("videos", ".lock")
    return shutil.copytree(POLICIES / request.param, tmp_path / request.param, ignore=names)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_small_policy_of_eight_of_the_papers_tasks_with_all_that_identifies_it():
    assert len(FOLDERS) == 8 and LANDER in FOLDERS
    for folder in FOLDERS:
        files = contents(folder)
        assert {"args.json", "result.json", "checkpoint.pt"} <= {str(path) for path in files}
        size = sum(len(data) for path, data in files.items() if path.parts[0] != "videos")
        assert size < 300_000
        about, result = (json.loads((folder / name).read_text()) for name in ("args.json", "result.json"))
        assert all(result[name] == value for name, value in about.items())
        assert re.fullmatch("[0-9a-f]{40}", about["commit"])  # not dirty
        paper = vars(dsppo_continuous.Args(env_id=about["args"]["env_id"], total_timesteps=about["args"]["total_timesteps"]))
        assert (about["args"]["alpha"], about["args"]["beta"]) in ((0.5, 20.0), (1.0, 0.0))  # DSPPO, DPPO
        own = {"alpha", "beta", "seed", "exp_name", "wandb_project_name", "compile", "num_threads"}
        assert {name: about["args"][name] for name in paper.keys() - own} == {name: paper[name] for name in paper.keys() - own}


def test_the_readme_has_the_numbers_of_the_results():
    readme = (POLICIES / "README.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines() if line.startswith("| [")]
    assert [row[0] for row in rows] == [f"[{folder.name}]({folder.name})" for folder in [*FOLDERS, STARGUNNER]]
    for row, folder in zip(rows, [*FOLDERS, STARGUNNER], strict=True):
        result = json.loads((folder / "result.json").read_text())
        score = f"{result['score']:,.1f} ± {result['score_stderr']:,.1f}"
        assert row[1:4] == [str(result["args"]["seed"]), f"{result['global_step']:,}", score]
        assert row[5] == ("SPPO" if folder == STARGUNNER else "DSPPO" if result["args"]["beta"] else "DPPO")
        assert result["commit"].startswith(row[4].strip("`")) and len(row[4]) >= 9


def command(*words):
    """The script in this process, as from the command line, without a warning for arguments of an earlier version."""
    with unchanged_process(), warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*ignored arguments")
        dsppo_continuous.main(dsppo_continuous.parse_args(list(map(str, words))))


@pytest.mark.parametrize("folder", [path.name for path in FOLDERS], indirect=True)
def test_a_committed_policy_plays_as_it_scored_and_has_finished(folder, capsys):
    """In other episodes than result.json's: by Gymnasium's threshold what the README calls solved, the others by half their
    score, which no untrained policy has. No exact numbers: another CPU may round otherwise."""
    before = contents(folder)
    command("--evaluate", folder, "--seed", 7, "--eval-episodes", 5)
    returns = json.loads(capsys.readouterr().out.split("returns ")[1])
    score, solved = json.loads((folder / "result.json").read_text())["score"], gymnasium.spec(folder.name).reward_threshold
    assert (score > (solved or np.inf)) == folder.name.startswith(("Inverted", "Lunar", "Bipedal", "Half"))
    assert len(returns) == 5 and np.median(returns) > (solved if score > (solved or np.inf) else score / 2)
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


def test_stargunners_policy_is_the_papers_settings_and_plays(tmp_path):
    """Against chance: a random game ends near 650 points; this policy has three times that in its first 3,000 steps."""
    about, result = (json.loads((STARGUNNER / name).read_text()) for name in ("args.json", "result.json"))
    assert all(result[name] == value for name, value in about.items()) and len(about["commit"]) == 40
    paper = vars(sppo_atari.Args(env_id="StarGunner", noise="bsc", beta=10.0))
    own = {"exp_name", "bf16", "eval_interval", "num_threads", "seed", "wandb_project_name"}
    assert {name: about["args"][name] for name in paper.keys() - own} == {name: paper[name] for name in paper.keys() - own}
    assert sum(len(data) for path, data in contents(STARGUNNER).items() if path.parts[0] != "videos") < 3_600_000
    assert torch.load(STARGUNNER / "checkpoint.pt", weights_only=True)["agent"]["actor.weight"].dtype == torch.float16
    copy = shutil.copytree(STARGUNNER, tmp_path / "run", ignore=shutil.ignore_patterns("videos", ".lock"))
    (copy / "args.json").write_text(json.dumps(about | {"args": about["args"] | {"bf16": False}}))  # quick on any CPU
    torch.manual_seed(1)
    policy, envs = sppo_atari.load_policy(copy)
    (obs, _), points = envs.reset(seed=1), 0.0
    for _ in range(3_000):
        obs, rewards, *_ = envs.step(policy(obs))
        points += rewards.item()
    envs.close()
    assert points > 2_000


@pytest.mark.parametrize("name", ["policy", "stargunner"])
def test_the_moving_pictures_are_small_and_move(name):
    path = ROOT / f"docs/{name}.gif"
    assert path.stat().st_size < 1_000_000
    frames = imageio.mimread(path)
    assert len(frames) > 50 and all(frame.shape[:2] == frames[0].shape[:2] for frame in frames)
    moved = [np.any(a != b) for a, b in itertools.pairwise(frames)]
    assert np.mean(moved) > 0.9
    assert Image.open(path).info["loop"] == 0  # for ever
