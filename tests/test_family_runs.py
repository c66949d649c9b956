"""Whole runs of the other scripts, as a user starts them: what test_runs.py tests for sppo_atari.py, in brief."""

import importlib
import json
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass

import imageio
import numpy as np
import pytest
import torch
from helpers import ENV, needs_compiler, no_process_outlives_its_test, only, run, scalars, start, wait_for, wandb_run  # noqa: F401

import sppo_atari


@dataclass
class Script:
    name: str
    env_id: str  # as resolved
    args: list[str]  # a small run, one thread
    batch: int  # environment steps of an iteration
    logged: int  # environment steps between two log entries
    noise: list[str]


A2C = ["--num-threads", "1", "--log-interval", "4", "--checkpoint-interval", "4"]
SCRIPTS = [
    Script(
        "sa2c_atari.py",
        "Breakout",
        ["--env-id", "Breakout", "--num-envs", "4", "--num-steps", "8", *A2C],
        32,
        128,
        ["--noise", "bsc"],
    ),
    Script(
        "dsppo_continuous.py",
        "LunarLanderContinuous-v3",
        ["--env-id", "LunarLanderContinuous", "--num-steps", "128", "--num-threads", "1", "--checkpoint-interval", "1"],
        128,
        128,
        ["--noise", "gaussian"],
    ),
    Script(
        "dsa2c_continuous.py",
        "LunarLanderContinuous-v3",
        ["--env-id", "LunarLanderContinuous", *A2C],
        32,
        128,
        ["--noise", "gaussian"],
    ),
]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
LOSSES = ["policy_loss", "reverse_loss", "value_loss", "entropy", "explained_variance"]


@pytest.fixture
def call():
    """Runs a script's main() in this process: what a command line does, without starting Python and torch again."""
    threads, handlers = (
        torch.get_num_threads(),
        {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
    )

    def call(script, *args):
        module = importlib.import_module(script.name.removesuffix(".py"))
        parsed = module.parse_args(list(map(str, args)), module.Args())
        module.check_args(parsed)
        module.main(parsed)

    yield call
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@each_script
def test_a_run_leaves_what_the_readme_says(script, tmp_path):
    args = ["--total-timesteps", 1300, "--eval-episodes", 2, "--eval-interval", 700, "--capture-video", "--track", "--seed", 3]
    env = {**ENV, "WANDB_MODE": "offline"}
    out, _ = run(script.name, *script.args, *args, *script.noise, "--run-dir", tmp_path, env=env)
    stem = script.name.removesuffix(".py")
    folder = only(tmp_path, f"{script.env_id}__*")
    assert re.fullmatch(rf"{script.env_id}__{stem}__3__\d+", folder.name)
    assert f"{script.env_id} on " in out and "score" in out.splitlines()[-1]
    saved = json.loads((folder / "args.json").read_text())
    assert saved["env_id"] == script.env_id and saved["args"]["noise"] == script.noise[1]
    assert {"python", "torch", "gymnasium", "numpy"} <= saved["versions"].keys()
    total = 1300 // script.batch * script.batch
    result = json.loads((folder / "result.json").read_text())
    assert result["global_step"] == total == torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"]
    assert result["score"] == pytest.approx(np.mean(result["returns"])) and len(result["returns"]) == 2
    videos = sorted(folder.glob("videos/*"))
    assert [int(path.stem) for path in videos] == [total, 704 if script.batch == 32 else 768]  # sorted as text
    assert imageio.get_reader(videos[0]).count_frames() > 20

    logged = scalars(folder)
    steps = sorted({*range(script.logged, total, script.logged), total})
    assert [step for step, _ in logged["charts/SPS"]] == steps
    for name in LOSSES:
        assert (
            len(logged[f"losses/{name}"]) == len(steps) and np.isfinite([value for _, value in logged[f"losses/{name}"]]).all()
        )
    assert logged["eval/episodic_return"][-1] == (total, pytest.approx(result["score"]))
    noise = [value for _, value in logged["charts/noise_rate" if script.noise[1] == "bsc" else "charts/noise_std"]]
    assert np.mean(noise) == pytest.approx(0.1 if script.noise[1] == "bsc" else 0.05, rel=0.5)
    assert "charts/episodic_return" in logged and "charts/adv_sign_change" in logged

    config, history = wandb_run(only(tmp_path, "wandb/offline-run-*/run-*.wandb"))
    assert config["noise"] == script.noise[1] and config["versions"] == saved["versions"]
    for tag in ("losses/reverse_loss", "eval/episodic_return"):
        points = [(row["global_step"], row[tag]) for row in history if tag in row]
        assert points == [(step, pytest.approx(value)) for step, value in logged[tag]], tag
    assert len([row for row in history if any(key.startswith("videos") for key in row)]) == 2


@each_script
def test_same_seed_same_curve_another_seed_another_and_noise_leaves_the_start(script, tmp_path, call):
    curves = []
    for name, args in (("a", ["--seed", 1]), ("b", ["--seed", 1]), ("c", ["--seed", 2]), ("d", ["--seed", 1, *script.noise])):
        args = ["--total-timesteps", 640, "--eval-episodes", 1, *args]
        call(script, *script.args, *args, "--run-dir", tmp_path / name)
        curves.append({tag: points for tag, points in scalars(only(tmp_path / name)).items() if tag != "charts/SPS"})
    first, again, other_seed, noisy = curves
    assert first == again
    assert first["losses/value_loss"] != other_seed["losses/value_loss"] != noisy["losses/value_loss"]
    assert first["losses/value_loss"] != noisy["losses/value_loss"]
    if "dsppo" in script.name:  # the first rollout is over before the noise can change anything that is logged raw
        assert first["charts/episodic_return"][0] == noisy["charts/episodic_return"][0]


@each_script
def test_noise_never_reaches_a_logged_return(script, tmp_path, call):
    """With a learning rate that rounds to nothing the policy stays: the same actions, episodes and scores."""
    logs = []
    for name, noise in (("none", []), ("noisy", script.noise)):
        args = ["--total-timesteps", 2560, "--learning-rate", 1e-30, "--eval-episodes", 1, *noise]
        call(script, *script.args, *args, "--run-dir", tmp_path / name)
        logs.append(scalars(only(tmp_path / name)))
    for tag in ("charts/episodic_return", "charts/episodic_length", "eval/episodic_return"):
        assert len(logs[0][tag]) > 0 and logs[0][tag] == logs[1][tag]
    assert logs[0]["losses/value_loss"] != logs[1]["losses/value_loss"]


@each_script
def test_signals_kills_and_resume(script, tmp_path, call, capsys):
    """SIGINT, then five SIGKILLs at random moments, a resume after each; nothing is missing and nothing there twice."""
    args = ["--total-timesteps", 10**7, "--eval-episodes", 1, "--run-dir", tmp_path]
    process = start(script.name, *script.args, *args)
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    folder = only(tmp_path)
    assert process.returncode == 130, err
    assert re.search(rf"SIGINT at step [\d,]+, saved; continue with --resume {folder}$", out.strip())

    def checkpoint_step():
        return torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"]

    rng, progressed = random.Random(0), [checkpoint_step()]
    for kill in range(5):
        process = start(script.name, "--resume", folder)
        if kill % 2:  # some iterations on; the other kills hit the start-up
            goal = progressed[-1] + script.logged * rng.randint(1, 4)
            wait_for(lambda goal=goal: checkpoint_step() >= goal)
        time.sleep(rng.uniform(0, 0.2 if kill % 2 else 3))
        process.kill()
        process.wait()
        progressed.append(checkpoint_step())
    assert progressed == sorted(progressed) and progressed[-1] > progressed[0]

    saved = json.loads((folder / "args.json").read_text())
    total = (checkpoint_step() // script.logged + 5) * script.logged  # an end that the test can wait for
    (folder / "args.json").write_text(json.dumps({**saved, "args": {**saved["args"], "total_timesteps": total}}))
    run(script.name, "--resume", folder)
    assert json.loads((folder / "result.json").read_text())["global_step"] == total
    logged = scalars(folder)
    steps = [step for step, _ in logged["charts/SPS"]]
    # an A2C script logs also where a signal stopped it
    assert steps == sorted({*range(script.logged, total + 1, script.logged), progressed[0]})
    for points in logged.values():
        assert [step for step, _ in points] == sorted({step for step, _ in points})
    capsys.readouterr()
    call(script, "--resume", folder)
    assert "has finished its" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sppo_atari.parse_args(["--resume", str(folder)], sppo_atari.Args())
    assert f"a run of {script.name}; expected a run of sppo_atari.py" in capsys.readouterr().err


@each_script
def test_resume_restores_weights_optimiser_normalisers_and_the_window_of_returns(script, tmp_path, call):
    """Copies of one checkpoint go on alike; with a part of it exchanged, they show that part."""
    call(script, *script.args, *script.noise, "--total-timesteps", 640, "--eval-episodes", 0, "--run-dir", tmp_path / "run")
    original = only(tmp_path / "run")
    saved = torch.load(original / "checkpoint.pt", weights_only=True)

    def resumed(name, **exchanged):
        folder = tmp_path / name
        shutil.copytree(original, folder)
        torch.save({**saved, **exchanged}, folder / "checkpoint.pt")
        call(script, "--resume", folder, "--total-timesteps", 1280)
        logged = {tag: points for tag, points in scalars(folder).items() if tag != "charts/SPS"}
        return logged, torch.load(folder / "checkpoint.pt", weights_only=True)

    logged, after = resumed("a")
    assert resumed("b")[0] == logged
    assert after["seconds"] > saved["seconds"] > 0
    assert saved["recent_returns"] and after["recent_returns"][: len(saved["recent_returns"])] == saved["recent_returns"]
    new = len(logged["losses/value_loss"]) // 2  # where the second half begins
    different = {"agent": {key: value + 1 if key.startswith("critic") else value for key, value in saved["agent"].items()}}
    if "atari" in script.name:
        different["square_avgs"] = [value * 1e12 for value in saved["square_avgs"]]
    else:
        state = {
            key: value * 1e12 if torch.is_tensor(value) else value for key, value in saved["optimizer"]["state"][0].items()
        }
        different["optimizer"] = {**saved["optimizer"], "state": {0: {**state, "step": saved["optimizer"]["state"][0]["step"]}}}
        mean, var, count = saved["obs_stats"]
        different["obs_stats"] = [[value + 5 for value in mean], var, count]
        different["return_stats"] = [saved["return_stats"][0], 1e6, saved["return_stats"][2]]
        num_envs = json.loads((original / "args.json").read_text())["args"]["num_envs"]
        assert count == pytest.approx(640 + num_envs + 1e-4)  # each observation once: of the first resets and of all steps
    for part, value in different.items():
        changed = resumed(part, **{part: value})[0]["losses/value_loss"]
        assert changed[:new] == logged["losses/value_loss"][:new] and changed[new:] != logged["losses/value_loss"][new:], part


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda script: script.name)
def test_gaussian_runs_learn_evaluate_and_resume(script, tmp_path, call):
    args = ["--num-bins", 0, "--alpha", 1, "--beta", 0, "--total-timesteps", 640, "--eval-episodes", 1, "--run-dir", tmp_path]
    call(script, *script.args, *args)
    folder = only(tmp_path)
    call(script, "--resume", folder, "--total-timesteps", 1280)
    result = json.loads((folder / "result.json").read_text())
    assert result["global_step"] == 1280 and np.isfinite(result["score"])
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["agent"]["log_std"].abs().max() > 0  # it starts at 0
    assert saved["agent"]["actor.4.weight"].shape == (2, 64)


def test_a_broken_gaussian_ends_before_the_environment_meets_it(tmp_path):
    """NaN actions are an assertion error in Box2D."""
    args = ["--env-id", "BipedalWalker", "--num-bins", 0, "--alpha", 1, "--beta", 0, "--learning-rate", 1e30]
    _, err = run("dsa2c_continuous.py", *args, "--run-dir", tmp_path, code=1)
    assert re.search(r"dsa2c_continuous.py: .* is (nan|-?inf) at step \d+; the run ends, there is no checkpoint yet", err)


@each_script
def test_a_broken_run_ends_and_leaves_no_checkpoint(script, tmp_path):
    args = ["--total-timesteps", 1280, "--eval-episodes", 0, "--run-dir", tmp_path, "--learning-rate", 1e30]
    _, err = run(script.name, *script.args, *args, code=1)
    assert re.search(rf"{script.name}: .* is (nan|-?inf) at step \d+; the run ends, there is no checkpoint yet", err)
    assert not (only(tmp_path) / "result.json").exists() and not (only(tmp_path) / "checkpoint.pt").exists()


BAD = {
    "sa2c_atari.py": [
        ("--env-id Alein", "--env-id Alein: no such Atari game ("),
        ("--rmsprop-alpha 2", "--rmsprop-alpha 2.0: must be less than or equal to 1"),
        ("--rmsprop-eps 0", "--rmsprop-eps 0.0: must be greater than 0"),
        ("--checkpoint-interval 150", "--checkpoint-interval 150: expected a multiple of log_interval = 100"),
        ("--num-envs 1 --num-steps 1 --norm-adv", "--norm-adv True: expected num_envs x num_steps of 2 or more"),
        ("--total-timesteps 79", "--total-timesteps 79: expected num_envs x num_steps = 80 or more"),
        ("--clip-coef 0.1", "--clip-coef: unknown argument"),
    ],
    "dsppo_continuous.py": [
        (
            "--env-id CartPole-v1",
            "--env-id CartPole-v1: has Box observations and Discrete actions (int64, shape ()); expected Box",
        ),
        (
            "--env-id Blackjack-v1",
            "--env-id Blackjack-v1: has Tuple observations and Discrete actions (int64, shape ()); expected Box",
        ),
        ("--env-id Hoper", "Did you mean: `Hopper`?"),
        ("--num-bins 1", "--num-bins 1: expected 0 (Gaussian) or 2 or more"),
        ("--num-bins 0", "--beta 20.0: expected 0 with num_bins 0"),
        ("--noise-std -1", "--noise-std -1.0: must be greater than or equal to 0"),
        ("--noise bsc", "'bsc'"),
        ("--reverse-prob both", "'both'"),
        ("--minibatch-size 100", "--minibatch-size 100: expected a divisor of num_envs x num_steps = 2048"),
        ("--resume /no/such/run --beta 3", "--resume /no/such/run: not the folder of a run of this script"),
    ],
    "dsa2c_continuous.py": [
        (
            "--env-id Taxi-v4",
            "--env-id Taxi-v4: has Discrete observations and Discrete actions (int64, shape ()); expected Box",
        ),
        ("--num-bins 0", "--beta 0.2: expected 0 with num_bins 0"),
        ("--checkpoint-interval 150", "--checkpoint-interval 150: expected a multiple of log_interval = 100"),
        ("--gamma 1.01", "--gamma 1.01: must be less than or equal to 1"),
    ],
}


@pytest.mark.parametrize(
    ("name", "line", "expected"), [(name, *case) for name, cases in BAD.items() for case in cases], ids=lambda value: value
)
def test_bad_input_is_one_line_with_exit_status_2(name, line, expected, capsys, monkeypatch):
    module = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as stopped:
        module.check_args(module.parse_args(line.split(), module.Args()))
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"{name}: error: ") and expected in err


@pytest.mark.parametrize("name", ["dsppo_continuous", "dsa2c_continuous"])
def test_odd_action_boxes_and_modules_are_refused(name, capsys, tmp_path, monkeypatch):
    import gymnasium as gym

    class Whole(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(0, 4, (2,), np.int64)

    class Empty(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (0,))

    gym.register("Whole-v0", entry_point=Whole)
    gym.register("Empty-v0", entry_point=Empty)
    (tmp_path / "raises_here.py").write_text("1 / 0")
    (tmp_path / "no_syntax_here.py").write_text("def")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    for env_id, reason in (
        ("Whole-v0", "Box actions (int64, shape (2,)); expected Box observations and a one-dimensional Box of float actions"),
        ("Empty-v0", "Box actions (float32, shape (0,)); expected"),
        ("raises_here:Hopper-v4", "(division by zero); expected"),
        ("no_syntax_here:Hopper-v4", "invalid syntax"),
        (".relative:Hopper-v4", "relative import"),
        (":Hopper-v4", "(Empty module name); expected"),
    ):
        with pytest.raises(SystemExit):
            module.check_args(module.Args(env_id=env_id))
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"error: --env-id {env_id}: " in err and reason in err, err


@each_script
def test_a_wandb_mode_that_there_is_not_is_refused(script, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "foo")
    module = importlib.import_module(script.name.removesuffix(".py"))
    with pytest.raises(SystemExit) as stopped:
        module.check_args(module.Args(track=True))
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--track: WANDB_MODE is foo; expected one of online, offline" in err


@each_script
def test_a_finished_run_is_left_as_it_is(script, call, tmp_path):
    total = 3 * script.batch
    call(script, *script.args, "--total-timesteps", total, "--eval-episodes", 0, "--run-dir", tmp_path)
    before = {path: path.read_bytes() for path in only(tmp_path).iterdir()}
    call(script, "--resume", only(tmp_path), "--total-timesteps", total + script.batch // 2)  # less than an iteration
    assert {path: path.read_bytes() for path in only(tmp_path).iterdir()} == before


def test_unbounded_actions_are_refused_with_bins_and_accepted_without(capsys):
    import gymnasium as gym

    import dsppo_continuous

    class Unbounded(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,))
        action_space = gym.spaces.Box(-np.inf, np.inf, (1,))

        def reset(self, **given):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), 0.0, False, False, {}

    gym.register("Unbounded-v0", entry_point=Unbounded, max_episode_steps=9)
    with pytest.raises(SystemExit):
        dsppo_continuous.check_args(dsppo_continuous.Args(env_id="Unbounded-v0"))
    assert "--env-id Unbounded-v0: its actions are unbounded" in capsys.readouterr().err
    dsppo_continuous.check_args(dsppo_continuous.Args(env_id="Unbounded-v0", num_bins=0, beta=0.0))

    class Broken(Unbounded):
        action_space = gym.spaces.Box(-3.4e38, 3.4e38, (1,))  # high - low is infinite

        def __init__(self, message):
            if message is not None:
                raise ValueError(message)

    gym.register("Huge-v0", entry_point=Broken, kwargs={"message": None})
    gym.register("Silent-v0", entry_point=Broken, kwargs={"message": ""})
    gym.register("Verbose-v0", entry_point=Broken, kwargs={"message": "two\nlines"})
    for env_id, reason in (("Huge", "its actions are unbounded"), ("Silent", "ValueError"), ("Verbose", "two lines")):
        with pytest.raises(SystemExit):
            dsppo_continuous.check_args(dsppo_continuous.Args(env_id=f"{env_id}-v0"))
        err = capsys.readouterr().err
        assert f"--env-id {env_id}-v0: " in err and reason in err and err.count("\n") == 1


@needs_compiler
@each_script
def test_compiled_loss_equals_the_plain_one(script):
    module = importlib.import_module(script.name.removesuffix(".py"))
    torch.manual_seed(0)
    if "atari" in script.name:
        agent, obs = module.Agent(6), torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8)
        batch = [obs, torch.randint(6, (16,)), torch.randn(16), torch.randn(16)]
    else:
        agent, old = module.Agent(5, 3, 11), [-2.4 + 0.1 * torch.randn(16, 3)] if "dsppo" in script.name else []
        batch = [torch.randn(16, 5), torch.randint(11, (16, 3)), *old, torch.randn(16), torch.randn(16)]
    loss_fn = module.minibatch_loss if "dsppo" in script.name else module.rollout_loss
    results = []
    for function in (loss_fn, torch.compile(loss_fn)):
        loss, stats = function(agent, module.Args(), *batch)
        results.append((loss, stats, torch.autograd.grad(loss, agent.parameters())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
