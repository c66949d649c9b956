"""benchmark/dashboard.py beside a stand-in for W&B's server: every metric is one that is logged, every colour ours."""

import json
import os
import re
import sys

import wandb_server
from helpers import ROOT, no_process_outlives_its_test, run  # noqa: F401

sys.path.insert(0, str(ROOT / "benchmark"))
import dashboard
from reporting.figures import ARM_COLOURS, CONTROL
from wandb_workspaces.workspaces._run_color_groups import parse_run_color_group_key

ENV = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}


def a_run(arm, env="Alien", **config):
    config = {"script": "sppo_atari.py", "env_id": env, "exp_name": arm, "seed": 1, "norm_adv": True} | config
    return {"id": f"{arm}{env}", "state": "finished", "config": config, "summary": {"score": 1.0}}


RUNS = [
    a_run("ppo_bsc", alpha=1.0, beta=0.0),
    a_run("ppo_raw", alpha=1.0, beta=0.0, norm_adv=False),
    a_run("sppo_a0.5_b10_bsc", alpha=0.5, beta=10.0),
    a_run("sppo_a0.5_b10_bsc", env="Krull", alpha=0.5, beta=10.0),
    a_run("dsppo_a0.5_b20", "Hopper-v4", script="dsppo_continuous.py", num_bins=11, alpha=0.5, beta=20.0),
    a_run("ppo_a10.5_bsc", alpha=10.5, beta=0.0),
    {"id": "other", "state": "running", "config": {"lr": 1}, "summary": {}},  # of another program
]


def test_the_view_that_is_sent(tmp_path):
    with wandb_server.serve(RUNS) as server:
        out, err = run("benchmark/dashboard.py", "me/rl", env=ENV | server.env | {"HOME": str(tmp_path)}, cwd=tmp_path)
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "rl", "Symmetric RL")
    assert out.strip().splitlines()[-1].startswith(f"{server.env['WANDB_BASE_URL']}/me/rl?nw=") and "Omitting" not in err
    spec = json.loads(view["spec"])["section"]
    sections = {one["name"]: one["panels"] for one in spec["panelBankConfig"]["sections"] if one["panels"]}
    shown = [panel["config"] for panels in sections.values() for panel in panels]
    metrics = [name for config in shown for name in config.get("metrics") or config["mediaKeys"]]
    assert sections.keys() == dashboard.SECTIONS.keys() and len(metrics) == sum(map(len, dashboard.SECTIONS.values()))

    # what the page names is what runs log: test_docs.py
    assert set(metrics) <= set(re.findall(r"`([a-z]+/\w+)`", (ROOT / "docs/metrics.md").read_text()))
    lines = [config for config in shown if "metrics" in config]
    assert all(one["xAxis"] == "global_step" and one["groupAgg"] == "mean" and one["groupArea"] == "stderr" for one in lines)

    colours = spec["customRunColors"]
    paths = {key: parse_run_color_group_key(key)["path"] for key in colours}
    found = {tuple(step["value"] for step in paths[key]): colour for key, colour in colours.items()}
    expected = {
        ("Alien", "ppo_bsc"): ARM_COLOURS["PPO"],
        ("Alien", "ppo_raw"): ARM_COLOURS["PPO raw"],
        ("Alien", "sppo_a0.5_b10_bsc"): ARM_COLOURS["SPPO"],
        ("Krull", "sppo_a0.5_b10_bsc"): ARM_COLOURS["SPPO"],
        ("Hopper-v4", "dsppo_a0.5_b20"): ARM_COLOURS["DSPPO"],
        ("Alien", "ppo_a10.5_bsc"): CONTROL,
    }
    assert found == expected


def test_a_dry_run_prints_the_panels_and_asks_nobody(tmp_path):
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:1", "HOME": str(tmp_path)}
    out, _ = run("benchmark/dashboard.py", "me/rl", "--dry-run", env=ENV | nobody, cwd=tmp_path)
    assert out.count("\n") == len(dashboard.SECTIONS) + sum(map(len, dashboard.SECTIONS.values()))
    assert "Returns\n  return over 100 games: charts/episodic_return_100\n" in out
    _, err = run("benchmark/dashboard.py", "rl", env=ENV | nobody, cwd=tmp_path, code=2)
    assert err == "dashboard.py: error: rl: expected ENTITY/PROJECT\n"
