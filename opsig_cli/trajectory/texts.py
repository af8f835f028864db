"""What a run keeps of text samples, `context[target]`, and the ending that the contexts of a pair share.

S samples. The contexts of two opposing groups of tokens often end alike, as in the paper's Appendix B: a colon, then a
newline or "the".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # `opsig --help` reads no file
    from opsig_cli.trajectory.file import Trajectory

NUMBERS = "x = "
"""What a text begins with that is the numbers of an input: where there is a label, that says more in a table."""
LONGEST = 16
"""Characters of the longest ending that is looked for."""
SHARED = 0.5
"""An ending is shared where at least this part of each group has it."""


@dataclass(frozen=True)
class Ending:
    """The end of the contexts of two groups: its text, the share of each group that has it, and of all samples."""

    text: str
    shares: tuple[float, float]
    everywhere: float


class Texts:
    """The text of every sample of a run, where it has any."""

    def __init__(self, run: Trajectory):
        self._text = run.read("samples/text") if run.has("samples/text") else None
        self._label = run.read("samples/label") if run.has("samples/label") else None
        self._contexts: list[str | None] | None = None

    def field(self, position: int) -> dict[str, str]:
        """The sample's text as a part of its record; nothing for samples that are not text."""
        return {} if self._text is None else {"text": str(self._text[position])}

    def after(self, side_a: np.ndarray, side_b: np.ndarray) -> dict[str, Any] | None:
        """What most contexts of both groups, given by positions, end with, as `Ending`'s fields; None where they
        share no ending."""
        if self._text is None or self._label is None:
            return None
        if self._contexts is None:
            self._contexts = [context(str(t), str(n)) for t, n in zip(self._text, self._label, strict=True)]
        everybody = [c for c in self._contexts if c is not None]
        a, b = ([c for i in side.tolist() if (c := self._contexts[i]) is not None] for side in (side_a, side_b))
        found = shared_ending(a, b, everybody)
        return None if found is None else asdict(found)


def context(text: str, label: str) -> str | None:
    """What stands before the target in `context[label]`, the label with or without its quotes; None for other texts.

    >>> context("as follows:[ the]", "' the'"), context("x = 1", "1")
    ('as follows:', None)
    """
    for target in (f"[{label}]", f"[{label.removeprefix('b')[1:-1]}]"):
        if text.endswith(target):
            return text.removesuffix(target)
    return None


def shared_ending(side_a: Sequence[str], side_b: Sequence[str], everybody: Sequence[str]) -> Ending | None:
    """The ending that at least half of each side has and that tells most: the largest p log(p / q), p its share in the
    side where it is rarer, q its share in everybody.

    >>> ending = shared_ending(["to do:", "this:"], ["to be:", "is it:"], ["to do:", "this:", "to be:", "is it:", "so"])
    >>> ending.text, ending.shares, ending.everywhere
    (':', (1.0, 1.0), 0.8)
    """
    best, most = None, 0.0
    for length in range(1, LONGEST + 1):
        for text in sorted({context[-length:] for context in side_a if len(context) >= length}):
            shares = _share(side_a, text), _share(side_b, text)
            if min(shares) < SHARED:
                continue
            everywhere = _share(everybody, text)
            telling = min(shares) * float(np.log(min(shares) / everywhere))
            if telling > most:
                best, most = Ending(text, shares, everywhere), telling
    return best


def _share(contexts: Sequence[str], ending: str) -> float:
    return sum(c.endswith(ending) for c in contexts) / len(contexts) if contexts else 0.0


def clause(after: dict[str, Any] | None) -> str:
    """An ending as the end of a sentence, or nothing.

    >>> clause(asdict(Ending(":", (1.0, 0.75), 0.008)))
    ", after ':' (100% and 75% of them; 0.8% of all samples)"
    """
    if after is None:
        return ""
    a, b = after["shares"]
    return f", after {after['text']!r} ({a:.0%} and {b:.0%} of them; {100 * after['everywhere']:.2g}% of all samples)"
