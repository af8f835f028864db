"""Faster and slower ways to the same numbers: the first that holds for a model is taken, and a slower one is said.

A way holds where it raises nothing and a sample's number is that of plain autograd. What a model may contain is not
known beforehand, and torch's transformations fail in their own ways, some of them silently.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from opsig_cli.errors import OpsigError
from opsig_torch import plain
from opsig_torch.naming import Test, culprit
from opsig_torch.opened import Opened

AGREES = 1e-3
"""Difference from plain autograd, relative to the larger of both, up to which a way is right in float32."""
PACE = 32
"""Samples of the pass that a slower way's time is compared with."""


class Disagrees(Exception):
    """Numbers are not those of plain autograd."""


@dataclass(frozen=True)
class Way:
    """`run` gives the numbers, or raises where it does not hold; `words` say how it goes; `holds` is what a layer must
    pass for it, None for a way that needs nothing but plain derivatives."""

    words: str
    run: Callable[[], Any]
    holds: Test | None = None


def first_that_holds(opened: Opened, what: str, ways: Sequence[Way], samples: int, order: int = 2) -> Any:
    """Numbers of the first way that holds from the one that held last. A slower one is said once.

    `what`: whose numbers these are, in words; `samples`: of how many, for the time. Raises OpsigError, naming the
    layer, where none holds.
    """
    first = opened.kept.get(("way", what), 0)
    problems: dict[int, Exception] = {}
    for number in range(first, len(ways)):
        way = ways[number]
        begin = time.perf_counter()
        try:
            found = way.run()
        except (OpsigError, MemoryError):
            raise
        except Exception as error:  # a model's own code, in transformations that it was not written for
            if ran_out_of_memory(error):
                raise MemoryError from error
            problems[number] = error
            continue
        if problems:
            opened.kept["way", what] = number
            seconds = (time.perf_counter() - begin) / max(samples, 1)
            opened.tell(_said(opened, what, ways[min(problems)], way, seconds))
        return found
    raise refusal(opened, what, problems[max(problems)], order) from problems[max(problems)]


def agree(found: float, exact: float, scale: float = 0.0) -> bool:
    """Whether two numbers are the same up to rounding; `scale`: the size of what they are made of."""
    return abs(found - exact) <= AGREES * max(abs(found), abs(exact), scale)


@contextmanager
def refusing(opened: Opened, what: str, order: int) -> Iterator[None]:
    """Turn what torch raises while differentiating inside into one line that names the layer."""
    try:
        yield
    except (OpsigError, MemoryError):
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise MemoryError from error
        raise refusal(opened, what, error, order) from error


def refusal(opened: Opened, what: str, error: Exception, order: int) -> OpsigError:
    """The one line for derivatives that a model does not have."""
    works = "Losses, mine and cluster --by loss still work"
    if isinstance(error, Disagrees) and not _repeats(opened):
        return OpsigError(
            f"{what} cannot be measured: the task's losses differ when they are evaluated again at the same "
            f"parameters. Turn dropout, noise and random augmentation off. {works}"
        )
    if order > 1:
        try:
            plain.gradients(opened, plain.sample_loss(opened, 0))
            works = "Losses, gradient_norm and cluster still work"
        except Exception:
            order = 1
    derivative = "second derivative" if order > 1 else "gradient"
    reason = " ".join(str(error).split()).split(". ")[0][:160]
    layer = culprit(opened, order=order)
    return OpsigError(f"{what} cannot be measured: {layer} has no {derivative} in torch ({reason}). {works}")


def _repeats(opened: Opened) -> bool:
    """Whether a sample's loss is the same again."""
    with torch.no_grad():
        first, second = (opened.losses_of([0]) for _ in range(2))
    return torch.equal(first, second)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether torch raised this because memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _said(opened: Opened, what: str, failed: Way, taken: Way, seconds: float) -> str:
    layer = culprit(opened, failed.holds) if failed.holds else "the model"
    return (
        f"note: {what} by {taken.words}, about {seconds / _pace(opened):.0f} times as long as a forward and backward "
        f"pass: {failed.words} would not hold for {layer}"
    )


def _pace(opened: Opened) -> float:
    """Seconds a sample of a forward and a backward pass."""
    count = min(PACE, opened.items)
    begin = time.perf_counter()
    with torch.enable_grad():
        plain.gradients(opened, opened.batch_losses(opened.batches.take(range(count))).nansum())
    return (time.perf_counter() - begin) / count
