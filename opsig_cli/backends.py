"""What turns a task and its parameters into numbers: the Backend protocol, and finding backends.

S samples, P parameters, B buffers, M chosen samples, C checkpoints, K eigenpairs. Arrays are numpy on both sides.
Losses are in nats; parameters are one flat float32 row in the order of `Session.layout`. P counts those that are
trained: gradients, Hessians and optimizers are over these alone, and the F that are frozen are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.tasks import Task, load_entry_point

ENTRY_POINT_GROUP = "opsig.backends"


@dataclass(frozen=True)
class Tensor:
    """Where one tensor of the model lies in the flat row of its kind.

    Kinds: "parameter", one that is trained; "frozen", a parameter whose `requires_grad` is False; "buffer".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


def parameter_name(keys: Sequence[str]) -> str:
    """What a parameter in nested containers is called, by the keys on its path; what wraps an array (a Variable of
    flax's nnx, whose key is `value`) adds no name.

    >>> parameter_name(["layers", "0", "kernel", "value"]), parameter_name([])
    ('layers.0.kernel', 'params')
    """
    return ".".join(keys[:-1] if len(keys) > 1 and keys[-1] == "value" else keys) or "params"


@dataclass(frozen=True)
class State:
    """A point of a run: step, parameters (P,) float32, buffers (B,) float64, optimizer state by name, (P,) each.

    `frozen`: the parameters that are not trained, (F,) float32, the same array at all states of a run; where it is
    empty, they are as the task's model has them.
    """

    step: int
    params: np.ndarray
    buffers: np.ndarray
    optimizer: Mapping[str, np.ndarray] = field(default_factory=dict)
    frozen: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


@dataclass(frozen=True)
class Training:
    """How to train. `batch_size` None is full batch. `momentum` is heavy-ball's beta; Adam's are `betas`; SplitSGD's
    tau is `dampening`, its eta_2 `sign_learning_rate`, and its r `radius`, None for its default.

    `wants_losses(step)` and `wants_state(step)` say what the snapshot of that step must carry. `weights` (S,), None for
    1 throughout, multiply the samples' losses in what is minimised, whose sum is divided by the number of all samples
    (of the minibatch) as before: weight 0 leaves a sample out and no other one counts for more. Gradients longer than
    `clip_norm` are shortened to it. `label_smoothing` is what is minimised instead of the task's own; recorded losses
    stay the task's. `tracked`: the samples whose losses snapshots carry, increasing, None for all; the others' are NaN.
    `began`: the step at which the optimizer began to count, later than 0 where a branch changed it. `replayed`:
    whether steps are repeated for their losses alone. Then there need be no predictions; the gradient of the last step,
    which no update takes, need not be measured; and that of the first may be made from what another training from the
    same state left, to rounding.
    """

    optimizer: str
    learning_rate: float
    steps: int
    batch_size: int | None = None
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    sign_learning_rate: float = 1e-3
    dampening: float = 0.9
    radius: float | None = None
    weight_decay: float = 0.0
    seed: int = 0
    wants_losses: Callable[[int], bool] = lambda step: False
    wants_state: Callable[[int], bool] = lambda step: False
    weights: np.ndarray | None = None
    tracked: np.ndarray | None = None
    clip_norm: float | None = None
    label_smoothing: float | None = None
    began: int = 0
    replayed: bool = False


def minibatch(items: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Items of the minibatch of a step; an epoch is a permutation drawn from (seed, epoch), its last batch smaller.

    >>> sorted(np.concatenate([minibatch(5, 2, 0, step) for step in range(3)]).tolist())
    [0, 1, 2, 3, 4]
    """
    epoch, position = divmod(step, -(-items // batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(items)
    return order[position * batch_size : (position + 1) * batch_size]


@dataclass(frozen=True)
class Snapshot:
    """What was seen at one step, before the update that follows it.

    `grad_norm` is that before clipping. `signed_fraction`: the share of parameters that the update moved by the sign,
    NaN but for SplitSGD.
    `losses` (S,) float32 and `predictions` (S,) integers or None; `state` where it was asked for; `update_norm` is NaN
    at the last step.
    """

    step: int
    train_loss: float
    learning_rate: float
    grad_norm: float
    update_norm: float
    losses: np.ndarray | None = None
    predictions: np.ndarray | None = None
    state: State | None = None
    signed_fraction: float = float("nan")


def unheard(share: float) -> None:
    """Takes what nobody listens for."""


@dataclass
class Passes:
    """How data goes through a model while something is measured: `heard` is called with the share of all the data that
    a batch is, each time one went through."""

    heard: Callable[[float], None] = unheard


class Session(Protocol):
    """A task opened on a device. Samples are named by their index in the task's dataset.

    A session may say `targets`: (S,) bool, which samples have a loss, where some never have one (it is NaN then), as a
    task's positions without a target; and `positions`: how many samples an item has, which share a forward pass but not
    a backward pass. It may say `couples_samples`: True where a sample's loss depends on the others of its chunk, as
    with batch norm by a chunk's statistics. Where a run has the same parameters in another order, as one of another
    backend may, `arrange(names)` makes the order its own. `versions`: of the libraries behind it, for a new file. Who
    opens one may set `tell`, which takes a line for a person: that a slower way is taken, and why. It may say `loads`:
    whether each pass loads the data anew, so that one had better serve many states, which is taken for granted where it
    does not say; and `passes` (`Passes`), by which long work shows how far it is.
    """

    samples: int
    optimizers: Sequence[str]
    tell: Callable[[str], None]

    @property
    def layout(self) -> list[Tensor]:
        """Names, shapes and places of all parameters and buffers."""
        ...

    @property
    def device_name(self) -> str:
        """The device, as a person knows it."""
        ...

    def initial(self, seed: int) -> State:
        """The run's first state, from torch seeded with `seed`."""
        ...

    def adopt(self, frozen: np.ndarray) -> None:
        """Take a run's frozen parameters, (F,), for the model's own, so that its states need not bring them anew."""
        ...

    def train(self, training: Training, start: State) -> Iterator[Snapshot]:
        """Snapshots of every step from `start.step` to `training.steps`, both included."""
        ...

    def losses(self, states: Sequence[State]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """At every state, the loss of every sample, (S,) float32, and its prediction, (S,) integers or None."""
        ...


@runtime_checkable
class SampleLosses(Protocol):
    """The capability by which a task is held against a run at little cost."""

    def sample_losses(self, state: State, samples: np.ndarray) -> np.ndarray:
        """Losses of chosen samples, (M,) float64, as `losses` has them."""
        ...


@runtime_checkable
class GradientCosines(Protocol):
    """The capability `cluster` needs."""

    def gradient_cosines(self, state: State, samples: np.ndarray) -> np.ndarray:
        """Cosines of the chosen samples' gradients over all parameters, (M, M) float64; NaN where a gradient is 0."""
        ...

    def mean_cosines(self, state: State, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray:
        """Mean cosine of chosen samples' gradients with those of each set of samples, (M, G) float64; NaN as above."""
        ...


@runtime_checkable
class Together(Protocol):
    """What a session can do that several processes share, beside sharing each measurement."""

    def cosines_at(self, states: Iterable[State], samples: np.ndarray) -> Iterator[np.ndarray]:
        """`gradient_cosines` at each of these states, in their order, of which every process measures some."""
        ...

    def in_rounds(
        self, work: Callable[..., tuple[np.ndarray, ...]], arguments: Sequence[Any], count: int
    ) -> tuple[np.ndarray, ...]:
        """So many rounds of a function of `opsig_cli.analysis`, of which every process does some (see `rounds` there):
        arrays with a row for each round."""
        ...


@runtime_checkable
class Features(Protocol):
    """The capability by which `cluster` sees what looks alike to the network."""

    def features(self, state: State, samples: np.ndarray) -> np.ndarray | None:
        """Features of chosen samples (what enters the last layer), less the mean of all samples and of length one,
        (M, D) float32; None for a task that has none."""
        ...

    def mean_feature_cosines(self, state: State, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray | None:
        """Mean cosine of each chosen sample's features, centred so, with those of each set of samples, (M, G) float64;
        None for a task that has none."""
        ...


@runtime_checkable
class GradientSketch(Protocol):
    """The capability that `cluster --sketch` needs."""

    def gradient_sketch(self, state: State, samples: np.ndarray, size: int, seed: int) -> np.ndarray:
        """A random projection of chosen samples' gradients of length one, (M, size) float32, the same for one seed.

        Products of two rows estimate their cosine, with a standard error of at most the root of 2 / size.
        """
        ...


@dataclass(frozen=True)
class Eigenpairs:
    """The most positive eigenpairs of a Hessian: `values` (K,) decreasing, `vectors` (K, P) of unit length,
    `residuals` |Hv - av| / |a| (K,), the Hessian-vector `products` spent, and whether all residuals met the
    tolerance. `memory` is what the backend keeps for a checkpoint near by."""

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    products: int
    converged: bool
    memory: Any = None


@runtime_checkable
class Curvature(Protocol):
    """The capability `sharpness` needs. All are of the mean training loss, or of one sample's loss, at a state."""

    def top_eigenpairs(
        self, state: State, count: int, tolerance: float, previous: Eigenpairs | None = None,
        scale: np.ndarray | None = None,
    ) -> Eigenpairs:  # fmt: skip
        """The `count` most positive eigenpairs of the Hessian H, or of diag(scale) H diag(scale), scale (P,).

        `previous`: those of a checkpoint near by, from which to begin.
        """
        ...

    def hessian_vectors(self, state: State, vectors: np.ndarray) -> np.ndarray:
        """Products of the Hessian with vectors, (K, P)."""
        ...

    def gradient_norms(self, state: State, samples: np.ndarray | None = None) -> np.ndarray:
        """Norm of every sample's gradient, (S,) float64; of chosen ones, (M,), where a session has `positions`."""
        ...

    def gradient(self, state: State, weights: np.ndarray | None = None) -> np.ndarray:
        """Gradient of the mean training loss, (P,), each sample's times its own of `weights` (S,) where they are given.

        The mean is over as many samples as without weights, as in `Training`.
        """
        ...

    def curvature_along(self, state: State, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss, slope v'g and curvature v'Hv of every sample along a direction v (P,), (S,) float64 each."""
        ...


@runtime_checkable
class SampleSharpness(Protocol):
    """The capability that `sharpness --metrics sample_sharpness` needs."""

    def sample_sharpness(self, state: State, samples: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        """The most positive eigenvalue a of each chosen sample's Hessian, (M,) float64, to the tolerance of its
        residual |Hv - av| / |H|, (M,) float64, |H| the largest size of an eigenvalue. Never above the true one, to
        rounding; a sample that is not finite has NaN."""
        ...


@runtime_checkable
class SpectralDensity(Protocol):
    """The capability that `sharpness --metrics spectral_density` needs."""

    def spectral_density(self, state: State) -> tuple[np.ndarray, np.ndarray, float]:
        """Nodes and weights (R, m) whose weighted sums estimate traces of functions of H; the trace's error."""
        ...


@runtime_checkable
class Slopes(Protocol):
    """The capability that `sharpness --name` and `cluster --by slope` need."""

    def slopes_along(self, state: State, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slopes v'g and curvatures v'Hv of every sample along each of K directions v (K, P), (S, K) float64 each."""
        ...


@dataclass(frozen=True)
class Need:
    """What measuring takes of the device's memory, in bytes: at the `least`, and as much as is of use (`most`), within
    the `bound`. `passes`: forward and backward passes over the data a checkpoint, about. `host`: bytes of the host's
    memory where that is another than the device's, within `host_bound`; 0 and 0 where it is the same."""

    least: int
    most: int
    bound: int
    passes: float
    host: int = 0
    host_bound: int = 0


def worded(size: float) -> str:
    """A size in words, in units of 1,024.

    >>> worded(12 * 2**30), worded(3 * 2**20)
    ('12.0 GiB', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@runtime_checkable
class Plans(Protocol):
    """The capability that --plan needs."""

    def needs(self, what: str, count: int, state: State) -> Need:
        """What a measurement takes at a checkpoint.

        "losses" of all samples, "norms" of `count` samples' gradients (as many as all where they cost no less), `count`
        "eigenpairs", cosines of the "gradients" of `count` samples, "alignment" of `count` samples' gradients with
        those of groups, "curvature" along a direction, "sample_sharpness" of `count` samples, the "trace", a step of
        "training", and "outputs" of `count` inputs.
        """
        ...


@runtime_checkable
class Bounded(Protocol):
    """The capability that --memory needs."""

    def bound_by(self, memory: int) -> None:
        """Take no more than so many bytes of the device's memory in all; what cannot be done within is refused."""
        ...


@runtime_checkable
class Backend(Protocol):
    """What an entry point of the group `opsig.backends` names."""

    def open(
        self, task: Task, device: str | None = None, batch_size: int | None = None, statistics: str | None = None,
        double: bool = False,
    ) -> Session:  # fmt: skip
        """Open a task on "cpu" or "cuda" (None: the best there is), measured in batches of `batch_size`.

        `statistics` is the batch-norm convention, one of STATISTICS. `double`: in float64. Raises OpsigError where the
        device is absent, UsageError where `statistics` is unknown.
        """
        ...


STATISTICS = ("chunk", "running")


def check_statistics(name: str | None) -> None:
    """Raise UsageError for a batch-norm convention that is not one of STATISTICS."""
    if name not in (None, *STATISTICS):
        raise UsageError(f"batch-norm statistics are {' or '.join(STATISTICS)}, not '{name}'")


def require_each(shape: tuple[int, ...], samples: int, method: str = "losses") -> None:
    """Raise OpsigError where what a task's method returned is not of one value a sample."""
    if shape != (samples,):
        hint = ". A squeeze() without an axis takes the batch's away, too" if samples == 1 else ""
        raise OpsigError(
            f"the task's {method}() returned shape {shape} for {samples} samples. "
            f"It must return one {'unreduced loss' if 'losses' in method else 'class'} a sample{hint}"
        )


PRODUCTS = 10
"""Hessian-vector products of a top eigenvalue from nothing: 10 to 13 on small networks (benchmarks/curvature.py)."""


@runtime_checkable
class Meets(Protocol):
    """What a backend can do that shares its work among processes that were started together."""

    def meeting(self, rank: int, size: int) -> AbstractContextManager[Callable[[], None]]:
        """Inside, sessions are shared by these processes; gives what all but the first do, which is to serve it."""
        ...


def targets_of(session: Session) -> np.ndarray:
    """Which samples have a loss, (S,) bool: what a mean is over."""
    targets = getattr(session, "targets", None)
    return np.ones(session.samples, bool) if targets is None else np.asarray(targets, bool)


def load_backend(name: str) -> Backend:
    """The installed backend of that name, built. Raises OpsigError where it is unknown or broken."""
    return load_entry_point(ENTRY_POINT_GROUP, name, "backend")()


def require(session: Any, capability: type, name: str | None, what: str) -> None:
    """Raise OpsigError where the session of the backend of that name, or of the run's own, lacks a capability."""
    if isinstance(session, capability):
        return
    raise OpsigError(
        f"backend {name or 'of this run'} cannot compute {what}. The torch backend can, of a task that is written in "
        "torch: --backend torch"
    )
