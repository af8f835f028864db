"""What commands see of a task opened in JAX: every measurement, each in its own file. S samples, P parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import jax
import numpy as np

from opsig_cli.backends import Eigenpairs, Snapshot, State, Training
from opsig_jax.opened import Opened


class JaxSession(Opened):
    """A task on a device with all that this backend measures of it; how it is opened, see `opsig_jax.opened`."""

    optimizers = ("gd", "sgd", "momentum", "adam")
    versions: ClassVar = {"jax_version": jax.__version__}

    def train(self, training: Training, start: State) -> Iterator[Snapshot]:
        """Snapshots of every step from `start.step` to `training.steps`, both included; see `opsig_jax.training`."""
        from opsig_jax.training import train

        return train(self, training, start)

    def losses(self, states: Sequence[State]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Loss (S,) float32 and prediction (S,) int32 or None of every sample at every state."""
        from opsig_jax.forward import measured

        return [measured(self, self.vector_of(state)) for state in states]

    def sample_losses(self, state: State, samples: np.ndarray) -> np.ndarray:
        """Losses of chosen samples, (M,) float64."""
        from opsig_jax.forward import measured

        return measured(self, self.vector_of(state), samples)[0][samples].astype(np.float64)

    def gradient(self, state: State, weights: np.ndarray | None = None) -> np.ndarray:
        """Gradient of the mean training loss, (P,), with weights of the samples (S,) where they are given."""
        from opsig_jax.curvature import gradient

        return gradient(self, self.vector_of(state), weights)

    def gradient_norms(self, state: State, samples: np.ndarray | None = None) -> np.ndarray:
        """Norm of every sample's gradient, (S,) float64, or of chosen ones', (M,)."""
        from opsig_jax.alignment import gradient_norms

        return gradient_norms(self, self.vector_of(state), np.arange(self.samples) if samples is None else samples)

    def gradient_cosines(self, state: State, samples: np.ndarray) -> np.ndarray:
        """Cosines of the chosen samples' gradients, (M, M) float64; see `opsig_jax.alignment`."""
        from opsig_jax import alignment

        gram = alignment.gradient_gram(self, self.vector_of(state), samples)
        with np.errstate(invalid="ignore"):
            norms = alignment.directed(np.sqrt(np.diag(gram)))
            return gram / norms[:, None] / norms

    def mean_cosines(self, state: State, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray:
        """Mean cosine of samples' gradients with those of each set, (M, G)."""
        from opsig_jax.alignment import mean_cosines

        return mean_cosines(self, self.vector_of(state), samples, sets)

    def top_eigenpairs(
        self, state: State, count: int, tolerance: float, previous: Eigenpairs | None = None,
        scale: np.ndarray | None = None,
    ) -> Eigenpairs:  # fmt: skip
        """The most positive eigenpairs of the training loss's Hessian; see `opsig_jax.curvature`."""
        from opsig_jax.curvature import solve

        memory = None if previous is None else previous.memory
        found = solve(self, self.vector_of(state), count, tolerance, state.step, memory, scale)
        return Eigenpairs(found.values, found.vectors, found.residuals, found.products, found.converged, found.memory)

    def hessian_vectors(self, state: State, vectors: np.ndarray) -> np.ndarray:
        """Products of the training loss's Hessian with vectors, (K, P)."""
        from opsig_jax.curvature import Hessian

        hessian = Hessian(self, self.vector_of(state))
        return np.stack([hessian(vector) for vector in vectors])

    def spectral_density(self, state: State) -> tuple[np.ndarray, np.ndarray, float]:
        """Nodes and weights (R, m) of the Hessian's spectral density, and the trace's standard error."""
        from opsig_jax.curvature import spectral_density

        return spectral_density(self, self.vector_of(state))

    def curvature_along(self, state: State, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss, slope and curvature of every sample along a direction, (S,) float64 each."""
        from opsig_jax.curvature import curvature_along

        losses, slopes, curvatures = curvature_along(self, self.vector_of(state), direction)
        return losses, slopes, curvatures

    def slopes_along(self, state: State, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slopes and curvatures of every sample along K directions, (S, K) float64 each."""
        from opsig_jax.curvature import curvature_along

        vector = self.vector_of(state)
        found = [curvature_along(self, vector, direction)[1:] for direction in directions]
        slopes, curvatures = (np.stack(rows, 1) for rows in zip(*found, strict=True))
        return slopes, curvatures

    def features(self, state: State, samples: np.ndarray) -> np.ndarray | None:
        """The task's own features of chosen samples, centred and of length one, (M, D) float32; None without."""
        from opsig_jax.forward import centred_features

        found = centred_features(self, self.vector_of(state))
        return None if found is None else found[samples].astype(np.float32)

    def mean_feature_cosines(self, state: State, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray | None:
        """Mean cosine of chosen samples' centred features with each set's, (M, G) float64, or None."""
        from opsig_jax.forward import centred_features

        found = centred_features(self, self.vector_of(state))
        return None if found is None else found[samples] @ np.stack([found[chosen].mean(0) for chosen in sets], 1)

    def outputs(self, state: State, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, float | None]:
        """Logits (N, classes) float64 and feature norms (N,) of pictures (N, H, W, C), and the data's mean norm.

        Norms are None for a task without features.
        """
        from opsig_jax.forward import outputs

        return outputs(self, self.vector_of(state), pictures)
