"""A session that several processes share: each measures some of the fixed batches. S samples, P parameters.

The first process holds the session that commands see; the others `serve` its calls. Of one measurement each does a part
(`opsig_torch.parts`); of several that know nothing of each other each does some from end to end (`each`), which takes
no talk on the way. Both have the bits that one process gives. What is not named here is measured by the first process
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from opsig_cli.backends import Call, Eigenpairs, Snapshot, State, Training
from opsig_torch import training as descent
from opsig_torch import whole
from opsig_torch.forward import LossRow
from opsig_torch.group import Group
from opsig_torch.parts import Options, PartialSession


class SharedSession(PartialSession):
    """A task that the processes of a group have opened, number `number` of those they have."""

    def __init__(self, group: Group, number: int, task: Any, options: Options):
        super().__init__(group, task, options)
        self._number = number
        self._known_frozen: np.ndarray | None = None
        self._told_targets = self.positions == 1
        self._replayed_from = whole.Latest()

    @property
    def device_name(self) -> str:
        """The device as a person knows it, and how many processes there are."""
        return f"{super().device_name}, {self.group.size} processes"

    # -- what the first process calls, and all perform

    def bound_by(self, memory: int) -> None:
        """Take no more than so many bytes at every process."""
        self._tell("bound", memory)
        super().bound_by(memory)

    def divide(self, memory: int) -> None:
        """Cut the data by so many bytes at every process, a bound that nobody asked for: freed memory is kept."""
        self._tell("divide", memory)
        self._divide(memory)

    def _divide(self, memory: int) -> None:
        self.memory = memory
        self.forget()

    def taken(self) -> int:
        """Half of the bound: processes cut the data in one way, and each has a size of its own."""
        return self.bound() // 2

    def initial(self, seed: int) -> State:
        """The run's first state; the others build the model as this process does."""
        self._tell("begin", seed)
        return super().initial(seed)

    def adopt(self, frozen: np.ndarray) -> None:
        """Take a run's frozen parameters for the model's own, at every process."""
        if self.group.leads and frozen.size and frozen is not self._known_frozen:
            self._tell("take", frozen)
            self._known_frozen = frozen
        super().adopt(frozen)

    def arrange(self, names: Sequence[str]) -> None:
        """Take this order of the parameters, at every process."""
        self._tell("arrange", list(names))
        super().arrange(names)

    def losses(self, states: Sequence[State]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        rows = [LossRow(self.samples) for _ in states]
        for part in self._together("losses", [self._bare(state) for state in states]):
            for number, first, losses, predictions in part:
                rows[number].put(
                    slice(first, first + len(losses)),
                    torch.from_numpy(losses),
                    None if predictions is None else torch.from_numpy(predictions),
                )
        return [row.arrays() for row in rows]

    def gradient_norms(self, state: State, samples: np.ndarray | None = None) -> np.ndarray:
        if self.positions > 1 or (self.couples_samples and samples is not None):
            return super().gradient_norms(state, samples)
        return np.concatenate(self._together("gradient_norms", self._bare(state), samples))

    def each(self, calls: Iterable[Call], result_bytes: int) -> Iterator[Any]:
        """Results of these calls, of which every process does one at a time from end to end; the first does all of them
        where it has no room for everybody's. Where fewer are left than there are processes, one whose parts can be
        shared is."""
        rest = iter(calls)
        bytes_each = result_bytes + 2 * self.flat.vector.nbytes
        roomy = 2 * self.group.size * bytes_each <= self.room()
        while some := list(islice(rest, self.group.size if roomy else 1)):
            few = len(some) < self.group.size and self.positions == 1 and not self.couples_samples
            if few and all(hasattr(self, f"share_of_{name}") for name, _ in some):
                yield from (getattr(self, name)(*arguments) for name, arguments in some)
                continue
            told = [(name, [self._lean(name, value) for value in values]) for name, values in some]
            for found in self._together("each", told) if roomy else [self.share_of_each(told)]:
                yield from found

    def replays(self, trainings: Iterable[tuple[Training, State]]) -> Iterator[Sequence[Snapshot]]:
        """Snapshots of trainings for their losses alone, of which every process does some from end to end."""
        asked: list[Training] = []

        def calls() -> Iterator[Call]:
            for training, start in trainings:
                asked.append(training)
                yield whole.REPLAY, (whole.told(training), start)

        for number, found in enumerate(self.each(calls(), 8 * self.samples)):  # a replay has few steps and samples
            yield whole.snapshots(found, asked[number], self.samples)

    def in_rounds(
        self, work: Callable[..., tuple[np.ndarray, ...]], arguments: Sequence[Any], count: int
    ) -> tuple[np.ndarray, ...]:
        """Rounds of a function of `opsig_cli.analysis`, shared where its arguments can be told."""
        if not all(value is None or isinstance(value, (np.ndarray, int, float)) for value in arguments):
            return work(*arguments, range(count))
        parts = self._together("rounds", f"{work.__module__}.{work.__name__}", list(arguments), count)
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def mean_cosines(
        self, state: State, samples: np.ndarray, sets: list[np.ndarray], norms: np.ndarray | None = None
    ) -> np.ndarray:
        if self.couples_samples or self.positions > 1:
            return super().mean_cosines(state, samples, sets, norms)
        if norms is None:
            norms = self.gradient_norms(state, np.unique(np.concatenate(sets)))
        return np.concatenate(self._together("mean_cosines", self._bare(state), samples, sets, norms))

    def gradient_sketch(self, state: State, samples: np.ndarray, size: int, seed: int) -> np.ndarray:
        if self.couples_samples or self.positions > 1:
            return super().gradient_sketch(state, samples, size, seed)
        return np.concatenate(self._together("gradient_sketch", self._bare(state), samples, size, seed))

    def curvature_along(self, state: State, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        loss, slope, curvature = np.concatenate(self._together("curvature_along", self._bare(state), direction), 1)
        return loss, slope, curvature

    def slopes_along(self, state: State, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slopes, curvatures = np.concatenate(self._together("slopes_along", self._bare(state), directions), 1)
        return slopes, curvatures

    def gradient(self, state: State, weights: np.ndarray | None = None) -> np.ndarray:
        return self._together("gradient", self._bare(state), weights)[0]

    def top_eigenpairs(
        self, state: State, count: int, tolerance: float, previous: Eigenpairs | None = None,
        scale: np.ndarray | None = None,
    ) -> Eigenpairs:  # fmt: skip
        with self._hessian(state, scale):
            return super().top_eigenpairs(state, count, tolerance, previous, scale)

    def hessian_vectors(self, state: State, vectors: np.ndarray) -> np.ndarray:
        with self._hessian(state):
            return super().hessian_vectors(state, vectors)

    def spectral_density(self, state: State) -> tuple[np.ndarray, np.ndarray, float]:
        with self._hessian(state):
            return super().spectral_density(state)

    def train(self, training: Training, start: State) -> Iterator[Snapshot]:
        """Snapshots of every step. Full batches are shared; minibatches, and models with batch norm, whose running
        statistics go from batch to batch, are trained by the first process alone."""
        if training.batch_size is not None or self.batch_norms():
            what = "minibatches" if training.batch_size is not None else "a model with batch norm"
            self.tell(f"note: {what} are trained by one of the {self.group.size} processes")
            return super().train(training, start)
        self._tell("load", self._bare(start))

        def gradient(_: Any, training: Training, step: int, wants: bool) -> tuple[float, LossRow]:
            if training.weights is not self.weights:
                self._tell("weigh", training.weights)
                self.weigh(training.weights)
            with self.group.together():
                self._tell("descend", training.label_smoothing)
                self.group.spread(self.flat.vector.detach())
                return self.share_of_descent(training)

        return descent.train(self, training, start, gradient)

    def _tell(self, name: str, *arguments: Any) -> None:
        self.group.tell(self._number, name, *arguments)

    def _together(self, name: str, *arguments: Any) -> list[Any]:
        """Every process's part of a measurement, in order, at the first."""
        with self.group.together():
            self._tell(name, *arguments)
            return self.perform(name, arguments)

    def _bare(self, state: State) -> State:
        """What of a state the others need: they have the frozen parameters, which are those of the run, and know from
        the first state on which samples have a loss."""
        self.adopt(state.frozen)
        if not self._told_targets:
            with self.at(state):
                counts = self.counts_S
            if self._all_targets is not None:
                self._tell("targets", None if counts is None else counts.cpu().numpy())
                self._told_targets = True
        return replace(state, optimizer={}, frozen=np.empty(0, np.float32))

    def _lean(self, name: str, value: Any) -> Any:
        """What of an argument the others need."""
        if not isinstance(value, State):
            return value
        return replace(self._bare(value), optimizer=value.optimizer if name == whole.REPLAY else {})

    @contextmanager
    def _hessian(self, state: State, scale: np.ndarray | None = None) -> Iterator[None]:
        """Products with the Hessian inside are those of all processes."""
        self._tell("hessian", self._bare(state), scale)

        def announce(what: str, vector: torch.Tensor | None = None) -> None:
            self.group.tell(what)
            if vector is not None:
                self.group.spread(vector)

        try:
            with self.shared_sums(), self.group.together():
                self.announce = announce
                yield
        finally:
            del self.announce
            self.group.tell("done")

    # -- at every process

    def perform(self, name: str, arguments: Sequence[Any]) -> list[Any]:
        """Measure this process's part; everybody's, in order, at the first. OpsigError at all where one fails."""
        return self.group.done(lambda: getattr(self, f"share_of_{name}")(*arguments))

    def serve(self, name: str, arguments: Sequence[Any]) -> None:
        """Do what the first process tells the others."""
        alone: dict[str, Callable[..., Any]] = {
            "begin": super().initial, "take": super().adopt, "load": self.load, "hessian": self.serve_hessian,
            "bound": super().bound_by, "divide": self._divide, "targets": self.know_targets,
            "arrange": super().arrange, "weigh": self.weigh,
        }  # fmt: skip
        if name in alone:
            alone[name](*arguments)
        elif name == "descend":
            self.serve_descent(*arguments)
        else:
            self.perform(name, arguments)

    def know_targets(self, counts_S: np.ndarray | None) -> None:
        """Take the first process's word for which samples have a loss."""
        self._all_targets = counts_S is None
        self._targets = None if counts_S is None else torch.from_numpy(counts_S).to(self.device)

    def share_of_each(self, calls: Sequence[Call]) -> list[Any]:
        """This process's own of these calls, done from end to end; none where there are fewer than processes."""
        if self.group.rank >= len(calls):
            return []
        name, arguments = calls[self.group.rank]
        if name == whole.REPLAY:
            training, start = arguments
            return [whole.replayed(super().train(whole.understood(training), self._replayed_from(start)), training)]
        assert name in whole.CALLS
        return [getattr(super(), name)(*arguments)]
