"""A task's parameters, a pytree, as one flat vector. P parameters.

Leaves that are arrays of real numbers are trained; others, such as integers, keys and functions, are constants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opsig_cli.backends import Tensor, parameter_name
from opsig_cli.errors import OpsigError


class Tree:
    """How a pytree of parameters lies in a vector (P,), in the order of the pytree until it is arranged otherwise.

    Raises OpsigError for parameters that no vector of real numbers can hold, and for state that is not trained, which
    no file would carry.
    """

    def __init__(self, params: Any):
        _refuse_state(params)
        found, self._structure = jax.tree_util.tree_flatten_with_path(params)
        self._leaves = [leaf for _, leaf in found]
        self.layout: list[Tensor] = []
        self._places: list[int] = []  # of the layout's tensors among the leaves
        self.is_half = False
        offset = 0
        for place, (path, leaf) in enumerate(found):
            if not isinstance(leaf, jax.Array | np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
                continue
            name = _name(path)
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise OpsigError(f"parameter {name} of the task is complex. Only real parameters are measured")
            self.is_half |= leaf.dtype.itemsize < 4
            self.layout.append(Tensor(name, "parameter", tuple(leaf.shape), offset, leaf.size))
            self._places.append(place)
            offset += leaf.size
        self.size = offset
        if not self.size:
            raise OpsigError("the task's init() returned no parameters: no array of real numbers")
        repeated = [name for name, count in Counter(tensor.name for tensor in self.layout).items() if count > 1]
        if repeated:
            raise OpsigError(
                f"two parameters of the task are called {repeated[0]}. Rename a key of what init() returns"
            )

    def vector(self, dtype: Any) -> np.ndarray:
        """The parameters as init() gave them, (P,)."""
        return np.concatenate([np.asarray(self._leaves[place], dtype).ravel() for place in self._places])

    def arrange(self, names: Sequence[str]) -> None:
        """Take another order of the same names for that of the vector."""
        by_name = {tensor.name: (tensor, place) for tensor, place in zip(self.layout, self._places, strict=True)}
        self.layout, self._places, offset = [], [], 0
        for name in names:
            tensor, place = by_name[name]
            self.layout.append(Tensor(name, tensor.kind, tensor.shape, offset, tensor.size))
            self._places.append(place)
            offset += tensor.size

    def split(self, vector: jax.Array) -> list[jax.Array]:
        """A vector (P,) as what there is for each tensor of the layout."""
        return [vector[t.offset : t.offset + t.size].reshape(t.shape) for t in self.layout]

    def joined(self, parts: Sequence[jax.Array]) -> jax.Array:
        """One vector (P,) of what there is for each tensor, or rows (B, P) of what has one axis more."""
        lead = parts[0].ndim - len(self.layout[0].shape)
        return jnp.concatenate([part.reshape(*part.shape[:lead], -1) for part in parts], axis=-1)

    def build(self, parts: Sequence[Any]) -> Any:
        """The task's own pytree with these in the place of its parameters."""
        leaves = list(self._leaves)
        for place, part in zip(self._places, parts, strict=True):
            leaves[place] = part
        return jax.tree_util.tree_unflatten(self._structure, leaves)


def _name(path: Sequence[Any]) -> str:
    return parameter_name([jax.tree_util.keystr((key,), simple=True) for key in path])


def _refuse_state(params: Any) -> None:
    """Raise OpsigError for what layers keep beside their parameters and update as they run."""

    def kinds(node: Any) -> set[str]:
        return {kind.__name__ for kind in type(node).__mro__}

    def is_wrapped(node: Any) -> bool:
        return bool(kinds(node) & {"Variable", "StateIndex"})

    for path, node in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_wrapped)[0]:
        names = kinds(node)
        real = any(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in _arrays(node))
        untrained = "StateIndex" in names or ("Variable" in names and "Param" not in names and real)
        if untrained or any(getattr(key, "key", None) == "batch_stats" for key in path):
            raise OpsigError(
                f"{_name(path)} of the task's parameters is state that is not trained, such as the statistics of batch "
                "norm, which the jax backend does not carry. Use group or layer norm, or keep it in the task"
            )


def _arrays(node: Any) -> list[Any]:
    return [leaf for leaf in jax.tree_util.tree_leaves(node) if isinstance(leaf, jax.Array | np.ndarray)]
