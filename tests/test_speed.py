"""benchmark/studies/speed.py: its parts on small batches, and its table of all suites, from numbers that were made up."""

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from helpers import ENV, ROOT

sys.path.insert(0, str(ROOT / "benchmark/studies"))
import speed
import speed_rlhf

import sa2c_atari
import sppo_atari


def test_the_plain_losses_are_the_scripts_without_the_reverse_term():
    torch.manual_seed(0)
    old, advantages = -torch.rand(1000) * 3, torch.randn(1000)
    logprobs = (old + torch.randn(1000) * 0.3).requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss, logprobs)[0]

    theirs, reverse, stats = speed.plain_ppo_loss(logprobs, old, advantages, 0.2, -1.0, False)
    ours, _, expected = sppo_atari.symmetric_ppo_loss(logprobs, old, advantages, 0.2)
    torch.testing.assert_close((theirs, gradient(theirs), stats), (ours, gradient(ours), expected), rtol=0, atol=0)
    assert reverse == 0 and 0.1 < stats["clipfrac"] < 0.9
    theirs, reverse = speed.plain_a2c_loss(logprobs, advantages, -1.0, False)
    ours, _ = sa2c_atari.symmetric_a2c_loss(logprobs, advantages)
    torch.testing.assert_close((theirs, gradient(theirs)), (ours, gradient(ours)), rtol=0, atol=0)
    assert reverse == 0


@pytest.mark.parametrize("name", speed.SUITES)
def test_the_phases_of_each_script_can_be_measured(name, monkeypatch):
    suite = dataclasses.replace(speed.SUITES[name], num_envs=4, num_steps=64, block=1)
    script, loss = importlib.import_module(suite.script), f"symmetric_{suite.algorithm}_loss"
    monkeypatch.setattr(script, loss, getattr(script, loss))  # which the measurement replaces
    found = speed.phases(speed.Args(pairs=1), suite, torch.get_num_threads())
    assert min(found["environments"], found["acting"], found["update"], found["update, plain"]) > 0
    assert found["update, symmetric / plain"] == found["update"] / found["update, plain"]  # of one pair


@pytest.mark.parametrize("more", ["", "--compile"])
def test_the_phases_of_a_loop_are_clocked(more, monkeypatch):
    """Also where the script compiles its update: its clock is then outside (here nothing is compiled)."""
    suite, compiled = dataclasses.replace(speed.SUITES["da2c"], env_id="Pendulum-v1", block=2), []
    script = importlib.import_module(suite.script)
    for holder, names in ((script, "act compute_gae update grad_shares step_envs"), (script.Run, "save log")):
        [monkeypatch.setattr(holder, name, getattr(holder, name)) for name in names.split()]  # which the measurement replaces
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    lines = speed.loop_phases(speed.Args("da2c", blocks=3, more=more), suite)
    found = {name.strip(): float(ms) for _, name, ms, _, _ in (line.split("|") for line in lines[4:])}
    assert {"acting", "environments", "update", "log", "the rest"} <= found.keys() and min(found.values()) >= 0
    assert bool(compiled) == bool(more)
    assert not any(hasattr(function, "inside") for function in compiled)


def test_growth_is_a_line_a_size(monkeypatch):
    """A rate of 100 steps/s at every size but 8 times the bins, where it is half."""
    sizes = []

    def measure(args, suite, arm, threads):
        sizes.append(
            (suite.num_envs, suite.num_steps, int(arm.split("--num-bins ")[1].split()[0]) if "--num-bins" in arm else 11)
        )
        return [50.0 if "--num-bins 88" in arm else 100.0], 123.4, 1.0

    monkeypatch.setattr(speed, "measure", measure)
    rows = [line.strip("| ").split(" | ") for line in speed.growth(speed.Args("dppo"), speed.SUITES["dppo"])[2:]]
    assert sizes == [(n, 2048, 11) for n in (1, 2, 4, 8)] + [(1, 2048 * n, 11) for n in (1, 2, 4, 8)] + [
        (1, 2048, 11 * n) for n in (1, 2, 4, 8)
    ]
    assert [row[:4] for row in rows[:3]] == [
        ["num_envs", "1", "20.480", ""],
        ["num_envs", "2", "40.960", "2.00"],
        ["num_envs", "4", "81.920", "2.00"],
    ]
    assert [row[3] for row in rows[8:]] == ["", "1.00", "1.00", "2.00"] and rows[0][4] == "123"


@pytest.mark.parametrize("module", [speed, speed_rlhf])
def test_a_run_that_fails_says_why(module, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arm = "sppo_atari.py --gamma 7" if module is speed else "sppo_rlhf_imdb.py --gamma 7"
    given = (speed.Args(), speed.SUITES["atari-ppo"], arm, 1) if module is speed else (arm, 1)
    with pytest.raises(SystemExit) as stopped:
        module.measure(*given)
    assert stopped.value.code.startswith("failed: ") and "less than or equal to 1" in stopped.value.code


def test_the_gpu_check_is_sound():
    """Its limits sum to nine minutes at most, and speed.py takes its arguments."""
    path = ROOT / "benchmark/studies/gpu_check.sh"
    subprocess.run(["bash", "-n", path], check=True)
    assert sum(map(int, re.findall(r"(?m)^part (\d+)", path.read_text()))) <= 540
    commands = re.findall(r"(?m)^part .*\$speed (.*)$", path.read_text())
    assert len(commands) == 6
    for command in commands:
        assert speed.tyro.cli(speed.Args, args=shlex.split(command)).cuda


def test_a_suite_says_when_compiling_pays(monkeypatch, tmp_path):
    """30 s more of warm-up, made good at 300 steps/s against 200: n / 200 - n / 300 = 30, n = 18,000."""
    (tmp_path / "benchmark/results/speed").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def measure(args, suite, arm, threads):
        compiled = "--compile" in arm
        return [300.0 if compiled else 200.0], 1.0, 40.0 if compiled else 10.0

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "phases", lambda *_: {})
    speed.measure_suite(speed.Args("dppo", rounds=1))
    table = (tmp_path / "benchmark/results/speed/dppo.md").read_text()
    assert "DSPPO with --compile: 30 s more until the end of the warm-up, made good after 18,000 steps." in table
    assert table.count("made good") == 1


@pytest.mark.parametrize("arm", [speed.SB3, "DSA2C (α 0.5, β 0.2)"])
def test_a_process_is_measured(arm, monkeypatch):
    monkeypatch.chdir(ROOT)
    suite = dataclasses.replace(speed.SUITES["da2c"], env_id="Pendulum-v1", block=2)
    rates, peak, _ = speed.measure(speed.Args(blocks=3), suite, speed.commands("da2c")[arm], 1)
    assert len(rates) == 3 and min(rates) > 0 and 50 < peak < 5000


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp on Linux alone")
@pytest.mark.parametrize("script", ["sppo_atari.py", "sa2c_atari.py"])
@pytest.mark.parametrize(("own", "expected"), [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_torchs_waiting_threads_leave_the_cores_to_the_games(script, own, expected):
    """libgomp itself tells what it has read."""
    environment = {**ENV, "OMP_DISPLAY_ENV": "VERBOSE", **own}
    done = subprocess.run([sys.executable, ROOT / script, "--help"], env=environment, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


def test_peers_run_in_the_users_environment():
    """Not in that of sppo_atari.py, which speed.py imports."""
    code = "import os, speed, sppo_atari; print(os.environ['GOMP_SPINCOUNT'], speed.ENVIRONMENT.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**ENV, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmark/studies'}"}, stdout=subprocess.PIPE
    )
    assert done.stdout.split() == [b"20000", b"None"]


def test_a_process_gets_the_users_environment(monkeypatch):
    class Started(Exception):
        pass

    def start(command, env, **options):
        raise Started(env)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setenv("GOMP_SPINCOUNT", "123")  # as a script sets it after speed.py has begun
    with pytest.raises(Started) as started:
        speed.measure(speed.Args(), speed.SUITES["da2c"], speed.commands("da2c")[speed.SB3], 1)
    assert started.value.args[0].get("GOMP_SPINCOUNT") != "123" and started.value.args[0]["OMP_NUM_THREADS"] == "1"


def test_peers_that_are_not_installed_are_left_out_in_one_line(monkeypatch, capsys):
    packages = {package: label for found in speed.OPTIONAL.values() for label, (package, _) in found.items()}
    assert packages == {"sbx-rl": "SBX (JAX)", "envpool": "PPO (α 1, β 0) with EnvPool's games"}

    def version(package):
        if package == "sbx-rl":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(speed, "version", version)
    assert list(speed.commands("dppo"))[:2] == [speed.SB3, "Gaussian PPO"]
    assert capsys.readouterr().out == (
        "SBX (JAX): left out, as sbx-rl is not installed (benchmark/studies/requirements-peers.txt)\n"
    )
    found = speed.commands("atari-ppo")
    assert list(found)[:3] == [speed.SB3, packages["envpool"], "PPO (α 1, β 0)"] and capsys.readouterr().out == ""
    pins = (ROOT / "benchmark/studies/requirements-peers.txt").read_text()
    for command in [*found.values(), *(command for found in speed.OPTIONAL.values() for _, command in found.values())]:
        assert (ROOT / command.split()[0]).is_file()
    assert all(f"\n{package}==" in pins for package in packages)


@pytest.mark.parametrize("name", ["blocks", "rounds", "pairs"])
def test_nothing_to_measure_is_refused(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed.main(speed.Args(**{name: 0}))
    assert stopped.value.code == 2 and capsys.readouterr().err == f"speed.py: error: --{name} 0: expected 1 or more\n"


@pytest.mark.parametrize("suite", ["dppo", "atari-ppo"])
def test_cuda_is_refused_where_there_is_nothing_to_measure(suite, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: suite == "dppo")
    with pytest.raises(SystemExit) as stopped:
        speed.main(speed.Args(suite, cuda=True))
    expected = f"speed.py: error: {suite} --cuda: expected atari-ppo or atari-a2c, and a GPU\n"
    assert stopped.value.code == 2 and capsys.readouterr().err == expected


def test_on_a_gpu_the_peak_is_that_of_torchs_allocator(monkeypatch):
    """The command asks for the GPU, and a wrapper notes the peak; here the GPU is taken out of the command."""
    popen, commands = subprocess.Popen, []

    def start(command, **kwargs):
        commands.append(command)
        no_gpu = "import torch; torch.cuda.max_memory_reserved = lambda: 3 * 2**20\n"
        words = [no_gpu + word if word == speed.GPU_PEAK else word.replace("--cuda", "--no-cuda") for word in command]
        return popen(words, **kwargs)

    monkeypatch.setattr(speed.subprocess, "Popen", start)
    suite = dataclasses.replace(speed.SUITES["atari-a2c"], block=2)
    arms = speed.commands("atari-a2c", cuda=True)
    assert list(arms) == [speed.SB3, "SA2C (α 0.5, β 5)", "SA2C (α 0.5, β 5) with --compile"]
    rates, peak, _ = speed.measure(speed.Args(blocks=2, cuda=True), suite, arms["SA2C (α 0.5, β 5)"], 1)
    assert len(rates) == 2 and min(rates) > 0 and peak == 3.0
    assert "--cuda" in commands[0] and commands[0][3] == "sa2c_atari.py"


def test_all_suites_in_one_table(tmp_path):
    about = {"commit": "a" * 40 + "-dirty"}
    rates = {"Stable-Baselines3": [100.0, 90.0, 130.0], "PPO (α 1, β 0)": [150.0, 250.0, 200.0], "SPPO (α 0.5, β 10)": [150.0]}
    phases = {"update, symmetric / plain": 0.99}
    content = {**about, "steps_per_second": rates, "peak_mib": dict.fromkeys(rates, 1234.4), "phases": phases}
    (tmp_path / "atari-ppo.json").write_text(json.dumps(content))
    content = {**about, "gpu": "one", "steps_per_second": rates, "peak_mib": dict.fromkeys(rates, 12.0)}
    (tmp_path / "atari-ppo-gpu.json").write_text(json.dumps(content))
    times = {
        "loop": {"generate": [3.0, 4.0, 5.0], "update": [6.0], "tokens": [640.0]},
        "SPPO (α 0.5, β 0.4)": {"generate": [5.0]},
    }
    content = {
        **about,
        "seconds": times,
        "peak_mib": {"loop": 10.0, "SPPO (α 0.5, β 0.4)": 9.0},
        "symmetric / plain": [1.0, 1.2, 1.1],
    }
    (tmp_path / "imdb.json").write_text(json.dumps(content))
    assert speed.combine(tmp_path)[2:] == [
        "| sppo_atari.py | Stable-Baselines3 | 100 steps/s | 1.00 x | 1,234 MiB |  | aaaaaaaaaaaa-dirty |",
        "| sppo_atari.py | PPO (α 1, β 0) | 200 steps/s | 2.00 x | 1,234 MiB |  | aaaaaaaaaaaa-dirty |",
        "| sppo_atari.py | SPPO (α 0.5, β 10) | 150 steps/s | 1.50 x | 1,234 MiB | 0.990 | aaaaaaaaaaaa-dirty |",
        "| sppo_atari.py on a GPU | Stable-Baselines3 | 100 steps/s | 1.00 x | 12 MiB |  | aaaaaaaaaaaa-dirty |",
        "| sppo_atari.py on a GPU | PPO (α 1, β 0) | 200 steps/s | 2.00 x | 12 MiB |  | aaaaaaaaaaaa-dirty |",
        "| sppo_atari.py on a GPU | SPPO (α 0.5, β 10) | 150 steps/s | 1.50 x | 12 MiB |  | aaaaaaaaaaaa-dirty |",
        "| sppo_rlhf_imdb.py | loop | 10.0 s an iteration | 1.00 x | 10 MiB |  | aaaaaaaaaaaa-dirty |",
        "| sppo_rlhf_imdb.py | SPPO (α 0.5, β 0.4) | 5.0 s an iteration | 2.00 x | 9 MiB | 1.100 | aaaaaaaaaaaa-dirty |",
    ]
