"""Writing a run as it happens: what `opsig train` uses, and what a training loop of one's own can use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from opsig_cli.backends import State, Tensor
from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.file import Trajectory, create_trajectory, open_trajectory
from opsig_cli.trajectory.rows import to_bfloat16


class Recorder:
    """Appends steps to a trajectory and commits them. S samples, P parameters.

    `samples`: their number, or their indices in the dataset. `labels`: text a sample; `classes`: names behind
    predictions; `layout`: names and shapes of the parameters, for checkpoints. `resume` continues a file that
    exists; what it already has at a step is not written again. Steps become durable together, every `commit_every`
    calls of `record`, with each checkpoint, and at the end. `bfloat16` keeps checkpoints at half the size: parameters
    alone, rounded, from which a run cannot be continued. Raises OpsigError where the file cannot be written, or
    holds another number of samples.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        samples: int | Sequence[int],
        *,
        labels: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        layout: Iterable[Tensor] | None = None,
        attributes: Mapping[str, Any] | None = None,
        resume: bool = False,
        replace: bool = False,
        commit_every: int = 10,
        bfloat16: bool = False,
    ):
        ids = np.arange(samples) if isinstance(samples, int) else np.asarray(samples)
        if resume:
            self.run = open_trajectory(path, "r+")
            try:
                check_samples(self.run, len(ids))
            except OpsigError:
                self.run.abort()  # a second try finds the file free
                raise
        else:
            self.run = create_trajectory(path, ids, attributes, replace=replace)
            if labels is not None:
                self.run.write("samples/label", np.array(labels, dtype=str))
            if classes is not None:
                self.run.write("class_name", np.array(classes, dtype=str))
            if layout is not None:
                write_layout(self.run, list(layout))
        self._commit_every = commit_every
        self._bfloat16 = bfloat16
        self._uncommitted = 0
        self._frozen: np.ndarray | None = None
        self._have = {group: set(self.run.steps(group).tolist()) for group in ("scalars", "losses", "checkpoints")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None or issubclass(kind, OpsigError):
            self.run.close()
        else:  # perhaps in the middle of a row
            self.run.abort()

    def record(
        self,
        step: int,
        *,
        scalars: Mapping[str, float] | None = None,
        losses: np.ndarray | None = None,
        predictions: np.ndarray | None = None,
        state: State | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what is known at a step.

        Scalars go by their schema name; losses and predictions are (S,); a state becomes a checkpoint, and `source`
        says which file it is from: path, bytes, sha256.
        """
        if scalars is not None:
            self._append("scalars", step, scalars)
        if losses is not None:
            self._append(
                "losses", step, {"loss": losses} | ({} if predictions is None else {"prediction": predictions})
            )
        if state is not None:
            self._keep_frozen(state.frozen)
            columns = {f"source__{name}": value for name, value in (source or {}).items()}
            self._append("checkpoints", step, self._checkpoint(state) | columns)
        self._uncommitted += 1
        if state is not None or self._uncommitted >= self._commit_every:
            self.run.commit()
            self._uncommitted = 0

    def _keep_frozen(self, frozen: np.ndarray) -> None:
        """Write the parameters that are not trained, once. Raises OpsigError where a later state has others."""
        if not frozen.size or frozen is self._frozen:
            return
        if not self.run.has("frozen/params"):
            self.run.write("frozen/params", frozen)
        elif not np.array_equal(self.run.frozen, frozen.astype(np.float32), equal_nan=True):
            raise OpsigError(
                f"{self.run.path} holds frozen parameters that are not those of this state. What changes is trained: "
                "its requires_grad must be True"
            )
        self._frozen = frozen

    def _checkpoint(self, state: State) -> dict[str, np.ndarray]:
        columns: dict[str, np.ndarray] = {"params": to_bfloat16(state.params) if self._bfloat16 else state.params}
        if state.buffers.size:
            columns["buffers"] = state.buffers
        if not self._bfloat16:
            columns |= {f"optimizer__{name}": row for name, row in state.optimizer.items()}
        return columns

    def _append(self, group: str, step: int, columns: Mapping[str, Any]) -> None:
        if step not in self._have[group]:
            self.run.append(group, step, **columns)
            self._have[group].add(step)


def check_samples(run: Trajectory, count: int) -> None:
    """Raise OpsigError where the dataset's length is not what it was when the run was recorded."""
    recorded = len(run.samples)
    if recorded != count:
        raise OpsigError(
            f"{run.path} was recorded over {recorded:,} samples and the task's dataset now has {count:,}. "
            "Give the --task, with the options, that the run was made with"
        )


def write_layout(run: Trajectory, layout: list[Tensor]) -> None:
    """Write names, shapes and places of parameters and buffers."""
    axes = max((len(tensor.shape) for tensor in layout), default=0)
    shapes = np.full((len(layout), max(axes, 1)), -1)
    for row, tensor in zip(shapes, layout, strict=True):
        row[: len(tensor.shape)] = tensor.shape
    run.write("layout/name", np.array([tensor.name for tensor in layout]))
    run.write("layout/kind", np.array([tensor.kind for tensor in layout]))
    run.write("layout/shape", shapes)
    run.write("layout/offset", np.array([tensor.offset for tensor in layout]))
    run.write("layout/size", np.array([tensor.size for tensor in layout]))


def check_trained(run: Trajectory, layout: Iterable[Tensor]) -> None:
    """Raise OpsigError where a model trains a parameter that was frozen in the run, or the other way round."""
    if not run.has("layout/kind"):
        return
    kinds = dict(zip(run.read("layout/name").tolist(), run.read("layout/kind").tolist(), strict=True))
    for tensor in layout:
        kind = kinds.get(tensor.name, tensor.kind)
        if kind != tensor.kind and "buffer" not in (kind, tensor.kind):
            before, now = ("trained", "freezes") if kind == "parameter" else ("frozen", "trains")
            raise OpsigError(
                f"{run.path} was recorded with {tensor.name} {before}, and the task's model {now} it (requires_grad). "
                "Give the --task that the run was made with, or record it anew"
            )


def read_state(run: Trajectory, step: int) -> State:
    """The checkpoint of a step. Raises OpsigError, naming the nearest, where there is none."""
    params = run.row("checkpoints/params", step)
    buffers = run.row("checkpoints/buffers", step) if run.has("checkpoints/buffers") else np.empty(0)
    slots = {}
    for name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "radius"):
        path = f"checkpoints/optimizer/{name}"
        if run.has(path):
            row = run.row(path, step)
            if not np.isnan(row).all():
                slots[name] = row
    return State(step, params, buffers, slots, run.frozen)
