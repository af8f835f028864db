"""Tensors of checkpoints as flat rows; and those that are frozen, which all must agree on. F numbers of these.

A parameter that the task's model does not train is kept once for the run. It is taken from the first checkpoint that
has it, and one that none has (where scripts save only what is trained) is as the model makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opsig_cli.backends import Tensor
from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing import checkpoints, names
from opsig_cli.studies.importing.torch_files import first_words


class FrozenRow:
    """The row (F,) float32 of what is not trained, gathered from one checkpoint after the other.

    `row` begins with what the model makes; `known`: the file that it is from, where a run that is added to has it.
    """

    def __init__(self, layout: Sequence[Tensor], row: np.ndarray, known: str | None = None):
        self._tensors = [tensor for tensor in layout if tensor.kind == "frozen"]
        self.row = row.astype(np.float32)
        self._from = {} if known is None else dict.fromkeys((tensor.name for tensor in self._tensors), known)

    def take(self, content: checkpoints.Content, fit: names.Fit, path: str, warn: Callable[[str], None]) -> None:
        """Take what a checkpoint is the first to have. Raises OpsigError where it has other values than one before."""
        for tensor in self._tensors:
            if tensor.name not in fit.keys:
                continue
            place = self.row[tensor.offset : tensor.offset + tensor.size]
            values = np.empty_like(place)
            try:
                put(values, tensor, content.tensors[fit.keys[tensor.name]].read(), path, warn)
            except (MemoryError, OpsigError):
                raise
            except Exception as error:  # reading is where a damaged file shows
                raise OpsigError(f"{path} cannot be read: {first_words(error)}") from error
            if tensor.name not in self._from:
                place[:] = values
                self._from[tensor.name] = path
            elif not np.array_equal(place, values, equal_nan=True):
                raise OpsigError(
                    f"{path} has another {tensor.name} than {self._from[tensor.name]}, and the task's model freezes "
                    "it. Where it was trained, its requires_grad must be True; else these are not of one run"
                )


def put(row: np.ndarray, tensor: Tensor, value: Any, path: str, warn: Callable[[str], None]) -> None:
    """Write a checkpoint's tensor into its part of a row. Raises OpsigError for codes that are no weights."""
    import torch

    if tensor.kind != "buffer" and value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        kind = str(value.dtype).removeprefix("torch.")
        if not value.is_floating_point():  # codes of a quantized model, or half of a complex number
            raise OpsigError(
                f"{path} holds {tensor.name} in {kind}: these are not weights to measure with. Import the model as it "
                "was trained"
            )
        warn(f"parameters in {kind} are taken as float32")
    torch.from_numpy(row).view(tensor.shape).copy_(value)
