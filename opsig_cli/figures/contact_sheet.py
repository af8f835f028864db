"""Sheets of samples: picture, label, and prediction before and after a step (the paper's Appendix H)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opsig_cli.figures.canvas import FAINT, MARGIN, MONO, WIDTH, WRONG, Area, cut, typeset, visible
from opsig_cli.figures.text_lines import TextLine, draw_lines, lines_height

PITCH = 1.05
"""Inches from tile to tile."""
LINE = 0.135
"""Inches a line of text."""
TEXT_LINES = 8
LONGEST = 15
"""Columns of a line under a picture; longer class names are cut."""


@dataclass(frozen=True)
class Tile:
    """One sample: `picture` is (h, w, 1 or 3) uint8, text, or None; `before` and `after` are predicted labels; `sample`
    its index, `name` what a person's own log calls it."""

    picture: np.ndarray | str | None
    label: str | None
    before: str | None
    after: str | None
    caption: str = ""
    sample: int | None = None
    name: str | None = None

    def lines(self) -> list[tuple[str, str, str]]:
        """What is written under the picture: text, colour and weight of each line."""
        lines = []
        if self.label is not None:
            lines.append((cut(self.label, LONGEST), "black", "bold"))
        for word, predicted in (("was", self.before), ("now", self.after)):
            if predicted is not None:
                wrong = self.label is not None and predicted != self.label
                mark = " \N{MULTIPLICATION SIGN}" if wrong else ""
                lines.append((f"{word} {cut(predicted, LONGEST - 4)}{mark}", WRONG if wrong else "#333333", "normal"))
        number = None if self.sample is None else f"#{self.sample}"
        if caption := ", ".join(filter(None, (number, self.caption))):
            lines.append((typeset(caption), FAINT, "normal"))
        if self.name is not None:
            lines.append((cut(self.name, LONGEST, end=True), FAINT, "normal"))
        return lines


def sheet_height(tiles: Sequence[Tile], columns: int) -> float:
    """Inches that a sheet of this many columns takes, its title included."""
    if listed := text_lines(tiles):
        return 0.3 + lines_height(listed)
    rows = -(-len(tiles) // columns)
    return 0.3 + max(1, rows) * _pitch(tiles) if tiles else 0.6


def draw_sheet(area: Area, left: float, title: str, tiles: Sequence[Tile], columns: int, colour: str) -> None:
    """Draw a titled sheet from `left` inches on; the colour frames every picture."""
    room = int(columns * PITCH * 72 / 6.2)
    area.text(left, 0.02, cut(typeset(title), room), color=colour, fontweight="bold")
    if not tiles:
        area.text(left, 0.3, "none", color=FAINT)
        return
    if listed := text_lines(tiles):
        draw_lines(area, left, 0.28, columns * PITCH, listed, colour)
        return
    pitch, shown = _pitch(tiles), _shown(tiles)
    height = -(-len(tiles) // columns) * pitch
    axes = area.axes(left, 0.26, columns * PITCH, height)
    axes.set(xlim=(0, columns * PITCH), ylim=(height, 0))
    axes.set_axis_off()
    inner = PITCH - 0.16
    under = inner + 0.08 if shown else 0.05
    for number, tile in enumerate(tiles):
        x = number % columns * PITCH
        y = number // columns * pitch
        if shown:
            _draw_picture(axes, tile.picture, x + 0.03, y + 0.03, inner, colour)
        for line, (words, ink, weight) in enumerate(tile.lines()):
            axes.text(
                x + 0.03, y + under + line * LINE, visible(words), color=ink, fontweight=weight, fontsize=7,
                va="top", parse_math=False,
            )  # fmt: skip


def text_lines(tiles: Sequence[Tile]) -> list[TextLine]:
    """The tiles as lines where all of them are text of one line; none elsewhere."""
    found = []
    for tile in tiles:
        if not isinstance(tile.picture, str) or "\n" in tile.picture:
            return []
        told = tile.label is not None and tile.picture.endswith("]")  # the target says what the label does
        notes = tile.lines()[told:]
        found.append(TextLine(tile.picture, [(words, ink) for words, ink, _ in notes]))
    return found


def _draw_picture(axes, picture: np.ndarray | str | None, x: float, y: float, side: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    if isinstance(picture, np.ndarray):
        pixels = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
        axes.imshow(pixels, extent=(x, x + side, y + side, y), interpolation="nearest", aspect="auto", zorder=1)
    else:
        words = "no picture" if picture is None else picture
        wrapped = [line for part in words.split("\n") for line in textwrap.wrap(part, 14) or [""]]
        if len(wrapped) > TEXT_LINES:  # its end is what the loss is of
            wrapped = ["\N{HORIZONTAL ELLIPSIS}", *wrapped[1 - TEXT_LINES :]]
        axes.text(
            x + side / 2, y + side / 2, visible("\n".join(wrapped)), ha="center", va="center", fontsize=7,
            family=MONO, color=FAINT if picture is None else "black", parse_math=False,
        )  # fmt: skip
    axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=colour, linewidth=1.4, zorder=2))
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())


def _shown(tiles: Sequence[Tile]) -> bool:
    """Whether any sample has a picture: without, there are lines and no boxes."""
    return any(tile.picture is not None for tile in tiles)


def _pitch(tiles: Sequence[Tile]) -> float:
    """Inches from row to row."""
    text = LINE * max(len(tile.lines()) for tile in tiles) + 0.02
    return text + (PITCH if _shown(tiles) else 0.1)


FULL_COLUMNS = int((WIDTH - 2 * MARGIN) / PITCH)
HALF_COLUMNS = int((WIDTH - 3 * MARGIN) / 2 / PITCH)
