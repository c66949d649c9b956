"""benchmark/report.py: statistics against scipy and by hand, mixtures, W&B's csv beside local folders, a golden report."""

import itertools
import json
import os
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import wandb_server
from helpers import ROOT, no_process_outlives_its_test, run  # noqa: F401
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import report
from reporting import arms, figures, tables
from reporting import runs as reading
from reporting.arms import FAMILIES, order


@pytest.fixture(autouse=True)
def placeholders(request):
    """Drawing takes most of a report's time: only tests that look at pictures (by monkeypatch) draw them."""

    def save(figure, path):
        [path.with_suffix(suffix).write_bytes(b"") for suffix in (".svg", ".png")]
        figures.plt.close(figure)

    with pytest.MonkeyPatch.context() as patch:
        if "monkeypatch" not in request.fixturenames:
            patch.setattr(figures, "save", save)
        yield


SCORES = {  # environment, noise, arm: seeds' scores
    ("Hopper", "none", "dppo"): [100.0, 110.0, 120.0],
    ("Hopper", "none", "dsppo"): [130.0, 140.0, 120.0],
    ("Hopper", "none", "control"): [128.0, 140.0, 119.0],
    ("Ant", "none", "dppo"): [10.0, 20.0, 30.0],
    ("Ant", "none", "dsppo"): [15.0, 10.0, 5.0],
    ("Ant", "none", "control"): [40.0, 16.0, 4.0],
}
OPTIONS = {"dppo": (1.0, 0.0), "dsppo": (0.5, 20.0), "control": (20.5, 0.0), "ppo": (1.0, 0.0)}


def result(env="Hopper", noise="none", arm="dppo", seed=1, score=1.0, **changed):
    """A result.json as dsppo_continuous.py writes it, in brief."""
    alpha, beta = OPTIONS[arm]
    args = {"env_id": f"{env}-v4", "seed": seed, "alpha": alpha, "beta": beta, "Z": -1.0, "noise": noise, "norm_adv": True}
    args |= {"num_bins": 0 if arm == "ppo" else 11, "reverse_prob": "joint", "literal_signs": False, "mean_weight": False}
    args |= {"learning_rate": 3e-4, "target_kl": None, "total_timesteps": 1000, "exp_name": "dsppo_continuous"}
    args |= {"run_dir": f"x{seed}"}
    about = {"script": "dsppo_continuous.py", "run_id": f"{env}{noise}{arm}{seed}", "env_id": f"{env}-v4", "seed": seed}
    about |= {"global_step": 1000, "seconds": 36.0}
    versions = {"torch": "2.13.0", "mujoco": "4.0.0"}
    for key, value in changed.items():
        target = args if key in args else versions if key in versions else about
        target[key] = value
    return {"score": score, "args": args, "versions": versions, "commit": "a" * 40, "device": "cpu", **about}


def write_events(path, score, steps=range(100, 1001, 100), signs=0.1):
    with SummaryWriter(path) as writer:
        for step in steps:
            writer.add_scalar("charts/episodic_return", score * step / 1000, step)
            writer.add_scalar("charts/adv_sign_change", signs, step)


def write_runs(folder, scores=SCORES, curves=False):
    for (env, noise, arm), values in scores.items():
        for seed, score in enumerate(values, 1):
            # as on a cluster, where runs of one seed start in the same second: their own folders have one name
            path = folder / f"{env}__{noise}__{arm}__{seed}" / f"{env}-v4__dsppo_continuous__{seed}__1700000000"
            path.mkdir(parents=True)
            (path / "result.json").write_text(json.dumps(result(env, noise, arm, seed, score)))
            if curves:
                write_events(path, score, signs=seed / 100)
    return folder


def save(folder, *results):
    for i, one in enumerate(results):
        path = folder / f"{one['run_id']}{i}"
        path.mkdir(parents=True)
        (path / "result.json").write_text(json.dumps(one))
    return folder


def load(*sources):
    return reading.load_runs(sources)


def make(sources, out, **changed):
    report.main(report.Args(sources=tuple(sources), out=out, reps=50, **changed))
    return (out / "report.md").read_text()


def refused(capsys, function, *args):
    """What a call that ends with status 2 says, in one line."""
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1, err
    return err


# --- statistics -------------------------------------------------------------------------------------------------------


def test_cells_wins_and_the_papers_numbers(tmp_path):
    """What scores are divided by is the baseline's mean, where it is above two standard errors: not -90, and not 5 ± 2.9."""
    more = {("Walker2d", "none", "dppo"): [-90.0, -80.0, -100.0], ("Humanoid", "none", "dppo"): [0.0, 5.0, 10.0]}
    runs = load(write_runs(tmp_path / "runs", {**SCORES, **more}))
    table = tables.cells(runs)
    by = {(row.task, row.arm): row for row in table.itertuples()}
    assert by["Hopper", "dppo"].mean == 110 and by["Hopper", "dppo"].seeds == 3
    assert by["Hopper", "dppo"].stderr == pytest.approx(10 / np.sqrt(3))
    published = pd.read_csv(ROOT / "benchmark/paper/scores.csv").query("noise == 'none'").set_index(["env", "algo"])
    paper = published.loc["Hopper", "DSPPO"]
    assert by["Hopper", "dsppo"].paper_mean == paper["mean"] and by["Hopper", "dsppo"].paper_stderr == paper["stderr"]
    assert np.isnan(by["Hopper", "control"].paper_mean)
    both = table[table.env.isin(["Ant-v4", "Hopper-v4"])]
    assert tables.wins(both, "dsppo", "dppo") == tables.wins(both, "control", "dsppo") == "1 of 2"
    assert tables.wins(both, "dppo", "dppo") == tables.wins(both, "control", "dppo", "paper_mean") == ""
    assert tables.clear(runs, "dppo") == pytest.approx({"Ant-v4": 20, "Hopper-v4": 110})
    shuffled = runs.iloc[::-1]  # a matrix has its rows in the order of the seeds
    np.testing.assert_allclose(tables.matrix(shuffled, "dsppo", ["Ant-v4", "Hopper-v4"]), [[15, 130], [10, 140], [5, 120]])
    one = result(script="sppo_atari.py", learning_rate=2.5e-4) | {"env_id": "ALE/Alien-v5"}  # Gymnasium's name of a game
    assert tables.cells(load(save(tmp_path / "game", one))).paper_mean[0] == published.loc["Alien", "PPO"]["mean"]


def test_an_interquartile_mean_is_relative_to_the_baselines():
    """By hand: the baseline's own, 0.5, 0.9, 1, 1, 1, 1, 1.1, 1.5 without two at each end, is 1, as a skewed one's is not."""
    base = np.array([[50.0, 9], [100, 10], [150, 11], [100, 10]])
    twice = np.array([[60.0, 1], [110, 12], [120, 13], [130, 1000]])
    assert tables.relative_iqm(base, base) == 1
    assert tables.relative_iqm(twice, base) == pytest.approx(np.mean([1.1, 1.2, 1.2, 1.3]) / np.mean([1, 1, 1, 1]))
    skewed = np.array([[10.0], [30], [30], [50], [80], [100], [100], [0]])  # mean 50, middle four 30, 30, 50, 80
    assert tables.relative_iqm(np.full((8, 1), 95.0), skewed) == pytest.approx(95 / np.mean([30, 30, 50, 80]))


def test_intervals_hold_the_baselines_chance_too():
    """An arm whose seeds are alike: all that its interval has is the baseline's, of which 80 to 120 are resampled."""
    scores = {"PPO": [80.0, 90, 110, 120], "SPPO": [100.0] * 4}
    runs = [{"arm": arm, "env": "Ant", "seed": i, "score": x} for arm, row in scores.items() for i, x in enumerate(row)]
    row = tables.aggregate(pd.DataFrame(runs).assign(method=lambda runs: runs.arm), "PPO", 200).iloc[0]
    assert row.what == "IQM" and row.value == 1 and row.low < 0.93 and row.high > 1.07


def test_aggregates_equal_scipys(tmp_path):
    """One arm has more seeds than the others, which takes none from any."""
    scores = SCORES | {(env, "none", "control"): [40.0, 16.0, 4.0, 7.0, 90.0] for env in ("Hopper", "Ant")}
    runs = load(write_runs(tmp_path, scores))
    table = tables.aggregate(runs, "dppo", 200)
    units = {"Hopper-v4": 110, "Ant-v4": 20}
    middle = {}
    for arm, rows in runs.groupby("arm"):  # of six or ten scores: without 1.5 or 2.5 at each end, rounded to 1 and 2
        ordered = np.sort(rows.score / rows.env.map(units))
        middle[arm] = ordered[len(ordered) // 4 : -(len(ordered) // 4)].mean()
    found = {arm: tables.matrix(runs, arm, ["Ant-v4", "Hopper-v4"]) for arm in middle}
    for row in table.itertuples():
        assert row.low <= row.value + 1e-9 and row.value <= row.high + 1e-9
        if row.what == "IQM":
            assert row.value == pytest.approx(middle[row.arm] / middle["dppo"]) and row.environments == 2
        else:  # the mean over environments of U / (n m)
            pairs = zip(found[row.arm].T, found[row.other].T, strict=True)
            assert row.value == pytest.approx(np.mean([stats.mannwhitneyu(a, b).statistic / len(a) / len(b) for a, b in pairs]))
    # by hand: of 9 pairs in Hopper dsppo wins 8 and ties 1; in Ant dsppo's 15 beats 10, its 10 ties 10
    (chance,) = table[(table.what != "IQM") & (table.arm == "dsppo") & (table.other == "dppo")].value
    assert chance == pytest.approx(((8 + 0.5) / 9 + (1 + 0.5) / 9) / 2)
    assert len(table) == 2 + 6


def test_a_thin_cell_costs_only_itself(tmp_path):
    """One seed in one cell, an environment that one arm lacks, and one with a baseline around 0: named, the rest stays."""
    scores = {**SCORES, ("Swimmer", "none", "dppo"): [1.0, 2.0, 3.0], ("Swimmer", "none", "dsppo"): [2.0, 3.0, 4.0, 5.0]}
    scores |= {("Walker2d", "none", arm): [-10.0, 12.0] for arm in ("dppo", "dsppo")}
    scores["Ant", "none", "control"] = [40.0]
    text = make([write_runs(tmp_path / "runs", scores)], tmp_path / "out")
    assert "With one seed and left out: control on Ant-v4." in text
    assert "95 % intervals, from 2 seeds and thus too narrow" in text
    assert "No interquartile mean over Walker2d-v4, where dppo's is not clearly above 0." in text
    assert "the first ones of each arm, as many as in its poorest" in text
    assert "**No control (α + β|Z|, β 0) beside the symmetric loss on Swimmer-v4, Walker2d-v4.**" in text
    table = pd.read_csv(tmp_path / "out/aggregates.csv").set_index(["what", "arm", "other"]).environments
    assert table["IQM", "dsppo", "dppo"] == 3 and table["IQM", "control", "dppo"] == 1
    assert table["P(arm > other)", "dsppo", "dppo"] == 4 and table["P(arm > other)", "dsppo", "control"] == 1
    scores = {("Hopper", "none", arm): [-100.0, -90.0] for arm in ("dppo", "dsppo")}  # nothing to divide by
    text = make([write_runs(tmp_path / "below", scores)], tmp_path / "out")
    assert "| dppo |  | 2 |  | 0.50 (" in text and "| dsppo |  | 2 | 0.50 (" in text


def test_a_baseline_with_an_odd_alpha_is_no_reference():
    assert all(map(arms.is_reference, ("PPO", "DA2C", "DPPO raw", "control PPO", "control DPPO α 2.5")))
    assert not any(map(arms.is_reference, ("DPPO α 7", "SPPO", "DSPPO β 2")))


def test_nothing_of_an_earlier_report_stays(tmp_path):
    make([write_runs(tmp_path / "runs", curves=True)], tmp_path / "out")
    (tmp_path / "out/mine.png").write_text("")
    before = {path.name for path in (tmp_path / "out").iterdir()}
    make([write_runs(tmp_path / "few", {("Hopper", "none", "dppo"): [1.0]})], tmp_path / "out")
    gone = {"aggregates.csv", "curves.png", "curves.svg"}
    assert gone < before and {path.name for path in (tmp_path / "out").iterdir()} == before - gone


def test_a_control_has_the_weight_of_a_symmetric_arm(tmp_path):
    """0.5 + 20 beside it or, where none has finished, in another environment; with Z -2, 0.5 + 40. Others have their alpha."""
    cells = [("Hopper", "none", "dsppo"), ("Hopper", "none", "control"), ("Ant", "none", "control")]
    folder = write_runs(tmp_path / "one", {cell: [1.0] for cell in [*cells, ("Ant", "gaussian", "control")]})
    runs = load(save(folder, result(seed=5, alpha=3.0)))
    found = {(run.env, run.noise, run.arm) for run in runs.itertuples()}
    named = {("Hopper-v4", "none", "control"), ("Ant-v4", "none", "control"), ("Ant-v4", "gaussian", "dppo α 20.5")}
    assert found == named | {("Hopper-v4", "none", "dsppo"), ("Hopper-v4", "none", "dppo α 3")}
    three = (("dsppo", 0.5, 20.0, -2.0), ("dppo", 40.5, 0.0, -1.0), ("dppo", 20.5, 0.0, -1.0))
    runs = [result(arm=arm, alpha=alpha, beta=beta, Z=z, run_id=f"{alpha}") for arm, alpha, beta, z in three]
    assert set(load(save(tmp_path / "two", *runs)).arm) == {"dsppo Z -2", "control", "dppo α 20.5"}


def test_a_scripts_default_name_is_no_name(tmp_path):
    """A default --exp-name, of today or of older scripts, is the arm. A name of one's own stays."""
    given = (
        *(("dppo", "dppo_gaussian"), ("dppo", "dsppo_continuous"), ("dsppo", "dsppo_a0.5_b20_gaussian")),
        *(("dsppo", "dsppo_a0.5_b20_factored"), ("control", "dppo_a20.5_gaussian"), ("dsppo", "sppo-beta-2")),
    )
    one = [result(arm=arm, noise="gaussian", seed=i, exp_name=name, run_id=f"{i}") for i, (arm, name) in enumerate(given)]
    runs = load(save(tmp_path, *one)).sort_values("seed")
    assert runs.arm.tolist() == ["dppo", "dppo", "dsppo", "dsppo", "control", "sppo-beta-2"]


def test_arms_are_labelled_by_what_differs(tmp_path):
    """SA2C and its control have one alpha and beta, PPO and raw PPO, too; reweighted arms differ in what is divided."""
    runs = load(write_atari(tmp_path / "ppo", ATARI))
    assert {arm: text for arm, text in arms.what_differs(runs).items() if arm != "reweighted"} == {
        "ppo": " (α 1, β 0)",
        "ppo_raw": " (α 1, β 0, no norm_adv)",
        "sppo": " (α 0.5, β 10)",
        "control": " (α 10.5, β 0)",
        "reweighted_vf": " (α 1, β 0, vf_coef 0.0476)",
    }
    both = {"sa2c": (0.5, 1.0, {}, [1.0]), "control": (0.5, 1.0, {"mean_weight": True}, [2.0])}
    runs = load(write_atari(tmp_path / "a2c", both, script="sa2c_atari.py", norm_adv=False))
    assert arms.what_differs(runs) == {"sa2c": " (α 0.5, β 1)", "control": " (α 0.5, β 1, mean_weight)"}


def test_a_report_without_curves_says_why(tmp_path):
    """Runs so short that no episode ended log signs, and no returns."""
    folder = write_runs(tmp_path / "runs", {("Hopper", "none", "dppo"): [1.0, 2.0]})
    for path in folder.glob("*/*"):
        with SummaryWriter(path) as writer:
            [writer.add_scalar("charts/adv_sign_change", 0.1, step) for step in (500, 1000)]
    text = make([folder], tmp_path / "out")
    assert "\nNo learning curves: no episode ended in these runs.\n" in text and "curves.svg" not in text
    assert "| Hopper-v4, noise none | 10.0 % (10.0 to 10.0) |" in text


def test_bad_arguments_are_one_line(tmp_path, capsys):
    """Sources that are none, hold no finished run, or are damaged; an output that is no folder."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good/result.json").write_text(json.dumps(result()))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/result.json").write_text('{"score": 1}')
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\0")
    (tmp_path / "head.csv").write_text("script,run_id,env_id,seed,score\n")
    for argv, expected in (
        ([], "expected folders with finished runs, runs.csv of a report, or --wandb"),
        (["good", "--out", "good/result.json/x"], "expected a folder to write in"),
        (["missing"], "missing: expected a folder with finished runs, or runs.csv of a report"),
        (["empty"], "no finished run with a score there; expected some result.json below"),
        (["odd.csv"], "odd.csv: expected a folder with finished runs, or runs.csv of a report"),
        (["binary.csv"], "binary.csv: expected a folder"),
        (["head.csv"], "no finished run with a score there"),
        (["broken"], "result.json: expected a result.json of one of the scripts"),
    ):
        words = [word if word.startswith("--") else str(tmp_path / word) for word in argv]
        err = refused(capsys, report.main, report.tyro.cli(report.Args, args=words))
        assert expected in err and err.startswith("report.py: error: "), argv


def test_the_last_tenth_of_training(tmp_path):
    """Three seeds whose runs end at 100, 110 and 120 after straight lines from 0, logged every 10 of 100 and 200 steps."""
    runs, points = [], []
    for seed, (end, steps) in enumerate(((100, 100), (110, 100), (120, 200))):
        runs.append({"run_id": f"{seed}", "env": "Ant-v4", "arm": "PPO"})
        points += [(f"{seed}", "charts/episodic_return", step, end * step / steps) for step in range(10, steps + 1, 10)]
        points += [(f"{seed}", "charts/adv_sign_change", step, 1e9) for step in range(10, steps + 1, 10)]
    points += [("of another script", "charts/episodic_return", 10, 1e9)]
    runs.append({"run_id": "without curves", "env": "Ant-v4", "arm": "DPPO"})
    curves = pd.DataFrame(points, columns=["run_id", "tag", "step", "value"])
    runs = pd.DataFrame(runs).assign(method=lambda runs: runs.arm)
    *_, line, _ = tables.training(runs, curves)
    ends = [100, 110, 120 * (190 + 200) / 400]  # steps above 90 of 100 and 180 of 200
    assert line == f"| Ant-v4 | {statistics.mean(ends):.1f} ± {statistics.stdev(ends) / 3**0.5:.1f} (3) |"
    assert tables.training(runs, curves[curves.run_id == "of another script"]) == []


def test_shares_of_the_gradient_are_told_and_drawn(tmp_path):
    """Means over training, then over seeds, by hand: 0.1 and 0.3 of one seed, 0.4 and 0.8 of the other."""
    runs = write_runs(tmp_path / "runs", {("Hopper", "none", "dppo"): [1.0, 2.0], ("Hopper", "none", "dsppo"): [3.0]})
    logged = {("dppo", 1): (0.1, 0.3), ("dppo", 2): (0.4, 0.8), ("dsppo", 1): (0.75, 0.25)}
    for (arm, seed), shares in logged.items():
        with SummaryWriter(next(runs.glob(f"Hopper__none__{arm}__{seed}/*"))) as writer:
            for step, share in zip((500, 1000), shares, strict=True):
                writer.add_scalar("charts/adv_sign_change", 0.1, step)
                for name, value in (("share_policy", share), ("share_value", 1 - share), ("clipped", 1.0)):
                    if (arm, name) != ("dsppo", "clipped"):
                        writer.add_scalar(f"losses/grad_{name}", value, step)
    lines = make([runs], tmp_path / "out").splitlines()
    assert "| | | policy | value | steps that the clip cuts |" in lines  # no entropy, no reference text
    assert "| Hopper-v4 | dppo | 0.40 ± 0.20 (2) | 0.60 ± 0.20 (2) | 1.00 (2) |" in lines
    assert "| Hopper-v4 | dsppo | 0.50 (1) | 0.50 (1) |  |" in lines  # logs no clip
    assert (tmp_path / "out/grad_shares.png").exists() and "![the policy's share of the gradient](grad_shares.svg)" in lines
    make([write_runs(tmp_path / "none", curves=True)], tmp_path / "out")  # runs that log none
    assert not (tmp_path / "out/grad_shares.png").exists()


def test_half_the_runs_from_a_csv_are_as_all_from_folders(tmp_path):
    """With curves.csv beside it; its empty fields, of target_kl, are None in a folder."""
    folder = write_runs(tmp_path / "runs", {key: SCORES[key] for key in SCORES if key[0] == "Hopper"}, curves=True)
    whole = make([folder], tmp_path / "one")
    for path in list(folder.glob("*control*")):
        path.rename(tmp_path / path.name)
    make([folder], tmp_path / "half")
    controls = list(tmp_path.glob("Hopper*control*"))
    assert make([*controls, tmp_path / "half/runs.csv"], tmp_path / "two") == whole
    assert (tmp_path / "one/curves.csv").read_text() == (tmp_path / "two/curves.csv").read_text()


def test_curves_come_back():
    """A straight line stays one, with many points and with few; steps between those of a seed are on its line."""
    for count in (7, 1000):
        steps = np.linspace(0, 10_000, count + 1)[1:]
        points = pd.DataFrame({"run_id": ["a"] * count + ["b"] * count, "step": np.concatenate([steps, steps * 0.9])})
        points["value"] = points.step * np.repeat([1.0, 3.0], count)
        table = figures.curve_table(points)
        assert len(table) == 100 and table.index[-1] == 10_000
        for name, slope, last in (("a", 1, 10_000), ("b", 3, 9_000)):
            mine = table[name].dropna()
            assert (mine / slope - mine.index).abs().max() <= 200  # two bins
            assert mine.index[-1] == last and len(mine) >= 100 * (1 - 1.2 / count) - 10


def test_few_points_are_drawn_as_they_are():
    """Values 0 and 1 by turns: of 39 points they stay, of 100 each is the mean of five, 2/5 or 3/5, but at the ends."""
    for count in (39, 100):
        points = pd.DataFrame({"run_id": "a", "step": np.arange(1, count + 1) * 100, "value": np.arange(count) % 2.0})
        values = figures.curve_table(points)["a"].dropna()
        middle = values.iloc[2:-2]
        assert values.isin([0, 1]).sum() == 39 if count == 39 else middle.between(0.39, 0.61).all()


def picture(monkeypatch, draw, *args):
    made = []
    monkeypatch.setattr(figures.plt, "close", made.append)
    draw(*args)
    monkeypatch.undo()
    (figure,) = made
    figures.plt.close(figure)
    return figure


def drawn(monkeypatch, draw, *args):
    """The lines of a figure by their labels."""
    lines = [line for axis in picture(monkeypatch, draw, *args).axes for line in axis.lines]
    return {line.get_label(): line for line in lines if not line.get_label().startswith("_")}


def test_the_arms_of_a_picture_are_drawn_alike(tmp_path, monkeypatch):
    """A run with few points leaves all unsmoothed. A mean ends with its shortest run. Shared steps stay where they are."""
    scores = {("Hopper", "none", arm): [1.0, 2.0] for arm in ("dppo", "dsppo")}
    runs = load(write_runs(tmp_path, scores))
    few = runs.run_id[0]
    for short in (True, False):
        counts = {run_id: 20 if short and run_id == few else 90 for run_id in runs.run_id}
        points = [
            {"run_id": run_id, "tag": "charts/episodic_return", "step": (i + 1) * 10_000 / count * end, "value": i % 2}
            for end, (run_id, count) in zip((1, 0.9, 1, 0.9), counts.items(), strict=True)
            for i in range(count)
        ]
        found = drawn(monkeypatch, figures.draw_curves, runs, pd.DataFrame(points), tmp_path / "x.png")
        assert len(found) == 2
        for line in found.values():
            steps, values = line.get_data()
            assert steps[-1] == 9000 and line.get_marker() == "None"
            assert np.ptp(values[5:-5]) > 0.7 if short else np.ptp(values[5:-5]) < 0.5
    points = [
        {"run_id": each, "tag": "charts/episodic_return", "step": s, "value": s} for each in runs.run_id for s in (1, 7, 10)
    ]
    found = drawn(monkeypatch, figures.draw_curves, runs, pd.DataFrame(points), tmp_path / "x.png")
    assert all(line.get_marker() == "o" and list(line.get_xdata()) == [1, 7, 10] for line in found.values())


def test_six_arms_are_small_multiples_and_no_legend_hides_a_curve(tmp_path, monkeypatch):
    for count, axes in ((5, 1), (6, 5)):
        six = {f"arm{i}": GRID["ppo"] for i in range(count)}
        runs = load(write_grid(tmp_path / f"runs{count}", "my_loss.py", arms=six, baseline="arm0"))
        points = [(each, tables.RETURNS[0], step, 1.0 * step) for each in runs.run_id for step in (1, 2)]
        curves = pd.DataFrame(points, columns=["run_id", "tag", "step", "value"])
        figure = picture(monkeypatch, figures.draw_curves, runs, curves, tmp_path / "x.png")
        shown = [axis for axis in figure.axes if axis.lines]
        assert len(shown) == axes and [len(axis.lines) for axis in shown] == ([5] if count == 5 else [2] * 5)
        assert {axis.lines[0].get_label().split(" (")[0] for axis in shown} == {"arm0"}
        assert len({axis.get_ylim() for axis in shown}) == 1
        for axis in shown:
            assert axis.get_legend().get_window_extent().y1 < axis.get_window_extent().y0


def test_a_band_is_the_standard_error_and_two_seeds_are_both_drawn(tmp_path, monkeypatch):
    """Of 1, 2, 6 and, at the second step, three times that: 3 ± 1.5275."""
    for seeds in (3, 2):
        values = [1.0, 2.0, 6.0][:seeds]
        runs = load(write_runs(tmp_path / str(seeds), {("Hopper", "none", "dppo"): values}))
        points = [(run.run_id, tables.RETURNS[0], step, run.score * step) for run in runs.itertuples() for step in (1, 3)]
        curves = pd.DataFrame(points, columns=["run_id", "tag", "step", "value"])
        (axis,) = picture(monkeypatch, figures.draw_curves, runs, curves, tmp_path / "x.png").axes
        if seeds == 2:
            assert [list(line.get_ydata()) for line in axis.lines] == [[1.5, 4.5], [1, 3], [2, 6]] and not axis.collections
            assert axis.get_title().endswith("mean and each seed, 2 seeds")
        else:
            edge = axis.collections[0].get_paths()[0].vertices
            error = statistics.stdev(values) / 3**0.5
            assert sorted({round(y, 6) for x, y in edge if x == 1}) == pytest.approx([3 - error, 3 + error], abs=1e-5)


def test_runs_that_normalise_nothing_have_no_sign_changes(tmp_path):
    """A2C logs 0."""
    runs = load(write_runs(tmp_path))
    curves = pd.DataFrame({"run_id": runs.run_id, "tag": "charts/adv_sign_change", "step": 100})
    lines = tables.signs(runs, curves.assign(value=np.where(runs.arm == "dppo", 0.0, 0.25)))
    assert (
        lines[-1] == "| Hopper-v4, noise none | 25.0 % (25.0 to 25.0) |" and tables.signs(runs, curves.assign(value=0.0)) == []
    )


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "DPPO"),
        ({"arm": "ppo"}, "PPO"),
        ({"arm": "dsppo"}, "DSPPO"),
        ({"arm": "dsppo", "reverse_prob": "factored"}, "DSPPO factored"),
        ({"arm": "dsppo", "literal_signs": True}, "DSPPO literal"),
        ({"arm": "control"}, "control DPPO"),
        ({"norm_adv": False}, "DPPO raw"),
        ({"num_bins": 21}, "DPPO 21 bins"),
        ({"arm": "dsppo", "Z": -2.0}, "DSPPO Z -2"),
        ({"script": "sppo_atari.py"}, "PPO"),
        ({"script": "sppo_atari.py", "arm": "dsppo"}, "SPPO"),
        ({"script": "dsa2c_continuous.py", "arm": "dsppo", "norm_adv": False}, "DSA2C"),
        ({"script": "sa2c_atari.py", "norm_adv": True}, "A2C normalised"),
        ({"script": "sppo_rlhf_imdb.py", "arm": "control"}, "control PPO"),
        ({"script": "sppo_atari.py", "norm_adv": False}, "PPO raw"),
        ({"script": "sppo_atari.py", "exp_name": "reweighted_vf"}, "PPO reweighted_vf"),
        ({"script": "sppo_atari.py", "exp_name": "ppo"}, "PPO"),
        ({"script": "dsa2c_continuous.py", "arm": "dsppo", "norm_adv": False, "mean_weight": True}, "control DA2C"),
    ],
)
def test_labels(changed, expected):
    assert arms.label(reading.flatten(result(**changed))) == expected


def write_atari(folder, arms, script="sppo_atari.py", **changed):
    """Runs on Alien with bsc noise: arm -> (alpha, beta, other settings, scores)."""
    own = {"env_id": "Alien", "learning_rate": 2.5e-4, "vf_coef": 0.5, "ent_coef": 0.01, "max_grad_norm": 0.5, "adam_eps": 1e-5}
    for arm, (alpha, beta, settings, scores) in arms.items():
        for seed, score in enumerate(scores, 1):
            one = result(seed=seed, score=score, script=script, noise="bsc", exp_name=arm, run_id=f"{arm}{seed}")
            args = one["args"] | own | {"alpha": alpha, "beta": beta} | settings | changed
            save(folder, one | {"env_id": "Alien", "args": args})
    return folder


FOUR = {"vf_coef": 0.5 / 10.5, "ent_coef": 0.01 / 10.5, "max_grad_norm": 0.5 / 10.5, "adam_eps": 1e-5 / 10.5}
ATARI = {
    "ppo": (1.0, 0.0, {}, [100.0, 110.0]),
    "ppo_raw": (1.0, 0.0, {"norm_adv": False}, [90.0, 80.0]),
    "sppo": (0.5, 10.0, {}, [120.0, 130.0]),
    "control": (10.5, 0.0, {}, [125.0, 127.0]),
    "reweighted": (1.0, 0.0, FOUR, [121.0, 129.0]),
    "reweighted_vf": (1.0, 0.0, {"vf_coef": 0.5 / 10.5}, [115.0, 118.0]),
}


def test_the_arms_of_the_atari_grids(tmp_path):
    """Each has its name, none is mixed with another; the paper's PPO (Alien, bsc: 1,042 +- 73) stands beside both baselines."""
    text = make([write_atari(tmp_path / "runs", ATARI)], tmp_path / "out")
    header = next(line for line in text.splitlines() if line.startswith("| | "))
    assert header == "| | ppo | ppo_raw | reweighted | reweighted_vf | sppo | control |"
    assert (
        "Arms: ppo (PPO, α 1, β 0); ppo_raw (PPO raw, α 1, β 0, no norm_adv); reweighted (PPO reweighted, α 1, β 0, adam"
        in text
    )
    published = pd.read_csv(ROOT / "benchmark/paper/scores.csv")
    (paper,) = published[(published.env == "Alien") & (published.noise == "bsc") & (published.algo == "PPO")]["mean"]
    cell = next(line for line in text.splitlines() if line.startswith("| Alien |")).split(" | ")
    shown = [f"[{tables.number(paper)} ± " in part for part in cell]
    assert shown == [False, True, True, False, False, False, False] and "[" in cell[5] and "[" not in cell[6]
    assert "The paper's PPO stands beside ppo and ppo_raw" in text
    cells = tables.cells(load(tmp_path / "runs"))  # the paper has one PPO, which is neither above nor below itself
    assert tables.wins(cells, "sppo", "ppo_raw", "paper_mean") == "1 of 1" == tables.wins(cells, "ppo", "ppo_raw")
    assert tables.wins(cells, "ppo", "ppo_raw", "paper_mean") == ""
    assert "Mixed" not in text and "No control" not in text


def test_a2c_has_its_controls(tmp_path):
    arms = {
        "a2c": (1.0, 0.0, {}, [1.0, 2.0]),
        "sa2c": (0.5, 1.0, {}, [3.0, 4.0]),
        "a2c_half": (0.5, 0.0, {}, [2.0, 3.0]),
        "a2c_more": (1.5, 0.0, {}, [2.0, 3.0]),  # alpha + beta of SA2C, which is no control of A2C (fact 3)
        "control": (0.5, 1.0, {"mean_weight": True}, [3.0, 5.0]),
    }
    folder = write_atari(tmp_path / "runs", arms, script="sa2c_atari.py", norm_adv=False)
    text = make([folder], tmp_path / "out")
    header = next(line for line in text.splitlines() if line.startswith("| | "))
    assert header == "| | a2c | a2c_half | a2c_more | sa2c | control |" and "The paper's PPO" not in text
    methods = {"a2c": "A2C", "a2c_half": "A2C α 0.5", "a2c_more": "A2C α 1.5", "sa2c": "SA2C", "control": "control A2C"}
    assert all(f"{name} ({methods[name]}, α " in text for name in arms)  # as runs without a name are called

    # runs that have no name are called as run.py's own grids call them
    for path in folder.glob("*/result.json"):
        saved = json.loads(path.read_text())
        name = "a2c_more" if saved["args"]["exp_name"] == "a2c_more" else "sa2c_atari"
        path.write_text(json.dumps(saved | {"args": saved["args"] | {"exp_name": name}}))
    assert make([folder], tmp_path / "unnamed") == text


def test_an_argument_that_ours_does_not_have_tells_arms_apart_and_is_not_the_papers(tmp_path):
    """Somebody edits one of our scripts in place and adds an argument."""
    folder = write_atari(tmp_path / "runs", {"sppo_atari": (0.5, 10.0, {}, [100.0, 900.0])})
    assert "[713" in make([folder], tmp_path / "out")  # the paper's SPPO stands beside it
    for seed, value in ((1, 0.0), (2, 0.5)):
        path = folder / f"sppo_atari{seed}0/result.json"
        saved = json.loads(path.read_text())
        path.write_text(json.dumps(saved | {"args": saved["args"] | {"my_coef": value, "sizes": [64, 64]}}))
    with pytest.raises(SystemExit):
        make([folder], tmp_path / "out")
    text = make([folder], tmp_path / "out", allow_mixed=True)
    assert "my_coef 0, 0.5" in text and "[713" not in text


def test_a_named_baseline_is_the_baseline_also_where_its_name_grows(tmp_path):
    folder = write_grid(tmp_path / "runs", "my_loss.py", baseline="mine")
    text = make([folder], tmp_path / "out")
    assert "| | mine | ppo | sppo | control |" in text and "Interquartile mean in units of mine's" in text
    table = pd.read_csv(tmp_path / "out/aggregates.csv")
    assert set(table[table.what == "IQM"].other) == {"mine"}
    for seed in (1, 2):  # a second beta of it
        save(folder, result(arm="dsppo", seed=seed, beta=5.0, script="my_loss.py", exp_name="mine", run_id=f"b{seed}"))
        path = next((folder / f"b{seed}0").glob("result.json"))
        one = json.loads(path.read_text())
        path.write_text(json.dumps(one | {"args": one["args"] | {"my_coef": 0.3}}))
    runs = load(folder)
    assert order(list(runs.arm.unique()), arms.roles_of(runs))[:2] == ["mine β 5", "mine β 20"]


# --- arms of a grid, and of scripts of one's own ---------------------------------------------------------------------

GRID = {  # arm: alpha, beta, my_coef, scores
    "ppo": (1.0, 0.0, 0.0, [100.0, 110.0, 120.0]),
    "sppo": (0.5, 20.0, 0.0, [130.0, 140.0, 120.0]),
    "control": (20.5, 0.0, 0.0, [128.0, 140.0, 119.0]),
    "mine": (0.5, 20.0, 0.3, [150.0, 160.0, 170.0]),
}


def write_grid(folder, script, baseline="ppo", arms=GRID, **changed):
    """What run.py leaves of a TOML file's grid on Hopper-v4 without noise, where the paper has DPPO and DSPPO."""
    folder.mkdir(parents=True)
    (folder / "grid.json").write_text(json.dumps({"script": script, "baseline": baseline}))
    for arm, (alpha, beta, my_coef, scores) in arms.items():
        for seed, score in enumerate(scores, 1):
            one = result(seed=seed, score=score, script=script, exp_name=arm, run_id=f"{arm}{seed}", **changed)
            one["args"] |= {"alpha": alpha, "beta": beta} | ({} if script in FAMILIES else {"my_coef": my_coef})
            save(folder / f"1000/Hopper-v4__none__{arm}__{seed}", one)
    return folder


def test_a_loss_of_ones_own_is_called_by_its_arm_and_has_no_published_numbers(tmp_path):
    """A copy of dsppo_continuous.py with beta above 0 and one more argument: never DSPPO, never beside the paper's DSPPO."""
    text = make([write_grid(tmp_path / "runs", "my_loss.py")], tmp_path / "out")
    assert "### my_loss.py, without noise; 1,000 steps" in text
    assert "| | ppo | mine | sppo | control |" in text
    assert "| Hopper-v4 | 110.0 ± 5.8 (3) | **160.0 ± 5.8** (3) | 130.0 ± 5.8 (3) | 129.0 ± 6.1 (3) |" in text
    assert "Interquartile mean in units of ppo's" in text and "above ppo" not in text  # one row
    assert "mine (α 0.5, β 20, my_coef 0.3)" in text and "ppo (PPO, α 1, β 0)" in text
    assert make([tmp_path / "out/runs.csv"], tmp_path / "again") == text


def test_an_arm_may_be_called_by_a_number(tmp_path):
    arms = {"10": GRID["ppo"], "0.50": GRID["mine"]}
    text = make([write_grid(tmp_path / "runs", "my_loss.py", baseline="10", arms=arms)], tmp_path / "out")
    assert "| | 10 | 0.50 |" in text and make([tmp_path / "out/runs.csv"], tmp_path / "again") == text


def test_our_own_scripts_arms_have_the_papers_numbers_and_their_names(tmp_path):
    """`ppo` of this grid has bins, so that it is the paper's DPPO."""
    make(
        [write_grid(tmp_path / "runs", "dsppo_continuous.py", arms={**GRID, "mine": (0.7, 20.0, 0, [1.0, 2.0])})],
        tmp_path / "out",
    )
    published = pd.read_csv(ROOT / "benchmark/paper/scores.csv").query("env == 'Hopper' and noise == 'none'").set_index("algo")
    found = pd.read_csv(tmp_path / "out/cells.csv").set_index("arm").paper_mean.dropna()
    assert dict(found) == {"ppo": published["mean"]["DPPO"], "sppo": published["mean"]["DSPPO"]}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "DSPPO"),
        ({"arm": "dppo"}, "DPPO"),
        ({"arm": "ppo"}, "PPO"),
        ({"arm": "control"}, None),
        ({"noise": "gaussian"}, None),  # its beta is 50 there
        ({"noise": "gaussian", "beta": 50.0}, "DSPPO"),
        ({"beta": 19.0}, None),
        ({"alpha": 1.0}, None),
        ({"Z": -2.0}, None),
        ({"num_bins": 21}, None),
        ({"num_bins": 0}, None),
        ({"learning_rate": 1e-3}, None),
        ({"reverse_prob": "factored"}, None),
        ({"literal_signs": True}, None),
        ({"norm_adv": False}, None),
        ({"target_kl": 0.01}, None),
        ({"arm": "dppo", "norm_adv": False}, None),
        ({"total_timesteps": 5, "exp_name": "mine", "seed": 7}, "DSPPO"),
        ({"script": "my_loss.py"}, None),
        ({"env": "Reacher"}, None),
    ],
)
def test_the_papers_numbers_need_the_papers_settings(changed, expected):
    row = reading.flatten(result(**{"arm": "dsppo", **changed}))
    assert arms.paper_name(row) == expected


def test_the_papers_numbers_of_a2c_on_swimmer_need_its_gamma():
    for gamma, expected in ((0.99, None), (0.9999, "DA2C")):
        one = result("Swimmer", script="dsa2c_continuous.py", norm_adv=False, learning_rate=7e-4)
        one["args"]["gamma"] = gamma
        assert arms.paper_name(reading.flatten(one)) == expected


def test_one_name_for_two_methods_is_refused(tmp_path):
    """All runs of a study under one --exp-name; two weights under one name are two arms."""
    folder = write_grid(tmp_path / "runs", "dsppo_continuous.py", arms={"x": GRID["ppo"]})
    save(folder, *(result(seed=i, exp_name="x", run_id=f"b{i}", norm_adv=False) for i in (4, 5)))
    assert reading.find_mixture(load(folder)) == ["Hopper-v4, noise none, dsppo_continuous.py, x: norm_adv False, True"]
    save(folder, *(result(arm="dsppo", seed=i, exp_name="x", run_id=f"c{i}") for i in (4, 5)))
    assert set(load(folder).arm) == {"x β 0", "x β 20"}


def test_settings_that_differ_within_an_arm_are_refused(tmp_path, capsys):
    folder = write_grid(tmp_path / "runs", "my_loss.py")
    for name, value in (("my_coef", 0.7), ("Z", -2.0), ("gamma", 0.5)):
        path = next(folder.glob("1000/*mine__2/*/result.json"))
        one = json.loads(path.read_text())
        before, one["args"] = one["args"], one["args"] | {name: value}
        path.write_text(json.dumps(one))
        with pytest.raises(SystemExit):
            make([folder], tmp_path / "out")
        assert f"Hopper-v4, noise none, my_loss.py, mine: {name} " in capsys.readouterr().err
        path.write_text(json.dumps(one | {"args": before}))
    make([folder], tmp_path / "out")


# --- damaged and partial sources -------------------------------------------------------------------------------------


def test_a_damaged_event_file_is_said_and_left_out(tmp_path):
    """Of scores 100, 110, 120 that grow to their last step, the last tenth without the damaged third is 105 ± 5."""
    folder = write_runs(tmp_path / "runs", {("Hopper", "none", "dppo"): [100.0, 110.0, 120.0]}, curves=True)
    head = "While training, mean over the last tenth of it:\n\n| | dppo |\n|---|---|\n"
    whole = make([folder], tmp_path / "whole")
    assert f"{head}| Hopper-v4 | 110.0 ± 5.8 (3) |\n" in whole and "left out" not in whole
    path = next(folder.glob("*dppo__3/*/events*"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + b"\0" * 40 + data[len(data) // 2 + 40 :])
    text = make([folder], tmp_path / "out")
    assert "**Curves left out, as their files are damaged or not whole: dppo, Hopper-v4, noise none, seed 3, ends at " in text
    assert "of 1,000 steps.**" in text and f"{head}| Hopper-v4 | 105.0 ± 5.0 (2) |\n" in text
    assert set(pd.read_csv(tmp_path / "out/curves.csv")) == {"tag", "step", "Hoppernonedppo1", "Hoppernonedppo2"}
    mended = make([folder, tmp_path / "whole/runs.csv"], tmp_path / "out")  # by a whole copy
    assert f"{head}| Hopper-v4 | 110.0 ± 5.8 (3) |\n" in mended


@pytest.mark.parametrize(
    ("steps", "end", "expected"),
    [
        (range(128, 1281, 128), 1280, None),
        (range(128, 1281, 128), 1408, "ends at 1,280 of 1,408 steps"),
        (range(256, 1281, 128), 1280, "has a hole before step 256"),
        ([128, 256, 512, 640], 640, "has a hole before step 512"),
        (range(128, 1281, 128), float("nan"), None),
        ([], 1280, "has no returns"),  # of other points
    ],
)
def test_what_a_curve_lacks(steps, end, expected):
    points = pd.DataFrame({"tag": "charts/adv_sign_change", "step": list(steps)})
    assert tables.shortfall(points, end) == expected


def test_returns_may_be_uneven():
    """RLHF's, which logs no signs: twice the longest gap may be missing at the end, a quarter of the run in between."""
    steps = np.cumsum(np.random.default_rng(0).integers(5, 40, 400))
    points = pd.DataFrame({"tag": "charts/episodic_return", "step": steps})
    assert tables.shortfall(points, steps[-1] + 70) is None
    assert tables.shortfall(points, steps[-1] + 100).startswith("ends at ")
    holed = points[(points.index < 100) | (points.index > 220)]
    assert tables.shortfall(holed, steps[-1]).startswith("has a hole before step ")
    clock = pd.DataFrame({"tag": "charts/adv_sign_change", "step": np.arange(1, 101) * 100})
    assert tables.shortfall(pd.concat([clock, holed]), 10_000) is None  # episodes end when they end


def test_the_order_of_the_sources_is_nothing(tmp_path):
    """A folder and an older runs.csv, in which a run had got less far: the folder counts, and so does the later of two csvs.
    A run that is in all of them counts once."""
    folder = write_runs(tmp_path / "runs")
    make([folder], tmp_path / "one")
    old, new, whole = tmp_path / "old.csv", tmp_path / "one/runs.csv", load(folder)
    exported = pd.read_csv(new)
    exported.loc[1, ["score", "global_step"]] = [-1.0, 500]
    exported.to_csv(old, index=False)
    for sources in itertools.permutations((folder, old, new)):
        assert load(*sources)[["run_id", "score", "folder"]].equals(whole[["run_id", "score", "folder"]])
    for sources in ((old, new), (new, old)):
        assert load(*sources).set_index("run_id").score.to_dict() == whole.set_index("run_id").score.to_dict()


def test_a_kill_while_a_report_is_written_loses_nothing(tmp_path, monkeypatch):
    """A report made from its own runs.csv, in its own folder: the only copy stays whole until the new one is."""
    make([write_runs(tmp_path / "runs")], tmp_path / "out")
    before = (tmp_path / "out/runs.csv").read_text()

    def killed(one, other):
        raise KeyboardInterrupt

    monkeypatch.setattr(figures.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        make([tmp_path / "out/runs.csv"], tmp_path / "out")
    assert (tmp_path / "out/runs.csv").read_text() == before


def styles(kinds, script="sppo_atari.py"):
    return figures.styles(pd.DataFrame({"arm": list(kinds), "method": list(kinds.values()), "script": script}))


def test_colours_are_fixed_by_arm():
    """Of one kind in every picture, whatever else is in it and whatever its name; no two arms of a picture look the same."""
    kinds = ("PPO", "DPPO", "SPPO", "DSPPO", "A2C", "control PPO", "PPO raw")
    alone = {kind: styles({"x": kind})["x"]["color"] for kind in kinds}
    assert alone["SPPO"] == alone["DSPPO"] and alone["PPO"] == alone["A2C"] and alone["control PPO"] == "#000000"
    together = styles({"a": "PPO", "b": "DPPO", "c": "DSPPO", "d": "control DPPO", "e": "PPO raw"})
    expected = [alone[kind] for kind in ("PPO", "DPPO", "DSPPO", "control PPO", "PPO raw")]
    assert [together[name]["color"] for name in "abcde"] == expected
    names = {"ppo": "PPO", "ppo2": "PPO", "sppo": "SPPO", "mine": "mine", "mine2": "SPPO", "c": "control", "c2": "control PPO"}
    many = styles(names)
    colours = {arm: style["color"] for arm, style in many.items()}
    assert colours["ppo"] == colours["ppo2"] == alone["PPO"] and colours["sppo"] == colours["mine2"] == alone["SPPO"]
    assert colours["mine"] not in {*alone.values()} and colours["c"] == colours["c2"] == "#000000"
    assert len({(style["color"], style["linestyle"]) for style in many.values()}) == 7
    assert many["c"]["linestyle"] in figures.CONTROL_LINES and many["ppo"]["linestyle"] == "-"
    beside = styles({"p": "PPO", "a": "A2C"}, ["sppo_atari.py", "sa2c_atari.py"])  # on axes beside each other
    assert beside["p"] == beside["a"] == {"color": "#0072B2", "linestyle": "-"}
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999"}
    assert {*figures.ARM_COLOURS.values(), *figures.SPARE_COLOURS, figures.CONTROL} <= okabe_ito


def test_curves_tell_weights_seeds_and_controls(tmp_path, monkeypatch):
    runs = load(write_runs(tmp_path, curves=True))
    curves, _ = tables.load_curves(runs, (tmp_path,))
    found = drawn(monkeypatch, figures.draw_curves, runs, curves, tmp_path / "x.svg")
    styles = {label: line.get_linestyle() for label, line in found.items()}
    assert styles == {"dppo (α 1, β 0)": "-", "dsppo (α 0.5, β 20)": "-", "control (α 20.5, β 0)": "--"}
    title = next(iter(found.values())).axes.get_title()
    assert title == "Hopper-v4\ndsppo_continuous.py; mean ± standard error, 3 seeds"
    before = (tmp_path / "x.svg").read_bytes()
    figures.draw_curves(runs, curves, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_bytes() == before and (tmp_path / "x.png").stat().st_size > 20_000


def test_arms_are_in_order():
    arms = ["DSPPO β 10", "control DPPO α 2.5", "DPPO", "DSPPO β 2", "DSPPO", "control DPPO α 10.5", "PPO", "DSPPO β 2.5"]
    ordered = ["PPO", "DPPO", "DSPPO", "DSPPO β 2", "DSPPO β 2.5", "DSPPO β 10", "control DPPO α 2.5", "control DPPO α 10.5"]
    assert order(arms) == ordered


def test_a_reports_own_table_gives_the_same_report(tmp_path):
    first = make([write_runs(tmp_path / "runs")], tmp_path / "one")
    assert "18 runs have no curves here." in first and first == make([tmp_path / "one/runs.csv"], tmp_path / "two")
    for name in ("runs.csv", "cells.csv", "aggregates.csv"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert not {"folder", "wandb", "run_dir"} & set(pd.read_csv(tmp_path / "one/runs.csv"))  # of this machine


def test_a_wandb_project_gives_the_same_report_as_its_folders(tmp_path):
    """Curves, too. A run that has crashed and one that ended short of its length are left out and named; another program's
    run is nobody's."""
    folder, crashed = write_runs(tmp_path / "runs", curves=True), result(arm="dsppo", seed=9, run_id="crashed")
    short = result(arm="dsppo", seed=8, run_id="short", global_step=999)
    logged = [{"id": "other", "state": "finished", "config": {"script": "train.py"}, "summary": {"score": 1.0}}]
    for one in (crashed, short, *(json.loads(path.read_text()) for path in folder.glob("*/*/result.json"))):
        config = one["args"] | {name: one[name] for name in ("script", "run_id", "versions", "commit", "device", "env_id")}
        summary = {name: one[name] for name in ("score", "seconds", "global_step")} | {"charts/SPS": 9.0}
        points = [{"global_step": step, "charts/episodic_return": one["score"] * step / 1000} for step in range(100, 1001, 100)]
        history = [{**point, "charts/adv_sign_change": one["args"]["seed"] / 100} for point in points]
        history.insert(0, {**history[3], "charts/episodic_return": 1e9})  # logged before a kill, and again when it was resumed
        state = "crashed" if one is crashed else "finished"
        logged.append({"id": one["run_id"], "state": state, "config": config, "summary": summary, "history": history})
    for one in (crashed, short):
        path = folder / one["run_id"]
        path.mkdir()
        (path / "args.json").write_text(json.dumps(one))
    text = make([folder], tmp_path / "one")
    assert "**Left out: not finished: dsppo (2). What is left may flatter these arms.**" in text
    with wandb_server.serve(logged) as server:
        env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | server.env
        env |= {"WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)}
        out, _ = run("benchmark/report.py", "--wandb", "me/rl", "--out", tmp_path / "two", "--reps", 50, env=env, cwd=tmp_path)
        _, err = run("benchmark/report.py", "--wandb", "me/none", env=env, cwd=tmp_path, code=2)
    assert out == text and (tmp_path / "two/curves.svg").exists()
    assert err.startswith("report.py: error: --wandb me/none: expected ENTITY/PROJECT")
    for name in ("cells.csv", "aggregates.csv", "curves.csv"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text(), name


def test_what_has_no_score_or_no_end_is_left_out_and_named(tmp_path):
    folder = write_runs(tmp_path / "runs", {**SCORES, ("Ant", "none", "dsppo"): [15.0, float("inf"), 5.0]})
    (folder / "begun").mkdir()
    (folder / "begun/args.json").write_text(json.dumps(result(arm="dsppo", seed=9)))
    text = make([folder], tmp_path / "out")
    said = "**Left out: not finished: dsppo (1); without a score: dsppo (1). What is left may flatter these arms.**"
    assert said in text and text.startswith("17 runs")


def test_rlhf_measures_before_and_after(tmp_path, monkeypatch):
    """Before: one value a seed, whatever the arms, which start alike. From W&B: the last values logged."""
    before, after = {1: 30.0, 2: 40.0}, {("ppo", 1): 50.0, ("ppo", 2): 60.0, ("dsppo", 1): 35.0, ("dsppo", 2): 45.0}
    logged = []
    for (arm, seed), value in after.items():
        one = result(arm=arm, seed=seed, score=0.5, script="sppo_rlhf_imdb.py", env_id="imdb")
        save(tmp_path / "runs", one | {"before": {"perplexity": before[seed]}, "after": {"perplexity": value}})
        config = one["args"] | {name: one[name] for name in ("script", "run_id", "versions", "env_id")}
        last = {"score": 0.5, "global_step": 1000, "eval/perplexity": value, "test/perplexity": -1.0}
        logged.append(SimpleNamespace(id=one["run_id"], name="x", state="finished", config=config, summary_metrics=last))
    text = make([tmp_path / "runs"], tmp_path / "one")
    assert "| | before | ppo | sppo |" in text
    assert "| perplexity | 35.0 ± 5.0 | 55.0 ± 5.0 | 40.0 ± 5.0 |" in text  # stderr of 30, 40: 7.07 / sqrt 2
    api = SimpleNamespace(runs=lambda project, lazy: logged)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=lambda: api, Error=ValueError))
    config = {name: value for name, value in config.items() if name != "total_timesteps"} | {"seed": 3}
    config |= {"iterations": 10, "trajectories_per_update": 101}  # 1,010 episodes, of which 1,000 were played
    logged.append(SimpleNamespace(id="stopped", name="x", state="finished", config=config, summary_metrics=last))
    found = reading.load_runs((), "me/rl")
    assert "| perplexity |  | 55.0 ± 5.0 | 40.0 ± 5.0 |" in tables.measures(found)
    assert len(found) == 4 and found.attrs["left out"] == ["not finished: sppo (1)"]


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [
        (0.8814, 0.00212, "0.8814 ± 0.0021"),
        (1243.4, 29.31, "1,243 ± 29"),
        (110.0, 5.77, "110.0 ± 5.8"),
        (15234.0, 1234.0, "15,234 ± 1,234"),
        (3.0, 0.0, "3.00"),
        (3.0, float("nan"), "3.00"),
        (-12.5, 0.96, "-12.50 ± 0.96"),
    ],
)
def test_numbers_have_two_digits_of_their_error(mean, error, expected):
    assert tables.with_error(mean, error) == expected


# --- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"total_timesteps": 2000}, "Hopper-v4, noise none: lengths 1,000, 2,000"),
        ({"torch": "2.12.0"}, "dsppo_continuous.py: versions.torch 2.12.0, 2.13.0"),
        ({"learning_rate": 1e-3}, "dsppo_continuous.py: learning_rate 0.0003, 0.001"),
        ({"target_kl": 0.01}, "dsppo_continuous.py: target_kl 0.01, none"),
        ({"seed": 1, "run_id": "another"}, "2 runs of dppo with seed 1"),
    ],
)
def test_mixed_runs_are_refused_unless_asked_for(changed, expected, tmp_path, capsys):
    folder = save(write_runs(tmp_path / "runs"), result(**{"seed": 9, "score": 5.0, **changed}))
    assert expected in refused(capsys, make, [folder], tmp_path / "out") and not (tmp_path / "out").exists()
    if "target_kl" in changed:
        text = make([folder], tmp_path / "out", allow_mixed=True)
        assert "**Mixed on request:**" in text and expected in text


def test_threads_names_folders_and_noise_that_is_off_are_no_mixture(tmp_path):
    one = result(seed=9, score=5.0, device="gpu", commit="b" * 40)
    one["args"] |= {"num_threads": 4, "run_dir": "elsewhere", "track": True, "noise_std": 0.1}
    two = result(seed=8)
    two["args"]["noise_std"] = 0.05
    text = make([save(write_runs(tmp_path / "runs"), one, two)], tmp_path / "out")
    assert "Mixed" not in text
    assert "hours of training; **2 commits: aaaaaaaaaaaa, bbbbbbbbbbbb**; **2 devices: cpu, gpu**. A score is" in text


# --- the whole report -------------------------------------------------------------------------------------------------

GOLDEN = """| | dppo | dsppo | control |
|---|---|---|---|
| Ant-v4 | **20.0 ± 5.8** (3) [{Ant dppo}] | 10.0 ± 2.9 (3) [{Ant dsppo}] | **20 ± 11** (3) |
| Hopper-v4 | 110.0 ± 5.8 (3) [{Hopper dppo}] | **130.0 ± 5.8** (3) [{Hopper dsppo}] | 129.0 ± 6.1 (3) |
| above dppo |  | 1 of 2 [{wins}] | 1 of 2 |
| above control | 0 of 2 | 1 of 2 |  |
"""


def test_report_of_a_small_set_of_runs(tmp_path):
    text = make([write_runs(tmp_path / "runs", curves=True)], tmp_path / "out")
    published = pd.read_csv(ROOT / "benchmark/paper/scores.csv").query("noise == 'none'").set_index(["env", "algo"])
    values = {}
    for env in ("Ant", "Hopper"):
        for arm in ("dppo", "dsppo"):
            row = published.loc[env, arm.upper()]
            values[f"{env} {arm}"] = f"{tables.number(row['mean'])} ± {tables.number(row['stderr'])}"
    above = sum(published.loc[env, "DSPPO"]["mean"] > published.loc[env, "DPPO"]["mean"] for env in ("Ant", "Hopper"))
    assert GOLDEN.format(**values, wins=f"{above} of 2") in text
    assert text.startswith("18 runs, 0.2 hours of training; commit aaaaaaaaaaaa; device cpu.")
    assert "Interquartile mean in units of dppo's" in text and "![learning curves](curves.svg)" in text
    # sign changes: seeds 1, 2, 3 have 1, 2, 3 %
    assert "| Hopper-v4, noise none | 2.0 % (1.0 to 3.0) |" in text
    curves = pd.read_csv(tmp_path / "out/curves.csv", index_col=["tag", "step"])
    assert curves.shape == (2 * 10, 18) and curves.notna().all(axis=None)
    assert curves.loc[("charts/episodic_return", 500), "Hoppernonedsppo2"] == pytest.approx(70.0)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    files = {"report.md", "runs.csv", "cells.csv", "aggregates.csv", "curves.csv"}
    assert names == files | {"curves.svg", "curves.png"}


# --- real runs --------------------------------------------------------------------------------------------------------

REAL = (
    ROOT / "tests/report_runs"
)  # 12 runs of dsppo_continuous.py on InvertedPendulum-v4 by run.py; golden/ is this script's report


def test_report_of_committed_runs_is_the_golden_one(tmp_path):
    text = make([REAL], tmp_path / "out")
    assert text == (REAL / "golden/report.md").read_text()
    for name in ("cells.csv", "aggregates.csv", "curves.csv"):
        ours, golden = pd.read_csv(tmp_path / "out" / name), pd.read_csv(REAL / "golden" / name)
        pd.testing.assert_frame_equal(ours, golden, rtol=1e-5)


def test_the_golden_report_is_right():
    """Against the runs' own files with the standard library, and the pairs counted."""
    table = pd.read_csv(REAL / "golden/cells.csv").set_index(["noise", "arm"])
    chances = pd.read_csv(REAL / "golden/aggregates.csv").query("what == 'P(arm > other)'").set_index(["noise", "arm", "other"])
    for noise in ("none", "gaussian"):
        scores = {}
        for arm in ("dppo", "dsppo", "control"):
            files = sorted(REAL.glob(f"*__{noise}__{arm}__*/result.json"))
            scores[arm] = [statistics.mean(json.loads(path.read_text())["returns"]) for path in files]
            cell = table.loc[noise, arm]
            assert cell["mean"] == pytest.approx(statistics.mean(scores[arm])) and cell["seeds"] == len(files) == 2
            assert cell["stderr"] == pytest.approx(statistics.stdev(scores[arm]) / 2**0.5)
        for arm, other in itertools.permutations(scores, 2):
            pairs = [(a > b) + (a == b) / 2 for a in scores[arm] for b in scores[other]]
            assert chances.loc[noise, arm, other]["value"] == pytest.approx(statistics.mean(pairs))
