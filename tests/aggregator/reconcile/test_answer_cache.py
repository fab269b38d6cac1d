"""A comparison with an upstream that is interrupted goes on where it was."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aggregator.forward.polar_client import NoAnswer, Upstream
from aggregator.reconcile.polar_pairing import seen
from aggregator.reconcile.polar_reader import GOOD_FOR, Remembering, interrupted
from aggregator.reconcile.report import Cause
from deploy.client import Api
from deploy.errors import GiveUp
from deploy.server.control import new_secret, new_token, open_control
from meters.catalogue.catalogue import TokenCreated
from tests.support.polar.two_servers import Side, TwoSides, call, numbered
from tests.support.servers.installation import Installation
from tests.support.waiting import eventually

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Saying:
    """A reader that gives the same answer to everything."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def get(self, path: str, **params: Any) -> Any:
        """One question."""
        return self._answer

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Never asked: pages are made of questions."""
        raise AssertionError


class Counting:
    """A reader of a real server that counts its questions, and breaks off after some."""

    def __init__(self, reader: Any, most: int = 10**6) -> None:
        self._reader, self._most, self.asked = reader, most, 0

    def get(self, path: str, **params: Any) -> Any:
        """One question."""
        if self.asked == self._most:
            raise ConnectionError
        self.asked += 1
        return self._reader.get(path, **params)

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Never asked: pages are made of questions."""
        raise AssertionError


def test_what_was_answered_is_not_asked_again(sides: TwoSides, tmp_path: Path) -> None:
    """The second try asks only for what the first one did not get, and both together ask no more than one."""
    sides.here.send(*numbered(5))
    path, questions = tmp_path / "progress", [{"limit": limit} for limit in range(1, 8)]
    first, second = Counting(sides.here.api, most=4), Counting(sides.here.api)

    reading = Remembering(first, path, "key", NOW, go_on=False)
    with pytest.raises(ConnectionError):
        [reading.get("/v1/events/", **params) for params in questions]
    assert interrupted(path, "key", NOW) == NOW
    again = Remembering(second, path, "key", NOW, go_on=True)
    answers = [again.get("/v1/events/", **params) for params in questions]
    again.complete()

    assert (first.asked, second.asked) == (4, 3)
    assert [len(answer["items"]) for answer in answers] == [1, 2, 3, 4, 5, 5, 5]
    assert interrupted(path, "key", NOW) is None


def test_numbers_that_were_answered_are_still_numbers(sides: TwoSides, tmp_path: Path) -> None:
    """With all their digits, however small or large: an event that reads otherwise would count as changed."""
    sides.here.send(call("a", 0.1), call("b", 12345678901234567890), call("c", 1e-12), call("d", 2.5, text="0.1"))
    path = tmp_path / "progress"

    first = Remembering(sides.here.api, path, "key", NOW, go_on=False).get("/v1/events/")
    again = Remembering(Counting(None), path, "key", NOW, go_on=True).get("/v1/events/")

    assert again == first
    assert [seen(event) for event in again["items"]] == [seen(event) for event in first["items"]]


def test_a_line_that_a_kill_cut_short_is_asked_again(sides: TwoSides, tmp_path: Path) -> None:
    """Half an answer is none."""
    path = tmp_path / "progress"
    reading = Remembering(Counting(sides.here.api), path, "key", NOW, go_on=False)
    reading.get("/v1/meters/")
    path.write_bytes(path.read_bytes()[:-20])
    after = Counting(sides.here.api)

    Remembering(after, path, "key", NOW, go_on=True).get("/v1/meters/")
    once_more = Remembering(after, path, "key", NOW, go_on=True).get("/v1/meters/")

    assert after.asked == 1
    assert {meter["name"] for meter in once_more["items"]} == {"calls", "tokens"}


@pytest.mark.parametrize("odd", [{"error": "try later"}, {"items": []}, {"items": None, "pagination": {"max_page": 1}}])
def test_an_answer_of_another_shape_is_asked_again(odd: object, tmp_path: Path) -> None:
    """It ends the run like none at all; kept, it would be as wrong for the next six hours."""
    path, whole = tmp_path / "progress", {"items": [], "pagination": {"max_page": 1}}
    with pytest.raises(NoAnswer, match="something else than was asked for"):
        Remembering(Saying(odd), path, "key", NOW, go_on=False).get("/v1/meters/")

    assert Remembering(Saying(whole), path, "key", NOW, go_on=True).get("/v1/meters/") == whole


def test_answers_of_another_organization_are_not_gone_on_with(
    servers: tuple[Installation, Installation], sides: TwoSides
) -> None:
    """A run that Polar refuses to finish, then the token of an organization that has nothing: everything is missing."""
    sides.here.send(*numbered(3))
    sides.forward()
    with open_control(sides.there.data) as control:
        few, owner = new_secret(), control.organization(sides.there.id)
        control.decide([TokenCreated(new_token(owner, "few", few, ["events:read", "meters:read"]))])
    with Api(sides.there.url, few) as api:
        eventually(lambda: api.send("GET", "/v1/meters/").status_code == 200)
    sides.there.token = few
    with pytest.raises(GiveUp, match="refuses to be read"):
        sides.check()
    sides.there.api.__exit__()
    sides.there = Side(servers[1])
    sides.there.meter("calls")

    assert {one.cause for one in sides.check().differences} == {Cause.LOST}


def test_two_runs_do_not_share_their_answers(sides: TwoSides, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one on a directory is told to wait, and the first one is none the worse for it."""
    refused: list[GiveUp] = []
    asked = Upstream.get

    def get(self: Upstream, path: str, **params: Any) -> Any:
        monkeypatch.setattr(Upstream, "get", asked)
        with pytest.raises(GiveUp, match="another comparison with Polar runs") as second:
            sides.check()
        refused.append(second.value)
        return asked(self, path, **params)

    monkeypatch.setattr(Upstream, "get", get)

    assert sides.check().differences == []
    assert len(refused) == 1
    assert sides.check().differences == []


@pytest.mark.parametrize(("key", "age"), [("another", timedelta(0)), ("key", GOOD_FOR)])
def test_another_run_or_an_old_one_is_not_gone_on_with(key: str, age: timedelta, tmp_path: Path) -> None:
    """Answers belong to one range and are good for some hours; nothing is as good as no file."""
    path = tmp_path / "progress"
    assert interrupted(path, "key", NOW) is None
    Remembering(Counting(None), path, "key", NOW, go_on=False)

    assert interrupted(path, key, NOW + age) is None
