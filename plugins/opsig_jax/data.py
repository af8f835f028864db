"""A task's data, a pytree of arrays with a row a sample, in fixed batches on the device. S samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from opsig_cli.errors import OpsigError

CACHE_BYTES = 1 << 30
"""Batches are kept on the device up to this total; larger data come from the host on every pass."""


class Batches:
    """Iterating yields (slice of samples, batch), a batch being the task's own pytree of so many rows.

    Raises OpsigError where the data are no arrays, have no rows, or not as many of each array.
    """

    def __init__(self, data: Any, batch_size: int, double: bool, device: Any):
        arrays, self._structure = jax.tree_util.tree_flatten_with_path(data)
        self._arrays = [_array(jax.tree_util.keystr(path), leaf) for path, leaf in arrays]
        if not self._arrays:
            raise OpsigError("the task's data() returned no array. It returns arrays with one row a sample")
        counts = [len(array) for array in self._arrays]
        if len(set(counts)) > 1:
            listed = ", ".join(map(str, counts))
            raise OpsigError(f"the arrays of the task's data() have {listed} rows. Each has one row a sample")
        self.count = counts[0]
        if not self.count:
            raise OpsigError("the task's data are empty")
        if double:
            self._arrays = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in self._arrays]
        self.batch_size = batch_size
        self._device = device
        self._resident = sum(array.nbytes for array in self._arrays) <= CACHE_BYTES
        self._kept: dict[int, Any] = {}

    def slices(self) -> list[slice]:
        """The samples of every batch; the last may be smaller."""
        return [slice(i, min(i + self.batch_size, self.count)) for i in range(0, self.count, self.batch_size)]

    def __iter__(self) -> Iterator[tuple[slice, Any]]:
        for samples in self.slices():
            batch = self._kept.get(samples.start)
            if batch is None:
                batch = self.take(samples)
                if self._resident:
                    self._kept[samples.start] = batch
            yield samples, batch

    def take(self, samples: slice | np.ndarray) -> Any:
        """The rows of chosen samples, on the device."""
        chosen = [jax.device_put(array[samples], self._device) for array in self._arrays]
        return jax.tree_util.tree_unflatten(self._structure, chosen)


def _array(path: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if array.ndim == 0 or array.dtype.kind not in "fiubV":
        what = f"is {type(leaf).__name__}" if array.ndim == 0 or array.dtype == object else f"holds {array.dtype}"
        raise OpsigError(f"data(){path} of the task {what}. It returns arrays of numbers with one row a sample")
    return array
