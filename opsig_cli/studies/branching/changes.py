"""What a branch changes: samples that count more or less, settings, or the side of the edge of stability."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsig_cli.errors import UsageError

EDGES = {"into": 0.8, "out of": 2.0}
"""The threshold that a branch's learning rate gives, as a multiple of the sharpness at the fork."""


@dataclass(frozen=True)
class Change:
    """One branch's difference: weights by the name of samples, settings by name, and "into" or "out of" the edge."""

    weights: tuple[tuple[str, float], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    edge: str | None = None

    @property
    def words(self) -> str:
        """The change in words.

        >>> Change((("pair:1", 0.0), ("label:Coat", 0.5)), {"learning_rate": 0.05}).words
        'drop pair:1, weight label:Coat=0.5, learning rate 0.05'
        """
        parts = [f"weight {name}={weight:g}" if weight else f"drop {name}" for name, weight in self.weights]
        parts += [f"{key.replace('_', ' ')} {value}" for key, value in self.settings.items()]
        parts += [f"{self.edge} the edge"] if self.edge else []
        return ", ".join(parts) or "nothing"

    @property
    def slug(self) -> str:
        """The change as a part of a file's name.

        >>> Change((("pair:1", 0.0),)).slug
        'drop-pair-1'
        """
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.words).strip("-.")[:80]

    def stored_form(self) -> dict[str, Any]:
        """For the file's `change_json`."""
        return {"weights": [list(pair) for pair in self.weights], "settings": dict(self.settings), "edge": self.edge}


def changes_of(
    drop: Sequence[str], weight: Sequence[str], settings: Mapping[str, Any], edges: Sequence[str], each: bool
) -> list[Change]:
    """The branches that a command asks for: one of all changes together, or with `each` one of each.

    Both sides of the edge are two branches. Raises UsageError for a weight that is not NAME=NUMBER.

    >>> [change.words for change in changes_of(["pair:1", "pair:2"], [], {"seed": 1}, [], True)]
    ['drop pair:1', 'drop pair:2', 'seed 1']
    """
    if not 0 <= settings.get("label_smoothing", 0) < 1:
        raise UsageError(f"--label-smoothing {settings['label_smoothing']:g} is not at least 0 and below 1")
    weights = [(name.strip(), 0.0) for name in drop] + [_weight(text) for text in weight]
    if edges and "learning_rate" in settings:
        raise UsageError("--into-edge and --out-of-edge choose the learning rate. Leave --learning-rate out")
    if each:
        found = [Change((pair,)) for pair in weights]
        found += [Change(settings=settings)] if settings else []
        return found + [Change(edge=edge) for edge in edges] or [Change()]
    return [Change(tuple(weights), settings, edge) for edge in edges or [None]]


def _weight(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not equals or not name.strip() or not (math.isfinite(value) and value >= 0):
        raise UsageError(f"--weight '{text}' is not NAME=W with W at least 0. Write --weight group:3=0.5")
    return name.strip(), value
