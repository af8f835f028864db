"""What commands see of a task opened in torch: every measurement, each in its own file. S samples, P parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from opsig_cli.backends import Eigenpairs, Need, Snapshot, State, Training
from opsig_cli.errors import OpsigError
from opsig_torch import plain
from opsig_torch.apart import require_apart
from opsig_torch.forward import LossRow
from opsig_torch.opened import Opened
from opsig_torch.training import OPTIMIZERS
from opsig_torch.ways import refusing


class TorchSession(Opened):
    """A task on a device with all that can be measured of it; how it is opened, see `opsig_torch.opened`."""

    optimizers = OPTIMIZERS

    def bound_by(self, memory: int) -> None:
        """Take no more than so many bytes; see `opsig_torch.memory`."""
        self.memory = memory
        self.forget()

    def needs(self, what: str, count: int, state: State) -> Need:
        """What a measurement takes; see `opsig_torch.needs`."""
        from opsig_torch.needs import needs

        with self.at(state):
            return needs(self, what, count)

    @property
    def targets(self) -> np.ndarray | None:
        """Which samples have a loss, (S,) bool; None where all have. See `opsig_torch.opened`."""
        if self.positions == 1 or self.counts_S is None:
            return None
        return self.counts_S.cpu().numpy()

    def initial(self, seed: int) -> State:
        """The run's first state, from the task's model built after seeding torch. Raises OpsigError where the model
        couples samples: before hours are spent on it."""
        with self.seeding(), self.calculating():
            state = super().initial(seed)
        with self.calculating():
            require_apart(self)
        return state

    @contextmanager
    def at(self, state: State) -> Iterator[None]:
        """Measure at another state; raises OpsigError where samples are coupled, see `opsig_torch.apart`."""
        with super().at(state):
            require_apart(self)
            yield

    def train(self, training: Training, start: State) -> Iterator[Snapshot]:
        """Snapshots of every step from `start.step` to `training.steps`, both included; see `opsig_torch.training`."""
        from opsig_torch.training import train

        self.adopt(start.frozen)  # builds the model
        with self.seeding(), self.calculating():
            yield from train(self, training, start)

    def losses(self, states: Sequence[State]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Loss (S,) float32 and prediction (S,) int32 or None of every sample at every state.

        Where the data must be loaded anew on each pass, one pass serves all the states.
        """
        results = [LossRow(self.samples) for _ in states]
        with torch.no_grad():
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

    def sample_losses(self, state: State, samples: np.ndarray) -> np.ndarray:
        """Losses of chosen samples, (M,) float64; where samples are coupled, each in its whole chunk."""
        chunks = [np.arange(s.start, s.stop) for s in self.batches.slices()] if self.couples_samples else [samples]
        found = np.full(self.samples, np.nan)
        with self.at(state), torch.no_grad(), self.running.as_trained():
            for chunk in chunks:
                if np.isin(chunk, samples).any():
                    items, places = self.placed(chunk)
                    losses = self.task.losses(self.flat.model, self.batches.take(items))
                    found[chunk] = losses.double().cpu().numpy()[places]
        return found[samples]

    def gradient_cosines(self, state: State, samples: np.ndarray) -> np.ndarray:
        """Cosines of the chosen samples' gradients, (M, M) float64; see `opsig_torch.alignment`.

        Where samples are coupled, a gradient is that through the sample's whole chunk; see `opsig_torch.coupled`.
        """
        from opsig_torch import alignment, coupled

        with self.at(state):
            gram = (coupled if self.couples_samples else alignment).gradient_gram(self, samples)
        with np.errstate(invalid="ignore", divide="ignore"):
            norms = alignment.directed(np.sqrt(np.diag(gram)))
            gram /= norms[:, None]
            gram /= norms
        return gram

    def mean_cosines(self, state: State, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray:
        """Mean cosine of samples' gradients with those of each set, (M, G); where, see `gradient_cosines`."""
        from opsig_torch import coupled, set_cosines

        with self.at(state):
            return (coupled if self.couples_samples else set_cosines).mean_cosines(self, samples, sets)

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
        with self.at(state), torch.no_grad(), self.running.as_trained():
            mean = None
            if features is not None:
                norms = [features(self.flat.model, batch).norm(dim=1) for _, batch in self.batches]
                mean = float(torch.cat(norms).double().mean())
            self.flat.model.eval()
            batch = [task.inputs(pictures).to(self.device, self.flat.vector.dtype), None]
            logits = task.logits(self.flat.model, batch).double().cpu().numpy()
            own = None if features is None else features(self.flat.model, batch).norm(dim=1).double().cpu().numpy()
        return logits, own, mean

    def gradient(self, state: State, weights: np.ndarray | None = None) -> np.ndarray:
        """Gradient of the mean training loss, (P,), with weights of the samples (S,) where they are given."""

        def mean(indices: slice | np.ndarray, batch: Any) -> torch.Tensor:
            losses = self.counted(self.batch_losses(batch), indices)
            if weights is not None:
                losses = losses * torch.from_numpy(weights[indices]).to(losses)
            return losses.sum() / self.target_count

        with self.at(state), refusing(self, "the gradient", 1):
            parts = self.batches if weights is None else self._weighing(weights)
            terms = (plain.flattened(plain.gradients(self, mean(*each))) for each in parts)
            return self.total(terms, self.flat.vector.detach()).cpu().numpy()

    def _weighing(self, weights: np.ndarray) -> Iterator[tuple[slice | np.ndarray, Any]]:
        """The batches, of which those that few samples have weight in are these samples alone."""
        if self.couples_samples or self.positions > 1 or 2 * np.count_nonzero(weights) > self.samples:
            yield from self.batches
            return
        for indices in self.batches.slices():
            chosen = indices.start + np.flatnonzero(weights[indices])
            if len(chosen):
                yield chosen, self.batches.take(chosen)

    def sample_sharpness(self, state: State, samples: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        """The most positive eigenvalue of chosen samples' Hessians, and residuals; see `opsig_torch.spectrum`."""
        from opsig_torch.spectrum import sample_sharpness

        if self.couples_samples:
            raise OpsigError(
                "sample_sharpness is not measured where batch norm goes by chunks: a sample's Hessian has no part of "
                "its own there. Measure curvature instead, or train with --statistics running"
            )
        with self.at(state):
            found = sample_sharpness(self, samples, tolerance)
        return found.values, found.residuals

    def spectral_density(self, state: State) -> tuple[np.ndarray, np.ndarray, float]:
        """Nodes and weights (R, m) of the Hessian's spectral density, and the trace's standard error."""
        from opsig_torch.spectrum import spectral_density

        with self.at(state):
            return spectral_density(self)

    def gradient_norms(self, state: State, samples: np.ndarray | None = None) -> np.ndarray:
        """Norm of every sample's gradient, (S,) float64, a proxy if coupled, or of chosen ones', (M,); see
        `opsig_torch.alignment`."""
        from opsig_torch import alignment, coupled

        with self.at(state):
            if self.couples_samples and (self.positions > 1 or samples is not None):
                return coupled.gradient_norms(self, np.arange(self.samples) if samples is None else samples)
            return alignment.gradient_norms(self, samples)

    def curvature_along(self, state: State, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss, slope and curvature of every sample along a direction; see `opsig_torch.sample_curvature`."""
        from opsig_torch.sample_curvature import curvature_along

        with self.at(state):
            return curvature_along(self, torch.from_numpy(direction).to(self.flat.vector.detach()))

    def slopes_along(self, state: State, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slopes and curvatures of every sample along K directions, (S, K); see `opsig_torch.sample_curvature`."""
        from opsig_torch.sample_curvature import slopes_along

        with self.at(state):
            return slopes_along(self, torch.from_numpy(directions).to(self.flat.vector.detach()))
