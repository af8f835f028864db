"""A task opened on a device: the model as a vector, the data in batches, the convention of batch norm. S samples.

The ground that every measurement of this package stands on; it knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from opsig_cli.backends import State, check_statistics
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.tasks import Task, positions_of
from opsig_torch import arithmetic
from opsig_torch.data import Batches
from opsig_torch.flat import FlatModel
from opsig_torch.forward import forward
from opsig_torch.memory import LATER, bound_of, held, settled
from opsig_torch.positions import by_sample
from opsig_torch.running import Running
from opsig_torch.saved import saved_bytes

BATCH_SIZE = 500
CONVOLUTION_BATCH = 50
GRAPH_SHARE = 0.125
"""Part of the memory to spare that the graph of a batch may take, and as much those that are kept."""
VECTORS = 2
"""Vectors of parameters beside the model that any measurement holds: a checkpoint's, and the model's own meanwhile."""
GRAPH_FACTOR = 3
"""What a pass needs besides what autograd saves: gradients of the same, and temporaries."""
TOGETHER = 4096
"""Samples of a batch by default where an item has several: what they take grows with their number, too."""

Found = TypeVar("Found")


class Opened:
    """A task on a device, ready to be measured.

    `statistics` is the batch-norm convention: "chunk" normalises by each fixed batch of `batch_size` consecutive
    items, as full-batch training that accumulates over those batches does; "running" uses the running statistics,
    as evaluation does. Dropout is off except while training on minibatches. `double` computes in float64, as happens
    where the model is kept in it.
    """

    def __init__(
        self,
        task: Task,
        device: str | None = None,
        batch_size: int | None = None,
        statistics: str | None = None,
        double: bool = False,
    ):
        check_statistics(statistics)
        self.task = by_sample(task)
        self.device = _choose_device(device)
        self.positions = positions_of(task)
        self.batch_size = batch_size or (BATCH_SIZE if self.positions == 1 else max(1, TOGETHER // self.positions))
        self.statistics = statistics or "chunk"
        self.double = double
        self.batches = Batches(task, torch.device(self.device), self.batch_size, double)
        self.items, self.samples = self.batches.items, self.batches.count
        self.passes = self.batches.passes
        self.kept: dict[Any, Any] = {}
        """What measurements find out once for the model: traces by batch shape, how gradients are had."""
        self._kept_at: tuple[State | None, dict[str, Any]] = (None, {})  # the same for one state
        self.tell: Callable[[str], None] = lambda words: None
        """Where a line goes that a person should know of: that a slower way is taken, and why."""
        self.memory: int | None = None
        """Bytes that this process may take of the device's memory; None for what is free, less a margin."""
        self._base: int | None = None
        self._vectors = VECTORS
        self._flat: FlatModel | None = None
        self._order: list[str] = []
        self._running: Running | None = None
        self._targets: torch.Tensor | None = None
        self._all_targets: bool | None = True if self.positions == 1 else None

    @contextmanager
    def calculating(self) -> Iterator[None]:
        """Inside, torch calculates as it does here (see `arithmetic`), and runs a model that is built uncompiled."""
        uncompiled = nullcontext() if self._running is None else self._running.uncompiled()
        with arithmetic.calculating(self.device, lambda words: self.tell(words)), uncompiled:
            yield

    @contextmanager
    def seeding(self) -> Iterator[None]:
        """Inside, torch may be seeded and numbers drawn: its random numbers go on afterwards as before."""
        with torch.random.fork_rng([] if self.device == "cpu" else [torch.cuda.current_device()]):
            yield

    def total(self, terms: Iterable[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The sum of what batches contribute, shaped like a tensor, one after the other."""
        total = torch.zeros_like(like)
        for term in terms:
            total += term
        return total

    def announce(self, what: str, vector: torch.Tensor | None = None) -> None:
        """Tell other processes, where there are any, what all are to add up next; see `group`."""

    @property
    def flat(self) -> FlatModel:
        """The model as one vector, built on first use."""
        if self._flat is None:
            with torch.inference_mode(False), self.seeding():  # what is first measured may be trained next
                model = self.task.model()
                if not isinstance(model, torch.nn.Module):
                    raise OpsigError(f"the task's model() returned a {type(model).__name__}, not a torch.nn.Module")
                if not self.double and any(parameter.dtype is torch.float64 for parameter in model.parameters()):
                    self.double = True
                    self.batches.widen()
                    self.tell("note: the model is kept in float64, and is run in it; checkpoints are float32")
                dtype = torch.float64 if self.double else torch.float32
                self._running = Running(model, self.device, dtype, lambda words: self.tell(words))
                self._flat = FlatModel(model, torch.device(self.device), self.double, self._order)
                self._base = None
        return self._flat

    @property
    def running(self) -> Running:
        """The conditions under which the model is run."""
        assert self.flat
        assert self._running
        return self._running

    @property
    def layout(self):
        """Names, shapes and places of all parameters and buffers."""
        return self.flat.layout

    def parameter_count(self) -> int | None:
        """How many parameters the model has, trained or not, without memory for them; None where that is not known."""
        try:
            with torch.device("meta"):
                return sum(parameter.numel() for parameter in self.task.model().parameters())
        except Exception:  # a person's model may do anything as it is built, such as reading its own weights
            return None

    @property
    def device_name(self) -> str:
        """The device as a person knows it."""
        count = torch.get_num_threads()
        return torch.cuda.get_device_name() if self.device == "cuda" else f"cpu ({count} thread{'s' * (count > 1)})"

    @property
    def loads(self) -> bool:
        """Whether each pass loads the data anew, or has to once."""
        return not self.batches.resident

    def batch_norms(self) -> list[nn.Module]:
        """The model's batch norm layers."""
        return [m for m in self.flat.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's loss depends on the others of its chunk."""
        return self.statistics == "chunk" and bool(self.batch_norms())

    @property
    def drops_out(self) -> bool:
        """Whether the model has dropout, which is on only while training on minibatches."""
        modules = list(self.flat.model.modules())
        rates = [module.p for module in modules if isinstance(module, nn.modules.dropout._DropoutNd)]
        rates += [rate for module in modules if isinstance(rate := getattr(module, "dropout", 0.0), float)]
        return any(rate > 0 for rate in rates)

    def initial(self, seed: int) -> State:
        """The run's first state: the task's model built after seeding torch with `seed`."""
        torch.manual_seed(seed)
        self._flat = None
        self.forget()
        return self.state(0)

    def arrange(self, names: Sequence[str]) -> None:
        """Take this order of the trained parameters, as a run of another backend has them, for that of the vector."""
        self._order, self._flat = list(names), None
        self.forget()

    def forget(self) -> None:
        """Find out anew what was found out once, as of another model or with other memory."""
        self.kept.clear()
        self._kept_at = (None, {})

    def once_at(self, state: State, what: str, find: Callable[[], Found]) -> Found:
        """What `find()` gives at a state, found once for as long as no other state is measured; `what` names it."""
        if self._kept_at[0] is not state:
            self._kept_at = (state, {})
        if what not in self._kept_at[1]:
            self._kept_at[1][what] = find()
        return self._kept_at[1][what]

    def state(self, step: int) -> State:
        """Parameters and buffers as they are now."""
        params = self.flat.vector.detach().cpu().numpy().copy()
        return State(step, params, self.flat.read_buffers(), frozen=self.flat.read_frozen())

    def load(self, state: State) -> None:
        """Make a state the model's own."""
        self.adopt(state.frozen)
        self.flat.load(state)

    def adopt(self, frozen: np.ndarray) -> None:
        """Make a run's frozen parameters, (F,), the model's own: its states bring the same array and cost no copy.

        They are set in place, where traces that are kept see them.
        """
        if not self.flat.has_frozen(frozen):
            self.flat.load_frozen(frozen)

    @contextmanager
    def at(self, state: State) -> Iterator[None]:
        """Measure at another state: its parameters and buffers inside, those of before, to the bit, afterwards."""
        if self._kept_at[0] is not state:
            self._kept_at = (None, {})  # its memory is for what is measured next
        frozen = None if self.flat.has_frozen(state.frozen) else self.flat.read_frozen()
        vector = self.flat.vector.detach().clone()
        buffers = [buffer.clone() for _, buffer in self.flat.buffers]
        self.load(state)
        self.measuring_mode()
        try:
            with self.calculating():
                yield
        finally:
            if frozen is not None:
                self.adopt(frozen)
            with torch.no_grad():
                self.flat.vector.copy_(vector)
                for (_, buffer), saved in zip(self.flat.buffers, buffers, strict=True):
                    buffer.copy_(saved)

    def measuring_mode(self) -> None:
        """Everything in evaluation mode, batch norm excepted where its statistics are the chunk's."""
        self.flat.model.eval()
        if self.statistics == "chunk":
            for layer in self.batch_norms():
                layer.train()

    def inference_batch(self) -> int:
        """Convolutions on the CPU run up to three times faster in small batches; batch norm needs its own."""
        convolves = any(isinstance(module, nn.Conv2d) for module in self.flat.model.modules())
        if self.device == "cpu" and convolves and not self.couples_samples:
            return min(self.batch_size, CONVOLUTION_BATCH, self.fitting_batch())
        return min(self.batch_size, self.fitting_batch())

    def fitting_batch(self, order: int = 1) -> int:
        """How many items' graphs, to be differentiated `order` times, fit their share of the memory: a power of two.

        The batch's own size wherever that fits, and where samples are coupled, whose batches cannot be cut.
        """
        if self.couples_samples:
            return self.batch_size
        if ("item bytes", order) not in self.kept:
            one, two = (self.graph_bytes([0] * count, order) for count in (1, 2))
            self.kept["item bytes", order] = max(1, GRAPH_FACTOR * (two - one))
        fits = self.share(GRAPH_SHARE) // self.kept["item bytes", order]
        if fits >= self.batch_size:
            return self.batch_size
        return 1 << (max(1, fits).bit_length() - 1)

    def graph_bytes(self, items: list[int], order: int) -> int:
        """What autograd saves of these items' losses, to be differentiated so often; 0 where it cannot be listened to,
        as in a model that takes derivatives by torch.func itself."""
        with self.calculating(), torch.enable_grad(), suppress(Exception), saved_bytes() as saved:
            # what is amiss with the model is said, or refused by name, where it is asked for
            losses = self.batch_losses(self.batches.take(items), order)
            if order > 1 and losses.requires_grad:
                torch.autograd.grad(losses.sum(), self.flat.parameters, create_graph=True, allow_unused=True)
            return saved.total
        self.kept["unheard"] = True
        return 0

    def bound(self) -> int:
        """Bytes that this process may take in all."""
        if self.memory is None and "bound" not in self.kept:
            self.kept["bound"] = bound_of(self.device)
        return self.memory or self.kept["bound"]

    def room(self) -> int:
        """Bytes that it may still take."""
        return self.bound() - held(self.device)

    def base(self) -> int:
        """Bytes that it has before it measures: libraries, the data, and the model; found at the first call."""
        if self._base is None:
            assert self.flat
            self._base = settled(self.device) + (LATER if self.device == "cpu" else 0)
        return self._base

    def taken(self) -> int:
        """Bytes that are not for measurements to divide: the base."""
        return self.base()

    @contextmanager
    def beside(self, vectors: int) -> Iterator[None]:
        """Inside, a measurement holds so many vectors of parameters: what is to spare is less by these."""
        before, self._vectors = self._vectors, max(vectors, self._vectors)
        try:
            yield
        finally:
            self._vectors = before

    def share(self, part: float, most: int = 1 << 62) -> int:
        """Bytes for one of the things that a measurement holds of items or samples, `most` where there are as many: a
        part of what the bound leaves beside what is `taken` and the vectors that are held."""
        size = self.flat.vector.element_size() * self.flat.vector.numel()
        return max(0, min(most, int(part * (self.bound() - self.taken() - self._vectors * size))))

    def forward(self, batch: Any, predicted: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses (B,) of one batch and, where they are to be `predicted`, predictions (B,) or None, from one forward
        pass."""
        with self.running.as_trained():
            return forward(self.task, self.flat.model, batch, predicted)

    def batch_losses(self, batch: Any, order: int = 1) -> torch.Tensor:
        """Losses (B,) of one batch's samples, which can be differentiated `order` times; see `opsig_torch.running`."""
        with self.running.differentiable(order):
            return self.task.losses(self.flat.model, batch)

    def losses_of(self, samples: Sequence[int] | np.ndarray, order: int = 1) -> torch.Tensor:
        """Losses (M,) of chosen samples in this order, from one forward pass of their items; see `batch_losses`."""
        items, places = self.placed(samples)
        losses = self.batch_losses(self.batches.take(items), order)
        return losses if self.positions == 1 else losses[torch.from_numpy(places).to(losses.device)]

    def placed(self, samples: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The items of these samples, and the samples' places among the losses of these items, (M,).

        Samples of one item share it; where an item is a sample, they are the samples in their order.
        """
        samples = np.asarray(samples)
        if self.positions == 1:
            return samples, np.arange(len(samples))
        items, number = np.unique(samples // self.positions, return_inverse=True)
        return items, number * self.positions + samples % self.positions

    def samples_of(self, items: np.ndarray) -> np.ndarray:
        """The samples of these items, in order."""
        return (items[:, None] * self.positions + np.arange(self.positions)).ravel()

    @property
    def counts_S(self) -> torch.Tensor | None:
        """Which samples have a loss, (S,) bool; None where all have. Positions without a target have none (NaN).

        Found by a pass over the data at the loaded parameters, at the first call. Where no loss is a number, all count.
        """
        if self._all_targets is None:
            everything, size = self.batches.only(slice(0, self.samples)), self.fitting_batch()
            with torch.inference_mode(False), torch.no_grad(), self.running.as_trained(), everything:
                missing = [self.task.losses(self.flat.model, b).isnan() for _, b in self.batches.in_pieces(size)]
            targets = ~torch.cat(missing)
            self._all_targets = bool(targets.all())
            if not targets.any():  # the parameters are not finite: another state will tell
                self._all_targets = None
                return None
            self._targets = None if self._all_targets else targets
        return self._targets

    @property
    def target_count(self) -> int:
        """How many samples have a loss: what the mean is over."""
        return self.samples if self.counts_S is None else int(self.counts_S.sum())

    def counted(self, losses: torch.Tensor, samples: slice | np.ndarray) -> torch.Tensor:
        """The losses (B,) of these samples, 0 for those that have none."""
        if self.counts_S is None:
            return losses
        chosen = samples if isinstance(samples, slice) else torch.from_numpy(samples).to(losses.device)
        return torch.where(self.counts_S[chosen], losses, torch.zeros_like(losses))


def _choose_device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"no device is called '{name}'. Known: cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise OpsigError("no CUDA device can be used here. Use --device cpu, or install a CUDA build of torch")
    return name
