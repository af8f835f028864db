"""What autograd keeps of a computation for its derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Saved:
    """Bytes that were saved, each storage once."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: set[int] = set()

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor. What is kept is it without its history: a function's own output, as tanh keeps it, would
        hold on to the function, and with it to all that came before, for ever."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor.detach()


@contextmanager
def saved_bytes() -> Iterator[Saved]:
    """Count the bytes that autograd saves inside."""
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
        yield saved
