"""benchmark/speed.py's table of all suites, from numbers that were made up."""

import json
import sys

from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import speed


def test_all_suites_in_one_table(tmp_path):
    about = {"commit": "a" * 40 + "-dirty"}
    rates = {"Stable-Baselines3": [100.0, 90.0, 130.0], "PPO (α 1, β 0)": [150.0, 250.0, 200.0], "SPPO (α 0.5, β 10)": [150.0]}
    phases = {"update, symmetric / plain": 0.99}
    content = {**about, "steps_per_second": rates, "peak_mib": dict.fromkeys(rates, 1234.4), "phases": phases}
    (tmp_path / "speed_atari-ppo.json").write_text(json.dumps(content))
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
    (tmp_path / "speed_imdb.json").write_text(json.dumps(content))
    assert speed.combine(tmp_path)[2:] == [
        "| sppo_atari.py | Stable-Baselines3 | 100 steps/s | 1.00 x | 1,234 MiB |  | aaaaaaaaaaaa-dirty |",
        "| sppo_atari.py | PPO (α 1, β 0) | 200 steps/s | 2.00 x | 1,234 MiB |  | aaaaaaaaaaaa-dirty |",
        "| sppo_atari.py | SPPO (α 0.5, β 10) | 150 steps/s | 1.50 x | 1,234 MiB | 0.990 | aaaaaaaaaaaa-dirty |",
        "| sppo_rlhf_imdb.py | loop | 10.0 s an iteration | 1.00 x | 10 MiB |  | aaaaaaaaaaaa-dirty |",
        "| sppo_rlhf_imdb.py | SPPO (α 0.5, β 0.4) | 5.0 s an iteration | 2.00 x | 9 MiB | 1.100 | aaaaaaaaaaaa-dirty |",
    ]
