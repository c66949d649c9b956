"""The site is built from README.md and docs/ without a warning, and the workflow that publishes it does the same."""

import re
import shlex

import yaml
from helpers import ROOT
from mkdocs.commands.build import build
from mkdocs.config import load_config


def test_the_site_is_built_without_a_warning_and_its_links_lead_somewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("REPO_URL", "https://host.example/us/it")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))  # strict: a wrong link or anchor ends it
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert {path.parent.name for path in tmp_path.glob("*/index.html")} == pages
    for page in ("index.html", *(f"{name}/index.html" for name in pages)):
        (article,) = re.findall(r"(?s)<article.*?</article>", (tmp_path / page).read_text())
        links = set(re.findall(r'(?:href|src)="([^"#]+)', article))
        for link in links:
            if link.startswith("https://host.example/us/it/"):
                kind, _, path = link.removeprefix("https://host.example/us/it/").partition("/main/")
                assert kind.startswith("actions/") or (ROOT / path).exists(), link
                assert kind.startswith("actions/") or (ROOT / path).is_dir() == (kind == "tree"), link
            elif not link.startswith("http"):
                assert (tmp_path / page).parent.joinpath(link).resolve().exists(), (page, link)
        assert not {link for link in links if ".md" in link and "host.example" not in link}
    assert "LICENSE" in str(re.findall('href="([^"]+)"', (tmp_path / "index.html").read_text()))
    assert "clip_grad_norm_" in (tmp_path / "search/search_index.json").read_text()


def test_the_workflow_builds_the_site_as_the_test_does():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text())["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["pip install -r docs/requirements.txt", "python -m mkdocs build --strict"]
    assert shlex.split(commands[0])[-1] in (ROOT / "tests/requirements.txt").read_text()
