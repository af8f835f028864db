"""Names that libraries write other than their modules have them: transformers' conversions and peft's adapters.

transformers undoes its own conversions when it saves. Given numbered tensors in place of weights it tells, for every
tensor in its files, which of the model's numbers it holds: that is all that reading takes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from opsig_cli.studies.importing.entries import Entry, Piece

SAVED_WHOLE = "modules_to_save"
"""The segment of modules that peft trains and saves beside its adapters."""


@dataclass(frozen=True)
class Converted:
    """A tensor of the model out of several in a file: for each its name there, where its numbers go and which of them
    these are. Both are the first of consecutive places, or places one by one in a flat torch tensor, and `counts` says
    how many."""

    shape: tuple[int, ...]
    parts: dict[str, tuple[Any, Any]]
    counts: dict[str, int]


def adapter_aliases(model: Any, names: list[str]) -> dict[str, str]:
    """What peft calls these tensors in its files: without the adapter's name, and without `modules_to_save`."""
    adapters = {str(name) for module in model.modules() for name in getattr(module, "peft_config", None) or ()}
    if not adapters:
        return {}
    found = {}
    for name in names:
        segments = name.split(".")
        kept = [part for i, part in enumerate(segments) if i == 0 or (part not in adapters and part != SAVED_WHOLE)]
        if len(kept) < len(segments) and "original_module" not in kept:
            found[name] = ".".join(kept)
    return found


def written_by_transformers(model: Any) -> tuple[dict[str, str], dict[str, Converted]]:
    """How transformers names the tensors of its models inside this one in its files: those that it renames, and those
    that it takes apart, by the model's own names. Both are empty where it is not loaded, as no model is its then."""
    renamed: dict[str, str] = {}
    converted: dict[str, Converted] = {}
    for prefix, inner, revert in _models(model):
        import torch

        state = {name: torch.empty_like(value, device="meta") for name, value in inner.state_dict().items()}
        own = {id(value): name for name, value in state.items()}
        written = revert(inner, dict(state))
        same = {own[id(value)]: name for name, value in written.items() if id(value) in own}
        renamed |= {prefix + name: prefix + other for name, other in same.items() if name != other}
        apart = [name for name in state if name not in same and state[name].is_floating_point()]
        converted |= _apart(prefix, inner, revert, {name: tuple(state[name].shape) for name in apart})
    return renamed, converted


def _apart(prefix: str, model: Any, revert: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Converted]:
    """Which number of which tensor each of the written ones holds, by giving every number its own."""
    import torch

    if not shapes:
        return {}
    numbered, starts, end = {}, {}, 0
    for name, shape in shapes.items():
        count = int(torch.Size(shape).numel())
        numbered[name] = torch.arange(end, end + count, dtype=torch.float64).view(shape)
        starts[name] = end
        end += count
    found = {name: Converted(shape, {}, {}) for name, shape in shapes.items()}
    names = list(shapes)
    bounds = torch.tensor([starts[name] for name in names])
    for written, value in revert(model, numbered).items():
        flat = value.reshape(-1).long()
        owners = torch.bucketize(flat, bounds, right=True) - 1
        for owner in owners.unique().tolist():
            chosen = torch.nonzero(owners == owner).view(-1)
            each = found[names[owner]]
            each.parts[prefix + written] = _places(flat[chosen] - starts[names[owner]]), _places(chosen)
            each.counts[prefix + written] = len(chosen)
    return {prefix + name: each for name, each in found.items()}


def _places(index: Any) -> Any:
    """The first of consecutive places, or all of them."""
    first = int(index[0])
    return first if bool((index[1:] - index[:-1] == 1).all()) else index


def _models(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """transformers' models inside a module, outermost first: the prefix, the model, and what undoes its conversions."""
    utils = sys.modules.get("transformers.modeling_utils")
    loading = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    if utils is None or revert is None:  # before version 5 files have the modules' names
        return
    inside: list[str] = []
    for name, module in model.named_modules():
        nested = any(not outer or name.startswith(f"{outer}.") for outer in inside)
        if isinstance(module, utils.PreTrainedModel) and not nested:
            inside.append(name)
            yield (f"{name}." if name else ""), module, revert


def put_together(tensors: dict[str, Entry], converted: Mapping[str, Converted]) -> None:
    """Add to a file's tensors those of the model that it holds in parts, under their own names, beside them."""
    ends: dict[str, list[str]] = {}
    for key in tensors:
        parts = key.split(".")
        for place in range(len(parts)):
            ends.setdefault(".".join(parts[place:]), []).append(key)
    for name, each in converted.items():
        first = next(iter(each.parts), "")
        for key in ends.get(first, []):
            prefix = key.removesuffix(first)
            if prefix + name not in tensors and all(prefix + part in tensors for part in each.parts):
                inside = {part: tensors[prefix + part] for part in each.parts}
                tensors[prefix + name] = Entry(each.shape, partial(_read, each, inside), _pieces(each, inside))


def _read(converted: Converted, inside: Mapping[str, Entry]) -> Any:
    import torch

    whole = None
    for part, entry in inside.items():
        values, count = entry.read().reshape(-1), converted.counts[part]
        to, of = (slice(at, at + count) if isinstance(at, int) else at for at in converted.parts[part])
        if whole is None:
            whole = torch.empty(converted.shape, dtype=values.dtype).view(-1)
        whole[to] = values[of]
    assert whole is not None
    return whole.view(converted.shape)


def _pieces(converted: Converted, inside: Mapping[str, Entry]) -> list[Piece] | None:
    found = []
    for part, entry in inside.items():
        (to, of), lie = converted.parts[part], entry.pieces()
        if not isinstance(to, int) or of != 0 or converted.counts[part] != entry.numel() or lie is None:
            return None
        found += [Piece(each.path, each.offset, each.dtype, to + each.start, each.count) for each in lie]
    return found


def hint(path: str) -> str:
    """What to do where a folder of transformers does not fit; empty for any other path."""
    config = os.path.join(path, "config.json")
    try:
        with open(config, encoding="utf-8") as file:
            about = json.load(file)
    except (OSError, ValueError, RecursionError):
        return ""
    if not isinstance(about, dict) or "transformers_version" not in about:
        return ""
    named = about.get("architectures")
    kind = str(named[0] if isinstance(named, list) and named else about.get("model_type"))[:60]
    if importlib.util.find_spec("transformers") is None:
        return (
            f". transformers writes some models under other names than their modules have: install it, and let the "
            f"task's model() be its {kind}, for its own conversion"
        )
    return f". The folder is of transformers' {kind}: names are converted where the task's model() is one"
