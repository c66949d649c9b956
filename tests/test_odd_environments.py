"""Environments that are allowed and unusual: each plays as its plain twin does, or is refused before anything is made."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from typing import ClassVar

import gymnasium
import imageio
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers import ENV, ROOT, no_process_outlives_its_test, only, scalars, start, unchanged_process, wait_for  # noqa: F401

pytestmark = pytest.mark.quick


class Plain(gymnasium.Env):
    """A drifting point that leaves |x| < 3 or is cut off; the rewards are its steps. `opened` counts what nobody closed."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(-1, 1, (1,), np.float32)
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}
    opened, made = 0, 0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        Plain.opened += 1
        Plain.made += 1
        self.number, self.steps = Plain.made, 0  # 1 is the check's, 2 to 5 are the training's

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.standard_normal(2)
        return self.told(), {}

    def step(self, action):
        self.steps += 1
        self.x = self.x + 0.3 * self.drawn() + 0.2 * action[0]
        over, cut = (self.ended(bool(flag)) for flag in (abs(self.x[1]) > 3, False))
        return self.told(), self.paid(float(action[0] - abs(self.x[0]))), over, cut, {}

    def drawn(self):
        return self.np_random.standard_normal(2)

    def told(self):
        return self.x.copy()

    def paid(self, reward):
        return reward

    def ended(self, flag):
        return flag

    def render(self):
        return np.full((32, 48, 3), 100, np.uint8)

    def close(self):
        Plain.opened -= 1


SHARED = np.zeros(2)
ODD = {}  # name: what it does otherwise


def odd(name, limit=15, base=Plain, **methods):
    ODD[name] = type(name, (base,), methods)
    gymnasium.register(f"{name}-v0", ODD[name], max_episode_steps=limit)


def told_in_one_array(self):
    SHARED[:] = self.x
    return SHARED


def drawn_with_seeded_generators(self):
    """What a simulator does that seeds what it uses itself."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return Plain.drawn(self)


def drawn_without_gradients(self):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return Plain.drawn(self)


def drawn_from_spaces(self):
    return np.array([self.action_space.sample()[0], self.observation_space.sample()[0]])


# equal to their plain twin
odd("Plain")
odd("OneArrayForAll", told=told_in_one_array)
odd("TellsLists", told=lambda self: self.x.tolist())
odd("TellsRows", told=lambda self: self.x[None])
odd("TellsColumns", told=lambda self: self.x[:, None])
odd("PaysArrays", paid=lambda self, reward: np.array([reward]))
odd("EndsWithFloats", ended=lambda self, flag: float(flag))
odd("EndsWithArrays", ended=lambda self, flag: np.array([flag]))
odd("EndsWithNone", ended=lambda self, flag: flag or None)
odd("SeedsGenerators", drawn=drawn_with_seeded_generators)
odd("SwitchesGradientsOff", drawn=drawn_without_gradients)
odd("OneNumber", observation_space=Box(-np.inf, np.inf, (1,), np.float64), told=lambda self: self.x[:1].copy())
odd("OneScalar", base=ODD["OneNumber"], told=lambda self: self.x[0])
# that draw
odd("DrawsFromNumpy", drawn=lambda self: np.random.standard_normal(2))
odd("DrawsFromRandom", drawn=lambda self: np.array([random.gauss(0, 1), random.gauss(0, 1)]))
odd("DrawsFromTorch", drawn=lambda self: torch.randn(2).numpy())
odd("DrawsFromItsSpaces", drawn=drawn_from_spaces)
# that end a run, or do not start it
odd("TellsNan", told=lambda self: self.x * (np.nan if 2 <= self.number < 6 and self.steps == 20 else 1))
odd("TellsInfinity", told=lambda self: self.x + (np.inf if 2 <= self.number < 6 and self.steps == 20 else 0))
odd("TellsNanLater", told=lambda self: self.x * (np.nan if self.number >= 6 else 1))  # in evaluation
odd("PaysNan", paid=lambda self, reward: np.nan if self.number == 2 and self.steps == 20 else reward)
odd("Endless", limit=None)
odd("ShowsFloats", render=lambda self: np.zeros((32, 48, 3)))
odd("PaysTwice", paid=lambda self, reward: np.array([reward, reward]))


@pytest.fixture(params=["dsppo_continuous", "dsa2c_continuous"])
def call(request, tmp_path):
    """Runs a script in this process and returns its run folder; every environment is closed at the end, whatever the end is."""
    script = importlib.import_module(request.param)
    more = ["--num-envs", "4"] + (
        ["--minibatch-size", "32", "--num-steps", "16", "--update-epochs", "3"] if "ppo" in request.param else []
    )
    more += ["--log-interval", "4"] if "a2c" in request.param else []
    Plain.opened = 0

    def call(env_id, *args):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        Plain.made = 0
        line = ["--env-id", f"{env_id}-v0", "--total-timesteps", "128", *more, "--run-dir", str(folder), *args]
        with unchanged_process():
            script.main(script.parse_args(line))
        return only(folder)

    call.script, call.tmp_path = script, tmp_path
    yield call
    assert Plain.opened == 0 and torch.get_default_dtype() == torch.float32


def outcome(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"], json.loads((folder / "result.json").read_text())


def curves(folder):
    return {tag: values for tag, values in scalars(folder).items() if tag not in ("charts/SPS", "eval/episodic_return")}


def test_odd_environments_learn_and_score_as_their_plain_twin(call, monkeypatch):
    names, orders, randperm = list(ODD), [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: orders.append(randperm(*args, **kwargs)) or orders[-1])
    for name in names[: names.index("DrawsFromNumpy")]:
        orders.clear()
        weights, result = outcome(call(name, "--eval-episodes", "2"))
        if name in ("Plain", "OneNumber"):
            plain = (weights, result["returns"])
        assert result["returns"] == plain[1] and len(plain[1]) == 2, name
        torch.testing.assert_close(weights, plain[0], rtol=0, atol=0, msg=name)
        assert len({tuple(order.tolist()) for order in orders}) == len(orders)  # no two epochs shuffle alike
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


@pytest.mark.parametrize("name", ["DrawsFromNumpy", "DrawsFromRandom", "DrawsFromTorch", "DrawsFromItsSpaces"])
def test_the_seed_covers_what_an_environment_draws_from(call, name, capsys):
    """One curve for one seed, also after another run and without evaluations; --evaluate repeats result.json."""
    interval = "64" if "Spaces" in name else "0"  # spaces of the class are evaluation's, too
    folders = [
        call(name, "--eval-interval", every, "--seed", seed) for seed, every in (("1", "64"), ("3", "0"), ("1", interval))
    ]
    first, other, again = map(curves, folders)
    assert first == again and first != other
    returns = [round(value, 2) for value in outcome(folders[0])[1]["returns"]]
    capsys.readouterr()
    with unchanged_process():
        call.script.main(call.script.parse_args(["--evaluate", str(folders[0])]))
    assert f"returns {returns}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TellsNan", r"an observation of the environment is \[nan nan\] at step [68]\d"),
        ("TellsInfinity", r"an observation of the environment is \[inf inf\] at step [68]\d"),
        ("TellsNanLater", r"an observation of the environment is \[nan nan\] at step 128; the run ends, .*last checkpoint"),
        ("PaysNan", r"a reward of the environment is nan at step [68]\d"),
    ],
)
def test_numbers_that_are_none_end_the_run_and_are_named(call, name, message):
    with pytest.raises(FloatingPointError, match=message):
        call(name, "--eval-episodes", "1", "--checkpoint-interval", "4")
    folder = only(only(call.tmp_path))
    assert not (folder / "result.json").exists() and (folder / "checkpoint.pt").exists() == ("Later" in name)


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("PaysTwice", [], "can only convert an array of size 1"),
        ("ShowsFloats", ["--capture-video"], "--capture-video: ShowsFloats-v0 renders no frames of uint8"),
        ("Endless", [], "--env-id Endless-v0: .*no time limit, set --max-episode-steps"),
    ],
)
def test_it_is_refused_and_nothing_is_made(call, name, args, reason):
    with pytest.raises(ValueError, match=reason):
        call(name, *args)
    assert list(call.tmp_path.iterdir()) == [] and Plain.made > 0


def test_a_task_without_time_limit_trains_unscored_or_with_a_limit(call):
    assert outcome(call("Endless", "--eval-episodes", "0"))[1]["score"] is None
    folder = call("Endless", "--max-episode-steps", "9", "--eval-episodes", "2", "--capture-video")
    assert len(outcome(folder)[1]["returns"]) == 2
    assert imageio.get_reader(folder / "videos" / "128.mp4").count_frames() <= 9


def test_load_policy_plays_in_five_lines_what_the_result_says(call):
    folder = call("Plain", "--eval-episodes", "1")
    policy, env = call.script.load_policy(folder)
    obs, _ = env.reset(seed=int(np.random.default_rng([1, call.script.EVALUATION]).integers(2**31, size=1)[0]))
    total, done = 0.0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        total, done = total + reward, terminated or truncated
    env.close()
    assert [total] == outcome(folder)[1]["returns"]


def test_a_log_of_one_sample_is_finite(call):
    if "ppo" in call.script.__name__:
        pytest.skip("a minibatch has two")
    args = ["--num-envs", "1", "--num-steps", "1", "--total-timesteps", "129", "--eval-episodes", "0"]
    assert outcome(call("Plain", *args))[1]["global_step"] == 129


def test_a_signal_during_an_evaluation_while_training_saves_at_once(call, monkeypatch):
    """A2C, whose iteration takes milliseconds, runs one more."""
    monkeypatch.setattr(call.script, "evaluate", lambda policy, args, device, video, stop: stop.append(signal.SIGINT) or [])
    with pytest.raises(SystemExit):
        call("Plain", "--eval-interval", "64", "--total-timesteps", "256")
    step = 64 if "ppo" in call.script.__name__ else 64 + 4 * call.script.Args().num_steps
    assert torch.load(only(only(call.tmp_path)) / "checkpoint.pt", weights_only=True)["global_step"] == step


@pytest.mark.parametrize("script", ["dsppo_continuous", "dsa2c_continuous"])
def test_numpy_multiplies_on_one_thread(script):
    """Single observations gain nothing from more, and wide ones lose: --num-threads is for torch alone."""
    head, imports, _ = (ROOT / f"{script}.py").read_text().partition("import numpy as np")
    code = f"{head}{imports}\nimport threadpoolctl\nprint(json.dumps(threadpoolctl.threadpool_info()))"
    env = {name: value for name, value in ENV.items() if name != "OMP_NUM_THREADS"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    blas = [pool for pool in json.loads(out) if pool["user_api"] == "blas"]
    assert blas and all(pool["num_threads"] == 1 for pool in blas)


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


def test_a_module_where_the_user_stands_is_found_and_its_processes_end_with_the_run(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    args = ["--env-id", "mine:Mine-v0", "--num-steps", 128, "--eval-episodes", 1, "--total-timesteps", 10**7]
    process = start("dsppo_continuous.py", *args, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143, err
    assert only(tmp_path / "runs").name.startswith("Mine-v0__")
    engines = (tmp_path / "engines").read_text().split()
    assert len(engines) >= 2 and not any(os.path.exists(f"/proc/{pid}") for pid in engines)
