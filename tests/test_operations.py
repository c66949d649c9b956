"""What the control scripts do around the algorithm: command line, names, the run folder and its files."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import gymnasium
import imageio
import numpy as np
import pytest
import torch
import wandb
from helpers import ROOT, SCRIPTS, call, command, contents, each_script, only, unchanged_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sa2c_atari
import sppo_atari


@pytest.fixture
def no_training(monkeypatch):
    """A run is its folder: `train` and the environment's check are left out."""
    for script in SCRIPTS:
        monkeypatch.setattr(script.module, "train", lambda args, run: None)


BAD = [  # script, command line, what the message holds
    ("sppo_atari", "--env-id Alein", "Environment `Alein` doesn't exist in namespace ALE. Did you mean: `Alien`?"),
    ("sppo_atari", "--num-envs 0", "num_envs Input should be greater than 0 [type=greater_than, input_value=0"),
    ("sppo_atari", "--num-evns 4", "Unrecognized options: --num-evns, 4 "),
    ("sppo_atari", "--Z 0", "Z Input should be less than 0"),
    ("sppo_atari", "--exp-name a/b", "exp_name String should match pattern"),
    ("sppo_atari", "--minibatch-size 100", "--minibatch-size 100: expected a divisor of num_envs x num_steps = 1024"),
    ("sppo_atari", "--total-timesteps 1000", "--total-timesteps 1000: expected num_envs x num_steps = 1024 or more"),
    ("sppo_atari", "--resume /no/such", "/no/such is no run folder ("),
    ("sa2c_atari", "--clip-coef 0.1", "Unrecognized options: --clip-coef"),
    ("sa2c_atari", "--checkpoint-interval 150", "--checkpoint-interval 150: expected a multiple of 100"),
    ("sa2c_atari", "--num-envs 1 --num-steps 1 --norm-adv", "--norm-adv: expected num_envs x num_steps of 2 or more"),
    ("sa2c_atari", "--mean-weight --beta 0", "--mean-weight: expected --beta above 0"),
    ("dsppo_continuous", "--env-id Hoper", "Did you mean: `Hopper`?"),
    ("dsppo_continuous", "--env-id no_such_module:Mine-v0", "No module named 'no_such_module'"),
    ("dsppo_continuous", "--env-id Blackjack-v1", "observations Tuple(Discrete(32), Discrete(11), Discrete(2))"),
    ("dsppo_continuous", "--num-bins 1", "Input should be greater than or equal to 2"),
    ("dsppo_continuous", "--num-bins 0", "--num-bins 0: expected --beta 0"),
    ("dsppo_continuous", "--num-bins 0 --beta 0 --env-id CartPole-v1", "--num-bins 0: --env-id CartPole-v1: observations"),
    ("dsppo_continuous", "--minibatch-size 100", "--minibatch-size 100: does not divide 2048"),
    ("dsa2c_continuous", "--env-id Taxi-v4", "observations Discrete(500), actions Discrete(6); expected a Box of obs"),
    ("dsa2c_continuous", "--checkpoint-interval 150", "--checkpoint-interval: no multiple of 100"),
]


@pytest.mark.parametrize(("name", "line", "expected"), BAD, ids=[f"{name} {line}" for name, line, _ in BAD])
def test_bad_input_is_refused_with_status_2_and_nothing_is_made(name, line, expected, tmp_path, capsys):
    assert command(ROOT / f"{name}.py", line, "--run-dir", tmp_path / "runs") == 2
    said = " ".join("".join(capsys.readouterr()).replace("│", " ").replace("─", "").split())
    assert expected in said and "Traceback" not in said and list(tmp_path.iterdir()) == []


@each_script
def test_help_names_every_argument_also_one_without_a_comment_in_a_copy(script, tmp_path, capsys):
    copy = tmp_path / "mine.py"
    text = (ROOT / script.name).read_text()
    copy.write_text(text.replace("\n    noise:", "\n    my_scale: float = 1.5\n    noise:"))
    assert command(copy, "--help") == 0
    out = capsys.readouterr().out
    for name in (*script.module.Args.__dataclass_fields__, "my-scale"):
        assert f"--{name.replace('_', '-')}" in out
    assert "number of parallel games" in out or "number of environments" in out
    assert command(copy, script.args, "--my-scale 3 --total-timesteps 128 --eval-episodes 0 --run-dir", tmp_path / "runs") == 0
    saved = json.loads(only(tmp_path, "runs/*/args.json").read_text())
    assert saved["args"]["my_scale"] == 3.0 and saved["script"] == "mine.py"


ARMS = [
    ("sppo_atari", "", "sppo_a0.5_b1"),
    ("sppo_atari", "--beta 10 --noise bsc", "sppo_a0.5_b10_bsc"),
    ("sppo_atari", "--alpha 1 --beta 0", "ppo"),
    ("sppo_atari", "--alpha 1 --beta 0 --no-norm-adv --noise bsc", "ppo_raw_bsc"),
    ("sppo_atari", "--alpha 10.5 --beta 0", "ppo_a10.5"),
    ("sppo_atari", "--Z -2 --literal-signs", "sppo_a0.5_b1_Z-2_literal"),
    ("sppo_atari", "--beta 10 --exp-name mine", "mine"),
    ("sa2c_atari", "", "sa2c_a0.5_b5"),
    ("sa2c_atari", "--alpha 1 --beta 0 --norm-adv", "a2c_norm"),
    ("sa2c_atari", "--mean-weight --noise bsc", "sa2c_a0.5_b5_mean_bsc"),
    ("sa2c_atari", "--literal-signs", "sa2c_a0.5_b5_literal"),
    ("dsppo_continuous", "", "dsppo_a0.5_b20"),
    ("dsppo_continuous", "--alpha 1 --beta 0", "dppo"),
    ("dsppo_continuous", "--alpha 50.5 --beta 0 --noise gaussian", "dppo_a50.5_gaussian"),
    ("dsppo_continuous", "--alpha 1 --beta 0 --num-bins 0", "ppo"),
    ("dsppo_continuous", "--num-bins 7 --reverse-prob factored --no-norm-adv", "dsppo_a0.5_b20_7bins_factored_raw"),
    ("dsa2c_continuous", "", "dsa2c_a0.5_b0.2"),
    ("dsa2c_continuous", "--alpha 1 --beta 0", "da2c"),
    ("dsa2c_continuous", "--alpha 1 --beta 0 --num-bins 0 --noise gaussian", "a2c_gaussian"),
    ("dsa2c_continuous", "--mean-weight --Z -0.5", "dsa2c_a0.5_b0.2_mean_Z-0.5"),
]


def test_a_run_is_named_after_its_arm(no_training, tmp_path):
    scripts = {script.name[:-3]: script for script in SCRIPTS}
    for i, (name, line, arm) in enumerate(ARMS):
        call(scripts[name], line, "--run-dir", tmp_path / str(i))
        folder = only(tmp_path / str(i))
        assert folder.name.split("__")[1] == arm, line
        assert json.loads((folder / "args.json").read_text())["args"]["exp_name"] == arm


IDS = ["Pong", "Pong-v0", "Pong-v4", "PongDeterministic-v4", "PongNoFrameskip-v0", "PongNoFrameskip-v4", "ALE/Pong-v5"]
NO_IDS = [
    "PongNoFrameskip-v5",
    "Pong-v5",
    "ALE/Pong",
    "ALE/Pong-v4",
    "ALE/PongNoFrameskip-v4",
    "pong",
    "Pong-ram-v4",
    "",
    "Combat",
]


def test_ids_of_games():
    for script in (sppo_atari, sa2c_atari):
        assert {script.resolve_env(env_id) for env_id in IDS} == {("Pong", "pong")}
        for env_id in NO_IDS:
            with pytest.raises(gymnasium.error.Error):
                script.resolve_env(env_id)


@each_script
def test_main_from_python_checks_its_arguments(script, no_training, tmp_path, monkeypatch):
    Args, main = script.module.Args, script.module.main
    monkeypatch.chdir(tmp_path)
    unfit = {"minibatch_size": 50, "num_steps": 128} if "ppo" in script.name else {"total_timesteps": 3}
    for wrong in (unfit, {"beta": -1.0}, {"betta": 3.0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", ".")):
            main(Args(**wrong))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(wandb, "login", lambda: 1 / 0)  # there is no key
        patch.delenv("WANDB_MODE", raising=False)
        main(Args(track=True))
    assert list(tmp_path.iterdir()) == []
    with unchanged_process():
        main(Args(num_threads=3))
        assert torch.get_num_threads() == 3
    folder = only(tmp_path / "runs")
    before = contents(folder)
    more = {"eval_interval": 7, "total_timesteps": 10**8}
    for wrong in ({"seed": 2}, {"beta": 3.0}, {"total_timesteps": 10**4, "checkpoint_interval": 100}, {"exp_name": "x"}):
        with pytest.raises(
            ValueError, match=f"--{next(iter(wrong)).replace('_', '-')} .*: the run keeps its own, .*"
        ) as refused:
            main(Args(resume=str(folder), **(more | wrong)))
        assert ("or more" in str(refused.value)) == ("total_timesteps" in wrong) and contents(folder) == before
    main(Args(resume=str(folder)))
    main(Args(resume=str(folder), **more))
    assert json.loads((folder / "args.json").read_text())["args"]["total_timesteps"] == 10**8
    (folder / "checkpoint.pt").write_bytes(b"not a checkpoint")
    before = contents(folder)
    with pytest.raises(Exception, match=r"pickle|load"):
        main(Args(resume=str(folder), total_timesteps=10**9))
    assert contents(folder) == before


def test_a_folder_that_is_no_run_of_this_script_is_refused(no_training, tmp_path):
    call(SCRIPTS[0], f"--run-dir {tmp_path}")
    with pytest.raises(sppo_atari.BadInput, match=re.escape(f"{tmp_path} is no run folder")):
        sppo_atari.load_args(tmp_path)
    with pytest.raises(sa2c_atari.BadInput, match=r"is a run of sppo_atari.py; expected a run of sa2c_atari.py"):
        call(SCRIPTS[1], "--resume", only(tmp_path))


@each_script
def test_the_commit_is_known_in_a_checkout_of_another_user(script, no_training, tmp_path, monkeypatch):
    repository = tmp_path / "it's a repository"
    repository.mkdir()
    copy = shutil.copy(ROOT / script.name, repository)
    for words in ("init", "add .", "-c user.name=a -c user.email=b commit -m x"):
        subprocess.run(["git", *words.split()], cwd=repository, check=True, capture_output=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout.strip()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert subprocess.run(["git", "status"], cwd=repository, capture_output=True).returncode == 128
    spec = importlib.util.spec_from_file_location(f"copy_of_{script.name[:-3]}", copy)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for edited in ("", "# edited"):
        with open(copy, "a") as file:
            file.write(edited)
        with unchanged_process(), module.Run(module.Args(run_dir=str(tmp_path / f"runs{edited[2:]}"))).cleanup as _:
            saved = json.loads(only(tmp_path, f"runs{edited[2:]}/*/args.json").read_text())
        assert saved["commit"] == commit + "-dirty" * bool(edited)


def test_what_a_run_writes_is_whole_and_finite(monkeypatch, tmp_path, capsys):
    """Files, the lines without a terminal, TensorBoard's table of arguments; a score that is no number; a signal at the end."""
    held = sppo_atari.Run(sppo_atari.Args(total_timesteps=1024, eval_episodes=1, run_dir=str(tmp_path)))
    with held.cleanup:
        capsys.readouterr()
        scored = {"charts/episodic_return_100": 7.25}
        for step, late, stats in ((128, False, {}), (256, True, {}), (384, True, scored), (512, False, {})):
            held.global_step, held.next_line = step, held.next_line - 61 * late
            held.log(stats, 1.0)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(",")[0] for line in lines] == ["step 256", "step 384"] and lines[1].endswith("left, return 7.2")
        for bad in ("charts/a", "losses/b"):
            with pytest.raises(FloatingPointError, match=f"{bad} is nan"):
                held.log({bad: float("nan")}, 1.0)

        held.write("x.json", b"old")
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, "fsync", lambda _: os.close(-1))  # the disk is full
            held.write("x.json", b"new")
        assert (held.folder / "x.json").read_bytes() == b"old"
        monkeypatch.setattr(sppo_atari, "evaluate", lambda *_: [float("nan")])
        with pytest.raises(FloatingPointError, match="the mean return of the evaluation is nan"):
            held.evaluate(None)
        with pytest.raises(ValueError):
            held.finish([float("nan")])
        held.on_signal(signal.SIGTERM, None)
        with pytest.raises(SystemExit) as stopped:
            held.finish(held.evaluate(None))
        with pytest.raises(SystemExit):  # at once
            held.on_signal(signal.SIGTERM, None)
        assert stopped.value.code == 143 and not (held.folder / "result.json").exists()
    (text,) = EventAccumulator(str(held.folder)).Reload().Tensors("hyperparameters/text_summary")
    args = json.loads((held.folder / "args.json").read_text())["args"]
    table = text.tensor_proto.string_val[0].decode().splitlines()
    assert table[2:] == [f"|{name}|{value}|" for name, value in args.items()] and not held.writer.all_writers


@each_script
def test_a_video_is_whole_or_absent(script, tmp_path, monkeypatch):
    module, args = script.module, script.module.Args(env_id=script.env_id, eval_episodes=1)
    if "atari" in script.name:
        policy = module.Agent(4)
    else:
        policy = module.Agent(8, [11, 11]), module.RunningMeanStd(np.zeros(8), np.ones(8))
    video, stop, act = tmp_path / "videos" / "1.mp4", [], module.act
    with monkeypatch.context() as patch:
        patch.setattr(module, "act", lambda *own: (stop.append(signal.SIGINT), act(*own))[1])
        module.evaluate(policy, args, torch.device("cpu"), video, stop=stop)
    assert only(video.parent) == video.with_name("unfinished_1.mp4")  # the name of no other evaluation's
    module.evaluate(policy, args, torch.device("cpu"), video)
    assert only(video.parent) == video and imageio.get_reader(video).count_frames() > 20
