"""A page of blocks, one under the other, and saving it. Lengths are inches."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

WIDTH = 11.6
MARGIN = 0.3
SUFFIXES = (".png", ".pdf", ".svg")
SIDES = ("#0072b2", "#d55e00")
"""Blue and vermilion, of a pair's two sides: told apart by colour-blind readers and in grey."""
UP, DOWN = "#8e3a9e", "#1b7837"
"""Purple and green, of losses that rise and that fall."""
WHOLE = "#222222"
FAINT = "#777777"
WRONG = "#c40233"

FONT, MONO = "DejaVu Sans", "DejaVu Sans Mono"
FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK TC", "Noto Sans CJK KR", "Source Han Sans SC",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo",
    "Microsoft YaHei", "Malgun Gothic", "Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari",
    "Noto Sans Thai", "Noto Sans Symbols2", "Noto Emoji",
)  # fmt: skip
"""Fonts for scripts that the first font lacks, those of them that are installed."""
WIDE = ("SansCJK", "SourceHanSans", "wqy-", "PingFang", "Hiragino", "msyh", "malgun")
"""Parts of the names of files that hold such fonts."""


@functools.cache
def fallbacks() -> list[str]:
    """The installed fonts for what the first lacks."""
    from matplotlib import font_manager

    known = font_manager.fontManager
    if not any(font.name in FALLBACKS for font in known.ttflist):  # its list can be older than the fonts
        for path in font_manager.findSystemFonts():
            if any(part in os.path.basename(path) for part in WIDE):
                with contextlib.suppress(Exception):  # a file that is no font
                    known.addfont(path)
    installed = {font.name for font in known.ttflist}
    return [name for name in FALLBACKS if name in installed]


def fonts(words: str, first: str = FONT) -> list[str]:
    """The font and, where words have characters that it lacks, the others behind it: a text looks up each of them."""
    return [first] if all(ord(c) in _characters(first) for c in words if c != "\n") else [first, *fallbacks()]


@functools.cache
def _characters(font: str) -> set[int]:
    from matplotlib import font_manager

    return set(font_manager.get_font(font_manager.findfont(font)).get_charmap())


def style() -> dict[Any, Any]:
    """What every page is drawn and saved with."""
    return {
        "svg.hashsalt": "opsig", "svg.fonttype": "none", "pdf.fonttype": 42,  # many venues refuse fonts of type 3
        "font.size": 9, "font.family": [FONT],
    }  # fmt: skip


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

    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(WIDTH, 2 * MARGIN + sum(height for height, _ in blocks)), facecolor="white")
        FigureCanvasAgg(figure)
        top = MARGIN
        for height, draw in blocks:
            draw(Area(figure, top, height))
            top += height
        for text in _texts(figure):
            text.set_fontfamily(fonts(text.get_text(), text.get_fontfamily()[0]))
    return figure


def _texts(figure: Figure) -> Iterator[Text]:
    """All texts of a figure but those at ticks, which axes make for every tick that they are asked for."""
    from matplotlib.text import Text

    yield from figure.texts
    for axes in figure.axes:
        yield from (child for child in axes.get_children() if isinstance(child, Text))  # its titles, too
        legend = axes.get_legend()
        yield from (axes.xaxis.label, axes.yaxis.label, *(() if legend is None else legend.get_texts()))


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
        with matplotlib.rc_context(style()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # in a script that no installed font has
            quick: dict[str, Any] = {}
            if kind == ".png":  # a tenth larger, in half the time
                quick["pil_kwargs"] = {"compress_level": 1}
            figure.savefig(temporary, format=kind[1:], dpi=120, metadata=undated[kind], **quick)
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
    """A title as a block, on as many lines as it takes."""
    lines = wrapped(typeset(words), WIDTH - 2 * MARGIN, 1.1 * size)
    height = len(lines) * size * 1.3 / 72 + 0.18
    return height, lambda area: area.text(MARGIN, 0, "\n".join(lines), fontsize=size, fontweight="bold")


def sentence(words: str) -> Block:
    """Plain text as a block, on as many lines as it takes."""
    lines = wrapped(typeset(words), WIDTH - 2 * MARGIN, 10)
    return 0.14 + 0.17 * len(lines), lambda area: area.text(MARGIN, 0, "\n".join(lines), color=FAINT)


def over_steps(axes: Axes, first: float | None = None, last: float | None = None) -> None:
    """An x axis of steps, with ticks at whole ones; from `first` to `last`, where panels share a range."""
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    over = [line for line in axes.get_lines() if line.get_transform() == axes.transData]  # not those across the axes
    drawn = [float(x) for line in over for x in line.get_xdata()]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    if first is None or last is None:
        first, last = (min(drawn), max(drawn)) if drawn else (0, 1)
    if first == last:  # one step: an axis of fractions would say nothing
        axes.set(xlim=(first - 1, first + 1), xticks=[first])
    else:
        axes.set_xlim(first - 0.02 * (last - first), last + 0.02 * (last - first))


def quiet_axes(axes: Axes) -> None:
    """Without the top and right spines, with a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)


def typeset(words: str) -> str:
    """Plain text with true signs: a minus before a number, plus or minus, arrows and inequalities.

    >>> typeset("cosine -0.38 +- 0.07, p <= 0.01: was -> now, run-2.h5 --top 3")
    'cosine \u22120.38 \u00b1 0.07, p \u2264 0.01: was \u2192 now, run-2.h5 --top 3'
    """
    for plain, sign in (("+-", "\u00b1"), ("->", "\u2192"), ("<=", "\u2264"), (">=", "\u2265")):
        words = words.replace(plain, sign)
    return re.sub(r"(?<![\w.\-)])-(?=\.?\d)", "\N{MINUS SIGN}", words)


def columns(words: str) -> int:
    """How many columns of a typewriter the text takes: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in words)


def cut(words: str, room: int, end: bool = False) -> str:
    """Text of one line in at most so many columns, an ellipsis where its end, or with `end` its beginning, is left out.

    >>> cut("abcdef", 4), cut("abcdef", 4, end=True), cut("abc", 4)
    ('abc\u2026', '\u2026def', 'abc')
    """
    if columns(words) <= room:
        return words
    kept, used = [], 1
    for c in reversed(words) if end else words:
        used += columns(c)
        if used > room:
            break
        kept.append(c)
    return "\u2026" + "".join(reversed(kept)) if end else "".join(kept) + "\u2026"


def wrapped(words: str, width: float, size: float) -> list[str]:
    """Text on lines of at most so many inches, at a font size, broken between words where it can be."""
    room = int(width * 72 / (0.58 * size))
    lines = [""]
    for word in words.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if columns(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(cut(word, room))
    return [line for line in lines if line] or [""]


def visible(text: str) -> str:
    """Text in which characters that do not print are replaced; line breaks stay."""
    if text.isprintable():  # nearly all are: pictures within a page are texts of thousands of characters
        return text
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n" else c for c in text)
