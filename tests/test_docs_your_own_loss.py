"""docs/your-own-loss.md, followed to the letter: its diff, its TOML file and its commands, in a copy of the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers import ROOT

PAGE = (ROOT / "docs/your-own-loss.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", PAGE)
(DIFF,), (TOML,) = ([text for kind, text in BLOCKS if kind == wanted] for wanted in ("diff", "toml"))
INSTALL, COPY, TRY, GRID = (text for kind, text in BLOCKS if kind == "bash")


@pytest.fixture
def checkout(tmp_path):
    """The scripts and benchmark/ without its results, in which the page's files are saved and its commands run."""
    folder = tmp_path
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(ROOT / "benchmark", folder / "benchmark", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (folder / "my_loss.diff").write_text(DIFF)
    (folder / "my_grid.toml").write_text(TOML)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    for commands in (COPY, TRY):
        done = subprocess.run(["bash", "-ec", commands], cwd=folder, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_page_does_what_it_says(checkout):
    """One test, so that the page's commands run once, however many processes share the tests."""
    check_the_table_that_comes_out(checkout)
    check_the_arms_of_every_result(checkout)
    check_the_full_commands(checkout)
    check_the_copy_without_its_coefficient(checkout)


def check_the_table_that_comes_out(checkout):
    text = (checkout / "small_report/report.md").read_text()
    assert "### my_loss.py, without noise; 128 steps" in text
    assert "| | ppo | mine | sppo | control |" in text and "P(better than ppo)" in text
    assert "mine (α 0, β 0, spo_coef 1)" in text and "Left out" not in text and "left out" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| Breakout |") and "(2)" in line][:1]
    assert row.count("(2)") == 4 and "[" not in row  # two seeds each, and no number of the paper's
    cells = pd.read_csv(checkout / "small_report/cells.csv").set_index("arm")
    assert set(cells.index) == {"ppo", "sppo", "control", "mine"} and cells.paper_mean.isna().all()
    assert (checkout / "small_report/grad_shares.svg").exists()  # no game ends in so few steps, so that there are no curves


def check_the_arms_of_every_result(checkout):
    results = [json.loads(path.read_text()) for path in (checkout / "runs/grid/my_grid/128").glob("*/*/result.json")]
    found = {(one["args"]["exp_name"], one["args"]["spo_coef"], one["script"]) for one in results}
    assert len(results) == 8
    assert found == {(arm, float(arm == "mine"), "my_loss.py") for arm in ("ppo", "sppo", "control", "mine")}


def check_the_full_commands(checkout):
    small = [
        line.split(" --filter")[0].replace("/128 --out small", "/1000000 --out my")
        for line in TRY.replace("\\\n", "").splitlines()
    ]
    assert small == GRID.splitlines()
    dry = f"{sys.executable} benchmark/run.py my_grid.toml --dry-run"
    done = subprocess.run(dry.split(), cwd=checkout, capture_output=True, text=True, timeout=100, check=True)
    assert len(done.stdout.splitlines()) == 24 == int(re.search(r"Then the grid, (\d+) runs", PAGE)[1])
    assert INSTALL == "pip install -r benchmark/requirements.txt\n" and len(TOML.splitlines()) == 10


def check_the_copy_without_its_coefficient(checkout):
    """As the page says: the same run to the last bit. And the loss of the page is Simple Policy Optimization's, by hand."""
    sys.path.insert(0, str(checkout))
    import my_loss
    import torch

    import sppo_atari

    agent = my_loss.Agent(4)
    obs = torch.randint(0, 255, (8, 4, 84, 84), dtype=torch.uint8)
    actions, advantages, returns = torch.arange(8) % 4, torch.linspace(-1, 2, 8), torch.zeros(8)
    with torch.no_grad():
        logprobs = agent(obs)[0].gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    batch = (torch.tensor(0.1), obs, actions, logprobs - 0.05, advantages, returns)
    plain = {"alpha": 0.5, "beta": 1.0, "norm_adv": False}
    ours = sppo_atari.minibatch_loss(agent, sppo_atari.Args(**plain), *batch)[0]
    assert torch.equal(my_loss.minibatch_loss(agent, my_loss.Args(**plain), *batch)[0], ours)
    only = {"alpha": 0.0, "beta": 0.0, "vf_coef": 0.0, "ent_coef": 0.0, "norm_adv": False}
    loss = my_loss.minibatch_loss(agent, my_loss.Args(**only, spo_coef=1.0), *batch)[0].item()
    r = 2.718281828459045**0.05
    expected = -sum(a * r - abs(a) * (r - 1) ** 2 / (2 * 0.1) for a in advantages.tolist()) / 8
    assert loss == pytest.approx(expected, rel=1e-5)
