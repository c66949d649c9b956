"""benchmark/'s scripts without what they need: --help is there, and one line names the command that installs it."""

import runpy
import sys

import pytest
from helpers import ROOT

SCRIPTS = sorted(path for path in (ROOT / "benchmark").rglob("*.py") if "@dataclass" in path.read_text())
# what is not in the scripts' own requirements.txt, and tyro, without which nobody knows the arguments
EXTRA = ("matplotlib", "stable_baselines3", "sklearn", "openai", "ray", "rliable", "optuna", "cv2", "sbx", "envpool")
EXTRA += ("wandb_workspaces",)  # not pandas: the RLHF scripts' own datasets needs it


def start(script, argv, missing, monkeypatch, capsys):
    """Exit status, stdout and stderr of the script with these modules missing."""
    for name in [name for name in sys.modules if name.split(".")[0] in missing]:
        monkeypatch.delitem(sys.modules, name)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # import raises ModuleNotFoundError
    monkeypatch.setattr(sys, "argv", [str(script), *argv])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    return stopped.value.code, *capsys.readouterr()


@pytest.mark.parametrize("missing", [EXTRA, ("tyro",)], ids=["extra", "tyro"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help_without_the_requirements(script, missing, monkeypatch, capsys):
    code, out, err = start(script, ["--help"], missing, monkeypatch, capsys)
    first = script.read_text().split('"""')[1].splitlines()[0]
    assert " ".join(first.split()[:4]) in " ".join(out.split()), out
    assert code in (0, 2) and (code == 0) == (err == "")
    if script.name in ("run.py", "report.py", "dashboard.py", "optuna_sweep.py"):
        assert code == 0
    if code:
        assert err.count("\n") == 1 and f"{script.name}: error: needs " in err and "`pip install -r benchmark/" in err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_without_the_requirements_one_line_says_so(script, monkeypatch, capsys):
    code, out, err = start(script, [], ("tyro", *EXTRA), monkeypatch, capsys)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"{script.name}: error: needs " in err and "`pip install -r benchmark/" in err


def test_run_without_ray_says_so_before_it_makes_anything(tmp_path, monkeypatch, capsys):
    argv = ["imdb", "--folder", str(tmp_path / "runs")]
    code, _, err = start(ROOT / "benchmark/run.py", argv, ("ray",), monkeypatch, capsys)
    assert (code, err) == (2, "run.py: error: needs ray; expected what `pip install -r benchmark/requirements.txt` installs\n")
    assert not (tmp_path / "runs").exists()
