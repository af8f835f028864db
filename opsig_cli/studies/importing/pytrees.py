"""JAX's nested parameters as a checkpoint's content: names by the path, and the states of optax beside them.

A path's keys are joined by dots, as in `params.Dense_0.kernel`; a Variable of nnx is its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsig_cli.studies.importing.content import OPTIONS, Content, collect_numbers
from opsig_cli.studies.importing.entries import Entry
from opsig_cli.studies.importing.torch_files import number_of

SLOTS = {"mu": "exp_avg", "nu": "exp_avg_sq", "trace": "momentum_buffer"}
"""What a file calls the moments of optax's states."""
STATE = {*SLOTS, "count", "nu_max", "mu_hat", "nu_hat", "v", "v_row", "v_col", "mean_grad_sq", "hessian_diag"}
"""Fields of optax's states that mirror the parameters, and the count beside them."""
HYPERPARAMETERS = "hyperparams"
"""Where `inject_hyperparams` keeps the learning rate."""


def plain(name: str) -> str:
    """A parameter's path as every file and backend writes it: by dots, and without the `value` of a Variable of nnx.

    >>> plain("params/Dense_0/kernel"), plain("layers.0.bias.value")
    ('params.Dense_0.kernel', 'layers.0.bias')
    """
    return name.replace("/", ".").removesuffix(".value")


def collect_tree(tree: Any, content: Content) -> None:
    """Tensors, whole numbers and states of optimizers of nested dictionaries and lists, whose depth is bounded."""
    states: dict[str, dict[str, Any]] = {}
    rates: list[float] = []

    def walk(value: Any, path: str, depth: int) -> None:
        if isinstance(value, Entry):
            content.tensors[path] = value
            return
        inside = _children(value)
        if depth < 2 and path not in OPTIONS:
            collect_numbers(inside, content)
        if (given := inside.get(HYPERPARAMETERS)) is not None:
            rate = number_of(_children(given).get("learning_rate"))
            rates.extend([] if rate is None else [float(rate)])
            inside = {key: each for key, each in inside.items() if not key.startswith(HYPERPARAMETERS)}
            inside.pop("count", None)
        if _is_state(inside):
            _take(inside, states)
            return
        for key, each in inside.items():
            walk(each, f"{path}.{plain(key)}" if path else plain(key), depth + 1)

    walk(tree, "", 0)
    if states or rates:
        group = {"lr": rates[0]} if len(set(rates)) == 1 else {}
        content.optimizers.append({"state": states, "param_groups": [group | {"optax": True}]})


def _children(value: Any) -> dict[str, Any]:
    """What lies inside, by key; a Variable of nnx stands for its value. Empty for a leaf."""
    pairs = enumerate(value) if isinstance(value, list | tuple) else value.items() if isinstance(value, Mapping) else ()
    return {str(key): _variable(inner) for key, inner in pairs}


def _variable(value: Any) -> Any:
    alone = isinstance(value, Mapping) and list(value) == ["value"]
    return value["value"] if alone and isinstance(value["value"], Entry) else value


def _is_state(inside: Mapping[str, Any]) -> bool:
    """Whether these are the fields of one of optax's states that has moments."""
    moments = [key for key, value in inside.items() if key != "count" and value is not None]
    counted = "count" in inside and not _children(inside["count"])
    return set(inside) <= STATE and bool(moments) and (counted or moments in (["trace"], ["nu"]))


def _take(inside: Mapping[str, Any], states: dict[str, dict[str, Any]]) -> None:
    """Add a state's moments to those of each parameter, by its path among the parameters."""
    for field, tree in inside.items():
        if field == "count":
            continue
        flat = Content()
        collect = [("", tree)]
        while collect:
            path, value = collect.pop()
            if isinstance(value, Entry):
                flat.tensors[path] = value
            collect += [
                (f"{path}.{plain(key)}" if path else plain(key), each) for key, each in _children(value).items()
            ]
        for path, entry in flat.tensors.items():
            name = SLOTS.get(field, field) if field == "trace" or {"mu", "nu"} <= set(inside) else field
            states.setdefault(path, {})[name] = entry
            if "count" in inside:
                states[path]["step"] = inside["count"]
