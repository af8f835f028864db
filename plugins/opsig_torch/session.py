"""A task opened on a device: losses, training, gradients, curvature. S samples, P parameters, M chosen samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from opsig_cli.backends import Eigenpairs, Snapshot, State, Training
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.tasks import Task
from opsig_torch.data import Batches
from opsig_torch.flat import FlatModel

if TYPE_CHECKING:
    from opsig_torch.captured import Plan

BATCH_SIZE = 500
CONVOLUTION_BATCH = 50
STATISTICS = ("chunk", "running")
OPTIMIZERS = ("gd", "sgd", "momentum", "adam", "splitsgd", "signsgd")


class TorchSession:
    """A task on a device, ready to be measured.

    `statistics` is the batch-norm convention: "chunk" normalises by each fixed batch of `batch_size` consecutive
    samples, as full-batch training that accumulates over those batches does; "running" uses the running statistics,
    as evaluation does. Dropout is off except while training on minibatches. `double` computes in float64.
    """

    optimizers = OPTIMIZERS

    def __init__(
        self,
        task: Task,
        device: str | None = None,
        batch_size: int | None = None,
        statistics: str | None = None,
        double: bool = False,
    ):
        if statistics not in (None, *STATISTICS):
            raise UsageError(f"batch-norm statistics are {' or '.join(STATISTICS)}, not '{statistics}'")
        self.task = task
        self.device = _choose_device(device)
        _make_deterministic(self.device)
        self.batch_size = batch_size or BATCH_SIZE
        self.statistics = statistics or "chunk"
        self.double = double
        self.batches = Batches(task, torch.device(self.device), self.batch_size, double)
        self.samples = self.batches.count
        self.traces: dict[Any, Callable[..., Any]] = {}  # by batch shape; see opsig_torch.sample_curvature
        self._flat: FlatModel | None = None
        self._plan: Plan | None = None

    @property
    def flat(self) -> FlatModel:
        """The model as one vector, built on first use."""
        if self._flat is None:
            self._flat = FlatModel(self.task.model(), torch.device(self.device), self.double)
        return self._flat

    @property
    def layout(self):
        """Names, shapes and places of all parameters and buffers."""
        return self.flat.layout

    @property
    def device_name(self) -> str:
        """The device as a person knows it."""
        return torch.cuda.get_device_name() if self.device == "cuda" else f"cpu ({torch.get_num_threads()} threads)"

    def batch_norms(self) -> list[nn.Module]:
        """The model's batch norm layers."""
        return [m for m in self.flat.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's loss depends on the others of its chunk."""
        return self.statistics == "chunk" and bool(self.batch_norms())

    def initial(self, seed: int) -> State:
        """The run's first state: the task's model built after seeding torch with `seed`."""
        torch.manual_seed(seed)
        self._flat = None
        self.traces.clear()
        return self.state(0)

    def state(self, step: int) -> State:
        """Parameters and buffers as they are now."""
        return State(step, self.flat.vector.detach().cpu().numpy().copy(), self.flat.read_buffers())

    @contextmanager
    def at(self, state: State) -> Iterator[None]:
        """Measure at another state: its parameters and buffers inside, those of before, to the bit, afterwards."""
        vector = self.flat.vector.detach().clone()
        buffers = [buffer.clone() for _, buffer in self.flat.buffers]
        self.flat.load(state)
        self.measuring_mode()
        try:
            yield
        finally:
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

    def train(self, training: Training, start: State) -> Iterator[Snapshot]:
        """Snapshots of every step from `start.step` to `training.steps`, both included; see `opsig_torch.training`."""
        from opsig_torch.training import train

        return train(self, training, start)

    def losses(self, states: Sequence[State]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Loss (S,) float32 and prediction (S,) int32 or None of every sample at every state.

        Where the data must be loaded anew on each pass, one pass serves all the states.
        """
        results = [LossRow(self.samples) for _ in states]
        with torch.inference_mode():
            if self.batches.resident or len(states) == 1:
                for state, result in zip(states, results, strict=True):
                    with self.at(state):
                        for indices, batch in self.batches.in_pieces(self.inference_batch()):
                            result.put(indices, *self.forward(batch))
            else:
                for indices, batch in self.batches:
                    for state, result in zip(states, results, strict=True):
                        with self.at(state):
                            result.put(indices, *self.forward(batch))
        return [result.arrays() for result in results]

    def inference_batch(self) -> int:
        """Convolutions on the CPU run up to three times faster in small batches; batch norm needs its own."""
        convolves = any(isinstance(module, nn.Conv2d) for module in self.flat.model.modules())
        if self.device == "cpu" and convolves and not self.couples_samples:
            return min(self.batch_size, CONVOLUTION_BATCH)
        return self.batch_size

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses (B,) and predictions (B,) or None of one batch, from one forward pass."""
        predict = getattr(self.task, "predictions", None)
        if predict is None:
            return self.task.losses(self.flat.model, batch), None
        model = _Replay(self.flat.model)
        losses = self.task.losses(model, batch)
        with torch.no_grad():
            return losses, predict(model, batch)

    def gradient_cosines(self, state: State, samples: np.ndarray) -> np.ndarray:
        """Cosines of the chosen samples' gradients, (M, M) float64; see `opsig_torch.alignment`.

        Where samples are coupled, a gradient is that through the sample's whole chunk; see `opsig_torch.coupled`.
        """
        from opsig_torch import alignment, coupled

        with self.at(state):
            gram = (coupled if self.couples_samples else alignment).gradient_gram(self, samples)
        with np.errstate(invalid="ignore", divide="ignore"):
            norms = np.sqrt(np.diag(gram))
            gram /= norms[:, None]
            gram /= norms
        return gram

    def mean_cosines(self, state: State, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray:
        """Mean cosine of samples' gradients with those of each set, (M, G); where, see `gradient_cosines`."""
        from opsig_torch import alignment, coupled

        with self.at(state):
            return (coupled if self.couples_samples else alignment).mean_cosines(self, samples, sets)

    def gradient_sketch(self, state: State, samples: np.ndarray, size: int, seed: int) -> np.ndarray:
        """Sketches of chosen samples' gradients of length one, (M, size) float32; see `opsig_torch.sketch`."""
        from opsig_torch.sketch import gradient_sketch

        if self.couples_samples:
            raise OpsigError("with batch norm in chunks gradients are not sketched. Leave --sketch out")
        with self.at(state):
            return gradient_sketch(self, samples, size, seed)

    def features(self, state: State, samples: np.ndarray) -> np.ndarray | None:
        """Centred features of chosen samples, (M, D) float32, or None; see `opsig_torch.features`."""
        from opsig_torch.features import features

        with self.at(state):
            return features(self, samples)

    def mean_feature_cosines(self, state: State, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray | None:
        """Mean cosine of chosen samples' centred features with each set's, (M, G), or None."""
        from opsig_torch.features import mean_feature_cosines

        with self.at(state):
            return mean_feature_cosines(self, samples, sets)

    def gradient_plan(self) -> Plan:
        """How each parameter's per-sample gradients are had, found at the first call; see `opsig_torch.captured`."""
        from opsig_torch.captured import plan

        if self._plan is None:
            self._plan = plan(self)
        return self._plan

    def top_eigenpairs(
        self, state: State, count: int, tolerance: float, previous: Eigenpairs | None = None,
        scale: np.ndarray | None = None,
    ) -> Eigenpairs:  # fmt: skip
        """The most positive eigenpairs of the training loss's Hessian; see `opsig_torch.hessian`."""
        from opsig_torch.hessian import solve

        with self.at(state):
            scaled = None if scale is None else torch.from_numpy(scale).to(self.flat.vector.detach())
            memory = None if previous is None else previous.memory
            found = solve(self, count, tolerance, state.step, memory, scaled)
        vectors = found.vectors.cpu().numpy()
        return Eigenpairs(found.values, vectors, found.residuals, found.products, found.converged, found.memory)

    def hessian_vectors(self, state: State, vectors: np.ndarray) -> np.ndarray:
        """Products of the training loss's Hessian with vectors, (K, P); see `opsig_torch.hessian`."""
        from opsig_torch.hessian import Hessian

        with self.at(state):
            hessian = Hessian(self)
            like = self.flat.vector.detach()
            return np.stack([hessian(torch.from_numpy(v).to(like)).cpu().numpy() for v in vectors])

    def outputs(self, state: State, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, float | None]:
        """Logits (N, classes) float64 and feature norms (N,) of pictures (N, H, W, C), and the data's mean norm.

        Norms are None for a task without features. Batch norm uses its running statistics for the pictures.
        """
        task: Any = self.task
        features = getattr(task, "features", None)
        with self.at(state), torch.inference_mode():
            mean = None
            if features is not None:
                norms = [features(self.flat.model, batch).norm(dim=1) for _, batch in self.batches]
                mean = float(torch.cat(norms).double().mean())
            self.flat.model.eval()
            batch = [task.inputs(pictures).to(self.device, self.flat.vector.dtype), None]
            logits = task.logits(self.flat.model, batch).double().cpu().numpy()
            own = None if features is None else features(self.flat.model, batch).norm(dim=1).double().cpu().numpy()
        return logits, own, mean

    def gradient(self, state: State) -> np.ndarray:
        """Gradient of the mean training loss, (P,)."""
        with self.at(state):
            total = torch.zeros_like(self.flat.vector.detach())
            for _, batch in self.batches:
                loss = self.task.losses(self.flat.model, batch).sum() / self.samples
                parts = torch.autograd.grad(loss, self.flat.parameters, materialize_grads=True)
                total += torch.cat([part.reshape(-1) for part in parts])
            return total.cpu().numpy()

    def sample_sharpness(self, state: State, samples: np.ndarray) -> np.ndarray:
        """The most positive eigenvalue of chosen samples' Hessians, (M,) float64; see `opsig_torch.spectrum`."""
        from opsig_torch.spectrum import sample_sharpness

        if self.couples_samples:
            raise OpsigError(
                "sample_sharpness is not measured where batch norm goes by chunks: a sample's Hessian has no part of "
                "its own there. Measure curvature instead, or train with --statistics running"
            )
        with self.at(state):
            return sample_sharpness(self, samples)

    def spectral_density(self, state: State) -> tuple[np.ndarray, np.ndarray, float]:
        """Nodes and weights (R, m) of the Hessian's spectral density, and the trace's standard error."""
        from opsig_torch.spectrum import spectral_density

        with self.at(state):
            return spectral_density(self)

    def gradient_norms(self, state: State) -> np.ndarray:
        """Norm of every sample's gradient, (S,) float64, a proxy if coupled; see `opsig_torch.alignment`."""
        from opsig_torch.alignment import gradient_norms

        with self.at(state):
            return gradient_norms(self)

    def curvature_along(self, state: State, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss, slope and curvature of every sample along a direction; see `opsig_torch.sample_curvature`."""
        from opsig_torch.sample_curvature import curvature_along

        with self.at(state):
            return curvature_along(self, torch.from_numpy(direction).to(self.flat.vector.detach()))


class LossRow:
    """Losses and predictions of one step, gathered batch by batch on the device they are made on."""

    def __init__(self, samples: int):
        self._samples = samples
        self._losses: torch.Tensor | None = None
        self._predictions: torch.Tensor | None = None

    def put(self, indices: slice, losses: torch.Tensor, predictions: torch.Tensor | None) -> None:
        """Keep one batch's (B,) losses and predictions. Raises OpsigError where there is not one loss a sample."""
        if losses.shape != (indices.stop - indices.start,):
            raise OpsigError(
                f"the task's losses() returned shape {tuple(losses.shape)} for {indices.stop - indices.start} samples. "
                "It must return one unreduced loss a sample"
            )
        losses = losses.detach()
        if self._losses is None:
            self._losses = losses.new_empty(self._samples, dtype=torch.float64)
        self._losses[indices] = losses.double()
        if predictions is None:
            return
        if self._predictions is None:
            self._predictions = predictions.new_empty(self._samples, dtype=torch.int32)
        self._predictions[indices] = predictions.to(torch.int32)

    def mean(self) -> float:
        """Mean loss, summed in float64."""
        assert self._losses is not None
        return self._losses.mean().item()

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Losses (S,) float32 and predictions (S,) int32 or None."""
        assert self._losses is not None
        predictions = None if self._predictions is None else self._predictions.cpu().numpy()
        return self._losses.float().cpu().numpy(), predictions


class _Replay(nn.Module):
    """A model that returns the output it gave before when it is called with the very same input again.

    A task's losses() and predictions() each call the model; this makes them share one forward pass.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model
        self._seen: list[tuple[tuple, dict, Any]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for old_args, old_kwargs, output in self._seen:
            if _identical(args, old_args) and _identical(kwargs.items(), old_kwargs.items()):
                return output
        output = self.inner(*args, **kwargs)
        self._seen.append((args, kwargs, output))
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def _identical(left: Any, right: Any) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        (a[0] == b[0] and a[1] is b[1]) if isinstance(a, tuple) else a is b for a, b in zip(left, right, strict=True)
    )


def _choose_device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"no device is called '{name}'. Known: cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise OpsigError("no CUDA device can be used here. Use --device cpu, or install a CUDA build of torch")
    return name


def _make_deterministic(device: str) -> None:
    torch.use_deterministic_algorithms(device == "cpu")
    # Nothing here reads what it has not written, and the filling took a quarter of the time of gradient cosines.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.allow_tf32 = (
        False  # ten bits of mantissa are too few for losses that are compared step by step
    )
    torch.backends.cuda.matmul.allow_tf32 = False
