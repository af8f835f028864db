"""What the shell offers for a value: names of tasks, optimizers, scores, backends, and groups of a run.

Nothing here runs a person's code or imports torch: classes of a file are found by reading its text.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterable
from pathlib import Path

OPTIMIZERS = ("gd", "sgd", "momentum", "adam", "splitsgd", "signsgd")
MODELS = ("mlp", "cnn", "resnet18", "resnet20", "resnet56", "resnet110", "vgg11", "vgg11-bn", "vit", "gpt")
MOST = 200
"""Names that are offered."""


def among(*values: str) -> Callable[[str], list[str]]:
    """Offer those of these values that begin as what is written."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def tasks(incomplete: str) -> list[str]:
    """Installed tasks, Python files here, and the classes of one whose name is written with its colon."""
    place, colon, begun = incomplete.rpartition(":")
    if colon and place.endswith(".py"):
        return [f"{place}:{name}" for name in _classes(Path(place)) if name.startswith(begun)]
    from opsig_cli.tasks import installed

    files = sorted(str(path) + ":" for path in Path(".").glob("*.py") if _classes(path))
    return [name for name in (*installed(), *files) if name.startswith(incomplete)]


def backends(incomplete: str) -> list[str]:
    """Installed backends."""
    from importlib.metadata import entry_points

    names = sorted({entry.name for entry in entry_points(group="opsig.backends")})
    return [name for name in names if name.startswith(incomplete)]


def scores(incomplete: str) -> list[str]:
    """What `mine` can rank by."""
    from opsig_cli.studies.mining import SCORES

    return [name for name in SCORES if name.startswith(incomplete)]


def names_of_samples(incomplete: str) -> list[str]:
    """Sets of the run's samples: its labels, and the pairs and groups that cluster found last."""
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS") or ""  # an unfinished option hides it
    run = next((word for word in line.split() if word.endswith((".h5", ".hdf5")) and os.path.isfile(word)), None)
    return [name for name in _sets(run) if name.startswith(incomplete)][:MOST]


def _sets(run: str | None) -> Iterable[str]:
    from opsig_cli.errors import OpsigError
    from opsig_cli.studies import kept
    from opsig_cli.studies.clustering import keeping
    from opsig_cli.trajectory.file import open_trajectory

    kinds = ["pair:", "group:"]
    if run is None:
        return kinds
    try:
        with open_trajectory(run) as trajectory:
            labels = set(trajectory.read("samples/label").tolist()) if trajectory.has("samples/label") else set()
            last = kept.latest(trajectory, keeping.GROUP, keeping.Kept)
    except (OpsigError, OSError):  # the command itself says what is wrong
        return kinds
    if last is not None:  # what cluster found last
        clusters = last.found.clusters
        kinds = [f"pair:{number}" for number in sorted(clusters.numbers())]
        kinds += [f"group:{number}" for number in range(1, len(clusters.groups) + 1)]
    return [*kinds, *sorted(f"label:{label}" for label in labels)]


def _classes(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    needed = {"model", "dataset", "losses"}
    found = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    tasks = [c for c in found if needed <= {d.name for d in c.body if isinstance(d, ast.FunctionDef)}]
    return [c.name for c in tasks or found]
