"""Tensors without names, in the order of the model's: what equinox writes, and `numpy.savez` of a list of leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opsig_cli.backends import Tensor
from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.content import Content
from opsig_cli.studies.importing.entries import Entry

SLOTS = ("exp_avg", "exp_avg_sq")


def give_names(content: Content, layout: Sequence[Tensor], path: str) -> None:
    """Call tensors by the model's, which must come first and in its order; Adam's moments may follow on them.

    Numbers without axes are left out where the model has none: equinox writes the settings of layers, too. Raises
    OpsigError where the shapes are not the model's.
    """
    entries = content.unnamed
    if not any(tensor.shape == () for tensor in layout):
        entries = [entry for entry in entries if entry.shape != ()]
    for place, tensor in enumerate(layout):
        found = entries[place].shape if place < len(entries) else None
        if found != tensor.shape:
            there = "nothing" if found is None else f"one of {_shape(found)}"
            raise OpsigError(
                f"{path} holds arrays without names, and they are not the model's in its order: where {tensor.name} "
                f"({_shape(tensor.shape)}) should be there is {there}"
            )
    content.tensors = dict(zip((tensor.name for tensor in layout), entries, strict=False))
    rest = entries[len(layout) :]
    trained = [tensor for tensor in layout if tensor.kind == "parameter"]
    if trained and [entry.shape for entry in rest] == [tensor.shape for tensor in trained] * len(SLOTS):
        states: dict[str, dict[str, Entry]] = {}
        for place, tensor in enumerate(trained):
            states[tensor.name] = {slot: rest[place + i * len(trained)] for i, slot in enumerate(SLOTS)}
        content.optimizers = [{"state": states, "param_groups": [{"optax": True}]}]
    elif sum(entry.numel() for entry in rest):
        content.tensors |= {f"{len(layout) + i}": entry for i, entry in enumerate(rest)}


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if math.prod(shape) != 1 or shape else "a number"
