"""Tables: what people copy out of them stays in one piece."""

import io
import sys

import pytest

from deploy.output import show_table

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
