"""What a run was made with: interpreter, machine, package versions, and the state of the code."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "ray", "mlflow", "pydantic", "numpy", "tokenizers", "safetensors", "transformers")
"""Packages whose version can change what a run computes or records."""

PROJECT = Path(__file__).parents[1]

_GIT_TIMEOUT_S = 10


@dataclass(frozen=True)
class GitState:
    """The commit that the code was at."""

    commit: str
    branch: str
    dirty: bool
    """Whether files that git knows differ from the commit."""


def git_state(project: Path = PROJECT) -> GitState | None:
    """The state of the project's own repository; None where there is none (a wheel, the copy that a Ray job has)."""
    if not (project / ".git").exists():
        return None
    try:
        commit = _git(project, "rev-parse", "HEAD")
        branch = _git(project, "rev-parse", "--abbrev-ref", "HEAD")
        changes = _git(project, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        # No git program, a repository without a commit, or one that belongs to another user.
        return None
    return GitState(commit, branch, bool(changes))


def environment() -> dict[str, Any]:
    """Everything about this process that a reader of the run may want to know, ready for JSON."""
    git = git_state()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "packages": _versions(),
        "git": {"commit": git.commit, "branch": git.branch, "dirty": git.dirty} if git else None,
        "command": sys.argv,
    }


def cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _git(project: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=project, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S
    )
    return done.stdout.strip()
