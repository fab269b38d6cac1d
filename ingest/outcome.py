"""What a sender of events hears: what became of them or is wrong with them, as much of it as was asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ingest import answers, telemetry
from ingest.admission import Admitted, RefusedBody
from ingest.answers import JSON, Answer
from ingest.limits import ANSWER_BYTES_MAX
from ingest.recent import Verdict
from ingest.request import Preferences
from meters.log import format_position


def accepted(
    admitted: Admitted, verdicts: Sequence[Verdict] | None, preferences: Preferences, position: Mapping[int, int]
) -> Answer:
    """Events are in the log. ``verdicts`` are None where every one is new, as far as this process knows."""
    count = len(admitted.lines)
    rejected = len({refusal.index for refusal in admitted.refusals})
    [inserted] = inserted_of([count], [verdicts], rejected)
    if not preferences.applied:
        return counted(inserted, count, position)
    found: dict[str, Any] = {"inserted": inserted, "duplicates": count - inserted}
    if preferences.lenient:
        found["rejected"] = [
            {"index": refusal.index, "type": refusal.type, "loc": refusal.loc, "msg": refusal.msg}
            for refusal in admitted.refusals
        ]
    if preferences.representation:
        found["events"] = _representation(admitted, verdicts or [Verdict.ACCEPTED] * count)
    headers = JSON, _log_position(position), (b"preference-applied", preferences.applied)
    return Answer(200, msgspec.json.encode(found), headers)


def inserted_of(
    counts: Sequence[int], verdicts: Sequence[Sequence[Verdict] | None], rejected: int = 0
) -> list[int]:
    """How many of so many events in the log are new, by request. The metrics hear of all of them."""
    judged = [some for some in verdicts if some is not None]
    conflicts = sum([some.count(Verdict.CONFLICT) for some in judged])
    pairs = zip(counts, verdicts, strict=True)
    inserted = [count if some is None else some.count(Verdict.ACCEPTED) for count, some in pairs]
    telemetry.count_events(sum(inserted), conflicts, sum(counts), rejected)
    return inserted


def counted(inserted: int, count: int, position: Mapping[int, int]) -> Answer:
    """Polar's answer: two numbers."""
    body = b'{"inserted":%d,"duplicates":%d}' % (inserted, count - inserted)
    return Answer(200, body, (JSON, _log_position(position)))


def _log_position(position: Mapping[int, int]) -> tuple[bytes, bytes]:
    return b"log-position", format_position(position).encode()


def _representation(admitted: Admitted, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """What became of each event of the request, in its order."""
    kept = zip(admitted.indexes, verdicts, admitted.external_ids, strict=True)
    rows = [{"index": index, "verdict": verdict, "external_id": external_id} for index, verdict, external_id in kept]
    rejected = sorted({refusal.index for refusal in admitted.refusals})
    rows += [{"index": index, "verdict": Verdict.REJECTED, "external_id": None} for index in rejected]
    return sorted(rows, key=lambda row: row["index"])


def unprocessable(refused: RefusedBody) -> Answer:
    """Nothing is in the log: what is wrong, where it is not too long with what it is wrong with."""
    telemetry.EVENTS_REJECTED.inc(len({entry["loc"][2] for entry in refused.detail if len(entry["loc"]) > 2}))
    found = answers.problem(422, refused.error, refused.detail)
    if len(found.body) <= ANSWER_BYTES_MAX:
        return found
    return answers.problem(422, refused.error, [entry | {"input": None} for entry in refused.detail])
