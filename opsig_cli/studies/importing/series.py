"""Series that people have already: every sample's loss over time, and scalars. T steps, S samples."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing import logs
from opsig_cli.studies.importing.columns import COLUMNS, Warn, folded, listed
from opsig_cli.studies.importing.logs import Log
from opsig_cli.studies.importing.table_lines import ENDINGS, is_table, pointed, separator_of
from opsig_cli.studies.importing.torch_files import check_expansion, first_words
from opsig_cli.trajectory.schema import FIELDS

SCALARS = {name.removeprefix("scalars/") for name, field in FIELDS.items() if name.startswith("scalars/")
           and field.dtype == "f8"}  # fmt: skip
SCALAR_NAMES = {"loss": "train_loss", "lr": "learning_rate"} | {name: name for name in SCALARS}

FULL = 0.5
"""Share of the losses of all samples at all steps from which on a log is one of all samples, with gaps."""
MAX_SPREAD, SPARE_CELLS = 1000, 1 << 24
"""A table may become so many losses for each of its lines, and so many in any case."""
PLURALS = {"loss": "losses", "step": "steps", "label": "labels", "prediction": "predictions"}


@dataclass(frozen=True)
class Losses:
    """A series of losses: `steps` (T,) increasing, `samples` (S,) their indices; `row(t)` gives losses (S,) float32 and
    predictions (S,) integers or None; labels (S,), names (S,) and names of classes or None."""

    steps: np.ndarray
    samples: np.ndarray
    row: Callable[[int], tuple[np.ndarray, np.ndarray | None]]
    labels: np.ndarray | None = None
    names: np.ndarray | None = None
    classes: list[str] | None = None


def read_losses(
    path: str, named: Mapping[str, str] | None = None, as_sightings: bool | None = None, warn: Warn = lambda _: None
) -> Losses | Log:
    """Losses from .npy (T, S), .npz (`losses` (T, S); `steps`, `labels`, `predictions` where there), or a log with a
    line for each: see `logs.read`, with columns `named` by what they hold.

    A log that is nearly full becomes rows; one in which each sample is there at a few steps stays what it is, unless
    `as_sightings` says otherwise. Raises OpsigError where the file is damaged or is not of this form.
    """
    try:
        if is_table(path):
            log = logs.read(path, named or {}, warn)
            require_once(path, log, warn if as_sightings else None)
            sparse = is_sparse(log) if as_sightings is None else as_sightings
            if as_sightings is None and sparse:
                warn(
                    f"{path}: samples are there at few of the steps, so that it is taken as sightings, as of a loop "
                    "over minibatches. --rows takes it as losses of all samples with gaps"
                )
            return log if sparse else rows_of(path, log)
        if path.lower().endswith((".npy", ".npz")):
            return _losses_of_arrays(path)
    except OSError as error:
        reason = error.strerror or f"it is not readable ({first_words(error)})"
        raise OpsigError(f"{path}: {reason}") from error
    except (OpsigError, MemoryError):
        raise
    except Exception as error:  # a malformed array file can raise anything
        raise OpsigError(f"{path} is not readable ({first_words(error)})") from error
    raise OpsigError(
        f"{path} ends in neither .npy, .npz, {', '.join(ENDINGS)} nor one of these with .gz. Save losses as an "
        "array of steps by samples with numpy.save, or as CSV with the columns step,sample,loss"
    )


def _losses_of_arrays(path: str) -> Losses:
    loaded: Any = np.load(path, allow_pickle=False, mmap_mode="r")
    found, inside = {"losses": loaded}, ["losses"]
    if not isinstance(loaded, np.ndarray):
        check_expansion(loaded.zip, path)
        inside = loaded.files
        names = {PLURALS.get(name, name): name for name in inside}
        found = {name: loaded[names[name]] for name in PLURALS.values() if name in names}
        loaded.close()
    losses = found.get("losses")
    if losses is None:
        raise OpsigError(f"{path} has no array 'losses'. It has: {', '.join(inside) or 'none'}")
    if losses.ndim != 2 or losses.dtype.kind not in "fiu" or not losses.size:
        raise OpsigError(f"{path}: losses must be numbers of shape (steps, samples), not {losses.dtype} {losses.shape}")
    count, width = losses.shape
    steps, predictions, labels = found.get("steps"), found.get("predictions"), found.get("labels")
    steps = np.arange(count) if steps is None else np.asarray(steps)
    if steps.shape != (count,) or steps.dtype.kind not in "iu" or np.any(np.diff(steps) <= 0) or steps[0] < 0:
        raise OpsigError(f"{path}: steps must be {count} increasing integers, one a row of losses")
    if predictions is not None and (predictions.shape != losses.shape or predictions.dtype.kind not in "iu"):
        raise OpsigError(f"{path}: predictions must be integers of shape {losses.shape}, not {predictions.shape}")
    if labels is not None and labels.shape != (width,):
        raise OpsigError(f"{path}: labels must be one a sample, {width}, not {labels.shape}")

    def row(t: int) -> tuple[np.ndarray, np.ndarray | None]:
        return np.asarray(losses[t], np.float32), None if predictions is None else predictions[t]

    return Losses(steps.astype(np.int64), np.arange(width), row, None if labels is None else labels.astype(str))


def rows_of(path: str, log: Log) -> Losses:
    """A log as rows of all samples, what it lacks being NaN. Raises OpsigError where it holds far fewer losses."""
    order = np.lexsort((log.place, log.step))
    step_N, place_N, loss_N, prediction_N = (x[order] for x in (log.step, log.place, log.loss, log.prediction))
    times, starts = np.unique(step_N, return_index=True)
    ends = np.append(starts[1:], len(step_N))
    samples = len(log.samples)
    if len(times) * samples > MAX_SPREAD * len(step_N) + SPARE_CELLS:
        raise OpsigError(
            f"{path} names {samples:,} samples at {len(times):,} steps in {len(step_N):,} lines: a run of them would "
            f"be {len(times) * samples:,} losses, nearly all of them missing"
        )
    predicts = bool((prediction_N >= 0).any())

    def row(t: int) -> tuple[np.ndarray, np.ndarray | None]:
        values, predictions = np.full(samples, np.nan, np.float32), np.full(samples, -1)
        there = slice(starts[t], ends[t])
        values[place_N[there]] = loss_N[there]
        predictions[place_N[there]] = prediction_N[there]
        return values, predictions if predicts else None

    return Losses(times, log.samples, row, log.labels, log.names, log.classes)


def is_sparse(log: Log) -> bool:
    """Whether a log has fewer than FULL of the losses of all its samples at all its steps: then samples were seen batch
    by batch, and what is not there is no gap."""
    cells = len(np.unique(log.step)) * len(log.samples)
    return int(np.isfinite(log.loss).sum()) < FULL * cells


def require_once(path: str, log: Log, warn: Warn | None) -> None:
    """Raise OpsigError where a log has two losses of a sample at a step, or say so where a batch may have had it twice,
    and that is told by `warn`."""
    order = np.lexsort((log.place, log.step))
    step_N, place_N = log.step[order], log.place[order]
    twice = np.flatnonzero((np.diff(step_N) == 0) & (np.diff(place_N) == 0))
    if len(twice) and warn is not None:
        warn(f"{path}: batches had a sample twice, which counts twice, {len(twice):,} times")
    elif len(twice):
        place = place_N[twice[0]]
        name = log.samples[place] if log.names is None else log.names[place]
        raise OpsigError(
            f"{path} has two losses of sample {name} at step {step_N[twice[0]]}. Keep one: where a run went on from a "
            "checkpoint the later, and of several runs or splits those of one. Where batches draw a sample twice, "
            "--sightings takes both"
        )


def read_scalars(path: str) -> tuple[dict[int, dict[str, float]], list[str]]:
    """Scalars of each step from CSV with the column step, and the columns that have no place in the file.

    `loss` is read as train_loss and `lr` as learning_rate. Raises OpsigError where the file is not of this form.
    """
    found: dict[int, dict[str, float]] = {}
    unknown: list[str] = []
    try:
        for number, record in _rows(path, ("step",)):
            step = _whole(path, number, "step", record["step"])
            if step in found:
                raise OpsigError(f"{path} has two lines of step {step}: the second is line {number}")
            unknown = [name for name in record if name != "step" and name not in SCALAR_NAMES]
            found[step] = {
                SCALAR_NAMES[name]: _float(path, number, name, value)
                for name, value in record.items() if name in SCALAR_NAMES and value
            }  # fmt: skip
    except OSError as error:
        raise OpsigError(f"{path}: {error.strerror or first_words(error)}") from error
    if not any(found.values()):
        raise OpsigError(f"{path} has no column that is one of {', '.join(sorted(SCALAR_NAMES))}")
    return found, unknown


def _rows(path: str, needed: tuple[str, ...]) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Lines of a CSV file as dictionaries, with their numbers."""
    count = 0
    with open(path, newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        separator = separator_of(first)
        reader = csv.reader(itertools.chain([first], file), delimiter=separator)
        try:
            given = [name.strip() for name in next(reader, [])]
            header = [_known_name(name) for name in given]
            for place, name in enumerate(header):
                if name == "step" and place > header.index("step"):  # exports repeat it for each run
                    header[place] = given[place]
            if twice := [name for name in header if name in SCALAR_NAMES and header.count(name) > 1]:
                columns = " and ".join(own for own, name in zip(given, header, strict=True) if name == twice[0])
                raise OpsigError(f"{path} has several columns of {twice[0]}: {columns}. Leave one of them")
            if missing := [name for name in needed if name not in header]:
                raise OpsigError(
                    f"{path} has no column {missing[0]} in its first line. It has: {listed(header)}. Name the "
                    f"column of {missing[0]}s '{missing[0]}'"
                )
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise OpsigError(f"{path} line {reader.line_num} has {len(values)} values, not {len(header)}")
                count += 1
                cells = [value.strip() for value in values]
                if separator != ",":  # then a comma is the point of a number
                    cells = [pointed(cell) for cell in cells]
                yield reader.line_num, dict(zip(header, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise OpsigError(f"{path} is not readable as CSV ({first_words(error)})") from error
    if not count:
        raise OpsigError(f"{path} has a header and no lines")


def _known_name(name: str) -> str:
    """What commands call a column: without the run's name that exports put before it, a step by any name."""
    inner = name.rpartition(" - ")[2]
    column = folded(inner)
    if column in COLUMNS["step"]:
        return "step"
    if column in COLUMNS["loss"] or column in SCALAR_NAMES:
        return SCALAR_NAMES.get(column, "train_loss")
    return name


def _whole(path: str, number: int, name: str, text: str) -> int:
    if not (text.isdecimal() and len(text) < 19):
        raise OpsigError(f"{path} line {number}: {name} is '{text[:40]}', which is not a whole number from 0 on")
    return int(text)


def _float(path: str, number: int, name: str, text: str) -> float:
    try:
        return float(text) if text else float("nan")
    except ValueError:
        raise OpsigError(f"{path} line {number}: {name} is '{text[:40]}', which is not a number") from None
