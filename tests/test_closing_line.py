"""What a run of the tests prints last."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A test that uses Hypothesis, beside DuckDB.
TEST = "tests/aggregator/decode/test_identities.py::test_repeats_name_the_first_row_of_an_identity"


def test_the_summary_is_the_last_line() -> None:
    """Nothing follows it, not even what libraries print when Python ends."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TEST]
    ended = subprocess.run(
        command, cwd=ROOT, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100
    )
    assert ended.returncode == 0, ended.stdout
    assert re.fullmatch(r"1 passed in [\d.]+s.*", ended.stdout.rstrip("\n").rpartition("\n")[2]), ended.stdout
