"""Virtual environments for clients that cannot live together with each other, or with this product's dependencies.

Each is made once, from a pinned list with hashes, in the user's cache; a changed list makes a new one.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

SDK = Path(__file__).resolve().parent.parent / "sdk"  # the scripts for Polar's clients, and what they require
CACHE = Path.home() / ".cache" / "meterstream-tests"
INSTALL_S_MAX = 500  # seconds; it takes ten where the packages are near
READ_S_MAX = 100


def interpreter(version: str) -> Path:
    """A Python that has this version of polar-sdk."""
    return environment(f"polar-sdk-{version}", SDK / f"requirements-{version}.txt")


def reported(version: str, script: str, asked: object) -> Any:
    """What a script of tests/sdk makes, by this version of polar-sdk, of what it is asked."""
    done = subprocess.run(
        [interpreter(version), SDK / script], input=json.dumps(asked),
        capture_output=True, text=True, check=False, timeout=READ_S_MAX,
    )  # fmt: skip
    assert done.stderr == ""
    return json.loads(done.stdout)


def environment(name: str, requirements: Path) -> Path:
    """A Python that has what a list requires. Skips the test where it cannot be installed, and fails it in CI."""
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    home = CACHE / f"{name}-{digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another session may be making the same one
        complete = home / "complete"
        if not complete.exists():
            _make(home, requirements)
            complete.touch()
    return home / "bin" / "python"


def _make(home: Path, requirements: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, symlinks=True)
    # The list names all there is: left to look for itself, pip takes the newest of what is wanted with an extra.
    command = [sys.executable, "-m", "pip", "--python", str(home), "install", "--quiet",
               "--disable-pip-version-check", "--require-hashes", "--no-deps", "-r", str(requirements)]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S_MAX, check=False)
        reason = done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"no answer within {INSTALL_S_MAX} seconds"
    if reason:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up(f"{requirements.stem} cannot be installed: {reason.strip()[-300:]}")
