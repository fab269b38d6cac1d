"""A comparison of two checkouts: how pairs become ratios and verdicts, and that neither side runs the other's code."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import turns
from benchmarks.checkouts import Checkout, FailedError, checkouts, own_modules
from benchmarks.compare import GROUPS, KAFKA, Group, Rounds, Row, compared, measure, medians, order, report, table

ASKED = {"ingest": Group("small", 0, 0, 1, 1)}
SPEED = "speed, events/s"

# A benchmark of a small checkout: its speed is what its own product says.
FAKE_TURNS = """
import json, sys
import ingest
print(json.dumps(["small"]), flush=True)
while sys.stdin.readline():
    print(json.dumps({"speed, events/s": ingest.SPEED}), flush=True)
sys.exit(ingest.CODE)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of two commits, of which the second is twice as fast, and a change that is not committed."""
    root = tmp_path / "repository"
    (root / "benchmarks").mkdir(parents=True)
    (root / "ingest").mkdir()
    (root / "benchmarks" / "turns.py").write_text(FAKE_TURNS)
    (root / "benchmarks" / "load.py").write_text("")
    (root / ".gitignore").write_text("ignored\n__pycache__\n")
    git(root, "init", "--quiet")
    for speed in (100, 200):
        (root / "ingest" / "__init__.py").write_text(f"SPEED, CODE = {speed}, 0\n")
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", f"Speed {speed}")
    (root / "ingest" / "__init__.py").write_text("SPEED, CODE = 300, 0\n")
    (root / "ignored").write_text("")
    return root


def git(root: Path, *arguments: str) -> str:
    """Run git as somebody."""
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    command = ["git", "-C", str(root), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def worktrees(root: Path) -> int:
    """Worktrees that git knows of, the first included."""
    return git(root, "worktree", "list", "--porcelain").count("worktree ")


def rows(*pairs: tuple[float, float], goal: str = SPEED) -> list[Row]:
    """One goal that had these values of base and here."""
    return compared([({goal: base}, {goal: here}) for base, here in pairs])


def rounds(pair: tuple[Checkout, Checkout], count: int) -> Rounds:
    """So many rounds of the small benchmark."""
    found: dict[str, Rounds] = {}
    measure(pair, ASKED, count, found)
    return found["ingest"]


def test_more_in_a_second_and_less_time_are_better_alike() -> None:
    """Twice the rate and half the time both have the ratio 2, whatever a rate is a rate of."""
    assert rows((100, 200))[0].ratios == [2.0]
    assert rows((100, 200), goal="taken, requests/s")[0].ratios == [2.0]
    assert rows((10, 5), goal="a balance, p99, ms")[0].ratios == [2.0]
    assert rows((10, 5), goal="CPU, us an event")[0].ratios == [2.0]


def test_a_ratio_compares_the_two_turns_of_one_round() -> None:
    """A machine that gets slower from round to round changes no ratio, though every value is another one."""
    (row,) = rows((100, 100), (50, 50), (10, 10))

    assert row.ratios == [1.0, 1.0, 1.0]
    assert row.verdict == "same"


@pytest.mark.parametrize("number", range(2))
def test_no_side_is_favored_by_a_drift(number: int) -> None:
    """Each side takes four turns, at the same mean place; each is the first in every second round."""
    places = [[place for place, side in enumerate(order(number)) if side == one] for one in range(2)]

    assert [len(both) for both in places] == [4, 4]
    assert sum(places[0]) == sum(places[1])
    assert order(number)[0] == number


def test_a_round_has_the_median_of_its_turns() -> None:
    """A turn that something else disturbed moves no value."""
    turns = [{"a, ms": 1.0, "b/s": 10.0}, {"a, ms": 2.0, "b/s": 20.0}, {"a, ms": 50.0, "b/s": 0.1}]

    assert medians(turns) == {"a, ms": 2.0, "b/s": 10.0}


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.80, 0.90, 0.99], "worse"),
        ([0.80, 0.90, 1.01], "noise"),
        ([0.94, 0.96, 0.97], "same"),
        ([0.50, 1.00, 3.00], "same"),
        ([0.99, 1.10, 1.20], "noise"),
        ([1.02, 1.10, 1.20], "better"),
    ],
)
def test_a_verdict_needs_five_percent_and_rounds_that_agree(ratios: list[float], verdict: str) -> None:
    """A goal is worse or better when the median is beyond 5 % and every round points the same way."""
    assert Row(SPEED, [1.0] * 3, ratios, ratios).verdict == verdict


def test_a_value_that_one_side_lacks_is_not_compared() -> None:
    """A goal of one side alone is left out; so is a round in which one side measured nothing or zero."""
    (row,) = compared([
        ({"a, ms": 1.0, "base alone, ms": 1.0}, {"a, ms": 2.0, "here alone, ms": 1.0}),
        ({"a, ms": 0.0}, {"a, ms": 2.0}),
        ({"a, ms": 4.0}, {}),
    ])  # fmt: skip

    assert row == Row("a, ms", [1.0], [2.0], [0.5])


def test_a_table_fits_a_terminal_and_says_everything() -> None:
    """No line is wider than 80 columns, with the longest goals and large values; words of a long name stay whole."""
    goal = "one customer's total without a gateway at half load, p99, ms"
    found = rows((1_148_444.0, 1_166_020.0), (1_300_000.0, 800_000.0)) + rows((12.345, 0.98), goal=goal)
    text = report("b937e00", {"ingest": found})

    assert max(map(len, text.splitlines())) <= 80
    assert [line.split() for line in table(found).splitlines()] == [
        ["speed,", "events/s", "1,224,222", "983,010", "0.82", "0.62..1.02", "noise"],
        ["one", "customer's", "total", "without", "a", "12.3", "0.98", "13", "13..13", "better"],
        ["gateway", "at", "half", "load,", "p99,", "ms"],
    ]


def test_a_report_ends_with_what_is_worse() -> None:
    """The goals that fail a comparison are named once more at the end."""
    assert report("b937e00", {"drain": rows((100, 90))}).endswith("Worse: 1\n  drain: speed, events/s")
    assert report("b937e00", {"drain": rows((100, 100))}).endswith("Worse: 0")


def test_both_sides_run_their_own_code(repository: Path) -> None:
    """The commit is measured beside the working tree as it is, changes included, and each imports its own product."""
    with checkouts(repository, "HEAD~1") as pair:
        found = rounds(pair, 3)

        assert [(base[SPEED], here[SPEED]) for base, here in found] == [(100, 300)] * 3
        assert not (pair[1].root / "ignored").exists()
        assert worktrees(repository) == 2
    assert worktrees(repository) == 1
    assert not pair[0].root.parent.exists()


def test_a_commit_without_turns_is_given_those_of_the_working_tree(repository: Path) -> None:
    """A commit from before the comparison is measured, too."""
    git(repository, "rm", "--quiet", "--cached", "benchmarks/turns.py")
    git(repository, "commit", "--quiet", "-m", "Older")

    with checkouts(repository, "HEAD") as pair:
        ((base, here),) = rounds(pair, 1)

    assert (base[SPEED], here[SPEED]) == (200, 300)


def test_nothing_is_left_when_a_side_fails(repository: Path) -> None:
    """A side whose numbers are wrong ends the comparison with its exit code, and the worktree is removed."""
    (repository / "ingest" / "__init__.py").write_text("SPEED, CODE = 300, 3\n")

    with pytest.raises(FailedError) as failed, checkouts(repository, "HEAD") as pair:
        rounds(pair, 1)

    assert failed.value.code == 3
    assert worktrees(repository) == 1


def test_nothing_is_left_after_an_interrupt(repository: Path) -> None:
    """Ctrl-C removes the worktree and the scratch directory."""
    with pytest.raises(KeyboardInterrupt), checkouts(repository, "HEAD") as pair:
        raise KeyboardInterrupt

    assert worktrees(repository) == 1
    assert not pair[0].root.parent.exists()


def test_a_side_that_would_import_foreign_modules_is_refused(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that brings another product along, as PYTHONPATH may, ends the comparison before anything is measured."""
    (tmp_path / "elsewhere" / "ingest").mkdir(parents=True)
    (tmp_path / "elsewhere" / "ingest" / "__init__.py").write_text("")
    with checkouts(repository, "HEAD") as pair:
        own_modules(pair[0])
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))

        with pytest.raises(FailedError, match="would import ingest from"):
            own_modules(pair[0])


def test_an_unknown_commit_is_an_error(repository: Path) -> None:
    """A commit that git does not know is named, and nothing is made."""
    with pytest.raises(FailedError, match="nowhere is no commit"), checkouts(repository, "nowhere"):
        raise AssertionError

    assert worktrees(repository) == 1


def imports(path: Path) -> Iterator[str]:
    """The top-level packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]


def test_turns_import_only_the_standard_library() -> None:
    """Turns run in checkouts whose modules lie elsewhere, so they import nothing of this one."""
    assert turns.__file__
    assert set(imports(Path(turns.__file__))) <= sys.stdlib_module_names


def test_every_group_can_be_measured() -> None:
    """What a comparison asks for is what the turns have."""
    assert list(GROUPS | KAFKA) == list(turns.GROUPS)


def test_a_backlog_is_worked_off_on_command(tmp_path: Path) -> None:
    """A real turn: figures for every line of input, and the totals were right at the end."""
    command = [sys.executable, "-m", "benchmarks.turns", "drain", "--seconds", "0", "--size", "1000"]
    done = subprocess.run(command, cwd=tmp_path, input="backlog\nbacklog\n", capture_output=True, text=True, check=True)
    ready, *figures = map(json.loads, done.stdout.splitlines())

    assert ready == ["backlog"]
    assert [list(turn) for turn in figures] == [["a backlog, events/s", "a backlog, CPU us an event"]] * 2
    assert all(value > 0 for turn in figures for value in turn.values())
