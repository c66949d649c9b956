"""Environments that are allowed and unusual: each plays as its plain twin does, or is refused in one line at the start."""

import importlib
import json
import os
import signal
import subprocess
import sys
from typing import ClassVar

import gymnasium
import imageio
import numpy as np
import pytest
import torch
from helpers import ROOT, no_process_outlives_its_test, only, start, wait_for  # noqa: F401

pytestmark = pytest.mark.quick


class Plain(gymnasium.Env):
    """A drifting point that leaves |x| < 3 or is cut off; the rewards are its steps. `opened` counts what nobody closed."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}
    opened, made = 0, 0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        Plain.opened += 1
        Plain.made += 1
        self.number = Plain.made

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.standard_normal(2)
        return self.told(), {}

    def step(self, action):
        self.x = self.x + 0.3 * self.np_random.standard_normal(2) + 0.2 * action[0]
        return self.told(), self.paid(float(action[0] - abs(self.x[0]))), bool(abs(self.x[1]) > 3), False, {}

    def told(self):
        return self.x.copy()

    def paid(self, reward):
        return reward

    def render(self):
        return np.full((32, 48, 3), 100, np.uint8)

    def close(self):
        Plain.opened -= 1


class ReusesItsArray(Plain):
    """Every observation is the same array, overwritten."""

    def told(self):
        self.array = getattr(self, "array", np.zeros(2))
        self.array[:] = self.x
        return self.array


class TellsLists(Plain):
    def told(self):
        return self.x.tolist()


class PaysArrays(Plain):
    def paid(self, reward):
        return np.array([reward])


class PaysTwice(Plain):
    def paid(self, reward):
        return np.array([reward, reward])


class ShowsNothing(Plain):
    def render(self):
        return None


class ShowsFloats(Plain):
    def render(self):
        return np.zeros((32, 48, 3))


class PaysNoNumberLater(Plain):
    """Only evaluation meets it: the second environment, after the check, is the training's."""

    def paid(self, reward):
        return reward if self.number < 3 else float("nan")


class Breaks(Plain):
    """In the training, not in the check before it."""

    steps = 0

    def paid(self, reward):
        self.steps += 1
        if self.steps == 20:
            sys.exit(7)  # what a second Ctrl-C does
        return reward


class Discrete(Plain):
    action_space = gymnasium.spaces.Discrete(3)


CLASSES = [
    Plain,
    ReusesItsArray,
    TellsLists,
    PaysArrays,
    PaysTwice,
    ShowsNothing,
    ShowsFloats,
    PaysNoNumberLater,
    Breaks,
    Discrete,
]
for kind in CLASSES:
    gymnasium.register(f"{kind.__name__}-v0", kind, max_episode_steps=15)
gymnasium.register("Endless-v0", Plain)


@pytest.fixture(params=["dsppo_continuous", "dsa2c_continuous"])
def call(request, tmp_path, capsys):
    """Runs a script in this process and returns its run folder; every environment is closed at the end, whatever the end is."""
    script = importlib.import_module(request.param)
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    more = ["--minibatch-size", "32", "--num-steps", "64"] if "ppo" in request.param else ["--log-interval", "4"]
    Plain.opened = Plain.made = 0

    def call(env_id, *args):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        line = ["--env-id", env_id, "--total-timesteps", "128", *more, "--run-dir", str(folder), *args]
        parsed = script.parse_args(line, script.Args())
        script.check_args(parsed)
        script.main(parsed)
        return only(folder)

    call.script, call.tmp_path = script, tmp_path
    yield call
    assert Plain.opened == 0
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def outcome(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"], json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("kind", [ReusesItsArray, TellsLists, PaysArrays], ids=lambda kind: kind.__name__)
def test_it_learns_and_scores_as_its_plain_twin(call, kind):
    weights, result = outcome(call("Plain-v0", "--eval-episodes", "2"))
    odd_weights, odd_result = outcome(call(f"{kind.__name__}-v0", "--eval-episodes", "2"))
    torch.testing.assert_close(odd_weights, weights, rtol=0, atol=0)
    assert odd_result["returns"] == result["returns"] and len(result["returns"]) == 2


@pytest.mark.parametrize(
    ("env_id", "args", "reason"),
    [
        ("PaysTwice-v0", [], "--env-id PaysTwice-v0: cannot play a step of it ("),
        ("ShowsNothing-v0", ["--capture-video"], "--capture-video: --env-id ShowsNothing-v0 renders object (); expected uint8"),
        ("ShowsFloats-v0", ["--capture-video"], "renders float64 (32, 48, 3); expected uint8"),
        ("Endless-v0", [], "--env-id Endless-v0: has no time limit"),
        ("Discrete-v0", [], "--env-id Discrete-v0: has Box observations and Discrete actions"),
    ],
)
def test_it_is_refused_in_one_line_and_nothing_is_made(call, env_id, args, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(env_id, *args)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and err.count("\n") == 1 and reason in err and out == ""
    assert list(call.tmp_path.iterdir()) == [] and Plain.made > 0


def test_a_task_without_time_limit_trains_unscored_or_with_a_limit(call):
    assert outcome(call("Endless-v0", "--eval-episodes", "0"))[1]["score"] is None
    folder = call("Endless-v0", "--max-episode-steps", "9", "--eval-episodes", "2", "--capture-video")
    assert len(outcome(folder)[1]["returns"]) == 2
    assert imageio.get_reader(folder / "videos" / "128.mp4").count_frames() <= 9


def test_rewards_that_are_no_numbers_in_evaluation_end_the_run(call, capsys):
    with pytest.raises(
        SystemExit, match=r"the mean return of the evaluation is nan at step 128; the run ends, .*checkpoint.pt"
    ):
        call("PaysNoNumberLater-v0", "--eval-episodes", "1", *(["--num-envs", "1"] if "a2c" in call.script.__name__ else []))
    folder = only(only(call.tmp_path))
    assert not (folder / "result.json").exists() and (folder / "checkpoint.pt").exists()


def test_environments_are_closed_when_the_training_ends_at_once(call):
    with pytest.raises(SystemExit) as stopped:
        call("Breaks-v0")
    assert stopped.value.code == 7 and Plain.made > 1


def test_a_resumed_run_draws_from_its_step(call, monkeypatch):
    """The seeds of the first resets, the generators of actions, noise and torch all follow from [seed, step]."""
    script, seeds = call.script, []

    def reset(self, seed=None, options=None):
        seeds.append((seed, torch.initial_seed()))
        sys.exit(3)

    monkeypatch.setattr(Plain, "reset", reset)
    agent = script.Agent(2, 1, 11)
    weights = script.flatten_parameters(agent)
    optimizer = torch.optim.Adam([weights]) if "ppo" in script.__name__ else torch.optim.RMSprop([weights])
    state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "recent_returns": [5.0], "seconds": 1.0}
    state |= {"obs_stats": script.RunningMeanStd((2,)).state(), "return_stats": script.RunningMeanStd().state()}
    for step in (0, 64, 128):
        args = script.Args(env_id="Plain-v0", num_envs=2, seed=3, run_dir=str(call.tmp_path / str(step)))
        held = script.Run(args)
        held.checkpoint = {"global_step": step, **state}
        with pytest.raises(SystemExit), held.cleanup:
            script.train(args, held)
    expected = [int(np.random.default_rng([3, script.ENVS, step]).integers(2**31, size=2)[0]) for step in (0, 64, 128)]
    assert seeds == list(zip(expected, [3, 67, 131], strict=True)) and len(set(expected)) == 3


def test_load_policy_plays_in_five_lines_what_the_result_says(call):
    folder = call("Plain-v0", "--eval-episodes", "1")
    policy, env = call.script.load_policy(folder)
    obs, _ = env.reset(seed=int(np.random.default_rng([1, call.script.EVALUATION]).integers(2**31, size=1)[0]))
    total, done = 0.0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        total, done = total + reward, terminated or truncated
    env.close()
    assert [total] == outcome(folder)[1]["returns"]


MODULE = """
import gymnasium, numpy, subprocess

class Mine(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,), numpy.float32)
    def __init__(self):
        self.engine = subprocess.Popen(["sleep", "1000"])
        with open("engines", "a") as file:
            file.write(f"{self.engine.pid} ")
    def reset(self, **given):
        return numpy.zeros(1, numpy.float32), {}
    def step(self, action):
        return numpy.zeros(1, numpy.float32), 0.0, False, False, {}
    def close(self):
        self.engine.kill()
        self.engine.wait()

gymnasium.register("Mine-v0", Mine, max_episode_steps=10)
"""


def alive(pid):
    return os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("ending", ["end", "signal"])
def test_a_module_where_the_user_stands_is_found_and_its_processes_end_with_the_run(ending, tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    steps = 10**7 if ending == "signal" else 256
    args = ["--env-id", "mine:Mine-v0", "--num-steps", 128, "--eval-episodes", 1, "--total-timesteps", steps]
    process = start("dsppo_continuous.py", *args, cwd=tmp_path)
    if ending == "signal":
        wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == (143 if ending == "signal" else 0), err
    assert only(tmp_path / "runs").name.startswith("Mine-v0__")
    engines = (tmp_path / "engines").read_text().split()
    assert len(engines) >= 2 and not any(map(alive, engines))


def test_a_folder_that_cannot_be_written_is_one_line(call):
    folder = call("Plain-v0", "--eval-episodes", "0")
    (folder / "args.json.tmp").mkdir()  # stands for a read-only folder, which does not stop the superuser
    before = (folder / "checkpoint.pt").read_bytes()
    command = [sys.executable, ROOT / f"{call.script.__name__}.py", "--resume", folder, "--total-timesteps", "1000"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["env_id"] = "test_odd_environments:Plain-v0"
    (folder / "args.json").write_text(json.dumps(saved))
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert f"--resume {folder}: " in ended.stderr and (folder / "checkpoint.pt").read_bytes() == before


def test_a_log_of_one_sample_is_finite(call):
    one = ["--num-envs", "1", "--num-steps", "1", "--minibatch-size", "1", "--no-norm-adv", "--total-timesteps", "3"]
    if "a2c" in call.script.__name__:
        one = ["--num-envs", "1", "--num-steps", "1", "--total-timesteps", "129"]  # the last log has one iteration
    assert outcome(call("Plain-v0", *one, "--eval-episodes", "0"))[1]["global_step"] == int(one[-1])


def test_a_signal_during_an_evaluation_while_training_saves_at_once(call, monkeypatch):
    """A2C, whose iteration takes milliseconds, runs one more."""
    monkeypatch.setattr(call.script, "evaluate", lambda policy, args, device, video, stop: stop.append(signal.SIGINT) or [])
    with pytest.raises(SystemExit):
        call("Plain-v0", "--eval-interval", "64", "--total-timesteps", "256")
    defaults = call.script.Args()
    step = 64 if "ppo" in call.script.__name__ else 64 + defaults.num_envs * defaults.num_steps
    assert torch.load(only(only(call.tmp_path)) / "checkpoint.pt", weights_only=True)["global_step"] == step


def test_a_compiled_run_plays_without_a_compiler(call, monkeypatch):
    folder = call("Plain-v0", "--eval-episodes", "1")
    record = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**record, "args": {**record["args"], "compile": True}}))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not call.script.parse_args(["--evaluate", str(folder)], call.script.Args()).compile
    call.script.check_args(call.script.parse_args(["--evaluate", str(folder)], call.script.Args()))
