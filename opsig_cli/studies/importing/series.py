"""Series that people have already: every sample's loss over time, and scalars. T steps, S samples."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.torch_files import check_expansion, first_words
from opsig_cli.trajectory.schema import FIELDS

SCALARS = {name.removeprefix("scalars/") for name, field in FIELDS.items() if name.startswith("scalars/")
           and field.dtype == "f8"}  # fmt: skip
SCALAR_NAMES = {"loss": "train_loss", "lr": "learning_rate"} | {name: name for name in SCALARS}

MAX_SPREAD, SPARE_CELLS = 1000, 1 << 24
"""A table may become so many losses for each of its lines, and so many in any case."""
PLURALS = {"loss": "losses", "step": "steps", "label": "labels", "prediction": "predictions"}


@dataclass(frozen=True)
class Losses:
    """A series of losses: `steps` (T,) increasing, `samples` (S,) their indices; `row(t)` gives losses (S,) float32 and
    predictions (S,) integers or None; labels (S,) or None."""

    steps: np.ndarray
    samples: np.ndarray
    row: Callable[[int], tuple[np.ndarray, np.ndarray | None]]
    labels: np.ndarray | None = None


def read_losses(path: str) -> Losses:
    """Losses from .npy (T, S), .npz (`losses` (T, S); `steps`, `labels`, `predictions` where there), or CSV with the
    columns step, sample, loss. Raises OpsigError where the file is damaged or is not of this form.
    """
    try:
        if path.endswith(".csv"):
            return _losses_of_csv(path)
        if path.endswith((".npy", ".npz")):
            return _losses_of_arrays(path)
    except OSError as error:
        raise OpsigError(f"{path}: {error.strerror or first_words(error)}") from error
    except (OpsigError, MemoryError):
        raise
    except Exception as error:  # a malformed array file can raise anything
        raise OpsigError(f"{path} is not readable ({first_words(error)})") from error
    raise OpsigError(
        f"{path} ends in neither .npy, .npz nor .csv. Save losses as an array of steps by samples with numpy.save, or "
        "as CSV with the columns step,sample,loss"
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


def _losses_of_csv(path: str) -> Losses:
    steps, samples, losses = [], [], []
    for number, record in _rows(path, ("step", "sample", "loss")):
        steps.append(_whole(path, number, "step", record["step"]))
        samples.append(_whole(path, number, "sample", record["sample"]))
        losses.append(_float(path, number, "loss", record["loss"]))
    step_S, sample_S = np.array(steps, np.int64), np.array(samples, np.int64)
    ids, places = np.unique(sample_S, return_inverse=True)
    order = np.lexsort((places, step_S))
    step_S, places, loss_S = step_S[order], places[order], np.array(losses)[order]
    twice = np.flatnonzero((np.diff(step_S) == 0) & (np.diff(places) == 0))
    if len(twice):
        raise OpsigError(f"{path} has two losses of sample {ids[places[twice[0]]]} at step {step_S[twice[0]]}")
    times, starts = np.unique(step_S, return_index=True)
    ends = np.append(starts[1:], len(step_S))
    if len(times) * len(ids) > MAX_SPREAD * len(step_S) + SPARE_CELLS:
        raise OpsigError(
            f"{path} names {len(ids):,} samples at {len(times):,} steps in {len(step_S):,} lines: a run of them would "
            f"be {len(times) * len(ids):,} losses, nearly all of them missing"
        )

    def row(t: int) -> tuple[np.ndarray, None]:
        values = np.full(len(ids), np.nan, np.float32)
        values[places[starts[t] : ends[t]]] = loss_S[starts[t] : ends[t]]
        return values, None

    return Losses(times, ids, row)


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
        reader = csv.reader(file)
        try:
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in needed if name not in header]:
                raise OpsigError(f"{path} has no column {missing[0]} in its first line. It needs {', '.join(needed)}")
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise OpsigError(f"{path} line {reader.line_num} has {len(values)} values, not {len(header)}")
                count += 1
                yield reader.line_num, dict(zip(header, (value.strip() for value in values), strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise OpsigError(f"{path} is not readable as CSV ({first_words(error)})") from error
    if not count:
        raise OpsigError(f"{path} has a header and no lines")


def _whole(path: str, number: int, name: str, text: str) -> int:
    if not (text.isdecimal() and len(text) < 19):
        raise OpsigError(f"{path} line {number}: {name} is '{text[:40]}', which is not a whole number from 0 on")
    return int(text)


def _float(path: str, number: int, name: str, text: str) -> float:
    try:
        return float(text) if text else float("nan")
    except ValueError:
        raise OpsigError(f"{path} line {number}: {name} is '{text[:40]}', which is not a number") from None
