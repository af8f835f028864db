"""The dataset in fixed, unshuffled batches of items on the device. An item has one sample, or T, one a position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import TensorDataset, default_collate

from opsig_cli.backends import Passes
from opsig_cli.errors import OpsigError
from opsig_cli.tasks import Task, positions_of

CACHE_BYTES = 1 << 30
"""Batches are kept on the device up to this total; the rest are made again on every pass."""


class Batches:
    """The task's items as collated batches. Iterating yields (slice of sample indices, batch) in order.

    Raises OpsigError where the dataset has no length, is empty, or returns another item when asked again.
    """

    def __init__(self, task: Task, device: torch.device, batch_size: int, double: bool):
        dataset: Any = task.dataset()
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise OpsigError("the task's dataset must be map-style: it needs a length and items by index")
        if len(dataset) == 0:
            raise OpsigError("the task's dataset is empty")
        if isinstance(dataset, Mapping) or hasattr(dataset, "iloc"):  # a table's [0] is a column
            raise OpsigError(
                f"the task's dataset is a {type(dataset).__name__}, which gives items by key and not by index. "
                "Make it a list of items, one a sample"
            )
        self.items, self.positions = len(dataset), positions_of(task)
        self.count = self.items * self.positions
        self.batch_size = batch_size
        self._dataset = dataset
        self._collate = getattr(task, "collate", None) or default_collate
        self._device = device
        self._double = double
        self._cache: dict[int, Any] = {}
        self._cached_bytes = 0
        self._tensors = dataset.tensors if type(dataset) is TensorDataset else None
        self._within = slice(0, self.items)
        self.passes = Passes()
        if self._tensors is None:
            self._check_repeatable()
        elif sum(t.nbytes for t in self._tensors) <= CACHE_BYTES:
            self._tensors = tuple(self._place(t) for t in self._tensors)

    def widen(self) -> None:
        """Floating-point data in float64 from now on."""
        self._double = True
        self._cache.clear()
        self._cached_bytes = 0
        if self._tensors is not None:
            self._tensors = tuple(
                t.double() if t.is_floating_point() and t.device == self._device else t for t in self._tensors
            )

    @property
    def resident(self) -> bool:
        """Whether every batch stays on the device, so that another pass costs no loading."""
        return self._tensors is not None or all(items.start in self._cache for items in self._cut(self.batch_size))

    def slices(self, size: int | None = None) -> list[slice]:
        """The samples of every batch, or of every piece of `size` items; the last may be smaller."""
        return [self._samples(items) for items in self._cut(size or self.batch_size)]

    @property
    def divisible(self) -> bool:
        """Whether the data can be cut into pieces of any size."""
        return self._tensors is not None

    def piece(self, size: int) -> int:
        """The size, in items, of the pieces that `in_pieces(size)` gives."""
        return self.batch_size if self._tensors is None else size

    @contextmanager
    def only(self, samples: slice) -> Iterator[None]:
        """Inside, the batches, or pieces, that these samples, which are of whole items, are made of, and no others."""
        before = self._within
        self._within = slice(samples.start // self.positions, samples.stop // self.positions)
        try:
            yield
        finally:
            self._within = before

    def in_pieces(self, size: int) -> Iterator[tuple[slice, Any]]:
        """The same data in batches of `size` items where it can be cut; in the usual batches elsewhere."""
        if self._tensors is None:
            yield from self
            return
        for items in self._cut(size):
            yield self._samples(items), [self._place(t[items]) for t in self._tensors]
            self._passed(items)

    def _cut(self, size: int) -> list[slice]:
        first, last = self._within.start, self._within.stop
        return [slice(i, min(i + size, last)) for i in range(first, last, size)]

    def _samples(self, items: slice) -> slice:
        return slice(items.start * self.positions, items.stop * self.positions)

    def __iter__(self) -> Iterator[tuple[slice, Any]]:
        if self._tensors is not None:
            yield from self.in_pieces(self.batch_size)
            return
        for items in self._cut(self.batch_size):
            batch = self._cache.get(items.start)
            if batch is None:
                batch = self._made(range(items.start, items.stop))
                size = sum(leaf.nbytes for leaf in tree_flatten(batch)[0] if isinstance(leaf, torch.Tensor))
                if self._cached_bytes + size <= CACHE_BYTES:
                    self._cache[items.start] = batch
                    self._cached_bytes += size
            yield self._samples(items), batch
            self._passed(items)

    def _passed(self, items: slice) -> None:
        """Say that a batch went through the model, as a part of what this process has."""
        self.passes.heard((items.stop - items.start) / (self._within.stop - self._within.start))

    def take(self, items: Sequence[int] | np.ndarray) -> Any:
        """A batch of the items with these indices, in this order."""
        self.passes.heard(len(items) / self.items)
        return self._made(items)

    def _made(self, items: Sequence[int] | np.ndarray) -> Any:
        if self._tensors is not None:
            chosen = torch.as_tensor(np.asarray(items))
            return [self._place(t[chosen.to(t.device)]) for t in self._tensors]
        with torch.inference_mode(False):  # a cached batch must serve training as well
            return tree_map(self._place, self._collate([self._dataset[int(i)] for i in items]))

    def _place(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        dtype = torch.float64 if self._double and leaf.is_floating_point() else leaf.dtype
        return leaf.to(self._device, dtype)

    def _check_repeatable(self) -> None:
        ends = [0, self.items - 1]
        first, second = (tree_flatten(self.take(ends))[0] for _ in range(2))
        same = all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second, strict=True)
        )
        if not same:
            raise OpsigError(
                "the task's dataset returns another item when it is asked for the same index again. "
                "Turn random augmentation off: a sample's loss over time needs one fixed sample"
            )
