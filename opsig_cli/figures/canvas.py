"""A page of blocks, one under the other, and saving it. Lengths are inches."""

from __future__ import annotations

import os
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 11.6
MARGIN = 0.3
SUFFIXES = (".png", ".pdf", ".svg")
STYLE: dict[Any, Any] = {"svg.hashsalt": "opsig", "svg.fonttype": "none", "font.size": 9}

SIDES = ("#0072b2", "#d55e00")
"""Blue and vermilion: told apart by colour-blind readers and in grey."""
WHOLE = "#222222"
FAINT = "#777777"
WRONG = "#c40233"


class Area:
    """A rectangle of a page; `axes` makes axes in a part of it, in inches from its top left corner."""

    def __init__(self, figure: Figure, top: float, height: float):
        self.figure, self.height = figure, height
        self._top = top
        self._page = figure.get_size_inches()

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes of this size. Lengths in inches."""
        page_width, page_height = self._page
        bottom = page_height - self._top - top - height
        return self.figure.add_axes((left / page_width, bottom / page_height, width / page_width, height / page_height))

    def text(self, left: float, top: float, words: str, **style: Any) -> None:
        """Text whose top left corner is here."""
        page_width, page_height = self._page
        style = {"va": "top", "ha": "left", "fontsize": 10, "parse_math": False} | style
        self.figure.text(left / page_width, 1 - (self._top + top) / page_height, visible(words), **style)


Block = tuple[float, Callable[[Area], None]]
"""A height, and what draws into an area of it."""


def page(blocks: Sequence[Block]) -> Figure:
    """A figure of the blocks, one under the other."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2 * MARGIN + sum(height for height, _ in blocks)), facecolor="white")
        FigureCanvasAgg(figure)
        top = MARGIN
        for height, draw in blocks:
            draw(Area(figure, top, height))
            top += height
    return figure


def save(figure: Figure, path: Path) -> None:
    """Save a figure whole or not at all; the same figure gives the same bytes.

    Raises ValueError for a suffix other than those of SUFFIXES, OSError where the path cannot be written.
    """
    import matplotlib

    path = Path(path)
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(f"pictures are saved as {', '.join(SUFFIXES)}, not '{path.suffix}'")
    undated: dict[str, dict[str, Any]] = {
        ".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None},
    }  # fmt: skip
    handle, temporary = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    try:
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a label in a script that the font lacks
            figure.savefig(temporary, format=kind[1:], dpi=120, metadata=undated[kind])
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def heading(words: str, size: float = 13) -> Block:
    """A line of text as a block."""
    return size / 72 + 0.22, lambda area: area.text(MARGIN, 0, words, fontsize=size, fontweight="bold")


def sentence(words: str) -> Block:
    """A line of plain text as a block."""
    return 0.3, lambda area: area.text(MARGIN, 0, words, color=FAINT)


def over_steps(axes: Axes) -> None:
    """An x axis of steps, with ticks at whole ones."""
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)


def quiet_axes(axes: Axes) -> None:
    """Without the top and right spines, with a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)


def visible(text: str) -> str:
    """Text in which characters that do not print are replaced; line breaks stay."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n" else c for c in text)
