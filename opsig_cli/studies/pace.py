"""Progress by passes over the data: a bar that counts parts moves on while one of them is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opsig_cli.backends import Passes, Session

Advance = Callable[..., None]
SHORT = 0.01
"""What a part lacks, however long it takes, until it is done."""


@contextmanager
def paced(session: Session, advance: Advance, parts: int, passes: float = 1.0, together: int = 1) -> Iterator[Advance]:
    """`advance`, called as before for each part that is done, of which passes over the data show some beforehand.

    `parts`: how many there are in all. A part takes so many `passes`, about; what the last one took is what the next is
    expected to. `together`: parts that are measured at a time. Nothing is shown of a session that does not say.
    """
    heard: Passes | None = getattr(session, "passes", None) if parts else None
    if heard is None:
        yield advance
        return
    expected, seen, done, ahead = max(passes, 1e-9), 0.0, 0, 0.0

    def passed(share: float) -> None:
        nonlocal seen, ahead
        seen += share
        shown = min(seen / expected, together - SHORT)
        if shown > ahead:
            advance(shown - ahead)
            ahead = shown

    def finished(count: float = 1, note: str = "") -> None:
        nonlocal expected, seen, done, ahead
        left = max(0.0, ahead - count)
        advance(count - (ahead - left), note=note)
        done, ahead = done + int(count), left
        if not left:
            expected = seen / done if seen and done else expected
            seen, done = 0.0, 0

    before, heard.heard = heard.heard, passed
    try:
        yield finished
    finally:
        heard.heard = before
