"""The commit that a study measured."""

import subprocess
from pathlib import Path


def git_commit() -> str:
    """The commit of this checkout, followed by "-dirty" if files other than results differ; "unknown" outside a checkout."""

    def git(*command):
        command = ["git", "-c", "safe.directory=*", *command]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    # the results of one suite are written before the next one is measured
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmark/results")
    return (git("rev-parse", "HEAD") or "unknown") + "-dirty" * bool(changed)
