"""The command line against a real server: what it says, in which form, and with which exit code."""

import csv
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from deploy.app import app, global_options_first
from deploy.settings import read_environment
from tests.support.servers.installation import Installation, meterstream
from tests.support.waiting import eventually

EVENTS = """{"name":"call","external_customer_id":"ada","external_id":"c1","metadata":{"tokens":0.1}}
{"name":"call","external_customer_id":"ada","external_id":"c2","metadata":{"tokens":0.2}}
{"name":"call","external_customer_id":"bob","metadata":{"tokens":5}}
"""


@pytest.fixture(scope="module")
def counted(running: Installation) -> Installation:
    """A server with a meter over three events, all of them visible."""
    running.answer("meters", "create", "--name", "tokens", "--sum", "tokens", "--where", "name=call")
    assert running.answer("events", "send", "-", text=EVENTS)["inserted"] == 3
    eventually(lambda: len(running.answer("events", "list")) == 3)
    return running


@pytest.mark.parametrize(
    ("line", "code", "complaint"),
    [
        (["servee"], 2, "Did you mean 'serve'?"),
        (["events", "sned", "-"], 2, "Did you mean 'send'?"),
        (["usage", "x", "--intervall", "day"], 2, "--interval"),
        (["usage", "x", "--output", "jsn"], 2, "'jsn' is not one of 'table', 'json', 'csv'"),
        (["serve", "--port", "65536"], 2, "--port: Expected `int` <= 65535"),
        (["usage", "x"], 2, "a token is needed: --token, or METERSTREAM_TOKEN"),
        (["usage", "x", "--token", "t", "--url", "http://127.0.0.1:9"], 1, "no server answers at http://127.0.0.1:9"),
        (["usage", "x", "--token", "t", "--url", "nonsense"], 2, "--url nonsense"),
        (["events", "send", "missing.ndjson", "--token", "t"], 2, "cannot read missing.ndjson"),
        (["tokens", "list", "--data", "missing"], 1, "there is no Meterstream data in missing"),
        (["rebuild", "--data", "missing"], 1, "there is no Meterstream data in missing"),
        (["meters", "create", "--name", "abc", "--token", "t"], 2, "give one of --count, --sum"),
        (["meters", "create", "--name", "abc", "--sum", "a", "--count", "--token", "t"], 2, "not --sum and --count"),
        (["meters", "create", "--name", "abc", "--count", "--unit", "custom", "--token", "t"], 2, "needs a --label"),
        (["webhooks", "create", "https://x", "--event", "x", "--token", "t"], 2, "there are customer.state_changed"),
        (["usage", "x", "--url"], 2, "--url needs a value"),
        (["usage", "x", "--output", "--chart"], 2, "--output needs a value"),
        (["usage", "x", "--start", "2026-03-02", "--end", "2026-03-01", "--token", "t"], 2, "--end must be later"),
        (["usage", "x", "--start", "0001-01-01", "--token", "t"], 2, "--start is a time from 2023-01-01 to 9000-01-01"),
        (["usage", "x", "--end", "9999-12-31", "--token", "t"], 2, "--end is a time from 2023-01-01 to 9000-01-01"),
        (["usage", "x", "--timezone", "Mars", "--start", "2026-01-01", "--token", "t"], 2, "--timezone takes a name"),
        (["usage", "x", "--top", "3", "--token", "t"], 2, "--top chooses among groups: give --by too"),
        (["tokens", "create", "--scope", "x"], 2, "audit:read"),
        (["meters", "preview", "--count", "--filter", "[" * 5000, "--token", "t"], 2, "no JSON: nested too deeply"),
        (["meters", "create", "--name", "abc", "--sum", "", "--token", "t"], 2, "--sum takes the name of a property"),
        (["tokens", "create", "--days", "9999999"], 2, "'--days': Input should be less than or equal to 36500"),
        (["meters", "list", "--token", "\xe4"], 2, "--token: Expected a token, which has letters, digits and signs"),
        (["credits", "grant", "x", "y", "1", "--key", "\xe4", "--token", "t"], 2, "--key takes letters, digits"),
        (["credits", "grant", "x", "y", "1", "--key", "a\nb", "--token", "t"], 2, "--key takes letters, digits"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(line: list[str], code: int, complaint: str) -> None:
    """Every mistake gives its exit code and one line on stderr, and neither an answer nor a traceback."""
    done = meterstream(*line)

    assert done.returncode == code, done.stderr
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


class Page(BaseHTTPRequestHandler):
    """A web server that has a page for everything."""

    def do_GET(self) -> None:
        """Any request."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>Welcome</html>")

    do_POST = do_GET


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    """The address of a server of something else."""
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("line", ["meters list", "customers state ada", "lag", "events send -"])
def test_another_web_server_is_no_meterstream(stranger: str, line: str) -> None:
    """A page where an answer should be is said in a line that names the address."""
    done = meterstream(*line.split(), "--url", stranger, "--token", "t", text='{"name":"a","customer_id":"b"}')

    assert (done.returncode, done.stdout) == (1, "")
    assert f"what answers at {stranger}" in done.stderr
    assert "is not Meterstream" in done.stderr


class Starting(BaseHTTPRequestHandler):
    """A server that answers the second question, and that no list has anything in it."""

    asked = 0

    def do_GET(self) -> None:
        """Any request."""
        Starting.asked += 1
        answer = b'{"items":[],"pagination":{"total_count":0,"max_page":0}}' if Starting.asked > 1 else b"{}"
        self.send_response(200 if Starting.asked > 1 else 503)
        for name, value in {"Content-Type": "application/json", "Retry-After": "0"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)


def test_a_server_that_is_still_starting_is_asked_again() -> None:
    """Its address is known as soon as it listens, and the next command may come a moment too early."""
    with HTTPServer(("127.0.0.1", 0), Starting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        done = meterstream("meters", "list", "--url", url, "--token", "t", "--output", "json")
        server.shutdown()
        thread.join()

    assert (done.returncode, json.loads(done.stdout)) == (0, []), done.stderr
    assert Starting.asked == 2


def test_certificates_that_cannot_be_read_are_named() -> None:
    """The variable is, which the library behind says nothing of."""
    done = meterstream("meters", "list", "--token", "t", SSL_CERT_FILE="missing.pem")

    assert done.returncode == 2
    assert "SSL_CERT_FILE" in done.stderr


def test_global_options_stand_anywhere() -> None:
    """They are moved to the front with their values, the rest keeps its order, and -- ends the search."""
    line = ["usage", "--output", "json", "m", "--url=http://x", "--chart", "--", "--token"]
    expected = ["--output", "json", "--url=http://x", "usage", "m", "--chart", "--", "--token"]

    assert global_options_first(line) == expected


def test_a_wrong_token_is_refused_with_the_way_out(counted: Installation) -> None:
    """A token that the server does not know ends with exit code 1 and says how to get one."""
    done = meterstream("meters", "list", "--url", counted.url, "--token", "polar_oat_wrong")

    assert done.returncode == 1
    assert "does not accept this token" in done.stderr
    assert "meterstream tokens create" in done.stderr
    assert "wrong" not in done.stderr


def test_a_token_may_do_what_it_was_made_for(counted: Installation) -> None:
    """A token made beside the running server works at once, within its scopes, until it is revoked."""
    made = counted.answer("tokens", "create", "--scope", "meters:read")
    here = ("--url", counted.url, "--token", made["token"])

    eventually(lambda: meterstream("meters", "list", *here).returncode == 0)
    refused = meterstream("events", "list", *here)
    assert refused.returncode == 1
    assert "higher privileges" in refused.stderr

    counted.answer("tokens", "revoke", made["id"])
    eventually(lambda: meterstream("meters", "list", *here).returncode == 1)
    listed = [token for token in counted.answer("tokens", "list") if token["id"] == made["id"]]
    assert listed[0]["revoked_at"]
    assert made["token"] not in json.dumps(listed)


def test_usage_is_exact_in_every_form(counted: Installation) -> None:
    """JSON, CSV and the table show the same exact numbers: 0.1 and 0.2 are 0.3."""
    usage = ("usage", "tokens", "--customer", "ada")

    answer = counted.answer(*usage)
    assert counted.run(*usage, "--output", "json").stdout.count("0.3") == 2
    assert answer["as_of"].startswith("0:")

    rows = list(csv.DictReader(io.StringIO(counted.run(*usage, "--output", "csv").stdout)))
    assert [row["quantity"] for row in rows if row["quantity"] != "0"] == ["0.3"]  # midnight may have come since
    assert len(rows) == len(answer["quantities"])

    chart = counted.run(*usage, "--chart").stdout
    assert "0.3" in chart
    assert "█" in chart


@pytest.mark.parametrize(
    ("options", "timestamps"),
    [
        ("hour --start 2026-01-05T13:30 --end 2026-01-05T14:00", ["2026-01-05T13:30:00Z"]),
        ("hour --start 2026-01-05T13:30 --end 2026-01-05T14:01", ["2026-01-05T13:30:00Z", "2026-01-05T14:00:00Z"]),
        ("day --start 2026-01-05 --end 2026-01-06 --timezone America/New_York", ["2026-01-05T05:00:00Z"]),
        ("day --start 2026-01-05T00:00Z --end 2026-01-05T06:00Z --timezone America/New_York",
         ["2026-01-05T00:00:00Z", "2026-01-05T05:00:00Z"]),
        ("week --start 2023-01-01 --end 2023-01-04", ["2023-01-01T00:00:00Z", "2023-01-02T00:00:00Z"]),
        ("week --start 2023-01-01 --end 2023-01-02 --timezone Europe/Berlin", ["2022-12-31T23:00:00Z"]),
        ("month --start 2026-01-31 --end 2026-03-01", ["2026-01-31T00:00:00Z", "2026-02-01T00:00:00Z"]),
        ("none --start 1999-01-31 --end 2026-03-01", ["1999-01-31T00:00:00Z"]),
    ],
)  # fmt: skip
def test_usage_shows_the_intervals_that_a_range_touches(
    counted: Installation, options: str, timestamps: list[str]
) -> None:
    """All of them, cut to the range, and none that begins where it ends; a time that does not say is the zone's."""
    answer = counted.answer("usage", "tokens", "--interval", *options.split())

    assert [point["timestamp"] for point in answer["quantities"]] == timestamps


def test_events_are_listed_within_a_range(counted: Installation) -> None:
    """From a time on and before a time; what was sent today was not sent before."""
    assert counted.answer("events", "list", "--since", "2026-01-01", "--customer", "ada")
    assert counted.answer("events", "list", "--until", "2026-01-01", "--customer", "ada") == []
    assert "--since takes a time" in counted.run("events", "list", "--since", "yesterday").stderr


def test_usage_is_shown_by_group(counted: Installation) -> None:
    """Over the whole range unless an interval is given; what is not among the first is one row."""
    (meter,) = counted.answer("meters", "list")
    by = ("usage", meter["id"], "--by", "external_customer_id", "--by", "metadata.model")
    answer = counted.answer(*by, "--customer", "ada", "--top", "1")
    shown = counted.run(*by, "--customer", "ada", "--top", "1", "--output", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(shown)))

    assert [(point["group"], point["quantity"]) for point in answer["quantities"]] == [
        ({"external_customer_id": "ada", "metadata.model": None}, 0.3)
    ]
    assert answer["remainder"][0]["quantity"] == 0
    assert [(row["external_customer_id"], row["metadata.model"]) for row in rows] == [
        ("ada", "(none)"), ("(all others)", "(all others)"),
    ]  # fmt: skip
    assert "--by: Input should be" in counted.run("usage", meter["id"], "--by", "model").stderr


@pytest.mark.parametrize("options", [["day"], ["week"], ["month"], ["year"]], ids=" ".join)
def test_usage_until_now_has_the_newest_interval(counted: Installation, options: list[str]) -> None:
    """Whatever the time of day is where the days are."""
    where = ("--timezone", "America/New_York", "--customer", "ada")

    assert counted.answer("usage", "tokens", *where, "--interval", *options)["total"] == 0.3


def test_lists_have_every_form(counted: Installation) -> None:
    """The same things come as JSON, as CSV and as a table."""
    (meter,) = counted.answer("meters", "list")
    rows = list(csv.DictReader(io.StringIO(counted.run("meters", "list", "--output", "csv").stdout)))

    assert rows[0]["id"] == meter["id"]
    assert json.loads(rows[0]["aggregation"]) == {"func": "sum", "property": "tokens"}
    assert "tokens" in counted.run("meters", "list").stdout


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (("meters", "create", "--name", "t3", "--count"), "--name: String should have at least 3"),
        (("meters", "create", "--name", "abc", "--count", "--unit", "x"), "--unit: Input should be 'scalar'"),
        (("events", "replay", "abc"), "there is no dead letter abc; `meterstream events dead` shows the ids"),
        (("credits", "grant", "eve", "tokens", "5"), "create it with `meterstream customers create`"),
        (("polar", "pull"), "a token of the Polar organization is needed: set METERSTREAM_POLAR_TOKEN"),
        (("webhooks", "redeliver", "abc"), "nothing was sent under the id abc"),
        (("tokens", "revoke", "abc"), "there is no token abc"),
        (("meters", "create", "--name", "abc", "--count", "--where", "a>true"), "--where: 'gt' does not order"),
        (("usage", "tokens", "--interval", "hour", "--start", "2024-01-01"), "--start and --end: By the hour"),
    ],
)
def test_what_the_server_refuses_of_a_command_is_wrong_usage(
    counted: Installation, line: tuple[str, ...], complaint: str
) -> None:
    """The option is named, or where the ids are to be found."""
    done = counted.run(*line)

    assert done.returncode == 2
    assert complaint in done.stderr


def test_of_two_meters_of_one_name_the_one_that_is_not_archived_is_meant(counted: Installation) -> None:
    """The second one is made where it is meant; the ids are named until one of them is archived."""
    create = ("meters", "create", "--name", "twin", "--count")
    first, refused = counted.answer(*create), counted.run(*create)
    assert refused.returncode == 2
    assert f"a meter called 'twin' is there already ({first['id']}); with --same-name" in refused.stderr

    second = counted.answer(*create, "--same-name")
    ambiguous = counted.run("usage", "twin")
    assert ambiguous.returncode == 2
    assert first["id"] in ambiguous.stderr
    assert second["id"] in ambiguous.stderr

    counted.patch(f"/v1/meters/{first['id']}", {"is_archived": True})
    eventually(lambda: counted.run("usage", "twin").returncode == 0)


def test_a_plan_leaves_nothing_behind_and_a_replay_needs_something_forwarded(counted: Installation) -> None:
    """Where nothing is forwarded, a plan makes no file and no token that is still good; a replay is refused."""
    counted.answer("forward", "plan")
    replay = counted.run("forward", "replay", "--since", "2026-03-01", "--until", "2026-03-02")

    assert not list(counted.data.glob("forward*"))
    assert [token["name"] for token in counted.answer("tokens", "list") if not token["revoked_at"]] == ["first"]
    assert replay.returncode == 1
    assert "nothing was forwarded" in replay.stderr


def test_the_version_comes_as_json() -> None:
    """For a program that wants to know."""
    assert list(json.loads(meterstream("version", "--output", "json").stdout)) == ["version"]
    assert meterstream("--version").stdout == meterstream("version").stdout


def test_an_unknown_meter_names_the_nearest(counted: Installation) -> None:
    """A misspelled meter is wrong usage, with the name that was probably meant."""
    done = counted.run("usage", "tokenz")

    assert done.returncode == 2
    assert "did you mean 'tokens'?" in done.stderr


def test_a_refused_event_is_named_by_its_line_and_the_others_are_kept(counted: Installation) -> None:
    """Bad lines are reported with their numbers and exit code 1; the good ones between them are in."""
    deep = [f'{{"name":"other","a":{"[" * levels}{"]" * levels}}}' for levels in (900, 5000)]
    lines = ["{", '{"name":"other"}', "", *deep, '{"name":"other","external_customer_id":"eve","external_id":"kept"}']

    done = counted.run("events", "send", "-", text="\n".join(lines))

    assert done.returncode == 1
    assert "line 1: not an event" in done.stderr
    assert "line 2: " in done.stderr
    assert "line 4: " in done.stderr
    assert "line 5: not an event: it is nested too deeply" in done.stderr
    assert "4 lines were rejected" in done.stderr
    eventually(lambda: len(counted.answer("events", "list", "--name", "other")) == 1)


def test_a_repeated_import_changes_nothing(counted: Installation, tmp_path: Path) -> None:
    """The first import inserts every row; the second finds all of them there, but for a row that came with it."""
    path = tmp_path / "usage.csv"
    path.write_text("user,total\n" + "".join(f"u{number},{number}\n" for number in range(1000)))
    columns = "external_customer_id=user,metadata.n=total"
    command = ("events", "import", str(path), "--map", columns, "--set", "name=csv")

    first = counted.answer(*command)
    with path.open("a") as file:
        file.write('one more,"1,5"\n')
    refused = counted.run(*command)
    second = counted.answer(*command, "--allow-text", "total")

    assert (first["inserted"], first["duplicates"]) == (1000, 0)
    assert refused.returncode == 2
    assert "total -> metadata.n: 1 of 1,001 cells is no number (line 1002 '1,5')" in refused.stderr
    assert (second["inserted"], second["duplicates"]) == (1, 1000)


def test_a_spreadsheets_export_is_imported_from_a_pipe(counted: Installation) -> None:
    """Semicolons and UTF-16 are recognized, decimals and times are named; each column is reported before it is sent."""
    text = "user;at;total\nada;46351,34375;1,5\nada;46351,5;2\n"
    columns = "external_customer_id=user,timestamp=at,metadata.n=total"
    command = ("events", "import", "-", "--map", columns, "--set", "name=sheet", "--output", "json")
    options = ("--decimal", ",", "--time-format", "excel")

    refused = counted.run(*command, text=text)
    done = counted.run(*command, *options, text=text)

    assert refused.returncode == 2
    assert "if so, give --time-format excel and --decimal ,; nothing was sent" in refused.stderr
    assert "total -> metadata.n: 2 numbers" in done.stderr
    assert json.loads(done.stdout)["inserted"] == 2
    found = counted.answer("events", "list", "--name", "sheet")
    assert [(event["timestamp"], event["metadata"]) for event in found] == [
        ("2026-11-25T12:00:00Z", {"n": 2}), ("2026-11-25T08:15:00Z", {"n": 1.5}),
    ]


def test_a_file_sent_twice_is_counted_once(counted: Installation, tmp_path: Path) -> None:
    """Equal lines without ids are two events, and still two when the file is sent again; a pipe's are new each time."""
    lines = '{"name":"twice","external_customer_id":"ada"}\n' * 2
    (path := tmp_path / "usage.ndjson").write_text(lines)

    answers = [counted.answer("events", "send", str(path), *more) for more in ([], [], ["--anew"])]
    answers += [counted.answer("events", "send", "-", text=lines) for _ in range(2)]

    found = [(answer["inserted"], answer["duplicates"]) for answer in answers]
    assert found == [(2, 0), (0, 2), (2, 0), (2, 0), (2, 0)]
    eventually(lambda: len(counted.answer("events", "list", "--name", "twice")) == 8)
    assert not counted.answer("events", "dead")


def test_a_preview_counts_without_creating(counted: Installation) -> None:
    """A preview answers for stored events, and no meter is there afterwards."""
    before = counted.answer("meters", "list")

    assert counted.answer("meters", "preview", "--count", "--where", "name=call")
    assert counted.answer("meters", "list") == before


def test_a_warning_about_a_meter_is_shown_once(counted: Installation) -> None:
    """A table has no row for warnings, which stderr has; JSON keeps them for programs."""
    line = ("meters", "preview", "--sum", "tokns", "--where", "name=call")
    table = counted.run(*line)

    assert "did you mean 'tokens'?" in table.stderr
    assert "tokns" not in table.stdout
    assert "did you mean 'tokens'?" in counted.answer(*line)["warnings"][0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("polar", "deliveries"), "No webhook of Polar's has arrived."),
        (("polar", "waiting"), "No credits of Polar's wait for a meter."),
    ],
)
def test_an_empty_list_about_polar_says_what_it_means(
    counted: Installation, line: tuple[str, ...], words: str
) -> None:
    """Without news from Polar the tables are empty, and stderr says why."""
    assert words in counted.run(*line).stderr


def test_totals_are_counted_again_and_it_is_said_for_whom(counted: Installation) -> None:
    """A recount agrees with the running totals; where a meter has more customers than are compared, that is said."""
    line = '{"name":"many","external_customer_id":"c%d","metadata":{"n":%d}}\n'
    counted.answer("events", "send", "-", text="".join(line % (number, number) for number in range(12)))
    counted.answer("meters", "create", "--name", "many", "--sum", "n", "--where", "name=many")
    eventually(lambda: counted.answer("usage", "many")["total"] == 66)

    done, few = (counted.run("meters", "backfill", meter, "--output", "json") for meter in ("many", "tokens"))

    rows = json.loads(done.stdout)
    assert (done.returncode, few.returncode) == (0, 0)
    assert [(row["customer"], row["recounted"], row["equal"]) for row in rows] == [
        (f"c{number}", number, True) for number in range(11, 1, -1)
    ]
    assert "Of 12 customers these are the 10 largest" in done.stderr
    assert "customers" not in few.stderr


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The words of every command, and the command."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    """``--help`` works for each, and a word in brackets in a help text is no markup."""
    shown = CliRunner().invoke(app, [*path, "--help"], obj=read_environment())
    texts = [getattr(one, "help", None) or "" for one in (COMMANDS[path], *COMMANDS[path].params)]

    assert shown.exit_code == 0
    assert "Usage:" in shown.stdout
    assert [Text.from_markup(text).plain for text in texts] == texts


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_paragraphs_of_a_commands_help_flow(path: tuple[str, ...]) -> None:
    """A paragraph has no line breaks of its own, which would show as broken lines in a terminal of another width."""
    paragraphs = (COMMANDS[path].help or "").split("\n\n")

    assert not [paragraph for paragraph in paragraphs if "\n" in paragraph]
