"""What would have happened: the branches of a run as their files tell, and where a branch comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsig_cli.studies.branching.controls import RANDOM, SAME_LABELS
from opsig_cli.trajectory.file import Trajectory

BRANCHES = 40
"""Branches that are listed."""


def rows(branches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a branch: its change, and the largest rise of the untouched samples in it, unchanged, and in controls.

    What a file tells wrongly is left out.
    """
    found = []
    for branch in branches[:BRANCHES]:
        effects = branch["effects"] if isinstance(branch["effects"], list) else []
        effects = [e for e in effects if isinstance(e, Mapping) and e.get("kind") == "branch"]
        own = next((e for e in effects if e.get("control") is None), {})
        found.append({
            "name": Path(branch["path"]).name, "from_step": branch["from_step"], "change": str(branch["change"]),
            "samples": _number(own.get("samples_changed")), "stopped_at": _number(own.get("stopped_at")),
            **{name: _number(own.get(name)) for name in
               ("rise_of_untouched", "unchanged_rise_of_untouched", "swing_of_changed", "unchanged_swing_of_changed")},
            "sentence": str(own.get("sentence") or ""),
            "random": _span(effects, RANDOM), "same_labels": _span(effects, SAME_LABELS),
        })  # fmt: skip
    return found


def origin(run: Trajectory) -> list[tuple[str, str]]:
    """Where a branch comes from, as facts of the run; none for a run that is no branch."""
    said = run.attributes
    if "from_step" not in said:
        return []
    parent = Path(str(said.get("parent_path", ""))).name
    return [("Branch of", f"{parent}, from step {said['from_step']}"), ("Change", str(said.get("change", "")))]


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _span(effects: Sequence[Mapping[str, Any]], kind: str) -> tuple[float, float] | None:
    """The smallest and largest rise among the controls of a kind."""
    values = [_number(e.get("rise_of_untouched")) for e in effects if e.get("control") == kind]
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None
