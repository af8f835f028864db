"""The pictures of `mine` and `cluster`. T steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opsig_cli.figures.canvas import DOWN, MARGIN, SIDES, UP, WIDTH, Area, Block, heading, page, sentence
from opsig_cli.figures.contact_sheet import FULL_COLUMNS, HALF_COLUMNS, Tile, draw_sheet, sheet_height
from opsig_cli.figures.curves import HEIGHT, Curve, draw_losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Side = tuple[str, Sequence[Tile], np.ndarray]
"""A group: its title, its tiles, and its mean loss (T,)."""


@dataclass(frozen=True)
class PairPanel:
    """Two opposing groups and what is said of them; `zoom`: the steps of the close-up, where they swing."""

    title: str
    side_a: Side
    side_b: Side
    zoom: tuple[int, int] | None = None


def movers_figure(
    sheets: Sequence[tuple[str, Sequence[Tile]]], steps: np.ndarray, curves: Mapping[str, np.ndarray],
    whole: np.ndarray, zoom: tuple[int, int], title: str, said: str = "", axis: str = "loss",
) -> Figure:  # fmt: skip
    """Sheets of mined samples, those that rose and those that fell, and over them the curves of the same colours, (T,)
    each, with the whole loss (T,). `said`: a line under the title."""
    colours = dict(zip([name for name, _ in sheets], (UP, DOWN), strict=False))
    lines = [Curve(f"mean, {name}", values, colours.get(name, UP)) for name, values in curves.items()]
    lines.append(Curve("mean, all samples", whole, style="--"))
    blocks = [heading(title), *([sentence(said)] if said else [])]
    blocks.append((HEIGHT, lambda area: draw_losses(area, steps, lines, zoom, axis)))
    for name, tiles in sheets:
        if tiles:
            blocks.append(sheet_block(f"{name}: {len(tiles)} shown", tiles, colours[name]))
    return page(blocks)


def sheet_block(name: str, tiles: Sequence[Tile], colour: str) -> Block:
    """A sheet of samples over the whole width, under its name."""
    return sheet_height(tiles, FULL_COLUMNS), lambda area: draw_sheet(area, MARGIN, name, tiles, FULL_COLUMNS, colour)


def pairs_figure(
    panels: Sequence[PairPanel], steps: np.ndarray, whole: np.ndarray, title: str, zoom: tuple[int, int],
    after: Sequence[Block] = (), said: str = "", axis: str = "loss", without: str = "no opposing pair was found",
) -> Figure:  # fmt: skip
    """Opposing pairs: each its groups' sheets side by side over their mean losses with the whole loss (T,).

    `after`: blocks that follow; `said`: a line under the title; `axis`: what the losses are, with their unit;
    `without`: what is said where there are no pairs.
    """
    blocks = [heading(title), *([sentence(said)] if said and panels else [])]
    if not panels:
        blocks.append(sentence(without))
        blocks.append(
            (HEIGHT, lambda area: draw_losses(area, steps, [Curve("all samples", whole, style="--")], zoom, axis))
        )
    for panel in panels:
        blocks += [
            heading(panel.title, 10),
            _pair_sheets(panel),
            _pair_curves(panel, steps, whole, panel.zoom or zoom, axis),
        ]
    return page([*blocks, *after])


def _pair_sheets(panel: PairPanel) -> Block:
    sides = (panel.side_a, panel.side_b)

    def draw(area: Area) -> None:
        for number, (name, tiles, _) in enumerate(sides):
            left = MARGIN if number == 0 else WIDTH / 2 + MARGIN / 2
            draw_sheet(area, left, name, tiles, HALF_COLUMNS, SIDES[number])

    return max(sheet_height(tiles, HALF_COLUMNS) for _, tiles, _ in sides) + 0.1, draw


def _pair_curves(panel: PairPanel, steps: np.ndarray, whole: np.ndarray, zoom: tuple[int, int], axis: str) -> Block:
    sides = (panel.side_a, panel.side_b)
    lines = [Curve(name, values, SIDES[number]) for number, (name, _, values) in enumerate(sides)]
    lines.append(Curve("all samples", whole, style="--"))
    return HEIGHT + 0.15, lambda area: draw_losses(area, steps, lines, zoom, axis)
