"""The faults over Kafka say what became of them."""

import ast
from pathlib import Path

import pytest

from tests.support.faults.sender import Outcome, told
from tests.support.faults.store_checks import SEED

KAFKA = Path(__file__).parent / "kafka"
FILES = sorted(set(KAFKA.glob("test_*.py")) - {KAFKA / "test_process_model.py"})  # which has no fault to tell of


def test_no_figure_is_left_out() -> None:
    """All eight are there, in seconds or in words."""
    outcome = Outcome(5, 4, 3, 2, 1, 0)
    assert told("cut", outcome, 1.234, "twice") == (
        f"kafka, cut: sent 5, acked 4, stored 3, dead 2, lost 1, doubled 0, recovery 1.23 s, seed {SEED}; twice"
    )
    assert told("odd", outcome, "none, nothing stops", seed="none, nothing is drawn").endswith(
        "recovery none, nothing stops, seed none, nothing is drawn"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_fault_over_kafka_tells_them(path: Path) -> None:
    """What a test records is made by ``told``."""
    tests = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "").startswith("test_")]
    silent = {
        node.name  # type: ignore[attr-defined]  # it has one
        for node in tests
        if not any(isinstance(part, ast.Call) and getattr(part.func, "id", "") == "told" for part in ast.walk(node))
    }

    assert tests
    assert silent == set()
