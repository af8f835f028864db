"""Fitting a checkpoint's tensors to the task's model by name and shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsig_cli.backends import Tensor
from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.conversion import adapter_aliases, written_by_transformers
from opsig_cli.studies.importing.entries import Entry
from opsig_cli.studies.importing.steps import EPOCH_KEYS, STEP_KEYS

BESIDE = re.compile(r"(^|[._])(ema|swa|avg|averag|shadow|teacher|target|grad|init|start|best|exp_avg)", re.IGNORECASE)
"""Beginnings of words in a prefix that speak of a copy beside the weights: an average, gradients, another time's."""
LIVE = "current_model_state."
"""Where Lightning keeps the weights themselves when its `state_dict` is their average."""
STATISTICS = ("running_mean", "running_var")
SHOWN = 3


@dataclass(frozen=True)
class Fit:
    """Which key of the checkpoint each tensor of the layout has; `prefix` is what stands before its name there.

    `kept`: frozen parameters and buffers that the checkpoint lacks; `unused`: keys beside the model's that it lacks;
    `others`: prefixes under which the whole model lies, too; `tied`: all keys of a tensor that has several.
    """

    prefix: str
    keys: dict[str, str]
    kept: list[str]
    unused: list[str]
    others: list[str]
    tied: dict[str, list[str]]


def aliases_of(model: Any) -> dict[str, list[str]]:
    """All names of each parameter and buffer of an nn.Module, by its first: tied ones have several, and so have those
    that the library which it is from writes under another."""
    names: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            first = names.setdefault(id(tensor), name)
            aliases.setdefault(first, []).append(name)
    firsts = {other: first for first, others in aliases.items() for other in others}
    for written in (adapter_aliases(model, list(firsts)), written_by_transformers(model)[0]):
        for name, other in written.items():
            if name in firsts and firsts.setdefault(other, firsts[name]) == firsts[name]:
                aliases[firsts[name]].append(other)
    return aliases


def fit(
    shapes: Mapping[str, tuple[int, ...]],
    layout: Sequence[Tensor],
    aliases: Mapping[str, list[str]],
    prefix: str | None,
    path: str,
) -> Fit:
    """The prefix under which a checkpoint holds the model, found from the names and shapes of both.

    `shapes` are those of the checkpoint's tensors by name. A prefix that all of the model's own names have may be
    missing in the checkpoint. Raises OpsigError where a parameter is missing under the best prefix or has another
    shape, naming the first of them.
    """
    found = []
    for inner in common_prefixes([tensor.name for tensor in layout]):
        votes = _votes(shapes, layout, aliases, inner)
        found += [(place, inner, votes[place]) for place in votes if prefix is None or place.startswith(prefix)]
    if not found:
        raise OpsigError(_nothing_fits(shapes, layout, prefix, path))
    averaged = any(place.startswith(LIVE) for place, _, _ in found)
    beside_last = {place: bool(BESIDE.search(place)) or (averaged and not place.startswith(LIVE))
                   for place, _, _ in found}  # fmt: skip
    found.sort(key=lambda each: (-each[2], beside_last[each[0]], len(each[0]), each[0]))
    best, inner, most = found[0]
    keys, wrong, tied = _place(shapes, layout, aliases, best, inner)
    missing = [t for t in layout if t.name not in keys and t.name not in wrong]
    kept = [t.name for t in missing if t.kind != "parameter" and not t.name.endswith(STATISTICS)]
    needed = [t.name for t in missing if t.name not in kept]
    if wrong or needed:
        raise OpsigError(_does_not_fit(shapes, layout, path, best, wrong, needed))
    others = [candidate for candidate, _, count in found[1:] if count == most and candidate != best]
    used = {best + name.removeprefix(inner) for names in aliases.values() for name in names}
    counters = (*STEP_KEYS, *EPOCH_KEYS)
    beside = best.split(".")[0] + "." if best else ""
    unused = [key for key in shapes if key.startswith(beside) and key not in used and key not in counters]
    return Fit(best, keys, kept, unused, others, tied)


def common_prefixes(names: Sequence[str]) -> list[str]:
    """ "" and every prefix, up to a dot, that all names have: "net." of net.0.weight and net.0.bias."""
    found, rest = [""], list(names)
    while rest and all("." in name for name in rest) and len({name.split(".")[0] for name in rest}) == 1:
        found.append(found[-1] + rest[0].split(".")[0] + ".")
        rest = [name.split(".", 1)[1] for name in rest]
    return found


def _votes(
    shapes: Mapping[str, tuple[int, ...]], layout: Sequence[Tensor], aliases: Mapping[str, list[str]], inner: str
) -> Counter[str]:
    """For every prefix in the checkpoint, how many tensors of the model lie under it; fitting shapes count more."""
    ends: dict[str, list[str]] = {}
    for key in shapes:
        parts = key.split(".")
        for cut in range(len(parts)):
            ends.setdefault(".".join(parts[cut:]), []).append(key)
    votes: Counter[str] = Counter()
    for tensor in layout:
        prefixes: dict[str, int] = {}
        for name in aliases.get(tensor.name, [tensor.name]):
            end = name.removeprefix(inner)
            for key in ends.get(end, []):
                prefix = key[: len(key) - len(end)]
                prefixes[prefix] = max(prefixes.get(prefix, 0), 1001 if shapes[key] == tensor.shape else 1000)
        votes.update(prefixes)
    return votes


def _place(
    shapes: Mapping[str, tuple[int, ...]], layout: Sequence[Tensor], aliases: Mapping[str, list[str]], prefix: str,
    inner: str,
) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:  # fmt: skip
    """Keys of the tensors that are there under a prefix, of those that have another shape there, and all keys of those
    that have several."""
    keys, wrong, tied = {}, {}, {}
    for tensor in layout:
        places = [prefix + name.removeprefix(inner) for name in aliases.get(tensor.name, [tensor.name])]
        there = [key for key in places if key in shapes]
        fitting = [key for key in there if shapes[key] == tensor.shape]
        if fitting:
            keys[tensor.name] = fitting[0]
            if len(fitting) > 1:
                tied[tensor.name] = fitting
        elif there:
            wrong[tensor.name] = there[0]
    return keys, wrong, tied


def listed(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _does_not_fit(
    shapes: Mapping[str, tuple[int, ...]], layout: Sequence[Tensor], path: str, prefix: str, wrong: dict[str, str],
    needed: list[str],
) -> str:  # fmt: skip
    place = f" (under {prefix})" if prefix else ""
    said = []
    if needed:
        said.append(f"it lacks {listed(needed)}")
    if wrong:
        model = {tensor.name: tensor.shape for tensor in layout}
        differ = [f"{name} is {_shape(shapes[key])} there and {_shape(model[name])} in the model"
                  for name, key in wrong.items()]  # fmt: skip
        said.append(listed(differ))
    return f"{path} does not fit the task's model{place}: {'; '.join(said)}. Give the --task and --model it was made by"


def _nothing_fits(
    shapes: Mapping[str, tuple[int, ...]], layout: Sequence[Tensor], prefix: str | None, path: str
) -> str:
    if not shapes:
        return f"{path} holds no tensors"
    first = [tensor.name for tensor in layout if tensor.kind == "parameter"]
    under = f" under {prefix}" if prefix else ""
    return (
        f"{path} has none of the model's tensors{under}: the model has {listed(first)}, and the file "
        f"{listed(list(shapes))}"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def check_tied(tensors: Mapping[str, Entry], fit: Fit, path: str) -> None:
    """Raise OpsigError, naming two, where a file holds different values under names of one tensor of the model."""
    for first, *others in fit.tied.values():
        values = None
        for other in others:
            here, there = tensors[first].pieces(), tensors[other].pieces()
            if here is not None and here == there:  # the same bytes
                continue
            values = tensors[first].read() if values is None else values
            if not bool((values == tensors[other].read()).logical_or(values.isnan()).all()):
                raise OpsigError(
                    f"{path} holds different values of {first} and {other}, which are one tensor in the task's model. "
                    "Where they were trained apart, model() must not tie them"
                )
