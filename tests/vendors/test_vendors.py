"""The strategies against the real libraries of their vendors, and the meters of a running server.

Those libraries live in environments of their own (see tests/support/environments.py): one has the newest versions, and
two the lowest that are supported. Each file ``vendor_*.py`` runs once with the newest versions and once with the
lowest; each of its tests is a test here, and what its events say must be what the meters of a server read.
"""

import ast
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import msgspec
import pytest

from tests.support.environments import environment
from tests.support.servers.installation import Installation, started
from tests.vendors.vendor_fixtures import SERVER, TALLY, TOKEN, VERSIONS

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
FILES = sorted(HERE.glob("vendor_*.py"))
VENDORS = [path for path in FILES if path.stem != "vendor_fixtures"]
SETS = {"newest": "requirements.txt", "lowest": "requirements-lowest.txt"}
PYDANTIC_AI = "vendor_pydantic_ai"
LOWEST_PYDANTIC_AI = "requirements-lowest-pydantic-ai.txt"  # needs newer clients than the lowest of the others
RUNS = [(path, versions) for versions in SETS for path in VENDORS]
FILE_S_MAX = 300  # importing them all takes ten on a machine that does nothing else
TIME_LIMIT = pytest.mark.timeout(1200)  # the first test may have to install everything
PERIOD = {"start_timestamp": "2023-01-01T00:00:00Z", "end_timestamp": "2030-12-31T00:00:00Z", "interval": "year"}


def names_in(path: Path) -> Iterator[str]:
    """The names of a file's tests."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name


class Runs:
    """Every file's run: what each test came to, and the tally of its events."""

    def __init__(self, installation: Installation, folder: Path) -> None:
        self.installation = installation
        self._folder = folder
        self._pool = ThreadPoolExecutor(2)
        self._runs: dict[tuple[str, str], Future[str]] = {
            (path.stem, versions): self._pool.submit(self._run, path, versions, interpreter(path, versions))
            for path, versions in RUNS
        }

    def _run(self, path: Path, versions: str, python: Path) -> str:
        tally = str(self.tally_of(path.stem, versions))
        environment = {
            "HOME": str(self._folder), "PYTHONPATH": str(REPOSITORY),
            SERVER: self.installation.url, TOKEN: self.installation.token, TALLY: tally, VERSIONS: versions,
        }  # fmt: skip
        options = ("-q", "-c", HERE / "vendors.ini", "--junitxml", self._report(path.stem, versions))
        done = subprocess.run(
            [python, "-m", "pytest", *options, path], cwd=REPOSITORY, env=environment,
            capture_output=True, text=True, timeout=FILE_S_MAX, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def _report(self, stem: str, versions: str) -> Path:
        return self._folder / f"{stem}-{versions}.xml"

    def tally_of(self, stem: str, versions: str) -> Path:
        """Where a run's tally is."""
        return self._folder / f"{stem}-{versions}.json"

    def failures(self, stem: str, versions: str, test: str) -> list[str]:
        """What is wrong with a test; it must have run, but for what the lowest versions do not have yet."""
        printed = self._runs[stem, versions].result()
        report = self._report(stem, versions)
        assert report.exists(), printed
        cases = [case for case in ElementTree.parse(report).iter("testcase")  # noqa: S314 (our own file)
                 if case.get("name", "").partition("[")[0] == test]  # fmt: skip
        assert cases, printed
        wrong = ("failure", "error") if versions == "lowest" else ("failure", "error", "skipped")
        return [told.text or "" for case in cases for told in case if told.tag in wrong]

    def tally(self, stem: str, versions: str) -> dict[str, str]:
        """What the meters must read: a total for each ``name key``."""
        printed = self._runs[stem, versions].result()
        assert self.tally_of(stem, versions).exists(), printed
        told: dict[str, str] = msgspec.json.decode(self.tally_of(stem, versions).read_bytes())
        return told

    def close(self) -> None:
        """Wait for what still runs."""
        self._pool.shutdown()


def interpreter(path: Path, versions: str) -> Path:
    """The Python that has the libraries for a file's tests in these versions."""
    if versions == "lowest" and path.stem == PYDANTIC_AI:
        return environment("strategies-lowest-pydantic-ai", HERE / LOWEST_PYDANTIC_AI)
    return environment(f"strategies-{versions}", HERE / SETS[versions])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All runs, two at a time."""
    folder = tmp_path_factory.mktemp("strategies")
    with started(folder) as installation, contextlib.closing(Runs(installation, folder)) as all_runs:
        yield all_runs


@TIME_LIMIT
@pytest.mark.parametrize(
    ("stem", "versions", "test"),
    [(path.stem, versions, test) for path, versions in RUNS for test in names_in(path)],
)
def test_with_the_real_library(runs: Runs, stem: str, versions: str, test: str) -> None:
    """What a test with a vendor's own library states is true."""
    assert runs.failures(stem, versions, test) == []


def meter_reading(http: httpx.Client, name: str, key: str) -> Decimal:
    """What a new meter reads."""
    aggregation: dict[str, Any] = {"func": "count"} if key == "count" else {"func": "sum", "property": key}
    clause = {"property": "name", "operator": "eq", "value": name}
    meter = {"name": f"{name} {key}", "aggregation": aggregation, "filter": {"conjunction": "and", "clauses": [clause]}}
    made = http.post("/v1/meters/", json=meter)
    assert made.status_code == 201, made.text
    read = http.get(f"/v1/meters/{made.json()['id']}/quantities", params=PERIOD)
    assert read.status_code == 200, read.text
    return Decimal(msgspec.json.decode(read.content, type=_Quantities).total)


class _Quantities(msgspec.Struct):
    total: Decimal


@TIME_LIMIT
@pytest.mark.parametrize(("stem", "versions"), [(path.stem, versions) for path, versions in RUNS])
def test_the_meters_read_what_the_strategies_told(runs: Runs, stem: str, versions: str) -> None:
    """Every event arrived, once, and every sum is the one of what was captured, to the last decimal."""
    told = {name: Decimal(total) for name, total in runs.tally(stem, versions).items()}
    assert told
    head = {"Authorization": f"Bearer {runs.installation.token}"}
    with httpx.Client(base_url=runs.installation.url, headers=head, timeout=60) as http:
        last = http.post("/v1/events/ingest", json={"events": [{"name": "last", "external_customer_id": "nobody"}]})
        http.headers.update({"Log-Position": last.headers["Log-Position"], "Prefer": "wait=20"})
        assert {f"{name} {key}": meter_reading(http, name, key) for name, key in map(str.split, told)} == told


def test_nothing_but_the_vendors_own_library_is_imported() -> None:
    """Importing a strategy loads no vendor's library and nothing of the server."""
    script = (
        "import sys, pkgutil, ingest.client.strategies as all\n"
        "for m in pkgutil.iter_modules(all.__path__): __import__(f'ingest.client.strategies.{m.name}')\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    unwelcome = {"openai", "anthropic", "google", "litellm", "langchain_core", "pydantic_ai", "opentelemetry", "boto3",
                 "botocore", "aiobotocore", "genai_prices", "duckdb", "pyarrow", "fastapi", "starlette", "pydantic",
                 "uvicorn", "aggregator", "deploy"}  # fmt: skip
    assert unwelcome & set(done.stdout.split()) == set()
