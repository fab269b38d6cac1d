"""Two checkouts side by side in a scratch directory, each able to import its own modules alone.

"Here" is a copy of the working tree, "base" is a git worktree of a commit. Each has an environment of its own. It takes
the libraries of the running Python, or installs its own where ``requirements.lock`` differs.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("meters", "ingest", "aggregator", "deploy", "benchmarks", "tests")
LOCK = "requirements.lock"
TURNS = "benchmarks/turns.py"
COMPILED = "\n@kernel("  # a module with compiled loops, wherever it lies

# Print where Python finds each package: in one folder, or in several if there is no __init__.py.
_PROBE = """
import importlib.util, json, sys
found = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}
print(json.dumps({name: list(spec.submodule_search_locations or ()) for name, spec in found.items() if spec}))
"""


class FailedError(Exception):
    """The comparison cannot go on. Carries the exit code."""

    def __init__(self, what: str, code: int = 2) -> None:
        super().__init__(what)
        self.code = code


@dataclass(frozen=True)
class Checkout:
    """Files of one side, the Python that imports them and nothing of the other side, and a directory to work in."""

    name: str
    root: Path
    python: Path
    work: Path


@contextlib.contextmanager
def checkouts(repository: Path, commit: str) -> Iterator[tuple[Checkout, Checkout]]:
    """Base and here in a scratch directory, each able to import its own modules alone. Raises FailedError."""
    known = _git(repository, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if known.returncode:
        raise FailedError(f"{commit} is no commit of this repository")
    with tempfile.TemporaryDirectory(prefix="meterstream-compare-", ignore_cleanup_errors=True) as name:
        scratch = Path(name).resolve()
        base, here = scratch / "base", scratch / "here"
        try:
            added = _git(repository, "worktree", "add", "--quiet", "--detach", str(base), known.stdout.strip())
            if added.returncode:
                raise FailedError(f"git made no worktree of {commit}: {added.stderr.strip()}")
            _copy(repository, here)
            if not (base / TURNS).exists():
                shutil.copy(here / TURNS, base / TURNS)
            yield _checkout(repository, base), _checkout(repository, here)
        finally:
            _git(repository, "worktree", "remove", "--force", str(base))


def _git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _copy(repository: Path, to: Path) -> None:
    """Copy the working tree as it is, without what git ignores."""
    listed = _git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    for name in filter(None, listed.split("\0")):
        if (repository / name).is_file():  # neither deleted nor a submodule
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, to / name)


def _checkout(repository: Path, root: Path) -> Checkout:
    """Make the checkout's environment, check what it imports, and compile its loops. Raises FailedError."""
    folder, work = root.with_name(f"{root.name}-environment"), root.with_name(f"{root.name}-work")
    work.mkdir()
    venv.EnvBuilder(symlinks=True).create(folder)
    python = folder / "bin" / "python"
    paths = [str(root)]
    if _locked(root) == _locked(repository):
        paths.append(sysconfig.get_path("purelib"))  # a path of a .pth file brings no .pth files of its own along
    else:
        _install(python, root / LOCK)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "checkout.pth").write_text("\n".join(paths) + "\n")
    checkout = Checkout(root.name, root, python, work)
    own_modules(checkout)
    _compile(checkout)
    return checkout


def _locked(root: Path) -> bytes:
    return (root / LOCK).read_bytes() if (root / LOCK).exists() else b""


def _install(python: Path, lock: Path) -> None:
    print(f"{LOCK} differs: installing that of {lock.parent.name}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
    done = subprocess.run([*command, "--require-hashes", "--no-deps", "-r", str(lock)], check=False)
    if done.returncode:
        raise FailedError(f"the dependencies of {lock.parent.name} could not be installed")


def own_modules(checkout: Checkout) -> None:
    """Raise FailedError if the checkout's Python, or a server that it starts, would import modules from elsewhere."""
    command = [str(checkout.python), "-c", _PROBE, *PACKAGES]
    done = subprocess.run(command, cwd=checkout.work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError(f"{checkout.name}: {done.stderr.strip()[-500:]}")
    for package, places in json.loads(done.stdout).items():
        if strange := [place for place in places if Path(place).resolve() != checkout.root / package]:
            raise FailedError(f"{checkout.name} would import {package} from {strange[0]}; is PYTHONPATH set?")


def _compile(checkout: Checkout) -> None:
    """Import each module with compiled loops once: the first import takes seconds and would disturb the first turns."""
    paths = (path for package in PACKAGES for path in (checkout.root / package).rglob("*.py"))
    loops = [path.relative_to(checkout.root) for path in paths if COMPILED in path.read_text(encoding="utf-8")]
    imports = "; ".join(f"import {'.'.join(path.with_suffix('').parts)}" for path in loops)
    subprocess.run([str(checkout.python), "-c", imports], cwd=checkout.work, capture_output=True, check=False)
