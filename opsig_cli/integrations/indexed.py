"""Items that know their index in the dataset, so that a trainer's batch says whose losses it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opsig_cli.errors import OpsigError

INDEX = "opsig_index"
"""The key under which a batch of dictionaries has its samples' indices."""


class Indexed:
    """A map-style dataset whose items carry their index: a dictionary under INDEX, a tuple as its last entry, and any
    other item as the first of a pair."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        if isinstance(item, Mapping):
            return {**item, INDEX: int(index)}
        return (*item, int(index)) if isinstance(item, tuple | list) else (item, int(index))


def with_index(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """A collator of dictionaries that passes on their indices, which `collate` itself does not see."""

    def collated(items: list[Any]) -> Any:
        import torch

        if not all(isinstance(item, Mapping) and INDEX in item for item in items):
            return collate(items)
        batch = collate([{key: value for key, value in item.items() if key != INDEX} for item in items])
        batch[INDEX] = torch.tensor([item[INDEX] for item in items])
        return batch

    return collated


def index_of(batch: Any) -> Any:
    """The indices of a batch's samples, as `Indexed` and a collator leave them. Raises OpsigError where it has none."""
    found = None
    if isinstance(batch, Mapping):
        found = batch.get(INDEX)
    elif isinstance(batch, Sequence) and len(batch):
        found = batch[-1]
    if found is None or getattr(found, "ndim", None) != 1 or getattr(found, "is_floating_point", bool)():
        raise OpsigError(
            "the batch has no indices of its samples. Give the data loader Indexed(dataset), or the callback "
            "batches=False"
        )
    return found
