"""Checkpoints of DeepSpeed and Megatron: parameters in float32 lie with the optimizer, in flat partitions or in groups.

These masters are what is trained; the copies in 16 bits beside them are rounded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.content import Content, collect, collect_numbers
from opsig_cli.studies.importing.entries import Entry, cut
from opsig_cli.studies.importing.torch_files import is_plain, load

ZERO_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
ZERO_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MEGATRON = re.compile(r"mp_rank_(\d+)(?:_\d+)*")
MEGATRON_FILE = "model_optim_rng.pt"
SLOTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
MASTER = "masters"
"""What the names of float32 masters begin with here."""


def deepspeed_files(folder: str) -> list[str]:
    """The files of weights and optimizer of a DeepSpeed folder, models first, by rank; empty for another folder."""
    names = os.listdir(folder)
    models = [(int(found[1] or 0), name) for name in names if (found := ZERO_MODEL.fullmatch(name))]
    parts = [(int(found[1]), name) for name in names if (found := ZERO_OPTIMIZER.fullmatch(name))]
    if not models:
        return []
    if any(found[2] != "00" for name in names if (found := ZERO_MODEL.fullmatch(name))):
        raise OpsigError(
            f"{folder} is split over tensor-parallel ranks. Merge them first (DeepSpeed: ds_to_universal.py, or "
            "save_16bit_model), and import the result"
        )
    return [os.path.join(folder, name) for _, name in (*sorted(models), *sorted(parts))]


def megatron_files(folder: str) -> list[str]:
    """The file of a Megatron folder, iter_0000500; empty for another folder."""
    ranks = sorted(name for name in os.listdir(folder) if MEGATRON.fullmatch(name))
    found = [os.path.join(folder, rank, MEGATRON_FILE) for rank in ranks]
    found = [path for path in found if os.path.isfile(path)]
    if len(found) > 1:
        raise OpsigError(
            f"{folder} is split over {len(found)} model-parallel ranks. Convert it first (Megatron: tools/checkpoint/"
            "convert.py with target sizes 1), or save it as torch_dist"
        )
    return found


def open_deepspeed(folder: str, content: Content) -> None:
    """Masters under `masters.`, and what has none as it was saved. Raises OpsigError where partitions are missing."""
    files = deepspeed_files(folder)
    models = [load(path) for path in files if path.endswith("_model_states.pt")]
    parts = [load(path) for path in files if path.endswith("_optim_states.pt")]
    if not all(isinstance(each, Mapping) for each in (*models, *parts)):
        raise OpsigError(f"{folder} is not as DeepSpeed writes it")
    first = models[0]
    collect_numbers(first, content)
    states = [each.get("optimizer_state_dict") for each in parts]
    if not states:
        collect({key: value for key, value in first.items() if key in ("module", "optimizer")}, content, folder)
        return
    if not all(isinstance(each, Mapping) for each in states):
        raise OpsigError(f"{folder} holds no optimizer state in its _optim_states.pt")
    count = states[0].get("partition_count", len(states))
    count = max(count) if isinstance(count, list) else count
    if count != len(states):
        raise OpsigError(f"{folder} holds {len(states)} of {count} partitions. Bring those of all processes together")
    stage = states[0].get("zero_stage", 2)
    shapes = [dict(group) for group in first.get("param_shapes") or []]
    masters = _zero3(states, shapes, folder) if stage == 3 else _zero2(states, shapes, folder)
    whole = first.get("module") if isinstance(first.get("module"), Mapping) else {}
    beside = {name: value for name, value in whole.items() if is_plain(value) and name not in masters}
    if stage == 3:
        beside = {name: value for name, value in beside.items() if name in (first.get("buffer_names") or ())}
        beside |= _zero3_frozen(models, folder)
    elif isinstance(frozen := first.get("frozen_param_fragments"), Mapping):
        beside |= frozen
    shared = first.get("shared_params")
    for name, other in shared.items() if isinstance(shared, Mapping) else ():
        if other in masters:
            beside.pop(name, None)
            masters[name] = masters[other]
    collect({MASTER: beside | masters}, content, folder)
    content.optimizers.append(_optimizer(states, shapes, stage, folder))


def _flat(states: Sequence[Mapping[Any, Any]], key: str, group: int, folder: str) -> list[Entry]:
    found = [state[key][group] for state in states if isinstance(state.get(key), list) and len(state[key]) > group]
    if len(found) != len(states) or not all(is_plain(each) for each in found):
        raise OpsigError(f"{folder} lacks {key} of group {group}, in which DeepSpeed keeps float32 parameters")
    return found


def _zero2(states: Sequence[Mapping[Any, Any]], shapes: Sequence[Mapping[str, Any]], folder: str) -> dict[str, Entry]:
    """Of stages 1 and 2 each process has a slice of a whole group laid flat."""
    found: dict[str, Entry] = {}
    for number, group in enumerate(shapes):
        parts = _flat(states, "single_partition_of_fp32_groups", number, folder)
        found |= _consecutive(parts, group, _paddings(states[0], number, len(group)))
    return found


def _paddings(state: Mapping[Any, Any], group: int, count: int) -> list[int]:
    given = state.get("param_alignment_paddings")
    return list(given[group]) if isinstance(given, list) and len(given) > group else [0] * count


def _consecutive(parts: Sequence[Entry], group: Mapping[str, Any], paddings: Sequence[int]) -> dict[str, Entry]:
    found, first = {}, 0
    for (name, shape), padding in zip(group.items(), paddings, strict=True):
        found[name] = cut(parts, first, shape)
        first += math.prod(shape) + padding
    return found


def _zero3(states: Sequence[Mapping[Any, Any]], shapes: Sequence[Mapping[str, Any]], folder: str) -> dict[str, Entry]:
    """Of stage 3 each process has a part of every parameter; its parts of all of them lie one after the other."""
    groups = [state.get("fp32_flat_groups") for state in states]
    if not all(isinstance(each, list) and each and all(map(is_plain, each)) for each in groups):
        raise OpsigError(f"{folder} lacks fp32_flat_groups, in which DeepSpeed keeps float32 parameters")
    return _spread([list(each) for each in groups if each], shapes)


def _spread(ranks: Sequence[Sequence[Entry]], shapes: Sequence[Mapping[str, Any]]) -> dict[str, Entry]:
    found, first = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        size = math.ceil(math.prod(shape) / len(ranks))
        found[name] = cut([cut(parts, first, (size,)) for parts in ranks], 0, shape)
        first += size
    return found


def _zero3_frozen(models: Sequence[Mapping[Any, Any]], folder: str) -> dict[str, Entry]:
    shapes = models[0].get("frozen_param_shapes")
    found = {}
    for name, shape in shapes.items() if isinstance(shapes, Mapping) else ():
        parts = [(each.get("frozen_param_fragments") or {}).get(name) for each in models]
        if not all(is_plain(each) for each in parts):
            raise OpsigError(f"{folder} lacks a part of {name}")
        found[name] = cut([each for each in parts if each is not None], 0, shape)
    return found


def _optimizer(
    states: Sequence[Mapping[Any, Any]], shapes: Sequence[Mapping[str, Any]], stage: Any, folder: str
) -> Mapping[str, Any]:
    """The base optimizer's state as torch.optim would save it, by the parameters' names."""
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    bases = [state.get(key) for state in states]
    if not all(isinstance(base, Mapping) and isinstance(base.get("state"), Mapping) for base in bases):
        return {"state": {}, "param_groups": []}
    groups = [dict(group) for group in (bases[0] or {}).get("param_groups") or [] if isinstance(group, Mapping)]
    flat = [{number: state for number, state in enumerate(base["state"].values())} for base in bases if base]
    found: dict[str, dict[str, Any]] = {name: {} for group in shapes for name in group}
    for slot in SLOTS:
        if not all(is_plain(state.get(slot)) for each in flat for state in each.values()) or not flat[0]:
            continue
        if stage == 3:
            moments = _spread([[state[slot] for state in each.values()] for each in flat], shapes)
        else:
            moments = {}
            for number, group in enumerate(shapes):
                parts = [each[number][slot] for each in flat if number in each]
                moments |= _consecutive(parts, group, _paddings(states[0], number, len(group)))
        for name, moment in moments.items():
            found[name][slot] = moment
    step = next((state.get("step") for each in flat for state in each.values()), None)
    step = step if step is not None else next((group.get("step") for group in groups), None)
    for name in found:
        if step is not None and found[name]:
            found[name]["step"] = step
    for group, shape in zip(groups, shapes, strict=False):
        group["params"] = list(shape)
        group.pop("step", None)
    return {"state": {name: state for name, state in found.items() if state}, "param_groups": groups}


def open_megatron(path: str, content: Content) -> None:
    """The model, with its float32 masters in its place where the optimizer keeps some. Raises OpsigError where it does
    not tell which is whose."""
    loaded = load(path)
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("model"), Mapping):
        raise OpsigError(f"{path} holds no `model`, as Megatron writes it")
    collect_numbers(loaded, content)
    inside = Content()
    collect({"model": loaded["model"]}, inside, path)
    given = loaded.get("optimizer")
    base = given.get("optimizer") if isinstance(given, Mapping) else None
    masters = given.get("fp32_from_fp16_params") if isinstance(given, Mapping) else None
    if masters is None and isinstance(given, Mapping):
        masters = given.get("fp32_from_float16_groups")
    trained = {name: entry for name, entry in inside.tensors.items() if len(entry.shape)}
    if isinstance(masters, list) and masters:
        flat = [each for group in masters if isinstance(group, list) for each in group if is_plain(each)]
        names = _in_groups(masters, trained)
        if names is None:
            raise OpsigError(f"{path} does not tell which of its {len(flat)} float32 masters is which parameter's")
        inside.tensors |= dict(zip(names, flat, strict=True))
    content.tensors |= inside.tensors
    if isinstance(base, Mapping):
        collect({"optimizer": base}, content, path)


def _in_groups(groups: Sequence[Any], trained: Mapping[str, Entry]) -> list[str] | None:
    """Names of masters in order, where their shapes tell: each group has the model's order."""
    from opsig_cli.studies.importing.optimizers import merge_order

    shapes = [[tuple(each.shape) for each in group] for group in groups if isinstance(group, list)]
    names = list(trained)
    if sum(map(len, shapes)) != len(names):
        return None
    order = merge_order([trained[name].shape for name in names], shapes)
    if order is None:
        return None
    placed: list[list[str]] = [[] for _ in shapes]
    for name, group in zip(names, order, strict=True):
        placed[group].append(name)
    return [name for group in placed for name in group]
