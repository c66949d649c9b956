"""mkdocs' hook: README.md is the first page; links out of docs/ lead to the repository, and pictures there are copied."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^()\s:#]+)(#[^()\s]*)?\)")


def on_files(files, config):
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for picture in sorted(set(re.findall(r"\(\.\./(\S+\.png)\)", pages))):
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    folder = ROOT if page.file.src_uri == "index.md" else ROOT / "docs"
    repository = config.repo_url.rstrip("/")

    def rewrite(link):
        target, anchor = link[1], link[2] or ""
        path = Path(os.path.normpath(folder / target))
        if path == ROOT / "README.md":
            return f"](index.md{anchor})"
        if path.is_relative_to(ROOT / "docs") and path.suffix != ".ipynb":
            return f"]({path.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        if path.suffix == ".png":
            return f"]({path.relative_to(ROOT).as_posix()})"
        if target.startswith("../../actions"):  # a page of the repository's host
            return f"]({repository}/{target.removeprefix('../../')})"
        return f"]({repository}/{'tree' if path.is_dir() else 'blob'}/main/{path.relative_to(ROOT).as_posix()}{anchor})"

    parts = re.split(r"(?ms)(^```.*?^```$)", markdown)  # blocks of code stay as they are
    return "".join(part if i % 2 else LINK.sub(rewrite, part) for i, part in enumerate(parts))
