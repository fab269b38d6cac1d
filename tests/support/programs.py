"""Programs of other people that a test needs: a linter from the environment, a server from the system."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def program(name: str, package: str) -> str:
    """Where the program is. Without it the test skips and says what to install; in CI that would hide a gap."""
    beside_python = Path(sys.executable).with_name(name)  # what the lock installs
    found = str(beside_python) if beside_python.exists() else shutil.which(name, path=f"{os.defpath}:/usr/sbin")
    if found is None:
        reason = f"{name} is not installed (package {package})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def assert_succeeds(*command: str | Path, cwd: Path | None = None) -> None:
    """The program ends with 0; what it said is the reason otherwise."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
