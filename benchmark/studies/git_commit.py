"""The commit that a study measured."""

import subprocess
from pathlib import Path


def git_commit() -> str:
    """The commit of this checkout, followed by "-dirty" if files differ; "unknown" outside a checkout."""
    command = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return described.stdout.strip() or "unknown"
