"""The two ends of eigenvectors, as sheets of samples side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opsig_cli.figures.canvas import MARGIN, SIDES, WIDTH, Area, Block, heading, page, sentence
from opsig_cli.figures.contact_sheet import HALF_COLUMNS, Tile, draw_sheet, sheet_height

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sheet = tuple[str, Sequence[Tile]]
"""The title and the tiles of one end."""


def ends_page(panels: Sequence[tuple[str, Sheet, Sheet]], title: str) -> Figure:
    """Eigenvectors, one under the other: what is said of each, and the samples at its one end and at the other."""
    blocks = [heading(title)]
    for words, *both in panels:
        blocks += [heading(words, 10), _sheets(both)]
    return page(blocks if panels else [*blocks, sentence("no eigenvector was measured")])


def _sheets(both: Sequence[Sheet]) -> Block:
    def draw(area: Area) -> None:
        for number, (name, tiles) in enumerate(both):
            left = MARGIN if number == 0 else WIDTH / 2 + MARGIN / 2
            draw_sheet(area, left, name, tiles, HALF_COLUMNS, SIDES[number])

    return max(sheet_height(tiles, HALF_COLUMNS) for _, tiles in both) + 0.1, draw
