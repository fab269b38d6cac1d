"""Tables: what people copy out of them stays in one piece."""

import csv
import io
import json
import sys
from decimal import Decimal

import pytest

from deploy.console import Output, show, show_table, text

ID = "ab06baa9-485e-4030-8776-30c548485885"
UNFOLDED = 5  # lines of a table with one row
ROWS = [{"id": ID, "about": "word " * 40, "created_at": "2026-11-21T23:30:46.589669Z"}]


class Terminal(io.StringIO):
    """What says that a person sits in front of it."""

    def isatty(self) -> bool:
        """It is one."""
        return True


@pytest.mark.parametrize("stdout", [Terminal, io.StringIO])
def test_ids_and_times_are_not_folded(
    stdout: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """However narrow the terminal is, times to the second; where nobody watches, texts are not folded either."""
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(sys, "stdout", stdout())

    show_table(ROWS, ("id", "about", "created_at"))

    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert ID in shown
    assert "2026-11-21T23:30:46Z" in shown
    assert (len(shown.splitlines()) > UNFOLDED) is (stdout is Terminal)


def test_a_table_fits_a_terminal_that_is_wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is widened for ids alone."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", Terminal())

    show_table(ROWS, ("id", "about", "created_at"))

    assert len(sys.stdout.getvalue().splitlines()[-1]) == 100  # type: ignore[attr-defined]


def test_numbers_are_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many columns there are: a number that is cut reads as another one. A sign makes it no text."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", Terminal())
    amount = Decimal("20000000.25")
    rows = [{"at": ID, "cause": "usage " * 9, "units": f"-{text(amount)}", "balance": amount, "events": 7000000}]

    show_table([*rows, {"cause": "earlier", "balance": 0}], ("at", "cause", "units", "balance", "events"))

    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "│ -20,000,000.25 │ 20,000,000.25 │ 7,000,000 │" in shown


@pytest.mark.parametrize("stdout", [Terminal, io.StringIO])
def test_what_strangers_wrote_steers_no_terminal(stdout: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters are replaced, in titles too; letters of any script, blanks and joiners stay."""
    monkeypatch.setattr(sys, "stdout", stdout())
    monkeypatch.setenv("TERM", "dumb")  # without styles, which begin with the same character
    name = "Ren\u00e9e\u00a0\u06f1 \U0001f469\u200d\U0001f680"

    show_table([{"name": f"\x1b]0;owned\x07\x9b2J\r\n\u202e{name}"}], ("name",), title="\x1b[2Jpages")

    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert name in shown
    assert not set(shown) & set("\x1b\x07\x9b\r\u202e")


@pytest.mark.parametrize("output", [Output.csv, Output.json])
def test_what_programs_read_steers_no_terminal_either(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a person looks at it, JSON means the same and CSV is replaced; elsewhere CSV is as it was written."""
    name = "\x1b]0;owned\x07\x9b2J\u202eRen\u00e9e\U000e0001"
    shown = {}
    for stdout in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stdout", stdout())
        show([{"name": name}], ("name",), output)
        shown[stdout] = sys.stdout.getvalue()  # type: ignore[attr-defined]

    assert not set(shown[Terminal]) & set("\x1b\x07\x9b\u202e\U000e0001")
    if output is Output.json:
        assert json.loads(shown[Terminal]) == json.loads(shown[io.StringIO]) == [{"name": name}]
    else:
        assert "Ren\u00e9e" in shown[Terminal]
        assert name in shown[io.StringIO]


@pytest.mark.parametrize("written", ["=HYPERLINK(1)", "+1+1", "-2*3", "@SUM(1)", "\t=1", "\r=1", "=\r=1"])
def test_what_strangers_wrote_is_no_formula_in_csv(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A spreadsheet shows it as the text that it is; numbers stay numbers, and other texts as they are."""
    show([{"a": written, "b": "-1,200.5", "c": Decimal("-3.5"), "d": "a=b"}], ("a", "b", "c", "d"), Output.csv)

    (_, row) = csv.reader(io.StringIO(capsys.readouterr().out, newline=""))
    assert row == [f"'{written}".replace("\r", "\n"), "-1,200.5", "-3.5", "a=b"]
