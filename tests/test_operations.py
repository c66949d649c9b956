"""What sppo_atari.py keeps for its user behind the algorithm: scores again, one writer, whole files, lines that arrive."""

import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial

import helpers
import imageio
import numpy as np
import pytest
import torch
from helpers import ENV, ROOT, no_process_outlives_its_test, only, wait_for, wandb_run  # noqa: F401

import dsppo_continuous
import sa2c_atari
import sppo_atari

run, start = partial(helpers.run, "sppo_atari.py"), partial(helpers.start, "sppo_atari.py")
SMALL = ["--env-id", "Breakout", "--num-envs", 4, "--num-steps", 32, "--minibatch-size", 64]
SMALL += ["--update-epochs", 1, "--num-threads", 1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    parent = tmp_path_factory.mktemp("runs")
    run(*SMALL, "--total-timesteps", 640, "--eval-episodes", 3, "--run-dir", parent)
    return only(parent)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_evaluate_plays_the_result_again_and_writes_nothing_but_the_video(finished):
    before, result = contents(finished), json.loads((finished / "result.json").read_text())
    out, _ = run("--evaluate", finished)
    assert f"returns {', '.join(f'{score:.1f}' for score in result['returns'])}" in out
    assert f"score {result['score']:.1f} +- {result['score_stderr']:.1f} at step 640" in out
    assert contents(finished) == before
    other, _ = run("--evaluate", finished, "--seed", 5, "--eval-episodes", 4, "--capture-video")
    assert len(other.splitlines()[0].split(", ")) == 4 and other.splitlines()[0] not in out
    assert contents(finished).keys() - before.keys() == {finished / "videos" / "640__seed5.mp4"}
    assert imageio.get_reader(finished / "videos" / "640__seed5.mp4").count_frames() > 20
    shutil.rmtree(finished / "videos")
    for words, reason in (
        (["--beta", 3], "--beta 3.0: with --evaluate the run keeps its own, 1.0; only --seed, "),
        (["--eval-episodes", 0], "--evaluate"),
    ):
        _, err = run("--evaluate", finished, *words, code=2)
        assert err.startswith("sppo_atari.py: error: ") and reason in err and err.count("\n") == 1


def test_load_policy_plays_in_five_lines(finished):
    policy, envs = sppo_atari.load_policy(finished)
    obs, _ = envs.reset(seed=np.array([1]))
    for _ in range(5):
        actions = policy(obs)
        assert actions.shape == (1,) and 0 <= actions[0] < 4
        obs, *_ = envs.step(actions)
    envs.close()


def test_tensorboard_has_the_hyperparameters(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished)).Reload()
    (text,) = events.Tensors("hyperparameters/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    args = json.loads((finished / "args.json").read_text())["args"]
    assert table.splitlines()[2:] == [f"|{name}|{value}|" for name, value in args.items()]


def test_wandb_gets_group_and_tags(tmp_path):
    args = ["--total-timesteps", 128, "--eval-episodes", 0, "--track", "--wandb-group", "g", "--wandb-tags", "a,b"]
    run(*SMALL, *args, "--run-dir", tmp_path, env={**ENV, "WANDB_MODE": "offline"})
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (about,) = (record.run for record in helpers.wandb_records(file) if record.WhichOneof("record_type") == "run")
    assert about.run_group == "g" and list(about.tags) == ["a", "b"]


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    process = start(*SMALL, "--total-timesteps", 10**7, "--checkpoint-interval", 1, "--run-dir", tmp_path)
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    folder = only(tmp_path)
    _, err = run("--resume", folder, code=2)
    assert err == f"sppo_atari.py: error: --resume {folder}: another process is training this run\n"
    assert process.poll() is None
    process.kill()
    process.wait()
    process = start("--resume", folder)
    assert process.stdout.readline().startswith("sppo_atari.py: Breakout on ")  # at once, also into a pipe
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "finishing this iteration, then saving; Ctrl-C again quits now" in err


def test_what_concerns_the_machine_and_the_logging_may_change_with_resume(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    changed = ["--eval-episodes", 1, "--eval-interval", 128, "--checkpoint-interval", 1, "--num-threads", 2]
    run("--resume", folder, "--total-timesteps", 896, *changed)
    assert [step for step, _ in helpers.scalars(folder)["eval/episodic_return"]] == [640, 768, 896]
    assert json.loads((folder / "args.json").read_text())["args"]["checkpoint_interval"] == 1


def test_a_corrupt_checkpoint_is_one_line_and_stays(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "checkpoint.pt").write_bytes(b"not a checkpoint")
    before = contents(folder)
    for argument in ("--resume", "--evaluate"):
        more = ["--total-timesteps", 1280] if argument == "--resume" else []
        _, err = run(argument, folder, *more, code=2)
        assert err.startswith(f"sppo_atari.py: error: {argument} {folder}: cannot load its checkpoint.pt (")
        assert err.count("\n") == 1 and contents(folder) == before


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = (folder / "checkpoint.pt").read_bytes()
    limit = len(before) // 2  # no file may grow beyond it: the system answers as for a full disk
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    _, err = run("--resume", folder, "--total-timesteps", 1280, code=1, **full)
    assert err.splitlines()[-1].startswith("sppo_atari.py: File too large; the run ends") and "Traceback" not in err
    assert (folder / "checkpoint.pt").read_bytes() == before
    run("--resume", folder, "--total-timesteps", 1280)


def test_letters_that_the_terminal_lacks_and_a_closed_pipe_end_no_run(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    args = ["--total-timesteps", 128, "--eval-episodes", 0, "--run-dir", tmp_path]
    run(*SMALL, *args, "--exp-name", "实验", env=env)
    command = [sys.executable, ROOT / "sppo_atari.py", *map(str, SMALL), *map(str, args), "--exp-name", "pipe"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=full, stderr=subprocess.PIPE).returncode == 0
    assert len(list(tmp_path.glob("*/result.json"))) == 2


def test_a_score_that_is_no_number_ends_the_run_and_json_has_no_nan(monkeypatch, tmp_path):
    args = sppo_atari.Args(env_id="Breakout", eval_episodes=1, run_dir=str(tmp_path))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sppo_atari, "evaluate", lambda *_: [float("nan")])
    held = sppo_atari.Run(args)
    with held.cleanup, pytest.raises(SystemExit, match="mean return of the evaluation is nan at step 7; the run ends"):
        held.evaluate(None, 7)
    with pytest.raises(ValueError):
        sppo_atari.write_json(tmp_path / "x.json", {"score": float("nan")})
    assert not list(tmp_path.rglob("x.json*"))
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)


def test_half_a_video_does_not_stay(monkeypatch, tmp_path):
    def interrupted(policy, args, device, path, stop):
        path.write_bytes(b"half")
        return []

    monkeypatch.setattr(sppo_atari, "evaluate", interrupted)
    assert sppo_atari.evaluate_and_film(None, None, None, tmp_path / "videos" / "1.mp4") == []
    assert not list((tmp_path / "videos").iterdir())


def test_a_resumed_run_draws_from_its_step(monkeypatch, tmp_path):
    """Game seeds, noise and torch's generator follow from [seed, step]; the window of 100 returns goes on."""
    seen = []

    class Games:
        single_action_space = sppo_atari.gymnasium.spaces.Discrete(3)

        def reset(self, seed):
            seen.append((seed.tolist(), torch.initial_seed()))
            raise KeyboardInterrupt

        def close(self):
            seen.append("closed")

    monkeypatch.setattr(sppo_atari, "make_envs", lambda *_: Games())
    agent = sppo_atari.Agent(3)
    optimizer = torch.optim.Adam(agent.parameters())
    args = sppo_atari.Args(num_envs=2, num_steps=4, seed=3)
    for step in (0, 8, 16):
        held = sppo_atari.Run(sppo_atari.replace(args, run_dir=str(tmp_path / str(step))))
        held.checkpoint = {"global_step": step, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        held.checkpoint["recent_returns"] = [5.0]
        with pytest.raises(KeyboardInterrupt), held.cleanup:
            sppo_atari.train(args, held)
    resets = seen[::2]
    assert seen[1::2] == ["closed"] * 3
    assert len({str(seeds) for seeds, _ in resets}) == 3 and [torch_seed for _, torch_seed in resets] == [3, 11, 19]
    expected = np.random.default_rng([3, sppo_atari.GAMES, 8]).integers(2**31, size=2).tolist()
    assert resets[1][0] == expected


@pytest.mark.parametrize(("target_kl", "epochs"), [(1e-12, 1), (1e9, 4), (None, 4)])
def test_target_kl_ends_the_update_after_an_epoch_that_is_above_it(target_kl, epochs):
    torch.manual_seed(0)
    agent = sppo_atari.Agent(3)
    args = sppo_atari.Args(minibatch_size=8, learning_rate=1e-2, target_kl=target_kl)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    batch = (torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8), torch.randint(3, (16,)), torch.full((16,), -1.1))
    batch = (*batch, torch.randn(16), torch.randn(16))
    sppo_atari.update(agent, optimizer, sppo_atari.minibatch_loss, args, torch.tensor(0.1), batch)
    assert optimizer.state[agent.actor.bias]["step"].item() == 2 * epochs


@pytest.mark.parametrize("name", ["dsppo_continuous", "dsa2c_continuous"])
def test_a_gradient_below_the_maximum_norm_is_left_as_it_is(name):
    script = importlib.import_module(name)
    torch.manual_seed(0)
    agent = script.Agent(4, 2, 5)
    args = script.Args(max_grad_norm=1e3, **({"update_epochs": 1, "minibatch_size": 16} if "ppo" in name else {}))
    weights = script.flatten_parameters(agent)
    old = [torch.full((16, 2), -1.6)] if "ppo" in name else []
    batch = (torch.randn(16, 4), torch.randint(5, (16, 2)), *old, torch.randn(16), torch.randn(16))
    loss_fn = script.minibatch_loss if "ppo" in name else script.rollout_loss
    loss, _ = loss_fn(agent, args, *batch)
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(agent.parameters()))])
    assert 0.1 < expected.norm() < 100
    script.update(agent, weights, torch.optim.SGD([weights], lr=0.0), loss_fn, args, batch)
    torch.testing.assert_close(weights.grad, expected, rtol=1e-4, atol=1e-6)


def test_rmsprop_alpha_reaches_the_optimiser_of_sa2c_atari():
    torch.manual_seed(0)
    agent = sa2c_atari.Agent(3)
    square_avgs = [torch.ones_like(parameter) for parameter in agent.parameters()]
    batch = (torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8), torch.randint(3, (4,)), torch.randn(4), torch.randn(4))
    sa2c_atari.update(agent, square_avgs, 1e-9, sa2c_atari.rollout_loss, sa2c_atari.Args(rmsprop_alpha=0.25), batch)
    expected = 0.25 + 0.75 * agent.critic.bias.grad**2
    torch.testing.assert_close(square_avgs[-1], expected)
    assert (expected - 0.25).item() > 1e-6


@pytest.mark.parametrize(("target_kl", "epochs"), [(1e-12, 1), (1e9, 4)])
def test_target_kl_on_continuous_tasks(target_kl, epochs):
    torch.manual_seed(0)
    agent = dsppo_continuous.Agent(4, 2, 5)
    weights = dsppo_continuous.flatten_parameters(agent)
    optimizer = torch.optim.Adam([weights], lr=1e-2)
    batch = (torch.randn(16, 4), torch.randint(5, (16, 2)), torch.full((16, 2), -1.6), torch.randn(16), torch.randn(16))
    args = dsppo_continuous.Args(minibatch_size=8, update_epochs=4, target_kl=target_kl)
    dsppo_continuous.update(agent, weights, optimizer, dsppo_continuous.minibatch_loss, args, batch)
    assert optimizer.state[weights]["step"].item() == 2 * epochs


def test_ctrl_c_during_evaluate_is_quiet_and_leaves_nothing(finished):
    process = start("--evaluate", finished, "--eval-episodes", 100, "--capture-video")
    wait_for(lambda: (finished / "videos" / "unfinished.mp4").exists())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err and out == ""
    assert list((finished / "videos").iterdir()) == []


def test_arguments_that_wandb_refuses_and_foreign_checkpoints_lose_nothing(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    torch.save({"a": 1}, folder / "checkpoint.pt")
    before = contents(folder)
    for words, reason in (
        (["--track", "--wandb-tags", "a,,b"], "--wandb-tags a,,b: must match pattern"),
        (["--track", "True"], "--track True: a switch takes no value; write --track or --no-track"),
        ([], f"--resume {folder}: cannot load its checkpoint.pt (KeyError)"),
    ):
        _, err = run("--resume", folder, "--total-timesteps", 1280, *words, code=2, env={**ENV, "WANDB_MODE": "offline"})
        assert reason in err and err.count("\n") == 1 and contents(folder) == before


def test_without_a_terminal_one_line_a_minute(tmp_path, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    held = sppo_atari.Run(sppo_atari.Args(env_id="Breakout", total_timesteps=1024, run_dir=str(tmp_path)))
    with held.cleanup:
        capsys.readouterr()
        held.log(128, {}, 1.0)
        assert capsys.readouterr().out == ""
        held.last_line -= 61
        held.log(256, {}, 1.0)
        assert re.fullmatch(r"sppo_atari.py: step 256, [\d,]+ steps/s, [\d:]+ left\n", capsys.readouterr().out)
        held.log(384, {}, 1.0)
        assert capsys.readouterr().out == ""
        held.last_line -= 61
        held.log(512, {"charts/episodic_return_100": 7.25}, 1.0)
        assert ": step 512, return 7.2, " in capsys.readouterr().out
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)


def test_help_into_head_is_quiet():
    """More text than a pipe holds, and nobody who reads it to its end."""
    command = f"{sys.executable} sppo_atari.py --help | head -n 1 > {os.devnull}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("0\n", "")
