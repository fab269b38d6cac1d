"""The demonstration's auditor finds what differs, and the trace is what its rule says."""

from decimal import Decimal
from itertools import islice
from pathlib import Path

import pytest

from deploy.demo import (
    CUSTOMERS,
    Figures,
    compare,
    conclude,
    customers,
    event,
    find_trace,
    make_trace,
    read_trace,
    recount,
)
from deploy.errors import MISMATCH, USAGE, GiveUp
from tests.support.servers.installation import meterstream

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:59:59.9999999,396,109
2023-11-16 19:00:00.0000000,879,55
"""


def trace_file(tmp_path: Path) -> Path:
    """Three rows on disk."""
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_a_recount_adds_up(tmp_path: Path) -> None:
    """Three rows by hand: tokens, requests, hours and an exact cost."""
    figures = recount(trace_file(tmp_path), None)

    assert figures.requests == 3
    assert figures.tokens == 374 + 44 + 396 + 109 + 879 + 55
    assert figures.tokens_by_hour == {"2023-11-16T18": 923, "2023-11-16T19": 934}
    assert figures.cost_cents == Decimal("0.62025")
    assert sum(figures.tokens_by_customer.values()) == figures.tokens


def test_rows_can_be_limited(tmp_path: Path) -> None:
    """The recount and the reader take the same first rows."""
    path = trace_file(tmp_path)

    assert recount(path, 2).requests == len(list(read_trace(path, 2))) == 2


def test_equal_figures_conclude(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing differs the demonstration says how much it compared."""
    figures = recount(trace_file(tmp_path), None)

    conclude(figures, figures)

    assert "All " in capsys.readouterr().out


@pytest.mark.parametrize("planted", ["requests", "cost_cents", "tokens_by_customer", "requests_by_hour"])
def test_a_planted_mismatch_ends_with_exit_code_3(
    tmp_path: Path, planted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One figure off by the smallest amount is found, named and ends with exit code 3."""
    true, false = recount(trace_file(tmp_path), None), recount(trace_file(tmp_path), None)
    value = getattr(false, planted)
    if isinstance(value, Decimal):
        setattr(false, planted, value + Decimal("1e-12"))
    else:
        value[next(iter(value))] += 1

    with pytest.raises(GiveUp) as raised:
        conclude(false, true)

    assert raised.value.exit_code == MISMATCH
    assert planted in capsys.readouterr().err


def test_what_only_one_side_has_is_a_difference() -> None:
    """A customer that one side lacks counts as zero there."""
    compared, differences = compare(Figures(tokens_by_customer={"ada": Decimal(1)}), Figures())

    assert compared == 5
    assert differences == ["tokens_by_customer of ada: the pipeline says 1, the trace adds up to 0"]


def test_the_spread_is_a_rule() -> None:
    """The same requests go to the same customers every time, most of them to the first."""
    first, again = (list(islice(customers(), 5000)) for _ in range(2))

    assert first == again
    assert len(set(first)) <= CUSTOMERS
    assert max(set(first), key=first.count) == "customer-001"


def test_a_generated_trace_is_one(tmp_path: Path) -> None:
    """The stand-in has the shape of the real trace and makes events that carry exact costs."""
    path = tmp_path / "made.csv"
    make_trace(path, rows=50)

    requests = list(read_trace(path, None))

    assert len(requests) == 50
    assert requests == sorted(requests)
    assert b'"_cost":{"amount":' in event(requests[0], "made").event


def test_a_copy_of_the_trace_is_found_beside_the_repository(tmp_path: Path) -> None:
    """A data folder next to the repository, or in it, is where the trace is looked for."""
    repository = tmp_path / "repository"
    copy = tmp_path / "elsewhere" / "data" / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv"
    repository.mkdir()

    assert find_trace(repository) is None
    copy.parent.mkdir(parents=True)
    copy.write_text(TRACE)
    assert find_trace(repository) == copy


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    """A CSV file without the trace's columns is wrong usage, and says which it should have."""
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")

    with pytest.raises(GiveUp, match="TIMESTAMP, ContextTokens, GeneratedTokens"):
        list(read_trace(path, None))


def trace_of(tmp_path: Path, *rows: str) -> Path:
    """A trace with these rows."""
    (path := tmp_path / "given.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    return path


def test_times_may_say_their_offset(tmp_path: Path) -> None:
    """The reader and the recount take them for the same moments, in UTC."""
    path = trace_of(tmp_path, "2023-11-16T20:15:46.6805900+02:00,1,1", "2023-11-16T18:30:00Z,1,1")

    times = [f"{request.timestamp:%H:%M:%S.%f%z}" for request in read_trace(path, None)]

    assert times == ["18:15:46.680590+0000", "18:30:00.000000+0000"]
    assert recount(path, None).requests_by_hour == {"2023-11-16T18": 2}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("2023-11-16 18:15:46,1", "the row has no cell for GeneratedTokens"),
        ("2023-11-16 18:15:46,1,x", "GeneratedTokens is 'x', and should be a whole number of tokens"),
        ("2023-11-16 18:15:46,-1,1", "ContextTokens is '-1', and should be a whole number of tokens"),
        ("yesterday,1,1", "Invalid isoformat string: 'yesterday'"),
        ("0001-01-01T00:00:00+14:00,1,1", "date value out of range"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, row: str, complaint: str) -> None:
    """It is wrong usage, with the line of the file."""
    path = trace_of(tmp_path, "2023-11-16 18:15:45,1,1", "", row)

    with pytest.raises(GiveUp, match=f"line 4, cannot be read as a trace: {complaint}") as raised:
        list(read_trace(path, None))

    assert raised.value.exit_code == USAGE


@pytest.mark.parametrize(
    ("first", "way"),
    [("2023-11-08", "shown for 7 days; take its first rows"), ("2022-12-31", "shown from 2023-01-01 to")],
)
def test_a_trace_that_cannot_be_shown_is_refused_first(tmp_path: Path, first: str, way: str) -> None:
    """Nothing is sent of one whose hours the API would not show, and no server is started."""
    path = trace_of(tmp_path, "2023-11-16 18:15:45,1,1", f"{first} 18:15:45,1,1")

    done = meterstream("demo", "--trace", str(path))

    assert (done.returncode, done.stdout) == (USAGE, "")
    assert f"the trace goes from {first} to 2023-11-16" in done.stderr
    assert way in done.stderr
    assert "Priced at" not in done.stderr


def test_a_row_that_the_server_refuses_is_named(tmp_path: Path) -> None:
    """It is what the trace says that is wrong, and not one of two ways to count."""
    path = trace_of(tmp_path, "2023-11-16 18:15:45,1,1", f"2023-11-16 18:15:46,{'9' * 30},1")

    done = meterstream("demo", "--trace", str(path))

    assert done.returncode == 1
    assert "line 3: metadata.tokens: Number should have at most" in done.stderr
    assert "Problem(" not in done.stderr
