"""What a checkpoint holds as one flat list: tensors under dotted names, such as `model.module.fc.weight` for
`{"model": {"module.fc.weight": ...}}`, whole numbers by their key, and optimizers' state."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.entries import Entry, tensor_of
from opsig_cli.studies.importing.stand_ins import StandIn, StoredArray, pairs_of, state_of
from opsig_cli.studies.importing.torch_files import WRAPPERS, is_plain, number_of

MAX_DEPTH, MAX_MODULES = 6, 64
OPTIONS = ("args", "config", "cfg", "hparams", "hyper_parameters", "opt", "options", "params")
"""Keys under which scripts keep what they were asked to do; a `step` there is no step that was reached."""
DIGITS = 18
"""Of a whole number that may be a step."""


@dataclass
class Content:
    """What one checkpoint holds. `log`: what a trainer logged on the way, as it wrote it; `unnamed`: tensors that have
    no names, in the order of the model's."""

    tensors: dict[str, Entry] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    optimizers: list[Mapping[str, Any]] = field(default_factory=list)
    log: list[Mapping[str, Any]] = field(default_factory=list)
    unnamed: list[Entry] = field(default_factory=list)

    def clear(self) -> None:
        """Let go of what was read."""
        for part in (self.tensors, self.optimizers, self.log, self.unnamed):
            part.clear()


def collect(loaded: Any, content: Content, path: str) -> None:
    """Everything of interest in nested containers; each container is looked at once, to a bounded depth."""
    seen: set[int] = set()

    def walk(value: Any, name: str, depth: int) -> None:
        if isinstance(value, Entry):
            if is_plain(value):
                content.tensors[WRAPPERS.sub("", name)] = value
        elif isinstance(value, StoredArray):
            with contextlib.suppress(TypeError, IndexError):
                content.tensors[name] = entry_of(value)
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen and depth < MAX_DEPTH:
            seen.add(id(value))
            if saved := optimizer_of(value):
                content.optimizers.append(saved)
                return
            state = state_of(value)
            if state is not None and is_module(state):
                module(state, name, 0)
                return
            if state is not None and not (isinstance(value, StandIn) and value.kind == "collections.OrderedDict"):
                walk(state, name, depth)
            if isinstance(value, Mapping) and depth < 2 and name not in OPTIONS:
                collect_numbers(value, content)
            inner: Any = value
            if isinstance(value, StandIn) and not value:
                inner = value.listed or (value if value.kind.startswith("collections.") else value.args)
            pairs = pairs_of(inner).items() if isinstance(inner, Mapping) else enumerate(inner)
            for key, each in list(pairs):
                if not isinstance(key, StandIn | Entry):
                    walk(each, f"{name}.{key}" if name else str(key), depth + 1)

    def module(state: Mapping[Any, Any], name: str, depth: int) -> None:
        """The tensors of a pickled module under the names that its state_dict() gives them."""
        lost = state.get("_non_persistent_buffers_set") or ()
        for kind in ("_parameters", "_buffers"):
            inside = state.get(kind)
            for key, value in pairs_of(inside).items() if isinstance(inside, Mapping) else ():
                full = WRAPPERS.sub("", f"{name}.{key}" if name else str(key))
                if is_plain(value) and not (isinstance(lost, set | frozenset | list) and key in lost):
                    content.tensors[full] = value
        below = state.get("_modules")
        for key, value in pairs_of(below).items() if isinstance(below, Mapping) else ():
            inner = state_of(value)
            if inner is not None and depth < MAX_MODULES:
                module(inner, f"{name}.{key}" if name else str(key), depth + 1)

    if not isinstance(loaded, Mapping | list | tuple):
        what = "single tensor" if isinstance(loaded, Entry) else type(loaded).__name__
        raise OpsigError(f"{path} holds a {what}, not a state dict")
    walk(loaded, "", 0)


def is_module(state: Mapping[Any, Any]) -> bool:
    """Whether these are the attributes of a torch.nn.Module."""
    return isinstance(state.get("_parameters"), Mapping) and isinstance(state.get("_modules"), Mapping)


def optimizer_of(value: Any) -> Mapping[str, Any] | None:
    """An optimizer's state_dict(), or what an optimizer that was pickled whole would give as such; None for others."""
    if not isinstance(value, Mapping):
        return None
    saved = value if "param_groups" in value else state_of(value)
    if saved is None or not isinstance(saved.get("param_groups"), list) or not isinstance(saved.get("state"), Mapping):
        return None
    groups = [dict(group) for group in saved["param_groups"] if isinstance(group, Mapping)]
    states = {key: inner for key, inner in saved["state"].items()}
    numbers: dict[Any, int] = {}
    for group in groups:
        given = group.get("params")
        if isinstance(given, list) and any(isinstance(each, Entry) for each in given):  # tensors, not their numbers
            group["params"] = [numbers.setdefault(each, len(numbers)) for each in given if isinstance(each, Entry)]
    if numbers:
        states = {numbers[key]: inner for key, inner in states.items() if key in numbers}
    return {"state": states, "param_groups": groups}


def entry_of(array: StoredArray) -> Entry:
    """A pickled numpy array as a tensor."""

    return Entry(array.shape, lambda: tensor_of(array.array()))


def collect_numbers(values: Mapping[Any, Any], content: Content) -> None:
    """Whole numbers by key: ints, floats and text of integers, tensors of one number. The first of a name stays."""
    for key, value in values.items():
        number = _number(value) if isinstance(key, str) else None
        if number is not None:
            content.numbers.setdefault(key, number)


def _number(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) < DIGITS else None
    if isinstance(value, StoredArray):
        with contextlib.suppress(TypeError, IndexError):
            value = entry_of(value)
    number = number_of(value)
    return int(number) if number is not None and abs(number) < 10**DIGITS and number == int(number) else None
