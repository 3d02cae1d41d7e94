"""The checkout that the package lies in, as git knows it."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit that the package's own checkout is at."""
    return _git("rev-parse", "HEAD")


def is_dirty() -> bool:
    """Whether files that belong to the commit have changed."""
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str | None:
    """The output of git for the package's own checkout; None outside a checkout or without git."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
