"""Samples of text, one a line, their targets under one another, as in the paper's Figs. 7 and 8. Lengths are inches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsig_cli.figures.canvas import MONO, Area, columns, cut, visible

PITCH = 0.155
"""From line to line."""
CHARACTER = 7 * 0.602 / 72
"""Width of a monospaced character at 7 points."""
TARGET = 0.9
NOTE = 0.95
"""Widths of the column of targets and of each column of notes."""


@dataclass(frozen=True)
class TextLine:
    """A context with its target in brackets at the end, and notes behind it, each with its colour."""

    text: str
    notes: Sequence[tuple[str, str]]


def lines_height(lines: Sequence[TextLine]) -> float:
    """What the lines take, some room under them included."""
    return len(lines) * PITCH + 0.1


def draw_lines(area: Area, left: float, top: float, width: float, lines: Sequence[TextLine], colour: str) -> None:
    """Write the lines; of a long context its end, behind an ellipsis. The colour is the targets'."""
    parts = [_split(line.text) for line in lines]
    beside = TARGET if any(target for _, target in parts) else 2 * CHARACTER
    room = int((width - beside - NOTE * max(len(line.notes) for line in lines)) / CHARACTER)
    end = min(room, max(columns(context) for context, _ in parts)) * CHARACTER
    style = {"family": MONO, "fontsize": 7}
    for number, (line, (context, target)) in enumerate(zip(lines, parts, strict=True)):
        y = top + number * PITCH
        area.text(left + end, y, cut(visible(context), room, end=True), ha="right", **style)
        area.text(left + end, y, fitted(target, TARGET), color=colour, fontweight="bold", **style)
        for place, (words, ink) in enumerate(line.notes):
            area.text(left + end + beside + place * NOTE, y, fitted(words, NOTE), color=ink, **style)


def _split(text: str) -> tuple[str, str]:
    """Context and target of `context[target]`, the bracket with the target, which can be a bracket itself."""
    bracket = text.rfind("[", 0, -2) if text.endswith("]") else -1
    return (text, "") if bracket < 0 else (text[:bracket], text[bracket:])


def fitted(words: str, width: float) -> str:
    """Words shortened to a column's width."""
    return cut(visible(words), int(width / CHARACTER) - 1)
