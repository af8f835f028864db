"""The pictures of `mine` and `cluster`. T steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opsig_cli.figures.canvas import MARGIN, SIDES, WIDTH, Area, Block, heading, page, sentence
from opsig_cli.figures.contact_sheet import FULL_COLUMNS, HALF_COLUMNS, Tile, draw_sheet, sheet_height
from opsig_cli.figures.curves import HEIGHT, Curve, draw_losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Side = tuple[str, Sequence[Tile], np.ndarray]
"""A group: its title, its tiles, and its mean loss (T,)."""


@dataclass(frozen=True)
class PairPanel:
    """Two opposing groups and what is said of them."""

    title: str
    side_a: Side
    side_b: Side


def movers_figure(
    sheets: Sequence[tuple[str, Sequence[Tile]]], steps: np.ndarray, curves: Mapping[str, np.ndarray],
    whole: np.ndarray, zoom: tuple[int, int], title: str,
) -> Figure:  # fmt: skip
    """Sheets of mined samples, each in a colour, and under them the curves of the same colours, (T,) each, with
    the whole loss (T,)."""
    colours = {name: SIDES[number % 2] for number, name in enumerate(curves)}
    lines = [Curve(name, values, colours[name]) for name, values in curves.items()]
    lines.append(Curve("all samples", whole, style="--"))
    blocks = [heading(title)]
    blocks.append((HEIGHT, lambda area: draw_losses(area, steps, lines, zoom)))
    for number, (name, tiles) in enumerate(sheets):
        blocks.append(sheet_block(name, tiles, SIDES[number % 2]))
    return page(blocks)


def sheet_block(name: str, tiles: Sequence[Tile], colour: str) -> Block:
    """A sheet of samples over the whole width, under its name."""
    return sheet_height(tiles, FULL_COLUMNS), lambda area: draw_sheet(area, MARGIN, name, tiles, FULL_COLUMNS, colour)


def pairs_figure(
    panels: Sequence[PairPanel], steps: np.ndarray, whole: np.ndarray, title: str, zoom: tuple[int, int],
    after: Sequence[Block] = (),
) -> Figure:  # fmt: skip
    """Opposing pairs: each its groups' sheets side by side over their mean losses with the whole loss (T,).

    `after`: blocks that follow.
    """
    blocks = [heading(title)]
    if not panels:
        blocks.append(sentence("no opposing pair was found"))
        blocks.append((HEIGHT, lambda area: draw_losses(area, steps, [Curve("all samples", whole, style="--")], zoom)))
    for panel in panels:
        blocks += [heading(panel.title, 10), _pair_sheets(panel), _pair_curves(panel, steps, whole, zoom)]
    return page([*blocks, *after])


def _pair_sheets(panel: PairPanel) -> Block:
    sides = (panel.side_a, panel.side_b)

    def draw(area: Area) -> None:
        for number, (name, tiles, _) in enumerate(sides):
            left = MARGIN if number == 0 else WIDTH / 2 + MARGIN / 2
            draw_sheet(area, left, name, tiles, HALF_COLUMNS, SIDES[number])

    return max(sheet_height(tiles, HALF_COLUMNS) for _, tiles, _ in sides) + 0.1, draw


def _pair_curves(panel: PairPanel, steps: np.ndarray, whole: np.ndarray, zoom: tuple[int, int]) -> Block:
    sides = (panel.side_a, panel.side_b)
    lines = [Curve(name, values, SIDES[number]) for number, (name, _, values) in enumerate(sides)]
    lines.append(Curve("all samples", whole, style="--"))
    return HEIGHT + 0.15, lambda area: draw_losses(area, steps, lines, zoom)
