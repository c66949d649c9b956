"""The scripts behind the README's first picture and fact 5's numbers: by hand, and small."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmark/studies"))
import forest
import four_settings
import full_length
import learning_pictures
import one_gradient

import sppo_atari

pytestmark = pytest.mark.quick


def test_the_last_step_to_which_two_curves_are_equal():
    one = pd.Series({100: 1.0, 200: 2.0, 300: 3.0, 400: 4.0})
    assert one_gradient.last_equal(one, one) == 400
    assert one_gradient.last_equal(one, pd.Series({100: 1.0, 200: 2.0000001, 300: 3.1, 400: 4.0})) == 200  # not again at 400
    assert one_gradient.last_equal(one, pd.Series({100: 1.0, 300: 3.0, 400: 4.0})) == 100  # no point at 200
    assert one_gradient.last_equal(one, one + 1) == 0


def test_the_picture_is_of_the_three_runs_that_it_names():
    folder = ROOT / "benchmark/results/continuous-ppo-lunarlander"
    curves, run = one_gradient.load(one_gradient.Args(folder))
    assert (run["alpha"], run["beta"], run["seed"], run["noise"]) == (0.5, 20.0, 1, "gaussian")
    runs = pd.read_csv(folder / "runs.csv").set_index("run_id")
    points = pd.read_csv(folder / "curves.csv").query("tag == 'charts/episodic_return'")
    for name, alpha in (("symmetric", 0.5), ("control", 20.5), ("baseline", 1.0)):
        ids = runs[(runs.alpha == alpha) & (runs.seed == 1) & (runs.noise == "gaussian") & (runs.num_bins == 11)].index
        expected = points.set_index("step")[ids[0]].dropna()
        assert len(ids) == 1 and curves[name].equals(expected)
    assert one_gradient.last_equal(curves["symmetric"], curves["control"]) == 18_432
    assert one_gradient.last_equal(curves["symmetric"], curves["baseline"]) == 2_048


@pytest.mark.parametrize("folder", sorted((ROOT / "benchmark/results").glob("learning-*")), ids=lambda folder: folder.name)
def test_the_learning_pictures_have_every_run_with_its_own_settings(folder):
    runs, curves = learning_pictures.read(folder)
    assert set(curves.run_id) == set(runs.run_id) and runs.run_id.is_unique and not curves.isna().any().any()
    ours = runs[runs.method != "sb3"].set_index("run_id")
    saved = json.loads((folder / "runs.json").read_text())
    saved = saved.values() if isinstance(saved, dict) else saved
    for command in (one["command"] for one in saved):
        words = command.split()
        name, alpha, beta = (words[words.index(word) + 1] for word in ("--seed", "--alpha", "--beta"))
        of_seed = ours[ours.index.str.endswith(f"_{name}") & (ours.script == words[1])]
        (run,) = of_seed[(of_seed.alpha == float(alpha)) & (of_seed.beta == float(beta))].itertuples()
        assert run.arm.startswith("control") == (float(alpha) != 1 and float(beta) == 0)
        assert (run.noise == "gaussian") == ("gaussian" in words) and run.env == (words[3] if "--env-id" in words else run.env)
    assert len(ours) == len(saved)


def test_fewer_than_four_settings_are_further_from_sppo():
    args = sppo_atari.Args(alpha=0.5, beta=10.0, noise="bsc", num_envs=2, num_steps=32, minibatch_size=16, num_threads=1)
    found = four_settings.differences(args)
    assert found["all four"] < 0.01 and len(found) == 9
    for name in ("all but `vf_coef`", "all but `max_grad_norm`", "all but `adam_eps`", "none: PPO"):
        assert found[name] > 5 * found["all four"] and found[name] > 0.05, name


def test_the_forest_has_every_cell_with_its_own_control():
    """Seeds, shares of the paper's length and chances, by hand from docs/results.md; no control of another beta."""
    table = forest.cells().set_index(["name", "percent"])
    swimmer = table.loc["DSPPO, Swimmer, noise, fresh seeds", 100.0]
    assert swimmer.seeds == 11 and (round(swimmer.baseline_value, 2), round(swimmer.control_low, 2)) == (0.64, 0.44)
    climber = table.loc["SPPO, CrazyClimber, no noise", 4.0]
    assert climber.seeds == 3 and (round(climber.baseline_value, 2), round(climber.control_value, 2)) == (0.89, 0.67)
    krull = [table.loc[f"SPPO, Krull, noise{fresh}", 4.0].raw for fresh in ("", ", fresh seeds")]
    assert krull == [False, True] and len(table) == 28
    without = table.index.get_level_values("name")[table.control_value.isna()]
    assert sorted(without) == [
        "DSA2C factored, Hopper, no noise",
        "DSA2C factored, Hopper, noise",
        "DSA2C, Hopper, no noise, β 10",
        "DSPPO, 8 tasks, no noise",
        "SPPO, StarGunner, noise",
    ]


def test_intervals_of_three_seeds_miss_more_often():
    three, eleven = forest.misses(3, trials=400, reps=400), forest.misses(11, trials=400, reps=400)
    assert 0.13 < three < 0.26 and 0.02 < eleven < 0.11


def test_the_picture_of_a_full_length_has_each_seed_the_means_and_the_papers_two_numbers(monkeypatch):
    folder, drawn = ROOT / "benchmark/results/atari-ppo-krull", []
    monkeypatch.setattr(full_length, "save", lambda figure, path: drawn.append((figure, path)))
    full_length.main(folder)
    (figure, path), runs = drawn[0], pd.read_csv(folder / "runs.csv")
    axis = figure.axes[0]
    dots = {float(y) for line in axis.lines if line.get_linestyle() == "None" for y in line.get_ydata()}
    papers = {5602 - 481, 5602, 5602 + 481, 9015 - 381, 9015, 9015 + 381}  # Table 11, with the ends of its errors
    assert set(runs.score) | papers == dots
    thin = [line for line in axis.lines if line.get_linewidth() == 0.7]
    thick = {line.get_label(): line for line in axis.lines if line.get_linewidth() == 2.4}
    assert len(thin) == len(runs) == 12
    own = runs[runs.exp_name == "sppo"]
    mean = thick[f"sppo: {own.score.mean():,.0f} at the end, 3 seeds"].get_ydata()
    seeds = np.array([line.get_ydata() for line in thin if line.get_color() == "#D55E00"])
    assert seeds.shape[0] == 3 and path == folder / "full_length.svg"
    np.testing.assert_allclose(mean, seeds[:, ~np.isnan(seeds).any(axis=0)].mean(axis=0))
    curves = pd.read_csv(folder / "curves.csv").query("tag == 'charts/episodic_return'")
    last = curves[curves.step > 190_000][own.run_id].mean().mean()  # the last bins, smoothed over five of them
    assert mean[-1] == pytest.approx(last, rel=0.05)
