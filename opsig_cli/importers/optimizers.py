"""Optimizer state as torch.optim saves it: settings from its parameter groups, moments as flat rows. P parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opsig_cli.backends import Tensor
from opsig_cli.importers.torch_files import is_plain, number_of

SLOTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""The parts of an optimizer's state that the file keeps."""
MAX_WAYS = 2
"""More than one way of matching is as bad as many."""


def settings_of(saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings under opsig's names that a saved optimizer's groups tell, and what a person should know of them.

    Adam is told from `betas`, gradient descent with or without momentum from `momentum`; of others only the learning
    rate is taken.
    """
    groups = [group for group in saved["param_groups"] if isinstance(group, Mapping)]
    if not groups:
        return {}, []
    group = max(groups, key=_size)
    settings: dict[str, Any] = {"learning_rate": _number(group.get("lr"))}
    notes = []
    rates = sorted({rate for each in groups if (rate := _number(each.get("lr"))) is not None})
    if len(rates) > 1:
        notes.append(
            f"its groups have learning rates {rates[0]:g} to {rates[-1]:g}; that of most parameters, "
            f"{settings['learning_rate']:g}, is taken"
        )
    decay = _number(group.get("weight_decay")) or 0.0
    betas = group.get("betas")
    if isinstance(betas, list | tuple) and len(betas) == 2 and _moment(saved, "exp_avg_sq", "max_exp_avg_sq"):
        settings |= {"optimizer": "adam", "beta1": _number(betas[0]), "beta2": _number(betas[1])}
        settings["epsilon"] = _number(group.get("eps"))
        settings["weight_decay"] = decay
        if decay and group.get("decoupled_weight_decay", False):
            settings["weight_decay"] = 0.0
            notes.append(f"AdamW's weight decay of {decay:g} acts beside the gradient and is left out")
        if group.get("amsgrad"):
            notes.append("amsgrad is taken as adam")
    elif "momentum" in group and "alpha" not in group:
        momentum = _number(group["momentum"]) or 0.0
        settings |= {"optimizer": "momentum", "momentum": momentum} if momentum else {"optimizer": "gd"}
        settings["weight_decay"] = decay
        if group.get("nesterov") or group.get("dampening"):
            notes.append("nesterov and dampening are taken as plain momentum, whose threshold is another")
    else:
        notes.append("its kind is not known here: say with --optimizer what comes nearest")
    return {key: value for key, value in settings.items() if value is not None}, notes


def _size(group: Mapping[str, Any]) -> int:
    params = group.get("params")
    return len(params) if isinstance(params, list) else 0


def _moment(saved: Mapping[str, Any], *names: str) -> bool:
    """Whether the state is that of Adam's family, or there is none yet."""
    states = [each for each in saved["state"].values() if isinstance(each, Mapping)]
    return not states or any(name in each for each in states for name in names)


def _number(value: Any) -> float | None:
    number = number_of(value)  # a learning rate may be a tensor
    return None if number is None else float(number)


def count_of(saved: Mapping[str, Any]) -> int | None:
    """How many steps an optimizer has counted itself, as Adam does; None where it does not."""
    counts = [_number(each.get("step")) for each in saved["state"].values() if isinstance(each, Mapping)]
    known = [count for count in counts if count is not None and count == count // 1]
    return int(max(known)) if known else None


def slots_of(
    saved: Mapping[str, Any], layout: Sequence[Tensor], prefix: str
) -> tuple[dict[str, np.ndarray], str | None]:
    """Momenta and moments as flat rows in the layout's order, (P,) float32 each; and why there are none, if so.

    A parameter that has none beside others that do was never stepped: its row is 0, from which an optimizer starts.
    """
    import torch

    states = saved["state"]
    parameters = [tensor for tensor in layout if tensor.kind == "parameter"]
    names = [name for name in SLOTS if any(_tensor(state, name) is not None for state in states.values())]
    if not names:
        return {}, None
    placed = _by_name(states, parameters, prefix) or _by_order(saved, parameters)
    if placed is None:
        return {}, "its parameters are not the model's, or could be in several orders"
    rows = {name: np.zeros(sum(tensor.size for tensor in parameters), np.float32) for name in names}
    for tensor, state in zip(parameters, placed, strict=True):
        for name in names:
            value = _tensor(state, name)
            if value is None:
                continue
            if tuple(value.shape) != tensor.shape:
                return {}, f"{name} of {tensor.name} has another shape than the parameter"
            row = rows[name][tensor.offset : tensor.offset + tensor.size]
            torch.from_numpy(row).view(tensor.shape).copy_(value)
    return rows, None


def _tensor(state: Any, name: str) -> Any:
    value = state.get(name) if isinstance(state, Mapping) else None
    return value if is_plain(value) else None


def _by_name(states: Mapping[Any, Any], parameters: Sequence[Tensor], prefix: str) -> list[Any] | None:
    """States keyed by parameters' names, as distributed training saves them."""
    for start in ("", prefix, prefix.split(".", 1)[-1]):
        if all(start + tensor.name in states for tensor in parameters):
            return [states[start + tensor.name] for tensor in parameters]
    return None


def _by_order(saved: Mapping[str, Any], parameters: Sequence[Tensor]) -> list[Any] | None:
    """States by number: within each group parameters come in the model's order; groups are told apart by shapes."""
    states = saved["state"]
    groups: list[list[Any]] = [list(group.get("params") or ()) for group in saved["param_groups"]]
    if sum(map(len, groups)) != len(parameters):
        return None
    known = [[states.get(number, {}) for number in group] for group in groups]
    shapes = [[next((tuple(value.shape) for name in SLOTS if (value := _tensor(state, name)) is not None), None)
               for state in group] for group in known]  # fmt: skip
    order = merge_order([tensor.shape for tensor in parameters], shapes)
    if order is None:
        return None
    taken = [iter(group) for group in known]
    return [next(taken[group]) for group in order]


def merge_order(
    whole: Sequence[tuple[int, ...]], parts: Sequence[Sequence[tuple[int, ...] | None]]
) -> list[int] | None:
    """From which part each element of `whole` comes, if `parts` are its subsequences in exactly one way.

    None in a part fits any shape. Returns None where there is no way, or several.

    >>> merge_order([(2, 3), (3,), (4, 2), (4,)], [[(2, 3), (4, 2)], [(3,), (4,)]])
    [0, 1, 0, 1]
    >>> merge_order([(2,), (2,)], [[(2,)], [(2,)]]) is None
    True
    """
    start = (0,) * len(parts)
    ways: list[dict[tuple[int, ...], tuple[int, int]]] = [{start: (1, -1)}]  # by how many of each part are used up
    for shape in whole:
        reached: dict[tuple[int, ...], tuple[int, int]] = {}
        for used, (count, _) in ways[-1].items():
            for number, part in enumerate(parts):
                if used[number] < len(part) and part[used[number]] in (shape, None):
                    after = tuple(n + (i == number) for i, n in enumerate(used))
                    reached[after] = (min(MAX_WAYS, reached.get(after, (0, 0))[0] + count), number)
        ways.append(reached)
    end = tuple(len(part) for part in parts)
    if ways[-1].get(end, (0, 0))[0] != 1:
        return None
    order = []
    for reached in ways[:0:-1]:
        number = reached[end][1]
        order.append(number)
        end = tuple(n - (i == number) for i, n in enumerate(end))
    return order[::-1]
