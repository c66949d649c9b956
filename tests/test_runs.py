"""Whole runs of the four control scripts: what they leave, repeat, survive and learn."""

import contextlib
import io
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version

import gymnasium
import helpers
import imageio
import numpy as np
import pytest
import torch
import wandb
from helpers import SCRIPTS, call, contents, each_script, no_process_outlives_its_test, only, scalars, train  # noqa: F401

continuous = pytest.mark.parametrize("script", SCRIPTS[2:], ids=lambda script: script.name)


@pytest.fixture(scope="module")
def wandb_dir(tmp_path_factory):
    """W&B reads its own variables, once in a process."""
    folder = tmp_path_factory.mktemp("wandb")
    own = {"MODE": "offline", "DIR": folder, "PROJECT": "studies", "RUN_GROUP": "noise", "TAGS": "a,b"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(f"WANDB_{name}", str(value))
        wandb.teardown()
        yield folder
        wandb.teardown()


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.name)
def finished(request, tmp_path_factory, wandb_dir):
    """A finished run with everything on: noise, evaluations on the way, video, W&B."""
    words = "--total-timesteps 1300 --eval-episodes 2 --eval-interval 700 --capture-video --track --seed 3 --noise"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        folder = train(request.param, tmp_path_factory.mktemp("runs"), words, request.param.noise)
    return request.param, folder, out.getvalue()


def test_a_run_leaves_what_the_readme_says(finished):
    script, folder, out = finished
    assert re.fullmatch(rf"{script.env_id}__{script.arm}__3__\d{{13}}", folder.name)
    assert f"{script.env_id} on cpu, 1 CPU threads" in out and "score" in out.splitlines()[-1]
    saved, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("args", "result"))
    assert saved["env_id"] == script.env_id and saved["args"]["exp_name"] == script.arm
    assert saved["versions"]["torch"] == version("torch") and saved["script"] == script.name
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert result["global_step"] == 1280 == checkpoint["global_step"]  # whole iterations
    assert result["score"] == pytest.approx(np.mean(result["returns"])) and len(result["returns"]) == 2
    assert result["score_stderr"] == pytest.approx(np.std(result["returns"], ddof=1) / 2**0.5)
    first_eval = -(-700 // script.batch) * script.batch
    assert sorted(path.name for path in folder.glob("videos/*")) == ["1280.mp4", f"{first_eval}.mp4"]
    assert imageio.get_reader(folder / "videos" / "1280.mp4").count_frames() > 20

    logged, steps, defaults = scalars(folder), list(range(128, 1281, 128)), script.module.Args()
    assert logged["eval/episodic_return"][-1] == (1280, pytest.approx(result["score"]))
    assert [step for step, _ in logged["eval/episodic_return"]] == [first_eval, 1280]
    names = "policy_loss reverse_loss value_loss entropy explained_variance grad_norm grad_clipped"
    for name in [*names.split(), *(["approx_kl", "old_approx_kl", "clipfrac"] if "ppo" in script.name else [])]:
        assert [step for step, _ in logged[f"losses/{name}"]] == steps
        assert np.isfinite([value for _, value in logged[f"losses/{name}"]]).all()
    rates = [defaults.learning_rate * (left / 10 if defaults.anneal_lr else 1) for left in range(10, 0, -1)]
    assert [rate for _, rate in logged["charts/learning_rate"]] == pytest.approx(rates)
    noise = [value for _, value in logged["charts/noise_rate" if script.noise == "bsc" else "charts/noise_std"]]
    assert np.mean(noise) == pytest.approx(0.1 if script.noise == "bsc" else 0.05, rel=0.4)
    assert all(0 <= share <= 1 for _, share in logged["charts/adv_sign_change"])
    assert [step for step, _ in logged["charts/SPS"]] == steps and "charts/episodic_return" in logged


def test_wandb_gets_arguments_curves_summary_and_video_and_its_own_variables_count(finished, wandb_dir):
    _, folder, _ = finished
    saved = json.loads((folder / "args.json").read_text())
    file = only(wandb_dir, f"wandb/offline-run-*/run-{saved['run_id']}.wandb")
    config, history = helpers.wandb_run(file)
    assert {name: config[name] for name in saved["args"]} == saved["args"] | {"env_id": saved["env_id"]}
    assert config["versions"] == saved["versions"] and config["commit"] == saved["commit"]
    assert not list(folder.parent.rglob("*wandb*"))  # TensorBoard would show its files as runs

    records = {}
    for record in helpers.wandb_records(file):
        records.setdefault(record.WhichOneof("record_type"), []).append(record)
    about = records["run"][0].run
    assert (about.project, about.run_group, list(about.tags)) == ("studies", "noise", ["a", "b"])
    assert about.display_name == folder.name
    metrics = {each.metric.glob_name or each.metric.name: each.metric for each in records["metric"]}
    score = metrics["eval/episodic_return"]
    assert metrics["*"].step_metric == score.step_metric == "global_step" and score.summary.max and score.summary.last

    logged = scalars(folder)
    for tag in ("losses/reverse_loss", "charts/SPS", "eval/episodic_return"):
        points = [(row["global_step"], row[tag]) for row in history if tag in row]
        assert points == [(step, pytest.approx(value)) for step, value in logged[tag]], tag  # each step once, in order
    updates = {item.key or item.nested_key[0]: item.value_json for each in records["summary"] for item in each.summary.update}
    scores = [value for _, value in logged["eval/episodic_return"]]
    assert json.loads(updates["eval/episodic_return"]) == pytest.approx({"last": scores[-1], "max": max(scores)})
    assert len([row for row in history if any(key.startswith("videos") for key in row)]) == 2


def test_evaluate_plays_the_result_again_and_a_finished_run_is_left_as_it_is(finished, capsys):
    script, folder, _ = finished
    before, result = contents(folder), json.loads((folder / "result.json").read_text())
    call(script, "--evaluate", folder)
    returns = np.round(result["returns"], 2).tolist()
    said = f"score {result['score']:.1f} +- {result['score_stderr']:.1f} at step 1,280; returns {returns}"
    assert said in capsys.readouterr().out and contents(folder) == before
    call(script, "--evaluate", folder, "--seed 5 --eval-episodes 1 --capture-video")
    out, video = capsys.readouterr().out, folder / "videos" / "1280__seed5.mp4"
    assert contents(folder).keys() - before.keys() == {video} and str(returns[0]) not in out
    assert imageio.get_reader(video).count_frames() > 20
    video.unlink()
    for words, reason in (("--beta 3", "--beta 3.0: the run keeps its own, "), ("--eval-episodes 0", "expected 1 or more")):
        with pytest.raises(script.module.BadInput, match=reason):
            call(script, "--evaluate", folder, words)
    call(script, "--resume", folder, "--total-timesteps 1311")  # less than an iteration more
    assert "has finished its 1,280 steps" in capsys.readouterr().out and contents(folder) == before


def test_load_policy_plays(finished):
    script, folder, _ = finished
    (policy, env), episode_return, done = script.module.load_policy(folder), 0.0, False
    seeds = np.random.default_rng([3, script.module.EVALUATION]).integers(2**31, size=2)
    obs, _ = env.reset(seed=seeds[:1] if script.env_id == "Breakout" else int(seeds[0]))
    if script.env_id == "Breakout":  # actions are sampled
        assert [policy(obs).shape for _ in range(9)] == [(1,)] * 9 and env.step(policy(obs))[0].shape == obs.shape
    else:
        while not done:
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            episode_return, done = episode_return + reward, terminated or truncated
        assert episode_return == json.loads((folder / "result.json").read_text())["returns"][0]
    env.close()


def test_a_run_of_an_earlier_version_goes_on_with_what_concerns_machine_and_logging_changed(finished, wandb_dir, tmp_path):
    script, folder, _ = finished
    folder = shutil.copytree(folder, tmp_path / "run")
    saved = json.loads((folder / "args.json").read_text())
    run_id = saved["run_id"] = f"copy-{saved['run_id']}"
    saved["args"] |= {"wandb_group": None, "wandb_tags": "", "torch_deterministic": True, "exp_name": script.name[:-3]}
    saved["args"] |= {"track": False, "wandb_project_name": "symmetric-rl-loss", "capture_video": False}
    (folder / "args.json").write_text(json.dumps(saved))
    gone = "wandb_group, wandb_tags" if "atari" in script.name else "torch_deterministic, wandb_group, wandb_tags"
    with pytest.warns(UserWarning, match=f"ignored arguments of an earlier version: {gone}$"):
        call(script, "--evaluate", folder, "--eval-episodes 1")
    words = f"--eval-interval 128 --eval-episodes 1 --no-cuda --checkpoint-interval {512 // script.batch} --track"
    with pytest.warns(UserWarning, match=f"ignored arguments of an earlier version: {gone}$"):
        call(script, "--resume", folder, "--total-timesteps 1536", words)
    helpers.run(script.name, "--resume", folder, "--total-timesteps", 1664)  # W&B does not see each new file of one process
    logged = scalars(folder)
    assert [step for step, _ in logged["charts/SPS"]] == list(range(128, 1665, 128))
    assert [step for step, _ in logged["eval/episodic_return"]][2:] == [1408, 1536, 1664]
    assert json.loads((folder / "result.json").read_text())["args"]["exp_name"] == script.name[:-3]

    # both sessions belong to one run in W&B, and each sends what is new
    sessions = sorted(wandb_dir.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    steps = [[row["global_step"] for row in helpers.wandb_run(path)[1] if "charts/SPS" in row] for path in sessions]
    assert steps == [[1408, 1536], [1664]]


@each_script
def test_same_seed_same_curve_another_seed_another(script, tmp_path):
    curves = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = train(script, tmp_path / name, f"--total-timesteps 512 --eval-episodes 1 --seed {seed}")
        curves.append({tag: points for tag, points in scalars(folder).items() if tag != "charts/SPS"})
    assert curves[0] == curves[1] and curves[0]["losses/value_loss"] != curves[2]["losses/value_loss"]


@each_script
def test_noise_changes_what_the_learner_sees_and_no_logged_return(script, tmp_path):
    """With a learning rate that rounds to nothing the policy stays: the same actions, episodes and scores."""
    logs = []
    for noise in ("none", script.noise):
        words = f"--total-timesteps 1280 --learning-rate 1e-30 --eval-episodes 1 --noise {noise}"
        logs.append(scalars(train(script, tmp_path / noise, words)))
    clean, noisy = logs
    for tag in ("charts/episodic_return", "charts/episodic_length", "eval/episodic_return"):
        assert len(clean[tag]) > 0 and clean[tag] == noisy[tag]
    assert clean["losses/value_loss"] != noisy["losses/value_loss"] and noisy.keys() - clean.keys()


def checkpoint_step(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"]


ENDS = list(zip(SCRIPTS, ("SIGINT", "SIGTERM", "SIGHUP", "nohup"), (4, 2, 2, 2), strict=True))


@pytest.mark.parametrize(("script", "name", "kills"), ENDS, ids=[f"{script.name}-{name}" for script, name, _ in ENDS])
def test_a_signal_and_random_kills_and_the_run_still_ends_whole(script, name, kills, tmp_path):
    """A signal, then SIGKILLs at random moments, start-up and checkpoint writing included, a resume after each."""
    words = f"{script.args} --total-timesteps 10_000_000 --eval-episodes 1 --run-dir {tmp_path}"
    nohup = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)} if name == "nohup" else {}
    process, rng = helpers.start(script.name, *words.split(), **nohup), random.Random(0)
    helpers.wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    folder = only(tmp_path)
    if name == "nohup":  # the terminal goes, the run stays
        process.send_signal(signal.SIGHUP)
        step, name = checkpoint_step(folder), "SIGINT"
        helpers.wait_for(lambda: checkpoint_step(folder) > step)
    with pytest.raises(script.module.BadInput, match=f"--resume {folder}: another process is training this run"):
        call(script, "--resume", folder)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate()
    assert process.returncode == 128 + getattr(signal, name), err
    assert re.search(rf"{name} at step [\d,]+, saved; continue with --resume {folder}$", out.strip())
    assert "finishing this iteration, then saving; once more quits now" in err

    progressed = [checkpoint_step(folder)]
    for kill in range(kills):
        process, goal = helpers.start(script.name, "--resume", folder), progressed[-1] + 128 * rng.randint(1, 4)
        if kill % 2 == 0:  # some iterations on; the other kills hit the start-up
            helpers.wait_for(lambda goal=goal: checkpoint_step(folder) >= goal)
        time.sleep(rng.uniform(0, 3 if kill % 2 else 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        progressed.append(checkpoint_step(folder))
    assert progressed == sorted(progressed) and progressed[-1] > progressed[0]

    saved = json.loads((folder / "args.json").read_text())
    now, total = {**saved["versions"]}, (checkpoint_step(folder) // 128 + 3) * 128
    saved["args"]["total_timesteps"], saved["versions"]["torch"] = total, "2.12.1"
    (folder / "args.json").write_text(json.dumps(saved))
    time.sleep(1.1)  # event files are sorted by the second of their names, and within a second by process
    call(script, "--resume", folder)
    logged, result = scalars(folder), json.loads((folder / "result.json").read_text())
    # A2C also logs where a signal stopped it
    assert [step for step, _ in logged["charts/SPS"]] == sorted({*range(128, total + 1, 128), progressed[0]})
    for points in logged.values():
        assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert result["global_step"] == checkpoint_step(folder) == total and result["versions"] == now
    # what did not change is not told again; somebody may have committed since
    assert [each for each in result["earlier"] if "commit" not in each] == [{"versions": {**now, "torch": "2.12.1"}}]
    assert [path.name for path in tmp_path.rglob("result.json*")] == ["result.json"] and not list(tmp_path.rglob("*.tmp"))


@each_script
def test_resume_restores_weights_optimiser_normalisers_and_the_window_of_returns(script, tmp_path, monkeypatch):
    """Copies of one checkpoint go on alike, from generators of their step; with a part exchanged, they show that part."""
    words = f"--total-timesteps 512 --eval-episodes 0 --noise {script.noise} --num-envs 2"
    original = train(script, tmp_path / "run", words)
    saved = torch.load(original / "checkpoint.pt", weights_only=True)

    def resumed(name, source=original, **exchanged):
        folder = shutil.copytree(source, tmp_path / name)
        (folder / "result.json").unlink()
        torch.save({**saved, **exchanged}, folder / "checkpoint.pt")
        call(script, "--resume", folder, "--total-timesteps 1024")
        logged = {tag: points for tag, points in scalars(folder).items() if tag != "charts/SPS"}
        return logged, torch.load(folder / "checkpoint.pt", weights_only=True)

    seeds, default_rng = [], np.random.default_rng
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed=None: seeds.append(seed) or default_rng(seed))
        logged, after = resumed("a")
    own = [getattr(script.module, name) for name in ("NOISE", "GAMES", "ENVS", "ACTIONS") if hasattr(script.module, name)]
    assert sorted(seed for seed in seeds if np.size(seed) == 3) == sorted([1, purpose, 512] for purpose in own)
    assert script.env_id != "Breakout" or torch.initial_seed() == 1 + 512
    # also where the curves are ahead of the checkpoint: what it logs anew shows once
    assert resumed("b", tmp_path / "a")[0] == logged and after["seconds"] > saved["seconds"] > 0
    assert after["recent_returns"][: len(saved["recent_returns"])] == saved["recent_returns"]
    different = {"agent": {key: value + 1 if key.startswith("critic") else value for key, value in saved["agent"].items()}}
    if script.name == "sa2c_atari.py":
        different["square_avgs"] = [value * 1e12 for value in saved["square_avgs"]]
    else:
        moments = {
            key: {name: value * (1e12 if "sq" in name else 1) for name, value in state.items()}
            for key, state in saved["optimizer"]["state"].items()
        }
        different["optimizer"] = {**saved["optimizer"], "state": moments}
    if "continuous" in script.name:
        mean, var, count = saved["obs_stats"]
        assert count == pytest.approx(512 + 2 + 1e-4)  # each observation once: of the first resets and of all steps
        different["obs_stats"] = [[value + 5 for value in mean], var, count]
        different["return_stats"] = [saved["return_stats"][0], 1e6, saved["return_stats"][2]]
    new = len(logged["losses/value_loss"]) // 2  # where the second half begins
    for part, value in different.items():
        changed = resumed(part, **{part: value})[0]["losses/value_loss"]
        assert changed[:new] == logged["losses/value_loss"][:new] and changed[new:] != logged["losses/value_loss"][new:], part


@each_script
def test_numbers_that_are_not_finite_end_the_run_and_the_checkpoint_from_before_stays(script, tmp_path, monkeypatch, capsys):
    """First in a loss before any checkpoint; then in the weights, which the last step breaks after a finite loss."""
    words = f"{script.args} --learning-rate 1e30 --total-timesteps 1280 --run-dir {tmp_path / 'broken'}"
    assert helpers.command(helpers.ROOT / script.name, words) == 1
    pattern = rf"(?m)^{script.name}: error: .* is (nan|-?inf) at step [\d,]+; the run ends, .* keeps the last checkpoint, if"
    assert re.search(pattern, capsys.readouterr().err)
    broken = only(tmp_path / "broken")
    assert not (broken / "result.json").exists() and not (broken / "checkpoint.pt").exists()

    folder, real_update = train(script, tmp_path / "good", "--total-timesteps", 2 * script.batch), script.module.update

    def update(agent, *rest):
        stats = real_update(agent, *rest)
        list(agent.parameters())[-1].data.fill_(float("nan"))
        return stats

    monkeypatch.setattr(script.module, "update", update)
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(FloatingPointError, match=f"the sum of the weights is nan at step {3 * script.batch}; the run ends"):
        call(script, "--resume", folder, "--total-timesteps", 3 * script.batch)
    assert (folder / "checkpoint.pt").read_bytes() == before and not (folder / "result.json").exists()


@continuous
def test_gaussian_runs_learn_and_resume(script, tmp_path):
    folder = train(script, tmp_path, "--num-bins 0 --alpha 1 --beta 0 --total-timesteps 256 --eval-episodes 1")
    call(script, "--resume", folder, "--total-timesteps 512")
    result = json.loads((folder / "result.json").read_text())
    assert result["global_step"] == 512 and np.isfinite(result["score"])
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    assert saved["log_std"].abs().max() > 0 and saved["actor.4.weight"].shape == (2, 64)  # it starts at 0


@continuous
def test_discrete_tasks_run_and_cartpole_is_learned(script, tmp_path):
    """20 steps at the start; the last rollout's actions are sampled, so that no lucky initialisation holds the pole up."""
    for env_id in ("Acrobot-v1", "LunarLander-v3"):
        folder = train(script, tmp_path / env_id, "--total-timesteps 512 --eval-episodes 1 --env-id", env_id)
        assert np.isfinite(json.loads((folder / "result.json").read_text())["score"])
    steps = 10240 if "ppo" in script.name else 16000
    call(script, f"--env-id CartPole-v1 --eval-episodes 1 --total-timesteps {steps} --run-dir {tmp_path / 'CartPole'}")
    returns = scalars(only(tmp_path / "CartPole"))["charts/episodic_return"]
    assert returns[0][1] < 60 and returns[-1][1] > 100


class Choices(gymnasium.Env):
    """Choices among 2, 5 and 3; the first one's number is the reward."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (4,)), gymnasium.spaces.MultiDiscrete([2, 5, 3])

    def reset(self, seed=None, options=None):
        return np.zeros(4), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return np.zeros(4), float(action[0]), False, False, {}


gymnasium.register("Choices-v0", Choices, max_episode_steps=20)


@continuous
def test_bins_that_a_dimension_lacks_are_never_played_and_have_no_gradient(script, tmp_path):
    folder = train(script, tmp_path, "--env-id Choices-v0 --total-timesteps 2048 --eval-episodes 2 --learning-rate 3e-3")
    assert json.loads((folder / "result.json").read_text())["score"] > 15  # 10 without learning, at most 20
    (agent, _), *_ = script.module.load_agent(folder)
    torch.manual_seed(0)
    obs = torch.randn(6, 4)
    actions = torch.stack([torch.randint(n, (6,)) for n in (2, 5, 3)], dim=-1)
    logprobs, entropy, values = agent(obs, actions)
    blocks = agent.actor(obs).unflatten(-1, (3, 5)).unbind(1)
    own = [torch.distributions.Categorical(logits=block[:, :n]) for block, n in zip(blocks, (2, 5, 3), strict=True)]
    expected = torch.stack([each.log_prob(actions[:, d]) for d, each in enumerate(own)], dim=-1)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, sum(each.entropy() for each in own))
    (logprobs.sum() + entropy.sum() + values.sum()).backward()
    lacking = torch.arange(5) >= torch.tensor([[2], [5], [3]])
    for name, parameter in agent.actor[-1].named_parameters():
        grad = parameter.grad.unflatten(0, (3, 5))
        assert (grad[lacking] == 0).all() and (grad[~lacking] != 0).any(), name
    assert (agent.actor[-1].bias.unflatten(0, (3, 5))[lacking] == -1e8).all()


@each_script
def test_main_works_in_a_thread_and_puts_signal_handlers_back(script, tmp_path, monkeypatch):
    args, handlers = script.module.Args(run_dir=str(tmp_path)), []

    def handled():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    before = handled()
    monkeypatch.setattr(script.module, "train", lambda args, run: handlers.append(handled()))
    thread = threading.Thread(target=script.module.main, args=(args,))
    thread.start()
    thread.join()
    script.module.main(args)
    own, in_main = handlers
    assert own == before == handled() and all(handler.__func__ is script.module.Run.on_signal for handler in in_main)


def test_a_run_in_the_profiler(tmp_path):
    words = f"{SCRIPTS[3].args} --total-timesteps 128 --eval-episodes 0 --run-dir {tmp_path}"
    command = [
        sys.executable,
        "-m",
        "cProfile",
        "-o",
        tmp_path / "profile",
        helpers.ROOT / "dsa2c_continuous.py",
        *words.split(),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "profile").stat().st_size > 10**4 and list(tmp_path.glob("*/result.json"))
