"""The same checkpoint under two names: a `last.ckpt` or `best.ckpt` beside a numbered one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np

from opsig_cli.backends import State
from opsig_cli.studies.importing import checkpoints, flow
from opsig_cli.studies.importing.steps import STEP_KEYS

SECOND = re.compile(r"(?:^|[^a-z])(?:last|best|latest|final)(?![a-z])", re.IGNORECASE)
"""Words of names that checkpoints have besides their numbered one."""


def without(
    paths: Sequence[str], glances: Sequence[flow.Glance], target: flow.Target, warn: flow.Warn
) -> tuple[list[str], list[flow.Glance]]:
    """Leave out checkpoints by a second name that hold what another one holds, which is said.

    Those are held against each other that say the same step, or all that say none: the sizes of files tell nothing, as
    torch.save writes a file's own name into it, once for each tensor.
    """
    second = [i for i, path in enumerate(paths) if SECOND.search(os.path.basename(path))]
    kept = [i for i in range(len(paths)) if i not in second]
    for i in second:
        other = _same(paths[i], [paths[o] for o in kept if _said(glances[i]) == _said(glances[o])], target)
        if other is None:
            kept.append(i)
        else:
            warn(f"{paths[i]} is left out: it holds the same as {other}")
    return [paths[i] for i in sorted(kept)], [glances[i] for i in sorted(kept)]


def _said(glance: flow.Glance) -> tuple[int | None, int | None]:
    """What a checkpoint says of its step, and what its optimizer has counted."""
    return next((glance.numbers[key] for key in STEP_KEYS if key in glance.numbers), None), glance.count


def _same(path: str, others: Sequence[str], target: flow.Target) -> str | None:
    """Which of the others holds the same, the first; None for none."""
    if not others:
        return None
    if linked := [other for other in others if os.path.realpath(path) == os.path.realpath(other)]:
        return linked[0]
    one = _state(path, target)
    for other in others:
        two = _state(other, target)
        if np.array_equal(one.params, two.params, True) and np.array_equal(one.buffers, two.buffers, True):
            return other
    return None


def _state(path: str, target: flow.Target) -> State:
    with checkpoints.opened(path) as content:
        return flow.read(content, target, path, 0, lambda text: None)
