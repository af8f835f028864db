"""Who aligns with whom: the similarity matrix in order of group, and the map of oppositions. M samples, G groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opsig_cli.figures.canvas import MARGIN, SIDES, WIDTH, Area, Block, cut, fonts, heading, typeset, visible

SIDE = 4.1
LINE = 0.12
"""Inches that a name needs; groups that are smaller have none in the matrix of samples."""
MOST_NUMBERS = 20
"""Groups up to which the cosines of opposing pairs are written."""
MOST_DRAWN = 4000
"""Samples that a matrix is drawn of: of more every so many."""


def alignment_block(
    similarity_MM: Any, means_GG: np.ndarray, group_M: np.ndarray, names: Sequence[str],
    pairs: Sequence[tuple[int, int]], measure: str = "cosine",
) -> list[Block]:  # fmt: skip
    """The matrix of similarities ordered by group, and the mean similarity of every two groups with pairs framed.

    `similarity_MM`: an array, or what gives blocks as one does; `means_GG` of every two groups; `group_M`: group of
    every sample, -1 for none (left out); `names` (G,).
    """
    groups = len(names)
    order = np.concatenate([np.flatnonzero(group_M == group) for group in range(groups)] or [np.empty(0, int)])
    sizes = np.array([(group_M == group).sum() for group in range(groups)])
    shown = order[:: len(order) // MOST_DRAWN + 1]

    def draw(area: Area) -> None:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.patches import Rectangle

        colours = LinearSegmentedColormap.from_list("sides", [SIDES[1], "white", SIDES[0]])  # as on the page
        style = {"cmap": colours, "vmin": -1, "vmax": 1, "interpolation": "nearest", "aspect": "equal"}
        left = area.axes(MARGIN + 0.9, 0.1, SIDE, SIDE)
        left.imshow(
            similarity_MM[np.ix_(shown, shown)], extent=(-0.5, len(order) - 0.5, len(order) - 0.5, -0.5), **style
        )
        edges = np.cumsum(sizes) - 0.5
        for edge in edges[:-1]:
            left.axhline(edge, color="black", linewidth=0.4)
            left.axvline(edge, color="black", linewidth=0.4)
        room = np.flatnonzero(sizes * SIDE >= LINE * sizes.sum())
        left.set(yticks=(edges - sizes / 2)[room], xticks=[], xlabel="samples, in order of group")
        _tick_names(left, [names[group] for group in room.tolist()])
        right = area.axes(WIDTH - MARGIN - SIDE - 0.7, 0.1, SIDE, SIDE)
        image = right.imshow(means_GG, **style)
        for a, b in pairs:
            for x, y in ((a, b), (b, a)):
                right.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.6))
                if groups <= MOST_NUMBERS:
                    right.text(
                        x, y, typeset(f"{means_GG[a, b]:.1f}".replace("0.", ".")), ha="center", va="center", fontsize=6
                    )
        right.set(
            yticks=range(groups),
            xticks=[],
            xlabel="mean over every two groups, in the same order; opposing pairs are framed",
        )
        _tick_names(right, names)
        bar = area.axes(WIDTH - MARGIN - 0.45, 0.1, 0.15, SIDE)
        area.figure.colorbar(image, cax=bar)
        bar.tick_params(labelsize=7)

    return [
        heading(f"who aligns with whom (blue), and who opposes whom (vermilion): {measure}", 10),
        (SIDE + 0.5, draw),
    ]


def _tick_names(axes, names: Sequence[str]) -> None:
    axes.set_yticklabels([visible(cut(name, 16)) for name in names], fontsize=7)
    for text in axes.get_yticklabels():
        text.set(parse_math=False, fontfamily=fonts(text.get_text()))
