"""Checkpoints of a run as states, the layout they are in, and whether a task's model and data are those of the run.

P parameters, B buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from opsig_cli.backends import Session, State, Tensor
from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.file import Trajectory


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


def read_layout(run: Trajectory) -> list[Tensor]:
    """Names, shapes and places of parameters and buffers. Raises OpsigError where they do not follow each other."""
    found, ends = [], {"parameter": 0, "frozen": 0, "buffer": 0}
    columns = [run.read(f"layout/{name}").tolist() for name in ("name", "kind", "shape", "offset", "size")]
    for name, kind, axes, offset, size in zip(*columns, strict=True):
        shape = tuple(axis for axis in axes if axis >= 0)
        if kind not in ends or offset != ends[kind] or size < 0 or math.prod(shape) != size:
            raise OpsigError(
                f"{run.path}: the layout of {name} does not follow the tensor before it, as opsig writes it"
            )
        ends[kind] += size
        found.append(Tensor(name, kind, shape, offset, size))
    return found


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


def in_order_of(run: Trajectory, session: Session) -> None:
    """Make the run's order of its parameters the session's, where both have the same by name, as two backends may.

    Raises OpsigError where one has another shape, or where the session keeps to its order.
    """
    if not run.has("layout/kind"):
        return
    ours = {tensor.name: tensor.shape for tensor in session.layout if tensor.kind == "parameter"}
    theirs = {tensor.name: tensor.shape for tensor in read_layout(run) if tensor.kind == "parameter"}
    if ours.keys() != theirs.keys():
        return
    for name, shape in theirs.items():
        if shape != ours[name]:
            raise OpsigError(
                f"{run.path} holds {name} of shape {shape}, and the task's is {ours[name]}. Give the --task that the "
                "run was made with; a layer's weights are transposed between torch and JAX"
            )
    if list(ours) != list(theirs):
        arrange = getattr(session, "arrange", None)
        if arrange is None:
            raise OpsigError(f"{run.path} holds its parameters in another order than this backend can take")
        arrange(list(theirs))


def read_state(run: Trajectory, step: int) -> State:
    """The checkpoint of a step. Raises OpsigError, naming the nearest, where there is none."""
    run.require("checkpoints/params")
    row = run.whole_row("checkpoints", step)
    slots = {path.removeprefix("optimizer/"): slot for path, slot in row.items() if path.startswith("optimizer/")}
    slots = {name: slot for name, slot in slots.items() if not _blank(slot)}
    return State(step, row["params"], row.get("buffers", np.empty(0)), slots, run.frozen)


def _blank(slot: np.ndarray) -> bool:
    """Whether nothing was measured; looks no further than the first value where that was."""
    return bool(np.isnan(slot.flat[:1]).any()) and bool(np.isnan(slot).all())
