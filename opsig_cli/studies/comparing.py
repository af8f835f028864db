"""Runs laid over each other: their losses, sharpness and signed shares. T steps, S samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.backends import Session
from opsig_cli.errors import OpsigError
from opsig_cli.studies.branching.lineage import is_branch_of
from opsig_cli.studies.curvature import held_group
from opsig_cli.studies.filled import targets_of
from opsig_cli.studies.trained import settings_of
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state


@dataclass(frozen=True)
class Series:
    """Values (T,) at steps (T,)."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float | None:
        """The last value, or None where there is none."""
        return float(self.values[-1]) if len(self.values) else None

    def between(self, first: int, last: int) -> Series:
        """The part at steps `first` to `last`, both included."""
        inside = (self.steps >= first) & (self.steps <= last)
        return Series(self.steps[inside], self.values[inside])


QUANTITIES = {
    "loss": "training loss",
    "accuracy": "accuracy on the training samples",
    "rising": "share of samples whose loss rises",
    "sharpness": "sharpness / stability threshold",
    "signed_fraction": "share moved by the sign",
}
"""What is compared, and its axis."""


def series_of(run: Trajectory) -> dict[str, Series]:
    """All quantities that the file holds. The loss is that of all samples where it was tracked, else the logged one."""
    found = tracked(run)
    if "loss" not in found and run.has("scalars/train_loss"):
        found["loss"] = _rows(run, "scalars", "train_loss")
    if run.has("scalars/signed_fraction"):
        signed = _rows(run, "scalars", "signed_fraction")
        found["signed_fraction"] = Series(signed.steps[:-1], signed.values[:-1])  # no step follows the last row
    group = held_group(run)
    if group is not None and run.has(f"{group}/threshold"):
        values, thresholds = _rows(run, group, "eigenvalue"), _rows(run, group, "threshold")
        found["sharpness"] = Series(values.steps, values.values[:, 0] / thresholds.values)
    return {name: series for name, series in found.items() if np.isfinite(series.values).any()}


def since_fork(runs: Sequence[Trajectory]) -> tuple[int, int] | None:
    """The steps from the first fork to the last step of a branch, where a run is compared with branches of its own."""
    branches = [branch for branch in runs if any(is_branch_of(branch, run) for run in runs)]
    ends = [int(steps[-1]) for branch in branches if len(steps := branch.steps("scalars"))]
    return (min(int(branch.attributes["from_step"]) for branch in branches), max(ends)) if ends else None


def tracked(run: Trajectory) -> dict[str, Series]:
    """Mean loss, accuracy, and the share of samples whose loss is higher than one step before (the paper's Fig. 36)."""
    if not run.has("losses/loss"):
        return {}
    steps = run.steps("losses")
    if not len(steps):
        return {}
    means, shares, previous, whole = [], [], None, True
    for _, rows in run.blocks("losses/loss"):
        for row in rows:
            mean = row.mean(dtype=np.float64)
            both, whole = whole and not np.isnan(mean), not np.isnan(mean)  # NaN where a sample was not measured
            means.append(mean if whole else _mean(row))
            if previous is None:
                shares.append(np.nan)
            else:
                shares.append((row > previous).mean() if both else _share_rising(previous, row))
            previous = row
    found = {"loss": Series(steps, np.array(means))}
    near = np.flatnonzero(np.diff(steps) == 1) + 1
    found["rising"] = Series(steps[near], np.array(shares)[near])
    label = label_numbers(run)
    if run.has("losses/prediction") and label is not None:
        targets = targets_of(run)
        right = [_accuracy(rows[:, targets], label[targets]) for _, rows in run.blocks("losses/prediction")]
        found["accuracy"] = Series(steps, np.concatenate(right))
    return found


def label_numbers(run: Trajectory) -> np.ndarray | None:
    """The class of every sample's label as predictions number it, (S,), -2 for one of none; None without classes."""
    if not run.has("class_name") or not run.has("samples/label"):
        return None
    names = {name: number for number, name in enumerate(run.read("class_name").tolist())}
    return np.array([names.get(label, -2) for label in run.read("samples/label").tolist()])


def _mean(row: np.ndarray) -> float:
    """The mean loss of the samples that were measured; NaN for none of them."""
    measured = row[~np.isnan(row)]
    return float(measured.mean(dtype=np.float64)) if len(measured) else float("nan")


def _share_rising(before: np.ndarray, after: np.ndarray) -> float:
    """The share that rises of the samples that were measured at both steps; NaN for none of them."""
    measured = len(before) - np.count_nonzero(np.isnan(before) | np.isnan(after))
    return np.count_nonzero(after > before) / measured if measured else float("nan")


def _accuracy(rows: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The share that is right of the predictions that were made, for each row; NaN for none of them."""
    made = (rows >= 0).sum(1)
    return np.divide((rows == label).sum(1), made, out=np.full(len(rows), np.nan), where=made > 0)


def summarise(run: Trajectory, series: Mapping[str, Series], until: int | None = None) -> dict[str, Any]:
    """One record of a run: how it was trained, where it ended, and medians over its second half of what fluctuates.

    `until`: the step at which series were cut off.
    """
    settings = settings_of(run)
    said = run.attributes
    record: dict[str, Any] = {"trajectory": run.path, "from_step": said.get("from_step"), "change": said.get("change")}
    for name in ("optimizer", "learning_rate", "sign_learning_rate", "batch_size", "seed"):
        record[name] = None if settings is None else getattr(settings, name)
    record["batch_size"] = record["batch_size"] or None  # 0 where it is not known
    if settings is not None and settings.optimizer != "splitsgd":
        record["sign_learning_rate"] = None
    steps = run.steps("scalars")
    steps = steps if until is None else steps[steps <= until]
    run.check("scalars", steps[-1:].tolist())
    record["steps"] = int(steps[-1]) if len(steps) else None
    for name in ("loss", "accuracy"):
        record[name] = series[name].last if name in series else None
    for name in ("rising", "sharpness", "signed_fraction"):
        record[name] = _median_of_second_half(series[name]) if name in series else None
    return record


def accuracy_on(run: Trajectory, session: Session, task: Any) -> float:
    """Share of a task's samples that the run's last checkpoint predicts as labelled."""
    steps = run.steps("checkpoints")
    if not len(steps):
        raise OpsigError(f"{run.path} has no checkpoint that can be used")
    state = read_state(run, int(steps[-1]))
    predictions = session.losses([state])[0][1]
    assert predictions is not None
    return float(np.mean([task.classes[p] == task.label(i) for i, p in enumerate(predictions.tolist())]))


def _rows(run: Trajectory, group: str, name: str) -> Series:
    steps = run.steps(group)
    return Series(steps, run.rows(f"{group}/{name}", 0, len(steps)))


def _median_of_second_half(series: Series) -> float | None:
    half = series.values[len(series.values) // 2 :]
    return float(np.nanmedian(half)) if np.isfinite(half).any() else None
