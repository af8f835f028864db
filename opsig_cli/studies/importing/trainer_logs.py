"""What trainers logged, at the step that each value is of: Hugging Face's trainer_state.json, Lightning's metrics.csv.

A trainer logs after its step: a gradient's norm and a learning rate logged at step s are those of the step from s - 1
to s, and so is the loss of its batch. What was evaluated at s is of the parameters after s steps.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.array_files import read_json
from opsig_cli.studies.importing.torch_files import first_words

Scalars = dict[int, dict[str, float]]
BEFORE = ("learning_rate", "grad_norm")
"""Numbers of the step that led to the one at which Hugging Face's Trainer logs them."""
EVALUATED = re.compile(r"^(val|valid|validation|test|eval)([_/.-]|$)|_epoch$|/dataloader_idx_", re.IGNORECASE)
"""Columns of Lightning's that are measured after the step at which it logs them."""
RATE = re.compile(r"^lr-|^lr$|^learning_rate$")
LOSS = ("train_loss_step", "train_loss", "loss_step", "loss", "train/loss", "train/loss_step")
MOMENTUM = re.compile(r"^lr-.*-momentum$")


def read(path: str) -> Scalars | None:
    """Scalars of each step from a trainer's own log; None for any other file. Raises OpsigError where it is damaged."""
    try:
        if path.endswith(".json"):
            history = read_json(path).get("log_history")
            if not isinstance(history, list):
                raise OpsigError(f"{path} has no log_history, as Hugging Face's trainer_state.json has")
            found = of_trainer([each for each in history if isinstance(each, dict)])
            if not found:
                raise OpsigError(f"{path} has an empty log_history")
            return found
        return _of_lightning(path) if path.endswith(".csv") else None
    except OSError as error:
        raise OpsigError(f"{path}: {error.strerror or first_words(error)}") from error


def of_trainer(history: Sequence[Mapping[str, Any]], rates: Mapping[int, float] | None = None) -> Scalars:
    """Scalars from the log_history of Hugging Face's Trainer.

    A loss is the mean over the steps since the last one: `train_loss` where that is one step, and else `loss` among
    what is only kept, at the step where the mean ends. `rates`: those of optimizers at checkpoints, by which older
    versions are told, which logged the rate of the step that follows.
    """
    found: Scalars = defaultdict(dict)
    logged = {each["step"]: each.get("learning_rate") for each in history if _is_step(each.get("step"))}
    here = [(rate, logged.get(step), logged.get(step + 1)) for step, rate in (rates or {}).items()]
    after = (
        bool(here) and all(rate == at for rate, at, _ in here) and any(at != later for _, at, later in here if later)
    )
    previous = 0
    for each in history:
        step: Any = each.get("step")
        if not _is_step(step) or "train_runtime" in each:  # the summary at the end
            continue
        for name, value in each.items():
            if name in ("step", "epoch") or not _is_number(value):
                continue
            if name == "loss":
                one = step - previous == 1
                found[step - one]["train_loss" if one else "loss"] = float(value)
            elif name in BEFORE and step > 0:
                found[step if after and name == "learning_rate" else step - 1][name] = float(value)
            else:
                found[step][name] = float(value)
        if "loss" in each:
            previous = step
    return dict(found)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _of_lightning(path: str) -> Scalars | None:
    """Scalars from the CSV that Lightning writes: a line for every time that something is logged, mostly empty."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            rows = list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise OpsigError(f"{path} is not readable as CSV ({first_words(error)})") from error
    names = list(rows[0]) if rows else []
    if not {"step", "epoch"} <= set(names) or not any(value == "" for row in rows for value in row.values()):
        return None
    last: dict[str, int] = {}
    cells: dict[str, list[tuple[int, str, float]]] = defaultdict(list)
    for number, row in enumerate(rows, 2):
        text, epoch = row["step"] or "", row["epoch"] or ""
        if not text.isdecimal() or len(text) > 18:
            raise OpsigError(f"{path} line {number}: step is '{text[:40]}', which is not a whole number from 0 on")
        last[epoch] = max(last.get(epoch, 0), int(text))
        for name, value in row.items():
            if name not in ("step", "epoch") and isinstance(value, str) and value != "":
                try:
                    cells[name].append((int(text), epoch, float(value)))
                except ValueError:
                    continue  # text
    found: Scalars = defaultdict(dict)
    loss = next((name for name in LOSS if name in cells and not _by_epoch(cells[name], last)), None)
    rate = next((name for name in cells if RATE.search(name) and not MOMENTUM.search(name)), None)
    for name, values in cells.items():
        later = bool(EVALUATED.search(name)) or (not RATE.search(name) and _by_epoch(values, last))
        known = {loss: "train_loss", rate: "learning_rate"}.get(name, f"{name}_epoch" if name == "train_loss" else name)
        for step, _, value in values:
            if not math.isnan(value) or known != "learning_rate":
                found[step + later][known] = value
    return dict(found)


def _by_epoch(values: Sequence[tuple[int, str, float]], last: Mapping[str, int]) -> bool:
    """Whether a column has one value an epoch, at its last step: the mean over it."""
    epochs = [epoch for _, epoch, _ in values]
    return len(set(epochs)) == len(epochs) and all(step == last[epoch] for step, epoch, _ in values)
