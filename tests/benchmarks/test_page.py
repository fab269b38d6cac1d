"""The benchmarks' page agrees with the results that lie beside it."""

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as every
from benchmarks import goals
from benchmarks.goals import GOALS, Goal, kept, of
from benchmarks.page import filled, results, tables

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
RESULTS = {name: result for name, result in results(FOLDER / "results").items() if name in tables(PAGE)}

RESULT = {
    "benchmark": "speed", "checks": {},
    "environment": {"command": "python -m benchmarks.speed", "commit": "abc", "load": 0.1},
    "rows": [{"who": "we", "rate": 1234567.8, "count": 3}, {"who": "they", "rate": 0.001234}],
}  # fmt: skip


def test_the_tables_are_those_of_the_results() -> None:
    """Making the page again changes nothing: no number on it was typed or left over from another run."""
    assert filled(PAGE, RESULTS) == PAGE


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_a_result_tells_where_it_comes_from_and_that_its_numbers_hold(name: str) -> None:
    """Each result has the machine, the versions, the commit and the command, and none of its checks failed."""
    where = RESULTS[name]["environment"]

    assert {"cpus", "machine", "kernel", "python", "libraries", "commit", "command"} <= set(where)
    assert [what for what, right in RESULTS[name]["checks"].items() if not right] == []


@pytest.mark.parametrize("name", every.FULL)
def test_every_benchmark_loads(name: str) -> None:
    """A benchmark that is run once a week still finds what it takes from the others."""
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


def test_every_plot_is_there_and_shown() -> None:
    """The page shows every plot beside the results, and no other."""
    shown = set(re.findall(r"\]\(results/([a-z_]+\.svg)\)", PAGE))

    assert shown == {path.name for path in (FOLDER / "results").glob("*.svg")}


def test_a_table_has_the_columns_that_are_wanted_and_the_rows_that_have_them() -> None:
    """Names stay left, numbers go right with as many digits as say something; a row that lacks a column is left out."""
    text = "before\n<!-- table speed: who, rate, count -->\nold\n<!-- end -->\nafter"

    assert filled(text, {"speed": RESULT}) == (
        "before\n<!-- table speed: who, rate, count -->\n| who | rate | count |\n| --- | ---: | ---: |\n"
        "| we | 1,234,568 | 3 |\n\n`python -m benchmarks.speed`, commit abc\n<!-- end -->\nafter"
    )
    assert "| they | 0.00123 |" in filled(text.replace(", count", ""), {"speed": RESULT})


def test_a_table_of_a_busy_machine_says_so() -> None:
    """Numbers measured beside other work carry a note."""
    busy = json.loads(json.dumps(RESULT))
    busy["environment"]["load"] = 3.2

    assert "other work kept 3.2 processes busy" in filled("<!-- table speed: who -->\n<!-- end -->", {"speed": busy})


def test_a_table_says_what_the_host_kept() -> None:
    """A slow hour of a machine that shares its processors with others is told from slow code."""
    slow = json.loads(json.dumps(RESULT))
    slow["environment"]["stolen %"] = 37.5

    shown = filled("<!-- table speed: who -->\n<!-- end -->", {"speed": slow})

    assert "the host kept 37.5 % of the processors' time" in shown


def test_a_table_of_another_machine_or_day_says_so() -> None:
    """Numbers of other hardware are not taken for those of the machine that the page describes."""
    here = {"cpus": 2, "cpu": "Xeon", "memory GiB": 24, "kernel": "6", "python": "3", "libraries": {},
            "at": "2026-11-22 13:12 UTC", "command": "c", "commit": "abc"}
    other = here | {"cpu": "EPYC", "at": "2026-11-21 09:00 UTC"}
    page = "<!-- machine slow -->\n<!-- end -->\n<!-- table speed: who -->\n<!-- end -->"

    def origin(where: dict[str, object]) -> str:
        found = filled(page, {"slow": {"environment": here}, "speed": RESULT | {"environment": where}})
        return found.splitlines()[-2]

    assert origin(other) == "`c`, commit abc; EPYC; 2026-11-21"
    assert origin(here | {"at": "2026-11-22 23:00 UTC"}) == "`c`, commit abc"


def test_rows_that_look_alike_stand_once() -> None:
    """A figure of a whole run that each of its rows carries is one line of a table of its own."""
    twice = RESULT | {"rows": [{"who": "we", "rate": 1.0}, {"who": "we", "rate": 2.0}]}

    assert filled("<!-- table speed: who -->\n<!-- end -->", {"speed": twice}).count("| we |") == 1


def test_a_goal_of_a_long_run_takes_no_shorter_one_for_it() -> None:
    """A million events reconciled say nothing about ten million, nor a short history about a long one."""
    short = {"reconcile": {"rows": [{"log": 1_000_000, "wall s": 6.0, "peak MB": 100.0}]}}

    found = {row["goal"]: row["reached"] for row in goals.rows(short)}

    assert set(found.values()) == {"not measured"}


def test_a_speed_is_kept_when_it_is_that_of_the_best_shorter_run() -> None:
    """A first run that was slow by chance makes no later one look fast; one run alone says nothing."""
    rows = [{"speed": 40.0}, {"speed": 100.0}, {"speed": 50.0}]

    assert kept("speed")(rows) == 0.5
    with pytest.raises(IndexError):
        kept("speed")(rows[:1])


@pytest.mark.parametrize(("events_a_second", "reached"), [(70_000, "no"), (99_000, "yes")])
def test_a_latency_at_a_load_that_was_not_carried_reaches_nothing(events_a_second: int, reached: str) -> None:
    """Fresh totals at two thirds of the load say nothing about all of it; the value is shown as it is."""
    row = {"phase": "at 100,000/s", "events/s": events_a_second, "fresh p99 ms": 150.0}

    (found,) = goals.rows({"freshness": {"rows": [row]}})

    assert (found["measured"], found["reached"]) == (150.0, reached)


@pytest.mark.parametrize(("seconds", "reached"), [(None, "no"), (30.0, "no"), (60.0, "yes")])
def test_a_speed_for_a_minute_takes_a_minute(seconds: float | None, reached: str) -> None:
    """A shorter run reaches nothing, however fast it was, and the title says how long it lasted if the run does."""
    row = {"phase": "full speed", "events/s": 300_000.0} | ({"seconds": seconds} if seconds else {})

    found, stall, *_ = goals.rows({"end_to_end": {"rows": [row]}})

    assert found["reached"] == reached
    assert found["goal"].endswith(f"; over {seconds:g} s" if seconds else "events/s")
    assert stall["reached"] == "not measured"


@pytest.mark.parametrize("table", ["table slow: who", "table speed: size"])
def test_what_is_not_there_is_an_error(table: str) -> None:
    """A result or a column with another name is not passed over."""
    with pytest.raises(KeyError):
        filled(f"<!-- {table} -->\n<!-- end -->", {"speed": RESULT})


@pytest.mark.parametrize(("found", "at_least", "reached"), [(9, False, True), (10, False, True), (11, False, False),
                                                            (9, True, False), (10, True, True), (11, True, True)])
def test_a_goal_is_reached_from_its_bound_on(found: float, at_least: bool, reached: bool) -> None:
    """A bound is the most or the least that is good enough."""
    assert Goal("speed", "speed", of("rate"), 10, at_least).reached(found) is reached


def test_every_goal_names_a_result_of_the_page() -> None:
    """No goal is left out of the table because of a name that nothing has."""
    assert {goal.result for goal in GOALS} <= set(RESULTS)
