"""The order of the data: which samples were in the batch of each step, where that is all that is known of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.records import json_lines
from opsig_cli.studies.importing.columns import COLUMNS
from opsig_cli.studies.importing.logs import Log, number_of, whole_of
from opsig_cli.studies.importing.table_lines import opened
from opsig_cli.studies.importing.torch_files import check_expansion, first_words


def read_order(path: str) -> Log:
    """Which samples were in the batch of each step, as a log without losses.

    `.npy` and `order` in `.npz`: (steps, batch) indices, -1 where a batch is shorter, with `steps` in `.npz` where they
    are not 0, 1, ...; JSON lines: a list of indices a step, or an object with `step` and `indices`. Raises OpsigError
    where the file is not of this form.
    """
    try:
        if path.lower().endswith((".npy", ".npz")):
            steps, batches = _order_of_arrays(path)
        elif path.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
            steps, batches = _order_of_json(path)
        else:
            raise OpsigError(f"{path} ends in neither .npy, .npz nor .jsonl, in which the order of the data is read")
    except OSError as error:
        raise OpsigError(f"{path}: {error.strerror or first_words(error)}") from error
    except (OpsigError, MemoryError):
        raise
    except Exception as error:  # a malformed array file can raise anything
        raise OpsigError(f"{path} is not readable ({first_words(error)})") from error
    if not sum(map(len, batches)):
        raise OpsigError(f"{path} names no samples")
    index = np.concatenate(batches)
    samples, place = np.unique(index, return_inverse=True)
    step = np.repeat(np.array(steps, np.int64), [len(batch) for batch in batches])
    return Log(step, place, np.full(len(step), np.nan), np.full(len(step), -1), samples)


def _order_of_arrays(path: str) -> tuple[list[int], list[np.ndarray]]:
    loaded: Any = np.load(path, allow_pickle=False, mmap_mode="r")
    steps = None
    if not isinstance(loaded, np.ndarray):
        check_expansion(loaded.zip, path)
        if "order" not in loaded.files:
            raise OpsigError(f"{path} has no array 'order'. It has: {', '.join(loaded.files) or 'none'}")
        steps, loaded = loaded["steps"] if "steps" in loaded.files else None, loaded["order"]
    if loaded.ndim != 2 or loaded.dtype.kind not in "iu" or not loaded.size:
        raise OpsigError(
            f"{path}: the order must be integers of shape (steps, batch), not {loaded.dtype} {loaded.shape}"
        )
    if loaded.max() >= 1 << 62 or (loaded.dtype.kind == "i" and loaded.min() < -1):
        raise OpsigError(f"{path}: the order must hold indices from 0 on, and -1 where a batch is shorter")
    steps = np.arange(len(loaded)) if steps is None else np.asarray(steps)
    if steps.shape != loaded.shape[:1] or steps.dtype.kind not in "iu" or steps[0] < 0 or np.any(np.diff(steps) <= 0):
        raise OpsigError(f"{path}: steps must be {len(loaded)} increasing integers, one a row of the order")
    rows = (np.asarray(row).astype(np.int64) for row in loaded)
    return steps.tolist(), [row[row >= 0] for row in rows]


def _order_of_json(path: str) -> tuple[list[int], list[np.ndarray]]:
    steps: list[int] = []
    batches = []
    for number, _, value in json_lines(opened(path)):
        step = steps[-1] + 1 if steps else 0
        if isinstance(value, dict):
            folded = {name.casefold(): name for name in value}
            keys = {what: next((folded[n] for n in COLUMNS[what] if n in folded), "") for what in ("step", "sample")}
            step = whole_of(path, number, "step", value.get(keys["step"], step))
            value = value.get(keys["sample"])
        indices = [number_of(each) for each in value] if isinstance(value, list) else [None]
        if any(index is None for index in indices):
            raise OpsigError(
                f"{path} line {number} must be a list of sample indices, or an object with step and indices"
            )
        if steps and step <= steps[-1]:
            raise OpsigError(f"{path} line {number}: step {step} comes after step {steps[-1]}")
        steps.append(step)
        batches.append(np.array(indices, np.int64))
    return steps, batches
