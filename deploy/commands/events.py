"""``meterstream events``: send and import usage, list events and dead letters, replay a dead letter.

``send`` and ``import_csv`` read a file and deliver its events (``deploy.files``). They report refused lines by number,
and finally the events that do not count because their ``external_id`` exists with other content.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from deploy.client import EPILOG, Session, session
from deploy.console import counted, harmless, note, parse_instant, progress_bar, show, show_one
from deploy.errors import INTERRUPTED, USAGE, GiveUp

if TYPE_CHECKING:
    from deploy.client import Api
    from deploy.files.sending import Conflicts, Delivery, Line

app = typer.Typer(no_args_is_help=True, help="Send usage events, list them, and look after those that do not count.")

EVENT_COLUMNS = ("timestamp", "name", "external_customer_id", "customer_id", "metadata")
DEAD_COLUMNS = ("id", "ingested_at", "reason", "detail", "raw")
STDIN = Path("-")
PROBLEMS_SHOWN_MAX = 20  # whoever has more of them has one cause

Anew = Annotated[bool, typer.Option("--anew", help="Count what was sent before once more, unless it names its id.")]

Encoding = Annotated[
    str,
    typer.Option(help="The file's encoding, such as windows-1252; UTF-8 and marked UTF-16 are recognized."),
]

Map = Annotated[
    list[str],
    typer.Option(
        help="FIELD=COLUMN,... such as name=kind,metadata.tokens=Tokens; in double quotes what has a comma in it."
    ),
]


@app.command(epilog=EPILOG)
def send(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A file with one JSON event a line; - reads standard input.")],
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Events in one request.")] = 500,
    anew: Anew = False,
    encoding: Encoding = "",
) -> None:
    """Send events, one JSON object a line, as they are. Sending a file again, or one that has grown, is harmless.

    A line of a file without external_id gets one from what it says, and from how often the same was said before it in
    this file. So equal lines of one file are different events, and the same line sent again, from any file, is the same
    event. What is meant as another one needs an external_id, a timestamp, or --anew. What comes from standard input
    happens now, so there every line without external_id is an event of its own.
    """
    from deploy.files.event_files import as_they_come, lines_of, read_ndjson

    is_new = anew or file == STDIN
    with _opened(file) as source:
        lines = as_they_come(source.fileno(), encoding=encoding) if file == STDIN else lines_of(source, encoding)
        _deliver(session(context), read_ndjson(lines, _apart(is_new)), batch, total=None, is_new=is_new)


@app.command(epilog=EPILOG, name="import")
def import_csv(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A CSV file with a header line; - reads standard input.")],
    map: Map = [],  # noqa: B006 (typer copies it)
    set: Annotated[list[str], typer.Option(help="FIELD=VALUE,... the same for every line, such as name=call.")] = [],  # noqa: B006
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Events in one request.")] = 500,
    anew: Anew = False,
    delimiter: Annotated[str, typer.Option(help="What separates cells, or tab; , ; | and tabs are recognized.")] = "",
    decimal: Annotated[str, typer.Option(help="The decimal sign of numbers, . or ,")] = ".",
    time_format: Annotated[
        str, typer.Option(help="iso, excel, day-first, month-first, or a pattern such as '%d.%m.%Y %H:%M'.")
    ] = "iso",
    encoding: Encoding = "",
    allow_text: Annotated[
        list[str], typer.Option(metavar="COLUMN", help="Cells that are no numbers are meant as text; repeatable.")
    ] = [],  # noqa: B006
    complete: Annotated[bool, typer.Option("--complete", help="Send the last line also if it has no newline.")] = False,
) -> None:
    """Import a CSV file. Rows that were imported before are skipped, so a longer file adds only its new rows.

    The command first reads the whole file and shows what each column holds. It sends nothing if a column mixes numbers
    with other cells (unless --allow-text names the column), or if the times cannot be read.

    A row's external_id comes from a column, if --map names one. Otherwise it comes from the row's cells, from --set,
    from the columns of name and customer, and from how many equal rows stand before it in the file. So equal rows of
    one file are different events. An equal row of another file is the same event and counts once. To count it again,
    tell the files apart (such as --set metadata.month=may) or give --anew.

    A timestamp without an offset is UTC. A last line without a newline may be half written: it is sent only with
    --complete.

    Example: meterstream events import usage.csv --map external_customer_id=user,timestamp=at,metadata.tokens=total
    --set name=llm.call

    Example, a German spreadsheet: meterstream events import mai.csv --map
    external_customer_id=Kunde,timestamp=Zeit,metadata.tokens=Menge --set name=llm.call --encoding windows-1252
    --decimal , --time-format day-first
    """
    from deploy.files.csv_files import CsvFile, CsvForm, parse_mapping, rereadable

    columns, constants = parse_mapping(map, "--map"), parse_mapping(set, "--set")
    form, allowed = CsvForm(delimiter, decimal, time_format, encoding).check(), frozenset(allow_text)
    with rereadable(file, sys.stdin.buffer if file == STDIN else None) as source:
        table = CsvFile(source, str(file), columns, constants, form, _apart(anew), complete)
        survey = table.survey(allowed)
        for line in survey.report():
            note(line)
        survey.check(allowed)
        _deliver(session(context), table.lines(survey), batch, total=survey.rows, is_new=anew)


@app.command(epilog=EPILOG, name="list")
def list_events(
    context: typer.Context,
    name: Annotated[list[str] | None, typer.Option(help="Only events of this name; repeatable.")] = None,
    customer: Annotated[list[str] | None, typer.Option(help="Only this external customer id; repeatable.")] = None,
    meter: Annotated[str | None, typer.Option(help="Only what this meter (id or name) counts.")] = None,
    since: Annotated[str | None, typer.Option(help="Only from this time on (ISO 8601; UTC unless it says).")] = None,
    until: Annotated[str | None, typer.Option(help="Only before this time.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 20,
) -> None:
    """The newest events."""
    from deploy.commands.meters import find_meter

    here = session(context)
    between = {
        name: given and parse_instant(given, f"--{name}").isoformat()
        for name, given in (("since", since), ("until", until))
    }
    with here.api() as api:
        meter_id = find_meter(api, meter)["id"] if meter else None
        found = api.get(
            "/v1/events/", name=name, external_customer_id=customer, meter_id=meter_id, limit=limit, **between
        )
    show(found["items"], EVENT_COLUMNS, here.output)


@app.command(epilog=EPILOG)
def dead(context: typer.Context) -> None:
    """What arrived and cannot be counted, with the reason and its bytes, up to 16 KiB of them."""
    here = session(context)
    with here.api() as api:
        show(list(api.pages("/v1/dead-letters/")), DEAD_COLUMNS, here.output)


@app.command(epilog=EPILOG)
def replay(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="The dead letter's id, as `meterstream events dead` shows it.")],
    file: Annotated[Path | None, typer.Option(help="The mended event; without it the letter goes as it is.")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Send nothing: not worth it, or sent otherwise.")] = False,
) -> None:
    """Send a dead letter again, mended if a file is given, and take it off the list once it is in.

    It counts for the organization of the token, so one that names another organization, or none, is not sent.
    """
    from deploy.client import looking_for, segment
    from deploy.files.sending import deliver

    here = session(context)
    if file and drop:
        raise GiveUp("--file and --drop exclude each other", USAGE)
    path = f"/v1/dead-letters/{segment(id, 'ID')}"
    with here.api() as api:
        with looking_for(f"there is no dead letter {id}; `meterstream events dead` shows the ids"):
            letter = api.get(path)
        if not drop:
            _check_own(letter)
            event = _event(_content(file) if file else letter["raw"].encode(), str(file or id), id)
            _check_new(letter, event.event)
            delivery = deliver(api, [event])
            if delivery.problems:
                raise GiveUp(f"{id} stays on the list: {delivery.problems[0].message}; mend it and give it with --file")
        show_one(api.post(f"{path}/replay", {}), here.output)


def _check_new(letter: dict[str, Any], event: bytes) -> None:
    """A letter counts once, and one whose external id was taken counts only under another. Raises GiveUp."""
    if letter["replayed_at"]:
        raise GiveUp(f"{letter['id']} was taken off the list at {letter['replayed_at']}, and is not sent again")
    if letter["reason"] == "conflict" and _external_id(letter["raw"].encode()) == _external_id(event):
        raise GiveUp(
            f"{letter['id']} stays on the list: its external_id was taken with other content, which counts; give the "
            "mended event another one with --file, or take the letter off the list with --drop"
        )


def _external_id(event: bytes) -> object:
    found = msgspec.json.decode(event)
    return found.get("external_id") if isinstance(found, dict) else None


def _check_own(letter: dict[str, Any]) -> None:
    """Whose a letter is that names nobody known, only its producer knows. Raises GiveUp."""
    if letter["is_own"]:
        return
    named = letter["organization_id"]
    raise GiveUp(
        f"{letter['id']} names {'no organization' if named is None else f'the organization {named!r}'}, and would "
        "count for the one of your token: give its event to `meterstream events send` with a token of the organization "
        "that it belongs to, and take it off this list with --drop"
    )


def _content(file: Path) -> bytes:
    with _opened(file) as source:
        return source.read()


def _apart(anew: bool) -> str:
    from deploy.files.event_files import never_again

    return never_again() if anew else ""


def _event(content: bytes, source: str, letter_id: str) -> "Line":
    """The one event of a file or of a dead letter, whose id keeps it apart from letters that say the same.

    Raises GiveUp.
    """
    from deploy.files.event_files import lines_of, read_ndjson
    from deploy.files.sending import Line

    found = list(read_ndjson(lines_of(io.BufferedReader(io.BytesIO(content))), apart=letter_id))
    if len(found) != 1 or not isinstance(found[0], Line):
        raise GiveUp(f"{source} should hold one event, a JSON object on one line", USAGE)
    return found[0]


@contextmanager
def _opened(file: Path) -> Iterator[io.BufferedReader]:
    if file == STDIN:
        assert isinstance(sys.stdin.buffer, io.BufferedReader)
        yield sys.stdin.buffer
        return
    try:
        source = file.open("rb")
    except OSError as error:
        raise GiveUp(f"cannot read {file}: {error.strerror}", USAGE) from None
    with source:
        yield source


def _deliver(here: Session, source: Iterator[Any], batch: int, total: int | None, *, is_new: bool) -> None:
    """Send what the source yields, show how far it is, and end with exit code 1 when a line does not count."""
    from deploy.files.sending import Delivery, deliver

    delivery = Delivery()
    try:
        with here.api() as api, progress_bar("events", total) as advance:
            deliver(api, _readable(source, delivery), into=delivery, events_max=batch, progress=advance)
            conflicts = _conflicts(api, delivery)
    except (KeyboardInterrupt, GiveUp) as reason:
        _show_problems(delivery)
        raise _ended_early(reason, delivery, is_new=is_new) from None
    count = len(delivery.problems)
    summary = {"inserted": delivery.inserted, "duplicates": delivery.duplicates, "refused": count}
    found = {"conflicts": conflicts.events if conflicts else None, "log_position": delivery.log_position}
    show_one(summary | found, here.output)
    _show_problems(delivery)
    if not delivery.safe_line and not count:
        note("there was no event in it")
    ends = [_do_not_count(conflicts)] if conflicts and conflicts.events else []
    ends += [_not_taken(count, is_new=is_new)] if count else []
    if ends:
        raise GiveUp("; ".join(ends))


def _conflicts(api: "Api", delivery: "Delivery") -> "Conflicts | None":
    """The events whose external_id was taken; None where nobody can say. All is sent, so that alone is no failure."""
    from deploy.files.sending import find_conflicts

    try:
        return find_conflicts(api, delivery)
    except GiveUp as reason:
        note(f"whether an external id was taken with other content could not be looked up: {reason}")
        return None


def _do_not_count(conflicts: "Conflicts") -> str:
    more = "" if conflicts.is_all else " or more"
    return (
        f"{conflicts.events:,}{more} events have an external id that was taken with other content, and do not count; "
        "`meterstream events dead` shows them"
    )


def _readable(source: Iterator[Any], delivery: "Delivery") -> Iterator["Line | None"]:
    from deploy.files.sending import Problem

    for item in source:
        if isinstance(item, Problem):
            delivery.problems.append(item)
        else:
            yield item


def _show_problems(delivery: "Delivery") -> None:
    for problem in sorted(delivery.problems, key=lambda problem: problem.line)[:PROBLEMS_SHOWN_MAX]:
        note(f"line {problem.line}: {harmless(problem.message)}")


def _not_taken(count: int, *, is_new: bool) -> str:
    """What to do about lines. A line's id counts the equal ones before it, so a mended one is itself in its file."""
    more = count - PROBLEMS_SHOWN_MAX
    return (
        f"{counted(count, 'line was', 'lines were')} rejected{f' ({more} more than shown)' if more > 0 else ''}; "
        f"the others are safe; fix the rejected ones, and send {'them alone' if is_new else 'the whole file again'}"
    )


def _ended_early(reason: BaseException, delivery: "Delivery", *, is_new: bool) -> GiveUp:
    """Why it ended, and what of the file is safe and what to send again.

    The ids of a file's lines are the same each time, those of new events are not.
    """
    code = reason.exit_code if isinstance(reason, GiveUp) else INTERRUPTED
    why = str(reason) or "interrupted"
    if not max(delivery.safe_line, delivery.doubtful_line):
        return GiveUp(why if isinstance(reason, GiveUp) else f"{why}; nothing was sent", code)
    safe = f"{delivery.inserted + delivery.duplicates} events are safe"
    if not is_new:
        return GiveUp(f"{why}; {safe}; send the file again, what is there already counts once", code)
    is_doubtful = delivery.doubtful_line > delivery.safe_line
    doubt = f", and those up to line {delivery.doubtful_line} may be" if is_doubtful else ""
    return GiveUp(
        f"{why}; {safe}, up to line {delivery.safe_line}{doubt}; send only what follows: without an external_id "
        "an event that is sent again counts twice", code,
    )
