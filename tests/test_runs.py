"""Whole runs of sppo_atari.py, as a user starts them: output, determinism, bad input, kills, signals, resuming, W&B."""

import json
import random
import re
import shutil
import signal
import sys
import time
from functools import partial
from importlib.metadata import version

import helpers
import imageio
import numpy as np
import pytest
import torch
from helpers import ENV, needs_compiler, no_process_outlives_its_test, only, scalars, wait_for, wandb_run  # noqa: F401

import sppo_atari

run, start = partial(helpers.run, "sppo_atari.py"), partial(helpers.start, "sppo_atari.py")
SMALL = ["--env-id", "Breakout", "--num-envs", 4, "--num-steps", 32, "--minibatch-size", 64]
SMALL += ["--update-epochs", 1, "--num-threads", 1]
LOSSES = ["policy_loss", "reverse_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"]


def call(*args):
    """main() in this process: what a command line does, without starting Python and torch again."""
    with helpers.unchanged_process():
        parsed = sppo_atari.parse_args(list(map(str, args)), sppo_atari.Args())
        sppo_atari.check_args(parsed)
        sppo_atari.main(parsed)


@pytest.fixture(scope="module")
def noisy_run(tmp_path_factory):
    """A finished run with everything on: noise, interval evaluation, video, an offline W&B run."""
    parent = tmp_path_factory.mktemp("runs")
    args = "--total-timesteps 1300 --eval-episodes 2 --eval-interval 600 --noise bsc --capture-video --track --seed 3"
    out, err = run(*SMALL, *args.split(), "--run-dir", parent, env={**ENV, "WANDB_MODE": "offline"})
    return only(parent, "Breakout*"), out, err


def test_a_run_leaves_what_the_readme_says(noisy_run):
    folder, out, _ = noisy_run
    assert re.fullmatch(r"Breakout__sppo_atari__3__\d+", folder.name)
    assert "Breakout on cpu, " in out and "score" in out.splitlines()[-1]
    saved = json.loads((folder / "args.json").read_text())
    assert saved["args"]["noise"] == "bsc" and saved["env_id"] == "Breakout" and saved["versions"]["torch"] == version("torch")
    result = json.loads((folder / "result.json").read_text())
    assert result["global_step"] == 1280  # 10 iterations of 4 x 32
    assert result["score"] == pytest.approx(np.mean(result["returns"])) and len(result["returns"]) == 2
    assert result["score_stderr"] == pytest.approx(np.std(result["returns"], ddof=1) / 2**0.5)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == 1280
    assert sorted(path.name for path in folder.glob("videos/*")) == ["1280.mp4", "640.mp4"]
    assert imageio.get_reader(folder / "videos" / "1280.mp4").count_frames() > 20

    logged = scalars(folder)
    assert [step for step, _ in logged["charts/SPS"]] == list(range(128, 1281, 128))
    assert [step for step, _ in logged["eval/episodic_return"]] == [640, 1280]
    assert logged["eval/episodic_return"][-1][1] == pytest.approx(result["score"])
    for name in [*LOSSES, "explained_variance"]:
        assert len(logged[f"losses/{name}"]) == 10
    rates = [rate for _, rate in logged["charts/learning_rate"]]
    assert rates == pytest.approx([2.5e-4 * left / 10 for left in range(10, 0, -1)])
    assert all(0 < rate < 0.35 for _, rate in logged["charts/noise_rate"])
    assert all(0 <= share <= 1 for _, share in logged["charts/adv_sign_change"])


def test_wandb_offline_records_config_scalars_and_video(noisy_run):
    folder, _, _ = noisy_run
    file = only(folder.parent, "wandb/offline-run-*/run-*.wandb")
    config, history = wandb_run(file)
    saved = json.loads((folder / "args.json").read_text())
    for name, value in saved["args"].items():
        assert config[name] == value, name
    assert config["versions"] == saved["versions"] and config["commit"] == saved["commit"]

    logged = scalars(folder)
    for tag in ("losses/policy_loss", "charts/SPS", "eval/episodic_return"):
        points = [(row["global_step"], row[tag]) for row in history if tag in row]
        assert points == [(step, pytest.approx(value)) for step, value in logged[tag]], tag  # each step once, in order
    videos = [row for row in history if any(key.startswith("videos") for key in row)]
    assert [row["global_step"] for row in videos] == [640, 1280]
    assert len(list(file.parent.glob("files/media/videos/**/*.mp4"))) == 2


def test_track_without_a_key_is_one_line_and_creates_nothing(tmp_path):
    _, err = run(*SMALL, "--track", "--run-dir", tmp_path / "runs", code=2, env={**ENV, "HOME": str(tmp_path)})
    assert err.splitlines()[-1].startswith("sppo_atari.py: error: --track") and "WANDB_MODE=offline" in err
    assert not (tmp_path / "runs").exists()


def test_same_seed_same_curve_and_another_seed_another(tmp_path):
    curves = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        args = ["--total-timesteps", 384, "--eval-episodes", 1, "--seed", seed, "--num-threads", 2]
        call(*SMALL[:-2], *args, "--run-dir", tmp_path / name)
        logged = scalars(only(tmp_path / name))
        curves.append({tag: points for tag, points in logged.items() if tag != "charts/SPS"})
    assert curves[0] == curves[1]
    assert curves[0]["losses/entropy"] != curves[2]["losses/entropy"]


def test_noise_changes_what_the_learner_sees_and_not_the_logged_returns(tmp_path):
    """With a learning rate that rounds to nothing the policy stays: the same actions, games and logged scores."""
    logs = []
    for noise in ("none", "bsc"):
        args = ["--total-timesteps", 2560, "--learning-rate", 1e-30, "--eval-episodes", 1, "--noise", noise]
        call(*SMALL, *args, "--run-dir", tmp_path / noise)
        logs.append(scalars(only(tmp_path / noise)))
    clean, noisy = logs
    for tag in ("charts/episodic_return", "charts/episodic_length", "eval/episodic_return"):
        assert len(clean[tag]) > 0 and clean[tag] == noisy[tag]
    assert clean["losses/value_loss"] != noisy["losses/value_loss"]
    rates = [rate for _, rate in noisy["charts/noise_rate"]]
    assert abs(np.mean(rates) - 0.1) < 5 * (0.09 / 2560) ** 0.5
    assert "charts/noise_rate" not in clean


BAD = [  # command line, what the one line must hold
    (
        "--env-id Alein",
        "--env-id Alein: no such Atari game (Environment `Alein` doesn't exist in namespace ALE. Did you mean: `Alien`?)",
    ),
    ("--num-envs 0", "--num-envs 0: must be greater than 0"),
    ("--num-envs many", "--num-envs: invalid literal for int() with base 10: 'many'"),
    ("--num-evns 4", "--num-evns: unknown argument; did you mean --num-envs?"),
    ("--num-minibatches 4", "--num-minibatches: unknown argument; did you mean --minibatch-size?"),
    ("--no_anneal_rl", "--no_anneal_rl: unknown argument; did you mean --anneal-lr?"),
    ("--xyzzy 4", "--xyzzy: unknown argument; see --help"),
    ("--adam-eps 0", "--adam-eps 0.0: must be greater than 0"),
    ("--adam-eps nan", "--adam-eps nan: must be a finite number"),
    ("--minibatch-size 100", "--minibatch-size 100: expected a divisor of num_envs x num_steps = 1024"),
    ("--minibatch-size 1", "--minibatch-size 1: expected 2 or more with norm_adv"),
    ("--total-timesteps 1000", "--total-timesteps 1000: expected num_envs x num_steps = 1024 or more"),
    ("--learning-rate nan", "--learning-rate nan: must be a finite number"),
    ("--gamma 1.5", "--gamma 1.5: must be less than or equal to 1"),
    ("--noise-prob -0.1", "--noise-prob -0.1: must be greater than or equal to 0"),
    ("--noise salt", "'salt'"),
    ("--Z 0", "--Z 0.0: must be less than 0"),
    ("--beta -1", "--beta -1.0: must be greater than or equal to 0"),
    ("--alpha inf", "--alpha inf: must be a finite number"),
    ("--clip-coef 0", "--clip-coef 0.0: must be greater than 0"),
    ("--capture-video --eval-episodes 0", "--capture-video True: expected --eval-episodes 1 or more"),
    ("--resume /no/such/run", "--resume /no/such/run: not the folder of a run"),
    ("--evaluate /no/such/run", "--evaluate /no/such/run: not the folder of a run"),
    ("--exp-name a/b", "--exp-name a/b: must match pattern"),
    ("--seed -1", "--seed -1: must be greater than or equal to 0"),
    ("--seed 9223372036854775808", "must be less than 9223372036854775808"),
    ("--env-id Combat", "--env-id Combat: no such Atari game"),
    ("--wandb-project-name a/b", "--wandb-project-name a/b: must match pattern"),
    ("--target-kl 0", "--target-kl 0.0: must be greater than 0"),
]


@pytest.mark.parametrize(("line", "expected"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_one_line_with_exit_status_2(line, expected, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sppo_atari.py"])
    with pytest.raises(SystemExit) as stopped:
        sppo_atari.check_args(sppo_atari.parse_args(line.split(), sppo_atari.Args()))
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("sppo_atari.py: error: ") and expected in err


def test_bad_input_creates_nothing(tmp_path):
    out, err = run("--beta", "-3", "--run-dir", tmp_path / "runs", code=2)
    assert out == "" and err.count("\n") == 1 and list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    _, err = run(*SMALL, "--run-dir", tmp_path / "file", code=2)
    assert "--run-dir" in err.splitlines()[-1]


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit) as stopped:
        sppo_atari.parse_args(["--help"], sppo_atari.Args())
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for name in sppo_atari.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in out


def test_a_broken_run_ends_and_keeps_the_checkpoint_from_before(tmp_path):
    """First before any checkpoint; then with the value head of a good one near the end of float32."""
    args = ["--total-timesteps", 512, "--checkpoint-interval", 1, "--eval-episodes", 0, "--run-dir", tmp_path]
    _, err = run(*SMALL, *args, "--learning-rate", 1e12, code=1)
    assert re.search(r"sppo_atari.py: .* is (nan|-?inf) at step 128; the run ends, there is no checkpoint yet", err)
    broken = only(tmp_path)
    assert not (broken / "result.json").exists() and not (broken / "checkpoint.pt").exists()
    shutil.rmtree(broken)

    run(*SMALL, *args)
    folder = only(tmp_path)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["agent"]["critic.bias"].fill_(1e30)  # its squared error is not finite
    torch.save(checkpoint, folder / "checkpoint.pt")
    before = (folder / "checkpoint.pt").read_bytes()
    _, err = run("--resume", folder, "--total-timesteps", 1280, code=1)
    assert f"losses/value_loss is inf at step 640; the run ends, {folder / 'checkpoint.pt'} is from before" in err
    assert (folder / "checkpoint.pt").read_bytes() == before and not (folder / "result.json").exists()


@pytest.fixture
def interrupted(tmp_path):
    """A run of 40 iterations that SIGINT stopped in the middle."""
    args = ["--total-timesteps", 40 * 128, "--checkpoint-interval", 3, "--eval-episodes", 1, "--run-dir", tmp_path]
    process = start(*SMALL, *args)
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    folder = only(tmp_path)
    assert re.search(rf"SIGINT at step [\d,]+, saved; continue with --resume {folder}$", out.strip())
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["global_step"] < 40 * 128
    return folder


def test_sigint_sigterm_and_resume(interrupted, capsys):
    step = torch.load(interrupted / "checkpoint.pt", weights_only=True)["global_step"]
    process = start("--resume", interrupted)
    wait_for(lambda: torch.load(interrupted / "checkpoint.pt", weights_only=True)["global_step"] > step)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 143 and "SIGTERM" in out
    run("--resume", interrupted)
    steps = [step for step, _ in scalars(interrupted)["charts/SPS"]]
    assert steps == list(range(128, 40 * 128 + 1, 128))  # each once: no hole, nothing twice
    result = json.loads((interrupted / "result.json").read_text())
    assert result["global_step"] == 5120

    # a finished run has nothing to go on with; a larger total continues it, a smaller one is refused
    capsys.readouterr()
    call("--resume", interrupted)
    assert "has finished its 5,120 steps" in capsys.readouterr().out
    for more, expected in (
        (["--total-timesteps", 4000], "--total-timesteps 4000: expected 5120"),
        (["--seed", 2], "--seed 2: with --resume the run keeps its own, 1; only --total-timesteps, "),
    ):
        with pytest.raises(SystemExit):
            call("--resume", interrupted, *more)
        assert expected in capsys.readouterr().err
    call("--resume", interrupted, "--total-timesteps", 5120 + 256)
    logged = scalars(interrupted)
    assert [step for step, _ in logged["charts/SPS"]][-3:] == [5120, 5248, 5376]
    assert [step for step, _ in logged["eval/episodic_return"]] == [5120, 5376]
    assert json.loads((interrupted / "result.json").read_text())["global_step"] == 5376


def test_resume_continues_the_same_wandb_run(tmp_path):
    env = {**ENV, "WANDB_MODE": "offline"}
    run(*SMALL, "--total-timesteps", 640, "--eval-episodes", 0, "--track", "--run-dir", tmp_path, env=env)
    folder = only(tmp_path, "Breakout*")
    run("--resume", folder, "--total-timesteps", 1280, env=env)
    sessions = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    run_id = json.loads((folder / "args.json").read_text())["run_id"]
    assert [path.name for path in sessions] == [f"run-{run_id}.wandb"] * 2
    # what W&B got from the second session starts where the first ended
    histories = [wandb_run(path)[1] for path in sessions]
    steps = [row["global_step"] for history in histories for row in history if "charts/SPS" in row]
    assert steps == list(range(128, 1281, 128))


def test_resume_restores_weights_optimiser_schedule_and_generators(tmp_path):
    """Copies of one checkpoint go on alike; with a part of it exchanged, they show that part."""
    args = ["--total-timesteps", 640, "--eval-episodes", 0, "--noise", "bsc", "--noise-prob", 0.5]
    call(*SMALL, *args, "--run-dir", tmp_path / "run")
    original = only(tmp_path / "run")
    saved = torch.load(original / "checkpoint.pt", weights_only=True)

    def resumed(name, **exchanged):
        folder = tmp_path / name
        shutil.copytree(original, folder)
        torch.save({**saved, **exchanged}, folder / "checkpoint.pt")
        call("--resume", folder, "--total-timesteps", 1280)
        logged = {tag: points for tag, points in scalars(folder).items() if tag != "charts/SPS"}
        return logged, torch.load(folder / "checkpoint.pt", weights_only=True)

    logged, after = resumed("a")
    assert resumed("b")[0] == logged
    assert after["optimizer"]["state"][0]["step"].item() == 20  # 10 iterations of 2 Adam steps in all
    assert logged["charts/learning_rate"][5][1] == pytest.approx(2.5e-4 * 0.5)  # iteration 6 of 10
    assert after["seconds"] > saved["seconds"] > 0
    assert (
        after["recent_returns"][: len(saved["recent_returns"])] == saved["recent_returns"]
        or len(after["recent_returns"]) == 100
    )
    agent = {**saved["agent"], "critic.bias": saved["agent"]["critic.bias"] + 100}
    assert resumed("d", agent=agent)[0]["losses/value_loss"][5][1] > 100 * logged["losses/value_loss"][5][1]


def test_resume_refuses_other_folders(tmp_path):
    for content in ("{", json.dumps({"script": "sa2c_atari.py", "args": {}}), json.dumps({"args": {"bogus": 1}}), "[]"):
        (tmp_path / "args.json").write_text(content)
        _, err = run("--resume", tmp_path, code=2)
        assert err.startswith(f"sppo_atari.py: error: --resume {tmp_path}") and err.count("\n") == 1


def test_ten_random_kills_and_the_run_still_ends_whole(tmp_path):
    """SIGKILL at random moments, start-up and checkpoint writing included, a resume after each."""
    rng = random.Random(0)
    total = 10**6
    args = [*SMALL, "--total-timesteps", total, "--checkpoint-interval", 1, "--eval-episodes", 1, "--run-dir", tmp_path]
    process, progressed = start(*args), [0]
    wait_for(lambda: list(tmp_path.glob("*/args.json")))
    folder = only(tmp_path)

    def checkpoint_step():
        path = folder / "checkpoint.pt"
        return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0

    for kill in range(10):
        if kill % 3:  # some iterations on; the other kills hit the start-up
            goal = progressed[-1] + 128 * rng.randint(1, 8)
            wait_for(lambda goal=goal: checkpoint_step() >= goal)
        time.sleep(rng.uniform(0, 0.3 if kill % 3 else 3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        progressed.append(checkpoint_step())
        process = start("--resume", folder)
    process.kill()
    process.wait()
    assert progressed == sorted(progressed) and progressed[-1] >= 6 * 128

    saved = json.loads((folder / "args.json").read_text())
    total = saved["args"]["total_timesteps"] = checkpoint_step() + 10 * 128  # an end that the test can wait for
    now = {**saved["versions"]}
    saved["versions"]["torch"] = "2.12.1"
    (folder / "args.json").write_text(json.dumps(saved))
    run("--resume", folder)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == total
    steps = [step for step, _ in scalars(folder)["charts/SPS"]]
    assert steps == list(range(128, total + 1, 128))
    for points in scalars(folder).values():
        assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert [path.name for path in tmp_path.rglob("result.json*")] == ["result.json"]
    result = json.loads((folder / "result.json").read_text())
    assert result["global_step"] == total
    assert result["versions"] == now
    assert result["earlier"] == [{"versions": {**now, "torch": "2.12.1"}}]  # ten times the same is said once
    assert not list(tmp_path.rglob("*.tmp"))


@needs_compiler
def test_compiled_run(tmp_path):
    run(*SMALL, "--compile", "--total-timesteps", 256, "--eval-episodes", 0, "--run-dir", tmp_path)
    assert len(scalars(only(tmp_path))["losses/policy_loss"]) == 2


def test_bf16_runs_close_to_float32():
    torch.manual_seed(0)
    agent = sppo_atari.Agent(6)
    obs = torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8)
    logprobs, values = agent(obs)
    agent.bf16 = True
    half_logprobs, half_values = agent(obs)
    assert half_logprobs.dtype == half_values.dtype == torch.float32
    assert (logprobs - half_logprobs).abs().max() < 0.02 and not torch.equal(values, half_values)
