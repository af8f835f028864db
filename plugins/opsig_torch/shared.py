"""A session that several processes share: each measures some of the fixed batches. S samples, P parameters.

The first process holds the session that commands see; the others `serve` its calls. What is of single samples is
measured in the very batches in which one process measures it, and put together in order. Sums over batches go from
process to process in the order of the batches (`Group.total`). Both have the bits that one process gives. What is not
named here is measured by the first process alone.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np
import torch

from opsig_cli.backends import Eigenpairs, Snapshot, State, Training
from opsig_cli.errors import OpsigError
from opsig_cli.tasks import TaskSpec, load, origin_of
from opsig_torch import arithmetic, features
from opsig_torch import training as descent
from opsig_torch.forward import LossRow
from opsig_torch.group import Elsewhere, Group, Lost
from opsig_torch.hessian import Hessian
from opsig_torch.memory import bound_of
from opsig_torch.session import TorchSession

Options = tuple[str | None, int | None, str | None, bool]


class SharedSession(TorchSession):
    """A task that the processes of a group have opened, number `number` of those they have."""

    def __init__(self, group: Group, number: int, task: Any, options: Options):
        super().__init__(task, *options)
        arithmetic.prepare(self.device)  # these processes are opsig's own
        self.group = group
        self._number = number
        self._known_frozen: np.ndarray | None = None
        self._told_targets = self.positions == 1
        self._weights: np.ndarray | None = None  # of a training's samples, as every process has them

    @property
    def device_name(self) -> str:
        """The device as a person knows it, and how many processes there are."""
        return f"{super().device_name}, {self.group.size} processes"

    # -- what the first process calls, and all perform

    def bound_by(self, memory: int) -> None:
        """Take no more than so many bytes at every process."""
        self._tell("bound", memory)
        super().bound_by(memory)

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
        return np.concatenate(self._together("norms", self._bare(state), samples))

    def cosines_at(self, states: Iterable[State], samples: np.ndarray) -> Iterator[np.ndarray]:
        """Cosines at each of these states, of which every process measures one at a time; the first does all of them
        where it has no room for everybody's."""
        rest = iter(states)
        each = 8 * len(samples) ** 2 + 2 * self.flat.vector.nbytes
        if 2 * self.group.size * each > self.room():
            yield from (self.gradient_cosines(state, samples) for state in rest)
            return
        while some := list(islice(rest, self.group.size)):
            for found in self._together("whole_cosines", [self._bare(state) for state in some], samples):
                if found is not None:
                    yield found

    def in_rounds(
        self, work: Callable[..., tuple[np.ndarray, ...]], arguments: Sequence[Any], count: int
    ) -> tuple[np.ndarray, ...]:
        """Rounds of a function of `opsig_cli.analysis`, shared where its arguments can be told."""
        if not all(value is None or isinstance(value, (np.ndarray, int, float)) for value in arguments):
            return work(*arguments, range(count))
        parts = self._together("rounds", f"{work.__module__}.{work.__name__}", list(arguments), count)
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def mean_cosines(self, state: State, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray:
        if self.couples_samples or self.positions > 1:
            return super().mean_cosines(state, samples, sets)
        return np.concatenate(self._together("cosines", self._bare(state), samples, sets))

    def gradient_sketch(self, state: State, samples: np.ndarray, size: int, seed: int) -> np.ndarray:
        if self.couples_samples or self.positions > 1:
            return super().gradient_sketch(state, samples, size, seed)
        return np.concatenate(self._together("sketch", self._bare(state), samples, size, seed))

    def features(self, state: State, samples: np.ndarray) -> np.ndarray | None:
        with self.at(state):
            return features.features(self, samples, self._parts_of_features(state))

    def mean_feature_cosines(self, state: State, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray | None:
        with self.at(state):
            return features.mean_feature_cosines(self, samples, sets, self._parts_of_features(state))

    def _parts_of_features(self, state: State) -> features.Parts:
        bare = self._bare(state)

        def parts(samples: np.ndarray) -> list[features.Part | None]:
            found = self._together("features", bare, samples)
            return [None if part is None else features.Part(*part) for part in found]

        return parts

    def curvature_along(self, state: State, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        loss, slope, curvature = np.concatenate(self._together("curvature", self._bare(state), direction), 1)
        return loss, slope, curvature

    def slopes_along(self, state: State, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slopes, curvatures = np.concatenate(self._together("slopes", self._bare(state), directions), 1)
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
            if training.weights is not self._weights:
                self._tell("weigh", training.weights)
                self._weigh(training.weights)
            self._tell("descend", training.label_smoothing)
            self.group.spread(self.flat.vector.detach())
            return self.share_of_descent(training)

        return descent.train(self, training, start, gradient)

    def _tell(self, name: str, *arguments: Any) -> None:
        self.group.tell(self._number, name, *arguments)

    def _together(self, name: str, *arguments: Any) -> list[Any]:
        """Every process's part of a measurement, in order, at the first."""
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

    @contextmanager
    def _hessian(self, state: State, scale: np.ndarray | None = None) -> Iterator[None]:
        """Products with the Hessian inside are those of all processes."""
        self._tell("hessian", self._bare(state), scale)

        def announce(what: str, vector: torch.Tensor | None = None) -> None:
            self.group.tell(what)
            if vector is not None:
                self.group.spread(vector)

        try:
            with self._shared_sums():
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
            "bound": super().bound_by, "targets": self.know_targets, "arrange": super().arrange, "weigh": self._weigh,
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

    def own(self, size: int) -> slice:
        """The samples of this process's share of all items, which are taken in pieces of `size`."""
        items = self.share_of(self.items, size)
        return slice(items.start * self.positions, items.stop * self.positions)

    def share_of(self, count: int, size: int) -> slice:
        """This process's share of `count` things in a row that are taken in pieces of `size`."""
        pieces = self.group.share(-(-count // size))
        return slice(min(pieces.start * size, count), min(pieces.stop * size, count))

    @contextmanager
    def _shared_sums(self) -> Iterator[None]:
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

    def share_of_norms(self, state: State, samples: np.ndarray | None) -> np.ndarray:
        from opsig_torch.alignment import gradient_norms

        samples = np.arange(self.samples) if samples is None else samples
        own = samples[self.share_of(len(samples), self.inference_batch())]
        with self.at(state):
            return gradient_norms(self, own) if len(own) else np.empty(0)

    def share_of_whole_cosines(self, states: Sequence[State], samples: np.ndarray) -> np.ndarray | None:
        if self.group.rank >= len(states):
            return None
        return super().gradient_cosines(states[self.group.rank], samples)

    def share_of_rounds(self, name: str, arguments: Sequence[Any], count: int) -> tuple[np.ndarray, ...]:
        module, _, function = name.rpartition(".")
        assert module.startswith("opsig_cli.analysis.")
        own = self.group.share(count)
        return getattr(import_module(module), function)(*arguments, range(own.start, own.stop))

    def share_of_cosines(self, state: State, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray:
        own = samples[self.share_of(len(samples), self.inference_batch())]
        return super().mean_cosines(state, own, sets) if len(own) else np.empty((0, len(sets)))

    def share_of_sketch(self, state: State, samples: np.ndarray, size: int, seed: int) -> np.ndarray:
        own = samples[self.share_of(len(samples), self.inference_batch())]
        return super().gradient_sketch(state, own, size, seed) if len(own) else np.empty((0, size), np.float32)

    def share_of_features(self, state: State, samples: np.ndarray) -> tuple[Any, ...] | None:
        own = self.own(self.batches.piece(self.inference_batch()))
        if own.start == own.stop:
            return None
        with self.at(state), self.batches.only(own):
            found = features.part_of(self, samples)
        return None if found is None else (found.rows, found.places, found.sums, found.count)

    def share_of_curvature(self, state: State, direction: np.ndarray) -> np.ndarray:
        own = self.own(self.batches.piece(self.inference_batch()))
        if own.start == own.stop:
            return np.empty((3, 0))
        with self.batches.only(own):
            return np.stack(super().curvature_along(state, direction))[:, own]

    def share_of_slopes(self, state: State, directions: np.ndarray) -> np.ndarray:
        own = self.own(self.batches.piece(self.inference_batch()))
        if own.start == own.stop:
            return np.empty((2, 0, len(directions)))
        with self.batches.only(own):
            return np.stack(super().slopes_along(state, directions))[:, own]

    def share_of_gradient(self, state: State, weights: np.ndarray | None) -> np.ndarray:
        with self._shared_sums():
            found = super().gradient(state, weights)
        return found if self.group.leads else found[:0]

    def serve_hessian(self, state: State, scale: np.ndarray | None) -> None:
        """Give this process's part of products with the Hessian until the first process is done."""
        like = self.flat.vector.detach()
        failed: Exception | None = None
        hessian = None
        with self.at(state), self._shared_sums():
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

    def _weigh(self, weights: np.ndarray | None) -> None:
        self._weights = weights

    def serve_descent(self, smoothing: float | None) -> None:
        """Give this process's part of the gradient of a step."""
        with torch.no_grad():
            self.flat.vector.copy_(self.group.spread(torch.empty_like(self.flat.vector)))
        self.share_of_descent(Training("gd", 0.0, 0, weights=self._weights, label_smoothing=smoothing))

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


def opened(group: Group, task: Any, options: Options) -> SharedSession:
    """A session of the first process, which the others open as well."""
    spec = origin_of(task)
    if spec is None:
        raise OpsigError("several processes share tasks that the command line names. Run this on one process")
    group.sessions += 1
    number = group.sessions
    gc.collect()  # sessions that nobody has any more, which the others then let go of, too
    group.tell(number, "open", spec.name, dict(spec.options), spec.model, list(options), sorted(group.held))
    session = _built(group, number, lambda: task, options)
    group.held[number] = session
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(group.size)))
    session.bound_by(bound_of(session.device) // (here if session.device == "cpu" else 1))
    return session


def serve(group: Group) -> None:
    """Do what the first process tells until it ends. Where one is gone, the first that is left raises Lost."""
    try:
        _serve(group)
    except Lost:
        if group.speaks():
            raise
        raise SystemExit(1) from None


def _serve(group: Group) -> None:
    sessions: dict[int, SharedSession] = {}
    while (message := group.hear()) != ["end"]:
        number, name, *arguments = message
        try:
            if name == "open":
                task, options, model, how, held = arguments
                sessions = {each: session for each, session in sessions.items() if each in held}
                spec = TaskSpec(task, options, model)
                sessions[number] = _built(group, number, lambda spec=spec: load(spec)[0], tuple(how))
            else:
                sessions[number].serve(name, arguments)
        except Lost:
            raise
        except (Elsewhere, Exception):
            continue


def _built(group: Group, number: int, task: Callable[[], Any], options: Options) -> SharedSession:
    """The session, once every process has it."""
    try:
        session = SharedSession(group, number, task(), options)
    except Exception as error:
        group.agree(error)
        raise
    group.agree()
    if session.device == "cuda":
        require_own_gpu(group)
    return session


def require_own_gpu(group: Group) -> None:
    """Raise OpsigError, at every process, where two of them have the same GPU, which NCCL refuses."""
    gpus = group.said(f"{socket.gethostname()} {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
    if len(set(gpus)) < len(gpus):
        second = next(rank for rank, gpu in enumerate(gpus) if gpu in gpus[:rank])
        raise OpsigError(
            f"processes {gpus.index(gpus[second])} and {second} have the same GPU. Start as many processes on a "
            "machine as it has GPUs, or use --device cpu"
        )
