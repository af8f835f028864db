"""What a backend is asked for a grouping: which gradients align, and what looks alike, over several checkpoints.

S samples of the run, M samples that are grouped, N others, C checkpoints, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from opsig_cli import backends
from opsig_cli.analysis.gram import Gram, Similarity, formed
from opsig_cli.analysis.group_means import ROWS, products
from opsig_cli.analysis.grouping import known
from opsig_cli.analysis.pairing import OPPOSES
from opsig_cli.analysis.rounds import Rounds, one_after_the_other
from opsig_cli.backends import Session
from opsig_cli.errors import UsageError
from opsig_cli.studies.clustering.window import Window, checkpoints_in
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

SKETCHED = 1536
"""D: numbers a sample, of all checkpoints, by which more than MOST_FORMED are compared: the band of an estimated cosine
is +-0.11."""
FEATURE_BYTES = 4 * 4096
"""About what a sample's features take."""
LOOKED = 256
"""Numbers a checkpoint to which wider features of so many are reduced, by random signs."""
DEAR = 250_000
"""Positions that backward passes for all samples may go through, all in all."""
POOL = 2
"""Samples with large losses whose gradients are looked at, for each that was mined."""


def gradients_are_dear(session: Session) -> bool:
    """Whether the gradients of all samples take far longer than a few passes over the data, as where an item has many,
    each with a backward pass of its own through the item."""
    positions = getattr(session, "positions", 1)
    return positions > 1 and positions * session.samples > DEAR


def why_nobody_joins(session: Session) -> str | None:
    """Why samples that were not mined do not join groups unless a person asks for it, in words."""
    if getattr(session, "couples_samples", False):
        return "with batch norm in chunks each costs a chunk"
    if gradients_are_dear(session):
        return "each costs a backward pass through its whole item"
    return None


def with_largest_gradients(
    run: Trajectory, session: Session, position: np.ndarray, window: Window, advance: Callable[..., None]
) -> np.ndarray:
    """The positions, and as many samples whose gradients are the largest over the window's checkpoints.

    Groups whose loss does not swing yet, as where a network gives both sides even odds, are found by their gradients
    alone; outliers are outliers by either (the paper's Fig. 2). At each checkpoint norms count relative to their root
    mean square. Positions alone for a backend without gradient norms. Where gradients are dear, those of the samples
    with the largest losses are looked at, POOL times as many as positions.
    """
    if not isinstance(session, backends.Curvature):
        return position
    score, dear = np.zeros(len(run.samples)), gradients_are_dear(session)
    for step in checkpoints_in(run, window).tolist():
        state = read_state(run, step)
        if dear:
            losses = known(session.losses([state])[0][0][run.samples])
            pool = np.argsort(-losses, kind="stable")[: POOL * len(position)]
            norms = np.zeros(len(score))
            norms[pool] = known(session.gradient_norms(state, run.samples[pool]))
        else:
            norms = known(session.gradient_norms(state)[run.samples])
        score += norms / (np.sqrt(np.mean(norms**2)) or 1.0)
        advance(note=f"step {step}")
    largest = np.argsort(-score, kind="stable")[: len(position)]
    return np.concatenate([position, largest[~np.isin(largest, position)]])


def mean_similarity(
    run: Trajectory, session: Session, backend: str | None, position: np.ndarray, window: Window, sketch: int | None,
    advance: Callable[..., None],
) -> Similarity:  # fmt: skip
    """Gradient cosines of the samples, averaged over checkpoints spread over the window, (M, M) float32.

    `sketch`: size of the sketches to estimate them from, each checkpoint's with a seed of its own; None is exact. Of
    more than MOST_FORMED samples the sketches themselves are returned, each of length one.
    """
    capability = backends.GradientCosines if sketch is None else backends.GradientSketch
    backends.require(session, capability, backend, "gradient cosines" if sketch is None else "gradient sketches")
    samples = run.samples[position]
    steps = checkpoints_in(run, window)
    if sketch is not None and not formed(len(samples)):
        rows_MD = np.empty((len(samples), len(steps) * sketch), np.float32)
        for number, step in enumerate(steps.tolist()):
            rows = session.gradient_sketch(read_state(run, step), samples, sketch, step)  # pyright: ignore[reportAttributeAccessIssue]
            rows_MD[:, number * sketch : (number + 1) * sketch] = of_length_one(rows)
            advance(note=f"step {step}")
        return Gram(rows_MD, 1 / len(steps))
    total = np.zeros((len(samples), len(samples)), np.float32)
    if sketch is None:
        every = at_each(run, session, steps, "gradient_cosines", 8 * len(samples) ** 2, samples)
        for step, found in zip(steps.tolist(), every, strict=True):
            np.add(total, known(found, copy=False), out=total, casting="same_kind")
            advance(note=f"step {step}")
    else:
        for step in steps.tolist():
            rows = known(session.gradient_sketch(read_state(run, step), samples, sketch, step))  # pyright: ignore[reportAttributeAccessIssue]
            for first in range(0, len(rows), ROWS):
                total[first : first + ROWS] += rows[first : first + ROWS] @ rows.T
            advance(note=f"step {step}")
    total /= len(steps)
    if sketch is not None:
        np.fill_diagonal(total, 1)
    return total


def at_each(
    run: Trajectory, session: Session, steps: Iterable[int], name: str, result_bytes: int, *arguments: Any
) -> Iterator[Any]:
    """What a measurement of the session's gives at each of these checkpoints, in their order."""
    calls = ((name, (read_state(run, int(step)), *arguments)) for step in steps)
    if isinstance(session, backends.Together):
        return session.each(calls, result_bytes)
    return (getattr(session, name)(*asked) for _, asked in calls)


def of_length_one(rows: np.ndarray) -> np.ndarray:
    """Rows over their lengths, in place; 0 for those that are 0 or not known."""
    rows = known(rows, copy=False)
    lengths = np.sqrt(np.einsum("md,md->m", rows, rows))
    rows /= np.where(lengths > 0, lengths, 1)[:, None]
    return rows


def sketch_size(run: Trajectory, window: Window) -> int:
    """Numbers a checkpoint of the sketches that more than MOST_FORMED samples are compared by."""
    return -(-SKETCHED // len(checkpoints_in(run, window)))


def sketch_band(run: Trajectory, window: Window, size: int) -> float:
    """Three standard errors of a similarity from sketches of this size. Raises UsageError where it hides opposition."""
    count = len(checkpoints_in(run, window))
    band = 3 * float(np.sqrt(2 / (size * count)))
    if band > -OPPOSES:
        least = int(np.ceil(18 / (count * OPPOSES**2)))
        raise UsageError(
            f"--sketch {size} has an error band of +-{band:.2f}, in which opposition is lost. Give at least {least}"
        )
    return band


def group_cosines(
    run: Trajectory, session: Session, steps: Iterable[int], position: np.ndarray, sets: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Mean gradient cosine of the samples at these positions with every group at each of the checkpoints, (M, G)."""
    result = 8 * len(position) * len(sets)
    return map(known, at_each(run, session, steps, "mean_cosines", result, run.samples[position], sets))


def mean_likeness(
    run: Trajectory, session: Session, position: np.ndarray, window: Window, in_rounds: Rounds = one_after_the_other
) -> Similarity | None:
    """Cosines of the samples' centred features, averaged over the checkpoints, (M, M) float32; None without features.

    Holds the features of one checkpoint beside it; of more than MOST_FORMED samples those of all, LOOKED numbers of
    each.
    """
    if not isinstance(session, backends.Features):
        return None
    if not formed(len(position)):
        return _likeness_rows(run, session, position, window)
    total = np.zeros((len(position), len(position)), np.float32)
    steps = checkpoints_in(run, window)
    for rows in at_each(run, session, steps, "features", FEATURE_BYTES * len(position), run.samples[position]):
        if rows is None:
            return None
        rows = known(rows, copy=False)
        (products_MM,) = in_rounds(products, (rows,), -(-len(rows) // ROWS))
        products_MM /= len(steps)
        total += products_MM
    return total


def _likeness_rows(
    run: Trajectory, session: Session, position: np.ndarray, window: Window
) -> Gram | None:  # fmt: skip
    steps, parts = checkpoints_in(run, window).tolist(), []
    every = at_each(run, session, steps, "features", FEATURE_BYTES * len(position), run.samples[position])
    for step, rows in zip(steps, every, strict=True):
        if rows is None:
            return None
        if rows.shape[1] > LOOKED:
            signs = np.random.default_rng(step).integers(0, 2, (rows.shape[1], LOOKED)) * 2 - 1
            rows = of_length_one(known(rows, copy=False) @ signs.astype(np.float32))
        parts.append(known(rows, copy=False))
    return Gram(np.concatenate(parts, 1), 1 / len(steps))


def mean_likeness_with(
    run: Trajectory, session: Session, outside: np.ndarray, sets: list[np.ndarray], window: Window
) -> np.ndarray:
    """Mean cosine of these samples' centred features with every group's, averaged over the checkpoints, (N, G)."""
    steps, result = checkpoints_in(run, window), 8 * len(outside) * len(sets)
    rows = list(at_each(run, session, steps, "mean_feature_cosines", result, run.samples[outside], sets))
    return known(np.mean(rows, axis=0))
