"""Ranges of steps as people write them."""

from __future__ import annotations

import re

from opsig_cli.errors import UsageError


def parse_range(text: str | None, what: str) -> tuple[int | None, int | None]:
    """Steps written `A:B`, either end left out, B included. Raises UsageError, naming the option, for anything else.

    >>> parse_range("100:", "--window")
    (100, None)
    """
    if text is None:
        return None, None
    found = re.fullmatch(r"(\d*):(\d*)", text.strip())
    if not found:
        raise UsageError(f"{what} '{text}' is not a range of steps. Write A:B, as in 100:200")
    first, last = (int(part) if part else None for part in found.groups())
    if first is not None and last is not None and first > last:
        raise UsageError(f"{what} '{text}' ends before it begins")
    return first, last
