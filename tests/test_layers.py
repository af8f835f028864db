"""Who may import whom, read from the source: every import, those inside functions and TYPE_CHECKING blocks too.

FLOORS lists the rooms of `opsig_cli` from the ground up; a room imports from itself and from floors below it. Rooms on
one floor do not know each other.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "opsig_cli"
PLUGINS = ROOT / "plugins"
HEAVY = {"torch", "sklearn", "scipy", "matplotlib"}
FLOORS = [
    {"errors", "analysis", "figures"},
    {"tasks", "settings", "records"},
    {"backends"},
    {"trajectory"},
    {"studies", "integrations"},
    {"report"},
    {"__init__"},
    {"commands"},
    {"main"},
    {"__main__"},
]


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name of a module of ours; a package is its `__init__`."""
    base = CORE.parent if path.is_relative_to(CORE) else PLUGINS
    return ".".join(path.relative_to(base).with_suffix("").parts)


EVERY = {name_of(path): path for path in [*modules(CORE), *modules(PLUGINS)]}


def imported(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names of the modules that a file imports; ours are resolved to the module that is meant."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield resolved(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield resolved(f"{node.module}.{alias.name}", node.module or "")


def resolved(name: str, package: str = "") -> str:
    for candidate in (name, f"{name}.__init__", package, f"{package}.__init__"):
        if candidate in EVERY:
            return candidate
    return name


def room(name: str) -> str:
    return name.split(".")[1]


def floor(name: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room(name) in rooms)


@pytest.mark.parametrize("name", [name for name in EVERY if name.startswith("opsig_cli.")])
def test_a_room_imports_from_itself_and_from_floors_below(name):
    ours = {found for found in imported(EVERY[name]) if found.split(".")[0] == "opsig_cli"}
    climbs = [found for found in ours if room(found) != room(name) and floor(found) >= floor(name)]
    assert not climbs, f"{name} (floor {floor(name)}) imports {climbs}"
    assert not {found for found in imported(EVERY[name]) if found.split(".")[0] in ("opsig_torch", "opsig_zoo")}


def test_no_module_imports_in_a_circle():
    graph = {name: {found for found in imported(path) if found in EVERY} - {name} for name, path in EVERY.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


def test_only_the_session_knows_the_measurements():
    """In `opsig_torch`, the top floor alone is imported by none of the others, and only it names them all; the session
    that several processes share is one of its kind."""
    above = {name for name, path in EVERY.items() if "opsig_torch.session" in imported(path)}
    assert above == {"opsig_torch.__init__", "opsig_torch.parts"}


def test_the_top_of_the_house_is_a_screen():
    entries = {path.name for path in CORE.iterdir() if not path.name.startswith("__")}
    assert len(entries) <= 13, sorted(entries)


@pytest.mark.parametrize("name", [name for name in EVERY if name.startswith("opsig_cli.")])
def test_heavy_libraries_are_imported_where_they_are_used(name):
    assert not HEAVY & {found.split(".")[0] for found in imported(EVERY[name], True)}
    assert "click" not in {found.split(".")[0] for found in imported(EVERY[name])}


@pytest.mark.parametrize("name", ["opsig_cli.report.charts", "opsig_cli.report.images"])
def test_what_draws_the_report_imports_nothing_of_ours(name):
    assert not {found for found in imported(EVERY[name]) if found in EVERY}


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("opsig_cli.")])
def test_plugins_import_only_the_contracts(name):
    ours = {room(found) for found in imported(EVERY[name]) if found.split(".")[0] == "opsig_cli"}
    assert ours <= {"backends", "tasks", "errors", "analysis"}  # analysis imports nothing of ours


@pytest.mark.parametrize("package", [name for name in EVERY if name.endswith("__init__")])
def test_each_package_says_what_lives_there(package):
    assert ast.get_docstring(ast.parse(EVERY[package].read_text()))
