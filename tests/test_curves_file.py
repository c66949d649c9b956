"""curves.csv of benchmark/report.py: what is written is read back."""

import sys

import pandas as pd
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
from reporting import tables

POINTS = pd.DataFrame(
    [
        ("b1", "charts/episodic_return", 100, 1.23456789),
        ("b1", "charts/episodic_return", 200, -2.0),
        ("a2", "charts/episodic_return", 150, 3e-9),  # another run has another step
        ("0042", "charts/adv_sign_change", 100, 0.5),  # not the number 42
    ],
    columns=["run_id", "tag", "step", "value"],
)


def in_order(points):
    return points.sort_values(["run_id", "tag", "step"], ignore_index=True)


def test_points_are_read_back_to_six_digits(tmp_path):
    (tmp_path / "curves.csv").write_text(tables.curves_csv(POINTS))
    assert (tmp_path / "curves.csv").read_text().splitlines() == [
        "tag,step,0042,a2,b1",
        "charts/adv_sign_change,100,0.5,,",
        "charts/episodic_return,100,,,1.23457",
        "charts/episodic_return,150,,3e-09,",
        "charts/episodic_return,200,,,-2",
    ]
    expected = POINTS.assign(value=[1.23457, -2.0, 3e-9, 0.5])
    pd.testing.assert_frame_equal(in_order(tables.read_curves(tmp_path / "curves.csv")), in_order(expected))


def test_no_points(tmp_path):
    (tmp_path / "curves.csv").write_text(tables.curves_csv(POINTS[:0]))
    assert tables.read_curves(tmp_path / "curves.csv").empty


def test_the_last_interval_of_logging_may_be_short():
    """A2C logs every 100 iterations and at its end: two points are a whole curve. A lost point is still a hole."""

    def shortfall(*steps):
        points = pd.DataFrame({"tag": "charts/adv_sign_change", "step": steps})
        return tables.shortfall(points, steps[-1])

    assert shortfall(3200, 4096) is shortfall(3200) is shortfall(3200, 6400, 6432) is None
    assert shortfall(100, 400, 500) == "has a hole before step 400"
