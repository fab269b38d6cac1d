"""The page with the truth table says what the tests with the real libraries prove."""

import re

from tests.vendors import truths


def test_the_page_is_made_from_the_table() -> None:
    """Rows and versions; ``python -m tests.vendors.truths`` writes them."""
    page = truths.PAGE.read_text(encoding="utf-8")
    assert truths.filled(page) == page


def test_every_row_is_proven() -> None:
    """A test with the real library names it."""
    files = [*truths.HERE.glob("vendor_*.py"), truths.TOKENS]
    named = set(re.findall(r'"([a-z-]+)"', "".join(path.read_text(encoding="utf-8") for path in files)))
    assert truths.TRUTHS.keys() - named == set()
