"""The habits of the field: one version, a Dockerfile that does what the README says, tests that train out of the normal run."""

import json
import re
import tomllib

import yaml
from helpers import ROOT


def test_the_version_is_that_of_the_newest_changes():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version, date = re.search(r"(?m)^## (\d+\.\d+\.\d+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text()).groups()
    assert citation["version"] == version
    assert f"{citation['date-released']:%-d %B %Y}" == date


def test_the_papers_pages_are_the_same_wherever_it_is_cited():
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    bibtex = (ROOT / "README.md").read_text().split("```bibtex")[1]
    assert f"volume = {{{paper['volume']}}}, pages = {{{paper['start']}--{paper['end']}}}" in bibtex


def test_the_dockerfile_takes_the_readmes_steps():
    lines, readme = (ROOT / "Dockerfile").read_text().splitlines(), (ROOT / "README.md").read_text()
    assert len(lines) <= 10
    (install,) = [line.removeprefix("RUN ") for line in lines if "pip install" in line]
    entry, command = (json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith(("ENTRYPOINT", "CMD")))
    for step in (install, " ".join([*entry, *command])):
        assert f"\n{step}\n" in readme
    (python,) = re.findall(r"FROM python:([\d.]+)-slim", "\n".join(lines))
    assert python in ("3.11", "3.12", "3.13")


def test_training_commands_stay_out_of_the_normal_run():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "-m 'not training'" in options["addopts"] and any(marker.startswith("training:") for marker in options["markers"])
