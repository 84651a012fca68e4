"""Marks that skip a test where it has no right to make namespaces of the kernel."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def may(*command: str) -> bool:
    """Whether a command of unshare is permitted here."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run(
            ["unshare", *command, "true"], capture_output=True, check=False
        ).returncode
        == 0
    )


needs_pid_namespaces = pytest.mark.skipif(
    not may("--pid", "--fork"), reason="no right to make a PID namespace"
)
needs_mounts = pytest.mark.skipif(
    not may("--mount"), reason="no right to make a mount namespace"
)
