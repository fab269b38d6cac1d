"""The architecture page says what the code says: its files, functions, packages and journeys."""

import ast
import re
from collections.abc import Iterator
from functools import cache

from tests.test_tidy import CODE_BLOCK, PRODUCT, REPOSITORY, assert_none, repository_files, source

TEXT = (REPOSITORY / "deploy/docs/architecture.md").read_text(encoding="utf-8")
PICTURE = TEXT[TEXT.index("```text") : TEXT.index("```\n")]
PROSE = re.sub(r"\n {2,}", " ", CODE_BLOCK.sub("", TEXT))  # a step that goes on in the next line is one line
REFERENCE = re.compile(r"`([\w./]+\.py)`(?::((?:\s`[\w.]+`,?)+))?")  # a file, and maybe what it defines
QUOTED = re.compile(r"`([\w.]+)`")
STEP = re.compile(r"^(\d+)\. `([\w./]+\.py)`(.*)$", re.MULTILINE)
FOLDER = re.compile(r"\b(?:" + "|".join(PRODUCT) + r")/[\w/]*\w")
JOURNEYS = ("Journey 1", "Journey 2", "Journey 3", "The ordinary way")


@cache
def definitions(file: str) -> frozenset[str]:
    """The functions, classes and values at the top of a file, and what its classes define, as ``Class.name``."""
    return frozenset(names(source(REPOSITORY / file).body))


def names(body: list[ast.stmt], owner: str = "") -> Iterator[str]:
    """What the statements define."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield owner + node.name
            yield from names(node.body, f"{owner}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner + node.name
        elif isinstance(node, ast.Assign):
            yield from (owner + target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield owner + node.target.id


def missing(text: str) -> Iterator[str]:
    """The files that a text names and that do not exist, and the names that such a file does not define."""
    for file, quoted in REFERENCE.findall(text):
        if not (REPOSITORY / file).is_file():
            yield file
        else:
            yield from (f"{file}: {name}" for name in QUOTED.findall(quoted) if name not in definitions(file))


def section(title: str) -> str:
    """What stands below a heading that begins with the title, up to the next heading."""
    found = re.search(rf"^#+ {title}.*?$(.*?)(?=^#|\Z)", PROSE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def steps(title: str) -> list[tuple[str, bool]]:
    """The modules of a journey in order, and whether the page marks the step as a return."""
    return [(file, "**return**" in rest) for _, file, rest in STEP.findall(section(title))]


def test_every_file_and_name_exists() -> None:
    """Each file of the page exists, and defines the functions and classes that stand behind it."""
    assert_none(missing(PROSE))


def test_the_page_names_functions() -> None:
    """The test above is not empty: it reads the steps of the journeys with their functions."""
    assert sum(len(QUOTED.findall(quoted)) for _, quoted in REFERENCE.findall(PROSE)) > 100


def test_a_renamed_function_is_found() -> None:
    """A function, a method and a file that do not exist are each reported."""
    text = "`meters/exact.py`: `encode`, `encoded`: text; `meters/log.py`: `Log.put`; and `meters/no.py`: `encode`."

    assert list(missing(text)) == ["meters/exact.py: encoded", "meters/log.py: Log.put", "meters/no.py"]


def test_every_journey_has_numbered_steps() -> None:
    """Three journeys, the third by both ways, each with its steps counted from 1."""
    counted = {title: [int(number) for number, _, _ in STEP.findall(section(title))] for title in JOURNEYS}

    assert all(len(numbers) > 10 and numbers == list(range(1, len(numbers) + 1)) for numbers in counted.values())


def test_a_journey_meets_a_module_once_unless_the_page_gives_the_reason() -> None:
    """A module stands twice in a journey only if the last section lists it for that journey, and says why."""
    remaining = section("Returns that remain")

    def differences() -> Iterator[str]:
        for title in JOURNEYS:
            modules = [file for file, _ in steps(title)]
            lines = [line for line in remaining.splitlines() if line.startswith(f"- {title}: ")]
            listed = {file for line in lines for file, _ in REFERENCE.findall(line)}
            yield from (f"{title}: {file}" for file in {file for file in modules if modules.count(file) > 1} ^ listed)

    assert_none(differences())


def test_returns_are_marked() -> None:
    """The steps that the page marks as returns are those whose module stood before in the journey."""
    def differences() -> Iterator[str]:
        for title in JOURNEYS:
            before: set[str] = set()
            for file, is_return in steps(title):
                if is_return != (file in before):
                    yield f"{title}: {file}"
                before.add(file)

    assert_none(differences())


def test_the_picture_has_every_package() -> None:
    """The picture names each package inside the four, and no other."""
    folders = [path.parent.relative_to(REPOSITORY) for path in repository_files() if path.name == "__init__.py"]
    packages = {str(folder) for folder in folders if folder.parts[0] in PRODUCT and len(folder.parts) > 1}

    assert set(FOLDER.findall(PICTURE)) == packages
