"""One sample between its nearest allies and opponents. T steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from opsig_cli.figures.canvas import MARGIN, SIDES, WHOLE, WIDTH, Area, heading, page, sentence
from opsig_cli.figures.contact_sheet import HALF_COLUMNS, Tile, draw_sheet, sheet_height
from opsig_cli.figures.curves import HEIGHT, Curve, draw_losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Side = tuple[str, Sequence[Tile], np.ndarray]
"""A set of samples: its title, its tiles, and its mean loss (T,)."""


def neighbours_page(
    own: Side, allies: Side, opponents: Side, steps: np.ndarray, whole: np.ndarray, zoom: tuple[int, int], title: str,
    said: str, axis: str,
) -> Figure:  # fmt: skip
    """A sample, its nearest allies beside its nearest opponents, and their mean losses with the whole loss (T,)."""

    def itself(area: Area) -> None:
        draw_sheet(area, MARGIN, own[0], own[1], HALF_COLUMNS, WHOLE)

    def both(area: Area) -> None:
        for number, (name, tiles, _) in enumerate((allies, opponents)):
            left = MARGIN if number == 0 else WIDTH / 2 + MARGIN / 2
            draw_sheet(area, left, name, tiles, HALF_COLUMNS, SIDES[number])

    lines = [
        Curve(own[0], own[2]), Curve("mean of the allies", allies[2], SIDES[0]),
        Curve("mean of the opponents", opponents[2], SIDES[1]), Curve("mean, all samples", whole, style=":"),
    ]  # fmt: skip
    height = max(sheet_height(tiles, HALF_COLUMNS) for _, tiles, _ in (allies, opponents)) + 0.1
    return page([
        heading(title), sentence(said), (sheet_height(own[1], HALF_COLUMNS) + 0.1, itself), (height, both),
        (HEIGHT + 0.15, lambda area: draw_losses(area, steps, lines, zoom, axis)),
    ])  # fmt: skip
