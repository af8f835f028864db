"""Who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "opsig_cli"
HEAVY = {"torch", "sklearn", "scipy", "matplotlib"}
ALLOWED = {
    "errors": set(),
    "analysis": {"analysis"},
    "figures": {"figures"},
    "clustering": {"cluster_records", "errors", "groups", "measure", "movers", "trajectory"},
    "report": {
        "agreement",
        "analysis",
        "clustering",
        "cluster_records",
        "comparing",
        "curvature",
        "errors",
        "figures",
        "groups",
        "movers",
        "pictures",
        "texts",
        "trajectory",
    },
    "schema": {"errors"},
    "records": {"errors"},
    "tasks": {"errors"},
    "backends": {"errors", "tasks"},
    "rows": {"schema"},
    "trajectory": {"errors", "schema", "store", "chunks", "rows", "vetting"},
    "store": {"errors"},
    "chunks": set(),
    "vetting": set(),
    "recorder": {"errors", "schema", "rows", "trajectory", "backends"},
    "importers": {
        "errors",
        "schema",
        "trajectory",
        "backends",
        "tasks",
        "recorder",
        "settings",
        "importers",
    },
    "measure": {"errors", "schema", "trajectory", "backends", "tasks", "recorder", "settings"},
}


def imports(path: Path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("path", modules(CORE), ids=lambda p: str(p.relative_to(CORE)))
def test_core_modules_import_only_what_lies_below_them(path):
    own = {name.split(".")[1] for name in imports(path, False) if name.startswith("opsig_cli.")}
    unit = path.relative_to(CORE).parts[0].removesuffix(".py")
    if unit in ALLOWED:
        assert own <= ALLOWED[unit] | {unit}
    if unit != "main":
        assert "main" not in own
    if unit not in ("main", "commands"):
        assert "commands" not in own
        assert "report" not in own - {unit}
    assert not {name for name in imports(path, False) if name.split(".")[0] in ("opsig_torch", "opsig_zoo")}


@pytest.mark.parametrize("path", modules(CORE), ids=lambda p: str(p.relative_to(CORE)))
def test_heavy_libraries_are_imported_where_they_are_used(path):
    assert not HEAVY & {name.split(".")[0] for name in imports(path, True)}
    assert "click" not in {name.split(".")[0] for name in imports(path, False)}


@pytest.mark.parametrize("name", ["charts", "images"])
def test_what_draws_the_report_imports_nothing_of_ours(name):
    own = {found for found in imports(CORE / "report" / f"{name}.py", False) if found.startswith("opsig_cli")}
    assert not own


@pytest.mark.parametrize("path", modules(ROOT / "plugins"), ids=lambda p: p.name)
def test_plugins_import_only_the_contracts(path):
    own = {name.split(".")[1] for name in imports(path, False) if name.startswith("opsig_cli.")}
    assert own <= {"backends", "tasks", "errors", "analysis"}  # analysis imports nothing of ours
