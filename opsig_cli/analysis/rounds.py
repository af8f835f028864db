"""Work in rounds that know nothing of each other, so that several processes may each do some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Work = Callable[..., tuple[np.ndarray, ...]]
"""Takes some arguments and then the numbers of the rounds to do, a range; arrays with a row for each."""
Rounds = Callable[[Work, Sequence[Any], int], tuple[np.ndarray, ...]]
"""Does so many rounds of some work with these arguments: arrays with a row for each."""


def one_after_the_other(work: Work, arguments: Sequence[Any], count: int) -> tuple[np.ndarray, ...]:
    """All rounds, in this process."""
    return work(*arguments, range(count))
