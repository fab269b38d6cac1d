"""What a command says beside its answer, and of a request that was refused."""

import csv
import io

import httpx
import pytest

from deploy.client import refused
from tests.support.servers.installation import Installation


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (429, "this token's requests are limited; there is room again in 7 s"),
        (503, "the server is busy or still starting; try again in 7 s"),
    ],
)
def test_whoever_asks_too_often_is_told_so(status: int, said: str) -> None:
    """A token's limit is no matter of how busy the server is."""
    assert str(refused(httpx.Response(status, headers={"Retry-After": "7"}))) == said


@pytest.mark.parametrize(
    ("filter", "missing"),
    [
        ('{"conjunction":"and"}', "clauses"),
        ('{"conjunction":"and","clauses":[{"property":"name","value":"a"}]}', "clauses.0.operator"),
    ],
)
def test_what_a_filter_lacks_is_named(running: Installation, filter: str, missing: str) -> None:
    """The option alone does not say which of its parts is required."""
    done = running.run("meters", "create", "--name", "lacking", "--count", "--filter", filter)

    assert done.returncode == 2
    assert f"--filter or --where: {missing}: Field required" in done.stderr


def test_usage_as_csv_has_its_total_beside_it(running: Installation) -> None:
    """The rows stay rows; the total and the position they are true for are notes."""
    running.answer("meters", "create", "--name", "totalled", "--count")

    done = running.run("usage", "totalled", "--output", "csv")

    assert done.stderr.startswith("Total 0, as of log position ")
    assert next(csv.reader(io.StringIO(done.stdout))) == ["timestamp", "quantity"]
