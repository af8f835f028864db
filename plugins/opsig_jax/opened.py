"""A task opened on a device: its parameters as a vector, its data in batches, its losses as compiled functions.

The ground that every measurement of this package stands on. S samples, B of a batch, P parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from opsig_linalg.space import NumpySpace

from opsig_cli.backends import State, check_statistics, require_each
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.tasks import Task, own_frames, positions_of

if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and "XLA_FLAGS" not in os.environ:
    os.environ.setdefault("NPROC", threads)  # read once, when XLA makes its threads
    if threads == "1":
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
import jax
import jax.numpy as jnp

from opsig_jax.data import Batches
from opsig_jax.tree import Tree

BATCH_SIZE = 500
BLOCK_BYTES = 64 << 20
"""Bound on the gradients of a block of samples, of which there may be three at a time."""
AGREES = 1e-4
"""Relative difference up to which a float32 loss is the same in other company."""


class Opened:
    """A task on a device, ready to be measured.

    `double` computes in float64, whatever JAX is set to. The precision of a person's own arrays is theirs elsewhere:
    nothing here changes JAX's configuration.
    """

    couples_samples = False

    def __init__(
        self,
        task: Task,
        device: str | None = None,
        batch_size: int | None = None,
        statistics: str | None = None,
        double: bool = False,
    ):
        check_statistics(statistics)
        if positions_of(task) > 1:
            raise OpsigError("the jax backend takes items of one sample, and the task's have more (positions)")
        self.task: Any = task
        self.device, self._place = _choose_device(device)
        self.dtype = np.dtype(np.float64 if double else np.float32)
        self._double = double
        with self.computing():
            self.batches = Batches(self.task.data(), batch_size or BATCH_SIZE, double, self._place)
        self.samples = self.batches.count
        self.tell: Callable[[str], None] = lambda words: None
        """Where a line goes that a person should know of."""
        self.kept: dict[Any, Any] = {}
        """Compiled functions by name, and what was found out once for the task."""
        self._tree: Tree | None = None
        self._order: list[str] | None = None

    @property
    def tree(self) -> Tree:
        """How the parameters lie in a vector, found out on first use."""
        return self._tree or self._built(0)

    @property
    def layout(self):
        """Names, shapes and places of all parameters, in the pytree's order or the one that was asked for."""
        return list(self.tree.layout)

    @property
    def space(self) -> NumpySpace:
        """Vectors (P,) as the eigensolver has them: on the host, where there is most room for them."""
        return NumpySpace(self.tree.size, self.dtype)

    @property
    def device_name(self) -> str:
        """The device as a person knows it."""
        return self._place.device_kind if self.device == "cuda" else "cpu (jax)"

    def arrange(self, names: Sequence[str]) -> None:
        """Take this order of the same parameters from now on, as in a run of another backend."""
        self.tree.arrange(names)
        self._order = list(names)
        self.kept.clear()

    def initial(self, seed: int) -> State:
        """The run's first state: the task's `init` with a key of `seed`."""
        tree = self._built(seed)
        state = State(0, tree.vector(self.dtype), np.empty(0))
        self.vector_of(state)
        return state

    def adopt(self, frozen: np.ndarray) -> None:
        """A run's frozen parameters: raises OpsigError where there are any."""
        if frozen.size:
            raise OpsigError(f"the run has {frozen.size:,} frozen parameters, and the jax backend trains all it has")

    def vector_of(self, state: State) -> jax.Array:
        """A state's parameters on the device, (P,). Raises OpsigError where they are not the task's, or the model mixes
        samples."""
        self.adopt(state.frozen)
        if state.buffers.size:
            raise OpsigError(f"the run has buffers ({state.buffers.size:,} numbers), and the jax backend carries none")
        if state.params.size != self.tree.size:
            raise OpsigError(
                f"the checkpoint has {state.params.size:,} parameters and the task's init() gives {self.tree.size:,}. "
                "Give the --task that the run was trained with"
            )
        with self.computing():
            vector = self.put(state.params)
            self._require_apart(vector)
        return vector

    def put(self, values: np.ndarray) -> jax.Array:
        """Numbers on the device, in the precision of the session."""
        with self.computing():
            return jax.device_put(np.asarray(values, self.dtype), self._place)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Where JAX is called: in the session's precision, on its device; what people do wrong becomes one line."""
        with ExitStack() as conditions:
            if self._double:
                conditions.enter_context(jax.enable_x64(True))
            conditions.enter_context(jax.default_device(self._place))
            conditions.enter_context(jax.default_matmul_precision("highest"))  # ten bits of TF32 are too few
            try:
                yield
            except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
                raise OpsigError(_traced_words(error)) from error
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise MemoryError from error
                raise
            except (NotImplementedError, TypeError, ValueError) as error:
                if own_frames(error):  # with the line of theirs
                    raise
                raise OpsigError(
                    f"JAX cannot compute this of the task: {' '.join(str(error).split())[:200]}"
                ) from error

    def compiled(self, name: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The function that `make` gives, compiled once a shape and called as JAX is."""
        if name not in self.kept:
            self.kept[name] = jax.jit(make())

        def call(*arguments: Any) -> Any:
            with self.computing():
                return self.kept[name](*arguments)

        return call

    def losses_at(self, parts: Sequence[Any], batch: Any) -> jax.Array:
        """Losses (B,) of a batch, of which `parts` are the parameters; to be traced."""
        count = len(jax.tree_util.tree_leaves(batch)[0])
        return self._each(self.task.losses(self.tree.build(parts), batch), count, "losses")

    def sample_loss(self, parts: Sequence[Any], sample: Any) -> jax.Array:
        """The loss of one sample, a batch of which the first axis is taken away; to be traced."""
        return self.losses_at(parts, jax.tree_util.tree_map(lambda row: row[None], sample))[0]

    def smoothed_at(self, parts: Sequence[Any], batch: Any, smoothing: float) -> jax.Array:
        """Losses (B,) over smoothed labels. Raises UsageError for a task that cannot smooth them."""
        smooth = getattr(self.task, "smoothed_losses", None)
        if smooth is None:
            raise UsageError(
                "the task's labels cannot be smoothed: it has no smoothed_losses(params, batch, smoothing)"
            )
        count = len(jax.tree_util.tree_leaves(batch)[0])
        return self._each(smooth(self.tree.build(parts), batch, smoothing), count, "smoothed_losses")

    def predictions_at(self, parts: Sequence[Any], batch: Any) -> jax.Array | None:
        """Predictions (B,) int32 of a batch, or None; to be traced."""
        predict = getattr(self.task, "predictions", None)
        if predict is None:
            return None
        count = len(jax.tree_util.tree_leaves(batch)[0])
        return self._each(predict(self.tree.build(parts), batch), count, "predictions").astype(jnp.int32)

    def _each(self, values: Any, count: int, method: str) -> jax.Array:
        """The values. Raises OpsigError where there is not one a sample."""
        values = jnp.asarray(values)
        require_each(values.shape, count, method)
        return values

    def _built(self, seed: int) -> Tree:
        with self.computing():
            key = jax.random.key(seed & 0xFFFFFFFF)
            if seed >> 32:
                key = jax.random.fold_in(key, (seed >> 32) & 0xFFFFFFFF)
            self._tree = Tree(self.task.init(key))
        if self._tree.is_half:
            self.tell("note: parameters are given in half precision, and are trained and measured in float32")
        if self._order is not None:
            self._tree.arrange(self._order)
        self.kept.clear()
        return self._tree

    def _require_apart(self, vector: jax.Array) -> None:
        """Raise OpsigError where a sample's loss depends on the others of its batch; once, at a finite state."""
        if "apart" in self.kept or self.samples == 1:
            return
        chosen = np.unique([0, self.samples // 3, self.samples // 2, self.samples - 1])
        half = len(chosen) // 2
        losses = self.compiled("losses alone", lambda: lambda v, batch: self.losses_at(self.tree.split(v), batch))
        together = np.asarray(losses(vector, self.batches.take(chosen)), np.float64)
        parts = [losses(vector, self.batches.take(some)) for some in (chosen[:half], chosen[half:])]
        apart = np.concatenate([np.asarray(part, np.float64) for part in parts])
        finite = np.isfinite(together)
        if not finite.any():
            return
        scale = float(np.abs(together[finite]).max())
        if not np.allclose(together, apart, AGREES, AGREES * scale, equal_nan=True):
            place = int(np.nan_to_num(np.abs(together - apart)).argmax())
            raise OpsigError(
                f"the loss of sample {chosen[place]} depends on which samples are in its batch ({together[place]:.6g} "
                f"and {apart[place]:.6g}): what it does is not its own, and is not measured. Take out of the model or "
                "of losses() what mixes samples, such as a mean over the batch"
            )
        if finite.all():
            self.kept["apart"] = True


def _choose_device(name: str | None) -> tuple[str, Any]:
    if name not in (None, "cpu", "cuda"):
        raise UsageError(f"no device is called '{name}'. Known: cpu, cuda")
    if name != "cpu":
        try:
            return "cuda", jax.devices("cuda")[0]
        except RuntimeError as error:
            if name == "cuda":
                raise OpsigError(
                    "no CUDA device can be used here. Use --device cpu, or install a CUDA build of jax"
                ) from error
    return "cpu", jax.devices("cpu")[0]


def _traced_words(error: Exception) -> str:
    """What JAX's errors of tracing mean to who wrote the task, and the line of theirs that it is about."""
    frames = own_frames(error)
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    match error:
        case jax.errors.TracerBoolConversionError():
            said = (
                "Python's if, while, and, or cannot decide by values that JAX computes. Use jnp.where or jax.lax.cond"
            )
        case jax.errors.TracerArrayConversionError():
            said = "numpy cannot take values that JAX computes. Use jax.numpy in its place"
        case jax.errors.TracerIntegerConversionError() | jax.errors.ConcretizationTypeError():
            said = (
                "a value that JAX computes is used as a plain number. Use jax.numpy, or make it an option of the task"
            )
        case jax.errors.NonConcreteBooleanIndexError():
            said = "an array cannot be cut by a mask that JAX computes: its shape would be open. Use jnp.where"
        case jax.errors.UnexpectedTracerError():
            said = "a value of one call of the task's code is used in another. Keep nothing that JAX computes on self"
        case _:
            said = " ".join(str(error).split())[:200]
    return f"{where}{said}"
