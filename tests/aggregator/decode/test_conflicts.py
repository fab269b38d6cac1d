"""Lines under one identity, judged by columns, against the same lines judged one by one."""

import asyncio
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.decode.decode import decode
from aggregator.decode.dedup import CONFLICT, SAID, Effects, Tally, join, judge, nothing, step
from aggregator.decode.directory import Directory
from aggregator.decode.identities import Keys, Seen
from ingest.log import open_log
from meters.errors import LINES_MAX
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Record
from tests.support.records import (
    NOW,
    NOW_US,
    ORGANIZATION,
    OTHER_ORGANIZATION,
    Running,
    decisions,
    entry,
    line,
    organization,
    record,
    rows,
)

METADATA = [
    "{}", '{"a": 0.1}', '{"a":0.1}', '{"a": 0.10}', '{"a": "0.1"}', '{"a": 1}', '{"a": true}', '{"a": "\\u00e9"}',
    '{"a": "é"}', '{"a": 1, "b": 2}', '{"b": 2, "a": 1}', '{"b": 2, "a": 3, "a": 1}',
]  # fmt: skip
TIMES = ["2026-03-01T12:00:00Z", "2026-03-01T13:00:00+01:00", "2026-03-01T11:59:59.000001Z"]  # the first is NOW
fields = st.fixed_dictionaries(
    {"metadata": st.sampled_from(METADATA)},
    optional={
        "name": st.sampled_from(["call", "chat"]),
        "external_customer_id": st.sampled_from(["ann", "bob"]),
        "timestamp": st.sampled_from(TIMES),
        "parent_id": st.sampled_from(["p", "q"]),
        "external_member_id": st.just("m"),
        "unknown": st.integers(0, 1),
    },
)
owners = st.sampled_from([ORGANIZATION, OTHER_ORGANIZATION])
sent_lines = st.tuples(owners, st.builds(lambda id, of: line(id, **of), st.sampled_from(["x", "y"]), fields))


def meaning(raw: bytes) -> dict[str, Any]:
    """What a line says, its numbers as they were sent."""
    said: dict[str, Any] = json.loads(raw, parse_int=lambda token: (token,), parse_float=lambda token: (token,))
    said.pop("unknown", None)
    said["timestamp"] = datetime.fromisoformat(said["timestamp"]) if "timestamp" in said else None
    return said


def repeats(raw: bytes, first: bytes) -> bool:
    """Whether a line says what the first one of its identity said. Without a time it repeats any."""
    ours, theirs = meaning(raw), meaning(first)
    theirs["timestamp"] = ours["timestamp"] and (theirs["timestamp"] or NOW)
    return ours == theirs


def expected(sent: list[tuple[str, bytes]]) -> list[str]:
    """What becomes of each line, one by one."""
    firsts: dict[tuple[str, str], bytes] = {}
    became = []
    for owner, raw in sent:
        key = owner, json.loads(raw)["external_id"]
        is_new = key not in firsts
        first = firsts.setdefault(key, raw)
        became.append("stored" if is_new else "duplicates" if repeats(raw, first) else "conflicts")
    return became


class Rounds:
    """One round after another, with what the ones before it stored."""

    def __init__(self) -> None:
        self._directory, self._seen = Directory(), Seen()
        self._stored: dict[tuple[int, int], dict[str, Any]] = {}

    def run(self, records: list[Record]) -> Effects:
        """The next one."""
        batch = decode(records, self._directory)
        if not batch.chunks:
            return nothing(batch)
        table, keys = join(batch)
        judged = judge(table, keys, *self._seen.find(keys.hi, keys.lo))
        effects = step(batch, judged, self._asked(judged.stored_firsts))
        self._seen.add(effects.keys)
        self._stored |= {(row["id_hi"], row["id_lo"]): row for row in effects.rows.to_pylist()}
        return effects

    def _asked(self, keys: Keys) -> pa.Table:
        asked = [self._stored[key] for key in zip(keys.hi.tolist(), keys.lo.tolist(), strict=True)]
        return pa.table({name: [row[name] for row in asked] for name in SAID} if asked else {})


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(sent_lines, max_size=8), min_size=1, max_size=3))
def test_columns_tell_what_the_lines_tell_one_by_one(rounds: list[list[tuple[str, bytes]]]) -> None:
    """In one round or in several, of one organization or two: each line is stored, a repetition or a contradiction.

    A contradiction is kept with its place, its owner, its time and its bytes.
    """
    sent = [one for lines in rounds for one in lines]
    became = expected(sent)
    following, offset = Rounds(), 0
    for lines in rounds:
        here = range(offset, offset + len(lines))
        offset += len(lines)
        effects = following.run([record(sent[n][1], offset=n, organization_id=sent[n][0]) for n in here])

        conflicts = [n for n in here if became[n] == "conflicts"]
        contrary = [(0, n, 0, sent[n][0], CONFLICT, sent[n][1], NOW.replace(tzinfo=None)) for n in conflicts]
        assert [tuple(letter.values()) for letter in effects.dead.drop(["detail"]).to_pylist()] == contrary
        stored = effects.rows["log_offset"].to_pylist() if effects.rows.num_columns else []
        assert stored == [n for n in here if became[n] == "stored"]
        counts = {kind: sum(became[n] == kind for n in here) for kind in ("stored", "duplicates", "conflicts")}
        assert effects.tallies == ({0: Tally(**counts)} if lines else {})


def test_what_was_stored_before_is_compared_with_each_of_its_own(tmp_path: Path) -> None:
    """Events of an earlier life, asked of the store all at once and in another order; a store made anew is equal."""
    names = [f"n{number}" for number in range(200)]
    log = open_log("memory:")
    asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
    asyncio.run(log.append(USAGE_EVENTS, [entry(*(line(name, name=name) for name in names))]))
    with Running(log, tmp_path / "store.duckdb") as running:
        running.catch_up()
    again = [line(name, name=name if name[-1] in "02468" else "n0", unknown=1) for name in reversed(names)]
    asyncio.run(log.append(USAGE_EVENTS, [entry(*again, line("n0", name="n1"), line("new"))]))
    letters = []
    for store in ("store.duckdb", "anew.duckdb"):
        with Running(log, tmp_path / store) as running:
            engine = running.catch_up()
            assert engine.store.tallies() == {"stored": 201, "duplicates": 100, "conflicts": 101, "dead": 0}
            letters.append(rows(engine.store, "SELECT * FROM dead_letters ORDER BY number"))
    log.close()

    assert letters[0] == letters[1]
    assert [(row[0], row[3]) for row in letters[0]] == list(enumerate([*range(0, 200, 2), 200]))


def test_any_number_of_lines_may_contradict_a_large_one() -> None:
    """What they contradict is kept once, however many they are: copied for each of these it would be 25 GB."""
    large = "{" + ",".join(f'"k{number}":"{"x" * 400}"' for number in range(1_000)) + "}"
    contrary = [line("a", metadata=f'{{"n":{number}}}') for number in range(60_000)]
    effects = Rounds().run([record(line("a", metadata=large), *contrary)])

    assert effects.tallies == {0: Tally(stored=1, conflicts=60_000)}
    assert np.array_equal(effects.dead["line"].to_numpy(), np.arange(1, 60_001))
    assert effects.dead["detail"].unique().to_pylist() == [
        "external_id 'a' was taken before with other content; the first one counts"
    ]


@pytest.mark.parametrize(
    "value", [b"x\n" * LINES_MAX, b"\n" * LINES_MAX + line("a"), line("a") + b"\n" * LINES_MAX + line("b")]
)
@pytest.mark.parametrize("admitted", [True, False])
def test_a_record_of_more_lines_than_events_have_room_is_one_dead_letter(value: bytes, admitted: bool) -> None:
    """With all its bytes, whatever they are; what comes before and after it counts."""
    much = Record(0, 1, NOW_US, value, ORGANIZATION, admitted)
    effects = Rounds().run([record(line("c")), much, record(line("d"), offset=2)])

    assert effects.tallies == {0: Tally(stored=2, dead=1)}
    (letter,) = effects.dead.to_pylist()
    assert (letter["log_offset"], letter["line"], letter["reason"]) == (1, 0, "record_lines")
    assert letter["raw"] == value


def test_a_record_of_as_many_empty_lines_says_nothing() -> None:
    """A line without anything in it is none, so there is nothing to keep."""
    effects = Rounds().run([Record(0, 0, NOW_US, b"\n" * LINES_MAX, ORGANIZATION)])

    assert (effects.dead.num_rows, effects.tallies) == (0, {})


@pytest.mark.parametrize("admitted", [True, False])
def test_a_place_and_an_external_id_never_meet(admitted: bool) -> None:
    """An event may be called as the place of a line without an id; both count, in either order."""
    for named_first in (True, False):
        named, nameless = line("0:1:0"), line(None, metadata={"n": 1})
        sent = [record(named, offset=0), record(nameless, offset=1, admitted=admitted)]
        if not named_first:
            sent = [sent[1], record(named, offset=2)]
        following = Rounds()
        effects = [following.run([one]) for one in sent]
        assert [one.rows["external_id"].to_pylist() for one in effects] == [["0:1:0"], ["0:1:0"]]
        assert all(one.dead.num_rows == 0 for one in effects)


@pytest.mark.parametrize("admitted", [True, False])
def test_an_empty_external_id_is_none(admitted: bool) -> None:
    """Lines of other producers with an empty id are known by their places."""
    lines = [line("", metadata={"n": number}) for number in (1, 10, 100)]
    effects = Rounds().run([record(*lines, offset=7, admitted=admitted)])
    assert effects.rows["external_id"].to_pylist() == ["0:7:0", "0:7:1", "0:7:2"]
    assert effects.dead.num_rows == 0
