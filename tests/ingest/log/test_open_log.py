"""Opening a log by its address."""

import subprocess
import sys

import pytest

from ingest.log import open_log


@pytest.mark.parametrize("url", ["redis://127.0.0.1:6379", "embedded:", "memory:elsewhere", "postgres:x"])
def test_an_unknown_url_says_what_is_known(url: str) -> None:
    """A URL of no known kind is an error that names the kinds there are."""
    with pytest.raises(ValueError, match="embedded:DIRECTORY, memory: or kafka:"):
        open_log(url)


def test_a_log_is_opened_without_anything_heavy() -> None:
    """A process that only appends loads neither the store nor the web framework, so that it starts at once."""
    program = "import sys, ingest.log; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.split()

    assert not {"duckdb", "pyarrow", "numpy", "fastapi", "pydantic", "httpx", "uvicorn"} & set(modules)
