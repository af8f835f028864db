"""Optimizer state as torch.optim saves it: settings from its parameter groups, moments as flat rows. P parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opsig_cli.backends import Tensor
from opsig_cli.settings import OTHER
from opsig_cli.studies.importing.entries import Entry
from opsig_cli.studies.importing.names import common_prefixes
from opsig_cli.studies.importing.pytrees import plain
from opsig_cli.studies.importing.torch_files import WRAPPERS, is_plain, number_of

SLOTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""The parts of an optimizer's state that the file keeps."""
_OF_ALL = frozenset((
    "params", "param_names", "lr", "weight_decay", "maximize", "foreach", "differentiable", "fused", "initial_lr",
    "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "name", "step",
))  # fmt: skip
"""Options of every optimizer of torch, and what its schedulers and Apex keep with them."""
ADAM_OPTIONS = _OF_ALL | {"betas", "eps", "amsgrad", "capturable", "decoupled_weight_decay", "bias_correction"}
SGD_OPTIONS = _OF_ALL | {"momentum", "dampening", "nesterov"}
ADAM_STATE, SGD_STATE = frozenset(("step", "exp_avg", "exp_avg_sq")), frozenset(("momentum_buffer",))
MAX_WAYS = 2
"""More than one way of matching is as bad as many."""


def settings_of(saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings under opsig's names that a saved optimizer's groups tell, and what a person should know of them.

    An optimizer is known by exactly the options and the state that torch's SGD, Adam and AdamW have; any other is
    OTHER, of which only the learning rate is taken.
    """
    groups = [group for group in saved["param_groups"] if isinstance(group, Mapping)]
    if not groups:
        return {}, []
    group = max(groups, key=lambda each: _size(each, saved["state"]))
    rate, rate_note = _of_largest(group, groups, saved["state"], "lr", "learning rates")
    decay, decay_note = _of_largest(group, groups, saved["state"], "weight_decay", "weight decays")
    notes = [note for note in (rate_note, decay_note) if note]
    settings: dict[str, Any] = {"optimizer": OTHER}
    states = [each for each in saved["state"].values() if isinstance(each, Mapping)]
    if all(map(_is_adam, groups)) and all(_has(each, ADAM_STATE) for each in states):
        beta1, beta2 = map(_number, group["betas"])
        settings = {"optimizer": "adam", "beta1": beta1, "beta2": beta2, "epsilon": _number(group.get("eps"))}
        decoupled = group.get("decoupled_weight_decay")
        if decay and decoupled is None:  # before torch 2.7
            notes.append(
                f"it does not say whether its weight decay of {decay:g} is AdamW's, beside the gradient: it is left "
                f"out. --weight-decay {decay:g} says that it is Adam's"
            )
        elif decay and decoupled:
            notes.append(f"AdamW's weight decay of {decay:g} acts beside the gradient and is left out")
        settings["weight_decay"] = 0.0 if decay and decoupled is not False else decay
    elif all(map(_is_sgd, groups)) and all(_has(each, SGD_STATE) for each in states):
        momentum = _number(group["momentum"]) or 0.0
        settings = {"optimizer": "momentum", "momentum": momentum} if momentum else {"optimizer": "gd"}
        settings["weight_decay"] = decay
        if momentum and group.get("nesterov"):
            settings["nesterov"] = True
            notes.append("its momentum is nesterov's, whose threshold is (2 + 2 beta)/(1 + 2 beta) over the rate")
    elif any(each.get("optax") for each in groups):
        notes.append(
            "optax's state does not say whose it is: --optimizer adam or momentum does, where it is one of these"
        )
    settings = {"learning_rate": rate} | settings
    return {key: value for key, value in settings.items() if value is not None}, notes


def _has(given: Mapping[Any, Any], known: frozenset[str], needed: frozenset[str] = frozenset()) -> bool:
    """Whether these are no other keys than the known ones, and all of those that are needed."""
    told = {str(key) for key, value in given.items() if value is not None or key in needed}
    return needed <= told <= known


def _is_adam(group: Mapping[str, Any]) -> bool:
    """Whether these are Adam's or AdamW's options, with the preconditioner that both have.

    AMSGrad, NAdam, RAdam and many of others' have the same moments and another one.
    """
    betas = group.get("betas")
    if not isinstance(betas, list | tuple) or len(betas) != 2 or None in map(_number, betas):
        return False
    plain = "amsgrad" in group or group.get("bias_correction") is True  # torch's own, or a fused one of Apex
    odd = group.get("amsgrad") or group.get("maximize") or group.get("bias_correction") is False
    return bool(plain) and not odd and _has(group, ADAM_OPTIONS, frozenset(("lr", "betas", "eps", "weight_decay")))


def _is_sgd(group: Mapping[str, Any]) -> bool:
    """Whether these are the options of gradient descent with or without momentum."""
    if not _has(group, SGD_OPTIONS, frozenset(("lr", "momentum", "dampening", "weight_decay", "nesterov"))):
        return False
    return not group.get("maximize") and (not group.get("dampening") or not _number(group["momentum"]))


def _of_largest(
    group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Any], key: str, what: str
) -> tuple[float | None, str | None]:
    """A setting of the largest group, and what to say where others have another.

    Without state there is no telling which group is the largest: a setting that differs is None then.
    """
    values = sorted({value for each in groups if (value := _number(each.get(key))) is not None})
    value = _number(group.get(key))
    if len(values) < 2 or value is None:
        return value, None
    said = f"its groups have {what} {values[0]:g} to {values[-1]:g}"
    if not _size(group, states)[0]:
        return None, f"{said}, and before it has moments it does not tell which is that of most parameters"
    return value, f"{said}; that of most parameters, {value:g}, is taken"


def _size(group: Mapping[str, Any], states: Mapping[Any, Any]) -> tuple[int, int]:
    """How many numbers a group moves, as far as its state tells, and in how many tensors."""
    numbers = group.get("params")
    numbers = numbers if isinstance(numbers, list) else []
    moments = [moment for number in numbers if (moment := _moment(states.get(number))) is not None]
    return sum(moment.numel() for moment in moments), len(numbers)


def _moment(state: Any) -> Any:
    """A tensor of the parameter's shape from its state; None where there is none."""
    return next((value for name in SLOTS if (value := _tensor(state, name)) is not None), None)


def _number(value: Any) -> float | None:
    number = number_of(value)  # a learning rate may be a tensor
    return None if number is None else float(number)


def count_of(saved: Mapping[str, Any]) -> int | None:
    """How many steps an optimizer has counted itself, as Adam does; None where it does not."""
    counts = [_number(each.get("step")) for each in saved["state"].values() if isinstance(each, Mapping)]
    known = [count for count in counts if count is not None and count == count // 1]
    return int(max(known)) if known else None


def matched(
    saved: Mapping[str, Any], layout: Sequence[Tensor], prefix: str
) -> tuple[list[tuple[Tensor, dict[str, Entry]]], str | None]:
    """Momenta and moments of each trained parameter that has some, by their names; and why there are none, if so."""
    states = saved["state"]
    parameters = [tensor for tensor in layout if tensor.kind == "parameter"]  # what is frozen is never stepped
    every = [tensor for tensor in layout if tensor.kind != "buffer"]
    names = [name for name in SLOTS if any(_tensor(state, name) is not None for state in states.values())]
    if not names:
        return [], None
    placed = _by_name(_named(saved) or states, parameters, prefix) or _by_order(saved, parameters)
    if placed is None and (whole := _by_order(saved, every)) is not None:  # an optimizer of all parameters
        placed = [state for tensor, state in zip(every, whole, strict=True) if tensor.kind == "parameter"]
    if placed is None:
        return [], "its parameters are not the model's, or could be in several orders"
    found = []
    for tensor, state in zip(parameters, placed, strict=True):
        slots = {name: value for name in names if (value := _tensor(state, name)) is not None}
        for name, value in slots.items():
            if value.shape != tensor.shape:
                return [], f"{name} of {tensor.name} has another shape than the parameter"
        found.append((tensor, slots))
    return found, None


def slots_of(
    saved: Mapping[str, Any], layout: Sequence[Tensor], prefix: str
) -> tuple[dict[str, np.ndarray], str | None]:
    """Momenta and moments as flat rows in the layout's order, (P,) float32 each; and why there are none, if so.

    A parameter that has none beside others that do was never stepped: its row is 0, from which an optimizer starts.
    """
    import torch

    found, why = matched(saved, layout, prefix)
    size = sum(tensor.size for tensor in layout if tensor.kind == "parameter")
    rows = {name: np.zeros(size, np.float32) for name in SLOTS if any(name in slots for _, slots in found)}
    for tensor, slots in found:
        for name, value in slots.items():
            row = rows[name][tensor.offset : tensor.offset + tensor.size]
            torch.from_numpy(row).view(tensor.shape).copy_(value.read())
    return rows, why


def _tensor(state: Any, name: str) -> Any:
    value = state.get(name) if isinstance(state, Mapping) else None
    return value if is_plain(value) else None


def _named(saved: Mapping[str, Any]) -> dict[str, Any]:
    """States by the names that an optimizer was given with its parameters; empty where it was given none."""
    return {
        WRAPPERS.sub("", str(name)): saved["state"].get(number, {})
        for group in saved["param_groups"]
        for name, number in zip(group.get("param_names") or (), group.get("params") or (), strict=False)
    }


def _by_name(states: Mapping[Any, Any], parameters: Sequence[Tensor], prefix: str) -> list[Any] | None:
    """States keyed by parameters' names, as distributed training saves them."""
    own = [tensor.name for tensor in parameters]
    for inner in common_prefixes(own):  # JAX's states go by the path below what was given to the optimizer
        for start in ("", prefix, prefix.split(".", 1)[-1], "module."):
            names = [start + plain(name.removeprefix(inner)) for name in own]
            if all(name in states for name in names) or (states and set(states) <= set(names)):
                return [states.get(name, {}) for name in names]
    return None


def _by_order(saved: Mapping[str, Any], parameters: Sequence[Tensor]) -> list[Any] | None:
    """States by number: within each group parameters come in the model's order; groups are told apart by shapes."""
    states = saved["state"]
    groups: list[list[Any]] = [list(group.get("params") or ()) for group in saved["param_groups"]]
    if sum(map(len, groups)) != len(parameters):
        return None
    known = [[states.get(number, {}) for number in group] for group in groups]
    shapes = [[None if (moment := _moment(state)) is None else tuple(moment.shape) for state in group]
              for group in known]  # fmt: skip
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
