"""Tables that loggers leave, a line for each loss of a sample: what each line says, and of which sample.

N losses, S samples. A log is read once, line by line; what stays in memory is 32 bytes a loss.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.columns import Warn
from opsig_cli.studies.importing.table_lines import lines_of

MISSING = {"na", "n/a", "#n/a", "<na>", "nan", "null", "none"}
"""What stands in a cell without a number, as pandas knows them, in any case of letters."""


@dataclass(frozen=True)
class Log:
    """Lines of a log: `step` (N,) and `place` (N,) int64, `loss` (N,) float64, `prediction` (N,) int64, -1 for none.

    `place` counts samples (S,) in the order of `samples`, their indices, increasing, or, where they have `names` (S,)
    in the log, 0, 1, ... in the order in which these first appear. `labels` (S,) and `classes`, the names behind
    predictions, where the log has them.
    """

    step: np.ndarray
    place: np.ndarray
    loss: np.ndarray
    prediction: np.ndarray
    samples: np.ndarray
    names: np.ndarray | None = None
    labels: np.ndarray | None = None
    classes: list[str] | None = None


def read(path: str, named: Mapping[str, str], warn: Warn) -> Log:
    """A log of losses; `named`: columns by what they hold, where a person says them.

    Raises OpsigError, naming the line, where it is not of this form.
    """
    columns, lines = lines_of(path, named, warn)
    step, place, loss, prediction = array("q"), array("q"), array("d"), array("q")
    known: dict[Any, int] = {}
    labels: dict[int, str] = {}
    relabelled: dict[int, int] = {}  # the line that says another label than the first, by sample
    classes: dict[str, int] = {}
    empty = 0
    for number, values in lines:
        for record in _spread(path, number, dict(zip(columns, values, strict=True))):
            if _is_empty(record["sample"]) and _is_missing(record["loss"]):
                empty += 1  # of an evaluation, say, in the same log
                continue
            if record["step"] == columns["step"]:
                raise OpsigError(
                    f"{path} line {number} is the header again, as where a run went on and its log was appended to. "
                    "Take it out, with the lines before it of steps that come again"
                )
            step.append(whole_of(path, number, "step", record["step"]))
            if _is_empty(record["sample"]):
                raise OpsigError(f"{path} line {number} has a loss and no {columns['sample']}")
            name = _name_of(record["sample"])
            at = known.setdefault(name, len(known))
            place.append(at)
            loss.append(_float(path, number, "loss", record["loss"]))
            prediction.append(_prediction(record.get("prediction"), classes))
            if not _is_empty(record.get("label")):
                label = str(_name_of(record["label"]))
                if labels.setdefault(at, label) != label:
                    relabelled.setdefault(at, number)
    if empty and len(step):
        warn(f"{path}: {empty:,} lines without a sample and a loss are left out")
    if relabelled:
        many = f"{len(relabelled):,} samples have" if len(relabelled) > 1 else "one sample has"
        line = min(relabelled.values())
        warn(f"{path}: {many} more than one {columns['label']}, as on line {line}; the first of each is taken")
    if not len(step):
        raise OpsigError(f"{path} has a header and no lines")
    return _with_samples(
        np.array(step), np.array(place), np.array(loss), np.array(prediction), list(known), labels, list(classes)
    )


def _with_samples(
    step: np.ndarray, place: np.ndarray, loss: np.ndarray, prediction: np.ndarray, known: list[Any],
    labels: Mapping[int, str], classes: list[str],
) -> Log:  # fmt: skip
    """The lines with what their samples are called: numbers where all are, else names."""
    label = [labels.get(at, "") for at in range(len(known))]
    names, samples = np.array([str(name) for name in known]), np.arange(len(known))
    if all(isinstance(name, int) for name in known):
        samples, back = np.unique(np.array(known, np.int64), return_inverse=True)
        names, place = None, back[place]
        label = [label[at] for at in np.argsort(back)]
    if classes and all(text.isdecimal() for text in classes):
        number = np.array([int(text[:9]) for text in classes])
        prediction, classes = np.where(prediction < 0, -1, number[prediction]), []
    found = np.array(label, dtype=str) if labels else None
    return Log(step, place, loss, prediction, samples, names, found, classes or None)


def _spread(path: str, number: int, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A line as it is, or, where it holds lists of samples and of their losses, a record for each."""
    if not isinstance(record["sample"], list):
        yield record
        return
    lists = {name: value for name, value in record.items() if isinstance(value, list)}
    if len({len(value) for value in lists.values()}) > 1 or not isinstance(record["loss"], list):
        raise OpsigError(f"{path} line {number}: samples and losses must be lists of one length")
    for values in zip(*lists.values(), strict=True):
        yield record | dict(zip(lists, values, strict=True))


def _is_empty(value: Any) -> bool:
    return value is None or value == ""


def _is_missing(value: Any) -> bool:
    """Whether there is no number, as tables write it."""
    return _is_empty(value) or (isinstance(value, str) and value.casefold() in MISSING)


def number_of(value: Any) -> int | None:
    """A whole number from 0 on, also as 12.0 or 1e3; None for anything else.

    >>> number_of("12.0"), number_of("1e3"), number_of(7), number_of("007"), number_of("-1")
    (12, 1000, 7, None, None)
    """
    if isinstance(value, str):
        if value.isascii() and value.isdecimal():
            return int(value) if len(value) < 19 and (value[0] != "0" or value == "0") else None
        if not value[:1].isdecimal() or not (set(value) & set(".eE")):
            return None
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) and 0 <= value < 1 << 62 else None


def _name_of(value: Any) -> Any:
    """What a sample is called: a number where it is one, else text."""
    number = number_of(value)
    return str(value) if number is None else number


def whole_of(path: str, number: int, name: str, value: Any) -> int:
    found = number_of(value.lstrip("0") or "0" if isinstance(value, str) and value.isdecimal() else value)
    if found is None:
        raise OpsigError(f"{path} line {number}: {name} is '{value!s:.40}', which is not a whole number from 0 on")
    return found


def _float(path: str, number: int, name: str, value: Any) -> float:
    try:
        return math.nan if _is_missing(value) else float(value)
    except (ValueError, TypeError, OverflowError):
        raise OpsigError(f"{path} line {number}: {name} is '{value!s:.40}', which is not a number") from None


def _prediction(value: Any, classes: dict[str, int]) -> int:
    if _is_missing(value) or str(value) == "-1":
        return -1
    return classes.setdefault(str(_name_of(value)), len(classes))
