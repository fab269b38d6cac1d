"""The house rules, as tests. Each rule looks at every file of the repository and reports all its offenses at once.

What a linter can say is in pyproject.toml (ruff, mypy, import-linter); here is what it cannot.
"""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("meters", "ingest", "aggregator", "deploy", "benchmarks", "tests")
PRODUCT = ("meters", "ingest", "aggregator", "deploy")

FUNCTION_LINES_MAX = 70  # what still fits on a screen
FILE_LINES_MAX = 600  # from here on, look again: is this one subject?
LONG_FILES: dict[str, str] = {  # the path of a longer file, and the reason why it stays whole
    "meters/ledger/ledger.py": "movements, windows and the fold of both are one rule of what is credited",
}
MODULE_LINES_MIN = 60  # a smaller one that a single module uses is a part of that one
SMALL_MODULES: dict[str, str] = {}  # the path of one that stands apart all the same, and the reason
FOLDER_MODULES_MAX = 14  # what a newcomer takes in at a glance
COLLECTIONS = {  # folders that may hold more, because each file is one of a kind
    "aggregator/api": "one file per resource",
    "benchmarks": "one file per benchmark",
    "deploy/commands": "one file per group of commands",
    "ingest/client/strategies": "one file per vendor or way of measuring",
    "meters": "one file per concept of metering",
    "tests/aggregator/api": "one file per resource",
    "tests/aggregator/reconcile": "one file per check",
    "tests/meters": "one file per concept of metering",
    "tests/deploy/commands": "one file per group of commands",
    "tests/vendors": "one file per vendor's library, and one for what it bills",
}
NAMELESS_MODULES = {"utils", "util", "common", "models", "types", "helpers", "misc"}  # a name that says nothing
ABBREVIATIONS = {"cfg", "conf", "mgr", "evt", "obj"}  # a full word costs nothing
ENVIRONMENT_HOME = "deploy/settings.py"
IMPURE_CALLS = {"float", "open", "print", "input", "eval", "exec", "globals", "__import__"}
ENTRANCES = {"deploy.cli"}  # started by its name
CODE_BLOCK = re.compile(r"^```.*?^```|(?:^ {4}[^\n]*\n)+", re.DOTALL | re.MULTILINE)  # of Markdown
NO_DIAGRAM = re.compile(r"^```(?:python|sh|js)$|^ {4}(?:make|meterstream) [a-z]|\.py\b", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")  # to a file of the repository, to a place in one
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FOR_APPLICATIONS = re.compile(r"ingest\.client\.(strategies\..*|prices|testing)")  # imported by who uses the client

# Places and words that belong to one machine or to how the work was done, not to the product.
UNWELCOME = re.compile(
    r"/(?:work|home|root|Users|farm)/[A-Za-z.]"  # a machine's paths
    r"|\bpypi\.org\b|pythonhosted\.org|registry\.npmjs|npmjs\.(?:org|com)|crates\.io|debian\.org|proxy\.golang"
    r"|\.\./shared\b|\bshared/(?:design|data|probes|conformance)"
    r"|\bco-authored-by\b|\b(?:written|generated|built|made) (?:by|with) (?:an? )?(?:ai|llm|claude|chatgpt|copilot)\b",
    re.IGNORECASE,
)


@cache
def repository_files() -> tuple[Path, ...]:
    """Every file that is tracked, or would be if it were added."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607 (git is on the path)
        cwd=REPOSITORY, capture_output=True, check=True, text=True,
    ).stdout
    paths = (REPOSITORY / name for name in listing.split("\0") if name)
    return tuple(sorted(path for path in paths if path.is_file()))


@cache
def source(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def python_files(*rooms: str) -> Iterator[Path]:
    """The Python files of the rooms (all rooms when none is named)."""
    for path in repository_files():
        if path.suffix == ".py" and path.relative_to(REPOSITORY).parts[0] in (rooms or ROOMS):
            yield path


def nodes(*rooms: str) -> Iterator[tuple[Path, ast.AST]]:
    """Every syntax node of the rooms, with its file."""
    for path in python_files(*rooms):
        for node in ast.walk(source(path)):
            yield path, node


def place(path: Path, node: ast.AST | None = None) -> str:
    """Where something stands, as editors take it."""
    line = f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr | ast.arg) else ""
    return f"{path.relative_to(REPOSITORY)}{line}"


def module_name(path: Path) -> str:
    """The name a file is imported under."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def assert_none(offenses: Iterable[str]) -> None:
    """Fail with every offense, a line each."""
    found = sorted(set(offenses))
    assert not found, "\n" + "\n".join(found)


def test_functions_fit_on_a_screen() -> None:
    """No function is longer than 70 lines."""
    def too_long() -> Iterator[str]:
        for path, node in nodes():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    yield f"{place(path, node)} {node.name} has {lines} lines"

    assert_none(too_long())


def test_a_long_file_has_a_reason() -> None:
    """A Python file over 600 lines stands in LONG_FILES with its reason, and no other file stands there."""
    lengths = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    long = {name for name, lines in lengths.items() if lines > FILE_LINES_MAX}

    assert_none(f"{name} has {lengths[name]} lines and no reason" for name in long - set(LONG_FILES))
    assert_none(f"{name} needs no reason" for name in set(LONG_FILES) - long)


def test_a_small_module_has_several_users() -> None:
    """A product module under 60 lines that a single one imports stands in SMALL_MODULES, and no other module does."""
    importers = Counter(name for path in python_files(*PRODUCT) for name in set(imported_names(path)))
    lengths = {
        place(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(*PRODUCT)
        if path.stem not in ("__init__", "__main__") and importers[module_name(path)] == 1
    }
    small = {name for name, lines in lengths.items() if lines < MODULE_LINES_MIN}

    assert_none(f"{name} has {lengths[name]} lines, one user and no reason" for name in small - set(SMALL_MODULES))
    assert_none(f"{name} needs no reason" for name in set(SMALL_MODULES) - small)


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    """No folder has more than 14 modules, unless it is a collection. Packages' ``__init__`` files do not count."""
    modules = Counter(place(path.parent) for path in python_files() if path.stem != "__init__")

    assert_none(
        f"{folder} has {count} modules"
        for folder, count in modules.items()
        if count > FOLDER_MODULES_MAX and folder not in COLLECTIONS
    )
    assert_none(f"{folder} is no folder of modules" for folder in COLLECTIONS if folder not in modules)


def test_every_module_has_a_name_that_says_something() -> None:
    """Nothing is called utils, common, models, types or helpers: a name says what is inside."""
    assert_none(place(path) for path in python_files() if NAMELESS_MODULES & set(module_name(path).split(".")))


def test_names_are_full_words() -> None:
    """No variable or parameter is an abbreviation such as cfg or mgr."""
    def short() -> Iterator[str]:
        for path, node in nodes():
            name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else ""
            if set(name.lower().split("_")) & ABBREVIATIONS:
                yield f"{place(path, node)} {name}"

    assert_none(short())


def test_the_environment_is_read_in_one_place() -> None:
    """Only deploy/settings.py reads the environment; everything else is told."""
    def readers() -> Iterator[str]:
        for path, node in nodes(*PRODUCT, "benchmarks"):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if {"environ", "environb", "getenv", "putenv"} & set(names) and place(path) != ENVIRONMENT_HOME:
                yield place(path, node)

    assert_none(readers())


def undocumented(path: Path, owner: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Public classes, functions and methods without a docstring. A leading underscore makes a name private."""
    for node in owner.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        derived = any(  # a setter speaks through its getter, an overload through its implementation
            (isinstance(mark, ast.Attribute) and mark.attr == "setter")
            or (isinstance(mark, ast.Name) and mark.id == "overload")
            for mark in node.decorator_list
        )
        if not ast.get_docstring(node) and not derived:
            yield f"{place(path, node)} {node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(path, node)


def test_public_names_are_documented() -> None:
    """Every module and every public class, function and method of the product has a docstring."""
    def silent() -> Iterator[str]:
        for path in python_files(*PRODUCT, "benchmarks"):
            tree = source(path)
            if tree.body and not ast.get_docstring(tree):
                yield f"{place(path)} the module"
            yield from undocumented(path, tree)

    assert_none(silent())


def test_every_test_states_its_truth() -> None:
    """Every test has a docstring: the truth that it holds."""
    assert_none(
        f"{place(path, node)} {node.name}"
        for path, node in nodes("tests")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if node.name.startswith("test_") and not ast.get_docstring(node)
    )


def test_an_assertion_claims_one_thing() -> None:
    """No `assert a and b`: two assertions say which one failed."""
    assert_none(
        place(path, node)
        for path, node in nodes()
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
    )


def test_every_room_has_a_readme() -> None:
    """Each room tells what it owns and what it does not."""
    assert_none(f"{room}/README.md is missing" for room in ROOMS if not (REPOSITORY / room / "README.md").is_file())


def test_every_module_stands_in_a_floor_plan() -> None:
    """The README of its folder, or of one above it in the room, names each module; a strategy's name says it all.

    Many names are words of sentences, too. So a name ends in .py, stands in backticks, or in a block that is a diagram.
    """
    def unnamed() -> Iterator[str]:
        for path in python_files(*PRODUCT):
            plans = [REPOSITORY / above / "README.md" for above in path.relative_to(REPOSITORY).parents[:-1]]
            told = "\n".join(plan.read_text(encoding="utf-8") for plan in plans if plan.is_file())
            diagrams = "\n".join(block for block in CODE_BLOCK.findall(told) if not NO_DIAGRAM.search(block))
            stem = re.escape(path.stem)
            is_named = re.search(rf"\b{stem}\.py\b|`(?:[\w./]*[./])?{stem}`", told)
            if path.stem not in ("__init__", "__main__") and not is_named and not re.search(rf"\b{stem}\b", diagrams):
                yield place(path)

    assert_none(path for path in unnamed() if "/strategies/" not in path)


def anchors(page: Path) -> set[str]:
    """The names that links to a page's headings have: small letters, spaces as dashes, no punctuation."""
    prose = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    words = (re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading) for heading in HEADING.findall(prose))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in words}


def test_every_link_of_a_page_leads_somewhere() -> None:
    """A link in Markdown names a file or a folder that is there, and a heading that the page has."""
    def astray() -> Iterator[str]:
        for page in repository_files():
            if page.suffix != ".md":
                continue
            for file, anchor in LINK.findall(CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))):
                target = (page.parent / file).resolve() if file else page
                if not target.exists() or (anchor and anchor not in anchors(target)):
                    yield f"{place(page)} {file}#{anchor}"

    assert_none(astray())


def imported_names(path: Path) -> Iterator[str]:
    """Every module that a file may import, at its top or inside a function."""
    for node in ast.walk(source(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_module_is_dead() -> None:
    """Every module of the product is imported by another one of it, or is an entrance."""
    used = set(ENTRANCES)
    for path in python_files(*PRODUCT, "benchmarks"):
        used |= {name for name in imported_names(path) if name != module_name(path)}

    assert_none(
        f"{place(path)} is never imported"
        for path in python_files(*PRODUCT)
        if path.name not in ("__init__.py", "__main__.py") and module_name(path) not in used
        if not FOR_APPLICATIONS.fullmatch(module_name(path))
    )


def test_the_domain_is_exact_and_touches_nothing() -> None:
    """meters/ calls neither float() nor open(): quantities are exact, and the world comes in as arguments."""
    assert_none(
        f"{place(path, node)} {node.func.id}()"
        for path, node in nodes("meters")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS
    )


def test_files_speak_of_the_product_alone() -> None:
    """No file names a machine's paths, a package registry's host, or anything else that is not the product's."""
    def strangers() -> Iterator[str]:
        for path in repository_files():
            if path == Path(__file__).resolve():
                continue
            text = path.read_bytes().decode("utf-8", errors="ignore")
            for number, line in enumerate(text.splitlines(), 1):
                if found := UNWELCOME.search(line):
                    yield f"{place(path)}:{number} {found.group()}"

    assert_none(strangers())
