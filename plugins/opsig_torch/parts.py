"""One process's part of each measurement that several share. S samples, P parameters.

A part is of the very batches in which one process measures, so that what is of single samples, put together in order,
has the bits that one process gives. Sums over batches go from process to process in the order of the batches
(`Group.total`), and have them, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch

from opsig_cli.backends import State, Training
from opsig_torch import arithmetic
from opsig_torch import training as descent
from opsig_torch.forward import LossRow
from opsig_torch.group import Group, Lost
from opsig_torch.hessian import Hessian
from opsig_torch.session import TorchSession

Options = tuple[str | None, int | None, str | None, bool]


class PartialSession(TorchSession):
    """A task that a process of a group has opened; `share_of_NAME` is its part of the measurement of that name."""

    def __init__(self, group: Group, task: Any, options: Options):
        super().__init__(task, *options)
        arithmetic.prepare(self.device)  # these processes are opsig's own
        self.group = group
        self.weights: np.ndarray | None = None  # of a training's samples, as every process has them

    def own(self, size: int) -> slice:
        """The samples of this process's share of all items, which are taken in pieces of `size`."""
        items = self.share_of(self.items, size)
        return slice(items.start * self.positions, items.stop * self.positions)

    def share_of(self, count: int, size: int) -> slice:
        """This process's share of `count` things in a row that are taken in pieces of `size`."""
        pieces = self.group.share(-(-count // size))
        return slice(min(pieces.start * size, count), min(pieces.stop * size, count))

    @contextmanager
    def shared_sums(self) -> Iterator[None]:
        """Inside, batches are this process's own, and sums over them everybody's."""
        with self.batches.only(self.own(self.batch_size)):
            self.total = self.group.total
            try:
                yield
            finally:
                del self.total

    def share_of_losses(self, states: Sequence[State]) -> list[tuple[int, int, np.ndarray, np.ndarray | None]]:
        """The state's number, the first sample, and losses and predictions from that on.

        Where passes cost no loading, the states' batches are one long row of which each process has a part.
        """
        size = self.batches.piece(self.inference_batch())
        pieces = self.batches.slices(size)
        if self.batches.divisible:
            own = self.group.share(len(states) * len(pieces))
            ends = [(own.start - n * len(pieces), own.stop - n * len(pieces)) for n in range(len(states))]
            groups = [([n], max(0, a), min(len(pieces), b)) for n, (a, b) in enumerate(ends)]
        else:
            own = self.group.share(len(pieces))
            groups = [(list(range(len(states))), own.start, own.stop)]
        found = []
        for numbers, first, last in groups:
            if first < last:
                samples = slice(pieces[first].start, pieces[last - 1].stop)
                with self.batches.only(samples):
                    rows = super().losses([states[number] for number in numbers])
                for number, (losses, predictions) in zip(numbers, rows, strict=True):
                    part = None if predictions is None else predictions[samples]
                    found.append((number, samples.start, losses[samples], part))
        return found

    def share_of_gradient_norms(self, state: State, samples: np.ndarray | None) -> np.ndarray:
        from opsig_torch.alignment import gradient_norms

        samples = np.arange(self.samples) if samples is None else samples
        own = samples[self.share_of(len(samples), self.inference_batch())]
        with self.at(state):
            return gradient_norms(self, own) if len(own) else np.empty(0)

    def share_of_rounds(self, name: str, arguments: Sequence[Any], count: int) -> tuple[np.ndarray, ...]:
        module, _, function = name.rpartition(".")
        assert module.startswith("opsig_cli.analysis.")
        own = self.group.share(count)
        return getattr(import_module(module), function)(*arguments, range(own.start, own.stop))

    def share_of_mean_cosines(
        self, state: State, samples: np.ndarray, sets: list[np.ndarray], norms: np.ndarray
    ) -> np.ndarray:
        own = samples[self.share_of(len(samples), self.inference_batch())]
        return super().mean_cosines(state, own, sets, norms) if len(own) else np.empty((0, len(sets)))

    def share_of_gradient_sketch(self, state: State, samples: np.ndarray, size: int, seed: int) -> np.ndarray:
        own = samples[self.share_of(len(samples), self.inference_batch())]
        return super().gradient_sketch(state, own, size, seed) if len(own) else np.empty((0, size), np.float32)

    def share_of_curvature_along(self, state: State, direction: np.ndarray) -> np.ndarray:
        own = self.own(self.batches.piece(self.inference_batch()))
        if own.start == own.stop:
            return np.empty((3, 0))
        with self.batches.only(own):
            return np.stack(super().curvature_along(state, direction))[:, own]

    def share_of_slopes_along(self, state: State, directions: np.ndarray) -> np.ndarray:
        own = self.own(self.batches.piece(self.inference_batch()))
        if own.start == own.stop:
            return np.empty((2, 0, len(directions)))
        with self.batches.only(own):
            return np.stack(super().slopes_along(state, directions))[:, own]

    def share_of_gradient(self, state: State, weights: np.ndarray | None) -> np.ndarray:
        with self.shared_sums():
            found = super().gradient(state, weights)
        return found if self.group.leads else found[:0]

    def serve_hessian(self, state: State, scale: np.ndarray | None) -> None:
        """Give this process's part of products with the Hessian until the first process is done."""
        like = self.flat.vector.detach()
        failed: Exception | None = None
        hessian = None
        with self.at(state), self.shared_sums():
            try:
                if self.batches.slices():
                    hessian = Hessian(self, None if scale is None else torch.from_numpy(scale).to(like))
            except Exception as error:  # told with the first product, at which the others listen
                failed = error
            while (what := self.group.hear()[0]) != "done":
                vector = self.group.spread(torch.empty_like(like)) if what == "product" else like
                try:
                    if failed is not None:
                        self.group.agree(failed)
                    elif hessian is None:
                        self.group.total((), like)
                    else:
                        hessian(vector) if what == "product" else hessian.gradient()
                except Lost:
                    raise
                except Exception:  # all know; the first process says what follows
                    continue

    def weigh(self, weights: np.ndarray | None) -> None:
        """Take these weights of the samples for the steps of descent that follow."""
        self.weights = weights

    def serve_descent(self, smoothing: float | None) -> None:
        """Give this process's part of the gradient of a step."""
        with torch.no_grad():
            self.flat.vector.copy_(self.group.spread(torch.empty_like(self.flat.vector)))
        self.share_of_descent(Training("gd", 0.0, 0, weights=self.weights, label_smoothing=smoothing))

    def share_of_descent(self, training: Training) -> tuple[float, LossRow]:
        """The gradient of the whole loss into `flat.gradient`, the loss, and every sample's; whole at the first."""
        row, sums, own = LossRow(self.samples), [], self.own(self.batch_size)
        self.measuring_mode()

        def terms() -> Iterator[torch.Tensor]:
            for indices, batch in self.batches:
                self.flat.gradient.zero_()
                counted, losses, predictions = descent.counted_losses(self, training, indices, batch)
                row.put(indices, losses, predictions)
                counted = self.counted(counted, indices)
                (counted.sum() / self.target_count).backward()
                sums.append(counted.detach().double().sum().item())
                yield self.flat.gradient.clone()

        with self.batches.only(own), self.calculating():
            self.flat.gradient.copy_(self.group.total(terms(), self.flat.gradient))
        total = 0.0
        for first, losses, predictions, its_sums in self.group.collected((own.start, *row.raw(own), sums)):
            if len(losses):
                held = None if predictions is None else torch.from_numpy(predictions)
                row.put(slice(first, first + len(losses)), torch.from_numpy(losses), held)
            for part in its_sums:
                total += part
        if not self.group.leads:
            return total, row
        whole = training.weights is None and training.label_smoothing is None
        return (row.mean(self.counts_S) if whole else total / self.target_count), row
