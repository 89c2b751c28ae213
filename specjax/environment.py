"""What a result depends on beside its config: versions, the machine, the source's commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """What a result depends on beside its config."""
    return {
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "specjax")},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        **_revision(),
    }


def _revision() -> dict[str, Any]:
    """This source's commit, and whether files differ from it. Installed as a wheel there is none."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        top = git("rev-parse", "--show-toplevel")
    except OSError:  # no git on this machine
        top = ""
    if not top or Path(top).resolve() != root.resolve():  # not a surrounding repository's
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": git("rev-parse", "HEAD") or None, "git_dirty": bool(git("status", "--porcelain"))}
