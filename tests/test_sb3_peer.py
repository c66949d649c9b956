"""benchmark/studies/sb3_peer.py: the paper's settings in SB3's terms, a run that is stopped and goes on, what it refuses."""

import json
import os
import signal
import sys
import tomllib
from collections import Counter

import pytest
import torch
from helpers import ROOT, scalars
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

sys.path.insert(0, str(ROOT / "benchmark"))
sys.path.insert(0, str(ROOT / "benchmark/studies"))
import run as grid
import sb3_peer


def start(*argv):
    """A run in this process; its exit status, 0 at its end."""
    try:
        sb3_peer.main([str(word) for word in argv])
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.mark.parametrize(
    ("family", "algorithm"), [("atari", "ppo"), ("atari", "a2c"), ("continuous", "ppo"), ("continuous", "a2c")]
)
def test_the_models_have_the_papers_settings(family, algorithm):
    paper = tomllib.loads((ROOT / "benchmark/paper/hyperparameters.toml").read_text())[family][algorithm]
    script = {"atari": f"s{algorithm}_atari.py", "continuous": f"ds{algorithm}_continuous.py"}[family]
    args = sb3_peer.parse_args(["--peer-of", script, "--env-id", "Pong" if family == "atari" else "Pendulum-v1"])
    model = sb3_peer.make_model(args, 1, torch.device("cpu"))
    model.env.close()
    given = {
        "learning_rate": model.lr_schedule(1.0),
        "num_envs": model.n_envs,
        "num_steps": model.n_steps,
        "gamma": model.gamma,
        "gae_lambda": model.gae_lambda,
        "ent_coef": model.ent_coef,
        "vf_coef": model.vf_coef,
        "max_grad_norm": model.max_grad_norm,
    }
    assert {name: paper.get(name, value) for name, value in given.items()} == given
    assert model.lr_schedule(0.5) == given["learning_rate"] * (0.5 if (family, algorithm) == ("atari", "ppo") else 1)
    optimizer = model.policy.optimizer
    if algorithm == "ppo":
        assert (model.batch_size, model.n_epochs) == (paper["minibatch_size"], paper["update_epochs"])
        assert model.clip_range(1.0) == paper["clip_coef"]
        assert model.clip_range(0.5) == paper["clip_coef"] * (0.5 if family == "atari" else 1)
        assert type(optimizer) is torch.optim.Adam and optimizer.defaults["eps"] == 1e-5 and model.normalize_advantage
    else:
        assert type(optimizer) is (RMSpropTFLike if family == "atari" else torch.optim.RMSprop)
        assert (optimizer.defaults["alpha"], optimizer.defaults["eps"]) == (0.99, 1e-5) and not model.normalize_advantage


def test_a_run_that_is_stopped_goes_on(tmp_path, monkeypatch, capsys):
    common = ["--peer-of", "dsa2c_continuous.py", "--env-id", "Pendulum-v1", "--num-threads", 1, "--run-dir", tmp_path]
    total, batch = 3200, 4 * 8
    on_rollout_start = sb3_peer.Loop._on_rollout_start

    def stop(loop):
        if loop.num_timesteps == 37 * batch:
            os.kill(os.getpid(), signal.SIGTERM)
        on_rollout_start(loop)

    monkeypatch.setattr(sb3_peer.Loop, "_on_rollout_start", stop)
    more = ["--total-timesteps", total, "--log-interval", 10, "--eval-episodes", 2, "--anneal-lr", "--exp-name", "sb3"]
    assert start(*common, *more) == 128 + signal.SIGTERM
    (folder,) = tmp_path.iterdir()
    assert f"SIGTERM at step {37 * batch:,}, saved" in capsys.readouterr().out and not (folder / "result.json").exists()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)

    # what it goes on from is what was saved
    restored, restore = [], sb3_peer.restore
    monkeypatch.setattr(sb3_peer.Loop, "_on_rollout_start", on_rollout_start)
    monkeypatch.setattr(sb3_peer, "restore", lambda model, saved: (restore(model, saved), restored.append(model)))

    def begin(loop):
        (model,) = restored
        torch.testing.assert_close(model.policy.state_dict(), checkpoint["agent"], rtol=0, atol=0)
        saved = checkpoint["optimizer"]["state"]
        torch.testing.assert_close(model.policy.optimizer.state_dict()["state"], saved, rtol=0, atol=0)
        count = sb3_peer.moments(model)["obs_stats"][2]
        assert count >= checkpoint["obs_stats"][2] > 37 * batch  # the observations of a fresh start come on top

    monkeypatch.setattr(sb3_peer.Loop, "_on_training_start", begin)
    assert start("--resume", folder) == 0

    result = json.loads((folder / "result.json").read_text())
    assert result["global_step"] == total == torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"]
    assert result["script"] == "sb3_peer.py" and result["peer_of"] == "dsa2c_continuous.py"
    assert result["library"].startswith("Stable-Baselines3 2.") and result["args"]["exp_name"] == "sb3"
    assert len(result["returns"]) == 2 and result["score"] == pytest.approx(sum(result["returns"]) / 2)
    assert (result["args"]["alpha"], result["args"]["beta"], result["args"]["num_bins"]) == (1, 0, 0)

    curves = scalars(folder)
    # SB3 anneals to 0 at its last update; the schedule goes on where it was
    expected = {step: 7e-4 * (1 - step / total) for step in (*range(320, 1184, 320), 37 * batch, *range(1280, total + 1, 320))}
    assert dict(curves["charts/learning_rate"]) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    returns = [value for _, value in curves["charts/episodic_return"]]
    assert returns and max(returns) < -300  # raw: of normalised rewards it would be above
    assert {value for _, value in curves["charts/episodic_length"]} == {200}

    # killed between its last checkpoint and its result: the same greedy scores again
    (folder / "result.json").unlink()
    monkeypatch.setattr(sb3_peer.Loop, "_on_training_start", lambda loop: None)
    assert start("--resume", folder) == 0
    again = json.loads((folder / "result.json").read_text())
    assert again["global_step"] == total and again["returns"] == pytest.approx(result["returns"], rel=1e-6)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--beta", "10"], "--beta 10.0: expected 0.0, as SB3's run follows no other"),
        (["--noise", "bsc"], "--noise bsc: expected none, as SB3's run follows no other"),
        (["--peer-of", "dsppo_continuous.py", "--num-bins", "11"], "--num-bins 11: expected 0, as SB3's run follows no other"),
        (["--peer-of", "ppo.py"], "argument --peer-of: invalid choice: 'ppo.py' (choose from 'sppo_atari.py'"),
        (["--minibatch-size", "100"], "--minibatch-size 100: expected a divisor of num_envs x num_steps = 1024"),
        (["--env-id", "Pongo"], "Environment `Pongo` doesn't exist in namespace ALE"),
        (["--n-steps", "5"], "Unrecognized options: --n-steps"),
        (["--resume", "no/such/folder"], "no/such/folder is no run folder"),
    ],
)
def test_bad_arguments_end_with_status_2(argv, expected, capsys):
    assert start(*argv) == 2 and expected in capsys.readouterr().err


# --- as an arm of a grid ----------------------------------------------------------------------------------------------


def test_the_committed_grids_have_sb3_beside_our_baselines(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # check_with_scripts sets it
    table = {"ppo": grid.cells("continuous-ppo"), "a2c": grid.cells("continuous-a2c")}
    runs = grid.cells("sb3")
    arms = {run.arm: (run.script, run.options) for run in runs}
    for name, script in (("ppo", "dsppo_continuous.py"), ("a2c", "dsa2c_continuous.py")):
        (paper,) = {run.options for run in table[name] if (run.env, run.noise, run.arm) == ("Hopper-v4", "none", name)}
        assert arms.pop(name) == (script, paper)
        assert arms.pop(f"sb3_{name}") == ("benchmark/studies/sb3_peer.py", f"--peer-of {script}")
    assert not arms and Counter((run.env, run.arm) for run in runs) == Counter(
        {(env, arm): 5 for env in ("Hopper-v4", "InvertedDoublePendulum-v4") for arm in ("ppo", "sb3_ppo", "a2c", "sb3_a2c")}
    )
    atari = grid.cells("sb3_atari")
    assert {run.arm: run.script for run in atari}["sb3"] == "benchmark/studies/sb3_peer.py"
    grid.check_with_scripts([run for run in (*runs, *atari) if "sb3" in run.arm], grid.Args("sb3"))  # they take the commands


def test_a_grid_with_noise_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    text = (ROOT / "benchmark/grids/sb3.toml").read_text().replace("seeds =", 'noises = ["gaussian"]\nseeds =')
    (tmp_path / "noisy.toml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        grid.main(grid.Args(str(tmp_path / "noisy.toml"), folder=tmp_path / "runs"))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "--noise gaussian: expected none" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
