"""Checkpoints of JAX: a tree of parameters and optax's state of it. JAX is not imported: its arrays bring it along.

P parameters. Names and order are those that the jax backend gives the same tree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from opsig_cli.backends import State, Tensor, parameter_name
from opsig_cli.errors import OpsigError

SLOTS = {"mu": "exp_avg", "nu": "exp_avg_sq", "trace": "momentum_buffer"}
"""What a file calls the moments of optax's states."""
MOMENTS = ({"count", "mu", "nu"}, {"trace"})
"""Fields of the states that have them: those of Adam's kind, and momentum."""


def layout_of(tree: Any) -> list[Tensor]:
    """Names, shapes and places of the arrays of real numbers in a tree. Raises OpsigError where it has none, or what is
    no parameter."""
    found, offset = [], 0
    for name, leaf in _arrays(tree):
        found.append(Tensor(name, "parameter", tuple(leaf.shape), offset, leaf.size))
        offset += leaf.size
    if not offset:
        raise OpsigError(f"model must be a torch.nn.Module or a tree of JAX's arrays, not {type(tree).__name__}")
    return found


def state_of(tree: Any, optimizer: Any = None, step: int = 0) -> State:
    """A tree and optax's state of it as a checkpoint of `step`, in the order of `layout_of`: a copy.

    Of the state the moments are kept that Adam and momentum have; a parameter that has none there counts as 0.
    """
    arrays = _arrays(tree)
    slots: dict[str, np.ndarray] = {}
    for state in _states(optimizer):
        for field, slot in SLOTS.items():
            if field in state._fields:
                held = dict(_arrays(getattr(state, field)))
                row = _row([held.get(name, np.zeros(leaf.shape)) for name, leaf in arrays])
                slots[slot] = slots[slot] + row if slot in slots else row  # of parts of the tree
    return State(step, _row([leaf for _, leaf in arrays]), np.empty(0), slots)


def _arrays(tree: Any) -> list[tuple[str, Any]]:
    """The arrays of real numbers in a tree, by their paths; empty where JAX is not loaded."""
    jax = sys.modules.get("jax")
    if jax is None:
        return []
    found = []
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]:
        kinds = _kinds(node)
        value = jax.tree_util.tree_leaves(node)[0] if "Variable" in kinds and jax.tree_util.tree_leaves(node) else node
        if not isinstance(value, jax.Array | np.ndarray) or not jax.numpy.issubdtype(value.dtype, np.inexact):
            continue
        name = _name(jax, path)
        if "Variable" in kinds and not kinds & {"Param", "OptVariable", "OptArray"}:
            raise OpsigError(f"model holds {name}, which is no parameter. Give nnx.state(model, nnx.Param)")
        if value.dtype.kind == "c":
            raise OpsigError(f"model holds {name} in {value.dtype}, and parameters are real numbers")
        found.append((name, value))
    return found


def _name(jax: Any, path: Sequence[Any]) -> str:
    return parameter_name([jax.tree_util.keystr((key,), simple=True) for key in path])


def _kinds(node: Any) -> set[str]:
    return {kind.__name__ for kind in type(node).__mro__}


def _is_variable(node: Any) -> bool:
    return "Variable" in _kinds(node)


def _states(optimizer: Any) -> list[Any]:
    """optax's states that hold moments, wherever they are in its state."""
    jax = sys.modules.get("jax")
    if optimizer is None or jax is None:
        return []
    found = jax.tree_util.tree_leaves(getattr(optimizer, "opt_state", optimizer), is_leaf=_has_moments)
    return [each for each in found if _has_moments(each)]


def _has_moments(node: Any) -> bool:
    return any(set(getattr(node, "_fields", ())) == fields for fields in MOMENTS)


def _row(arrays: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(array).astype(np.float32).ravel() for array in arrays])
