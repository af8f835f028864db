"""Folders of torch.distributed.checkpoint: `.metadata` says which tensors there are and where their blocks lie.

It is a pickle, and read as all are: nothing that it names is run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.content import Content, collect
from opsig_cli.studies.importing.entries import Entry, assembled
from opsig_cli.studies.importing.stand_ins import state_of
from opsig_cli.studies.importing.torch_files import load

METADATA = ".metadata"
MAX_BYTES_READ = 16 << 20
"""Of one object that is no tensor: settings are small."""


def open_distributed(folder: str, content: Content) -> None:
    """Raises OpsigError where the folder is damaged, incomplete or written through a transformation."""
    path = os.path.join(folder, METADATA)
    about = state_of(load(path))
    kinds = about.get("state_dict_metadata") if about else None
    stored = about.get("storage_data") if about else None
    if not isinstance(kinds, Mapping) or not isinstance(stored, Mapping):
        raise OpsigError(f"{path} does not say which tensors there are, as torch.distributed.checkpoint does")
    blocks: dict[str, list[tuple[tuple[int, ...], Mapping[Any, Any]]]] = {}
    for key, place in stored.items():
        index, info = state_of(key), state_of(place)
        if index is not None and info is not None:
            blocks.setdefault(str(index.get("fqn")), []).append((tuple(index.get("offset") or ()), info))
    paths = about.get("planner_data") if about else None
    nested: dict[Any, Any] = {}
    for name, kind in kinds.items():
        size = (state_of(kind) or {}).get("size")
        where = blocks.get(name, [])
        value: Any = None
        if isinstance(size, tuple):
            parts = [(offset, _block(folder, info)) for offset, info in where]
            if sum(part.numel() for _, part in parts) != Entry(size, lambda: None).numel():
                raise OpsigError(f"{folder} lacks a part of {name}")
            value = assembled(size, [(offset or (0,) * len(size), part) for offset, part in parts])
        elif where and _whole(where[0][1], "length") <= MAX_BYTES_READ:
            value = _object(folder, where[0][1])
        _put(nested, paths.get(name) if isinstance(paths, Mapping) else None, name, value)
    collect(_listed(nested), content, folder)


def _block(folder: str, info: Mapping[Any, Any]) -> Entry:
    found = _object(folder, info)
    if not isinstance(found, Entry):
        raise OpsigError(f"{folder} holds no tensor where its {METADATA} says one")
    return found


def _object(folder: str, info: Mapping[Any, Any]) -> Any:
    """What lies at a place: each is a torch.save of its own."""
    if info.get("transform_descriptors"):
        raise OpsigError(f"{folder} is compressed or otherwise transformed. Save it without, or the state_dict alone")
    name = str(info.get("relative_path"))
    if os.path.basename(name) != name:
        raise OpsigError(f"{folder} names a file outside of it: {name[:60]}")
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise OpsigError(f"{folder} lacks {name}, which its {METADATA} names")
    return load(path, _whole(info, "offset"), _whole(info, "length"))


def _whole(info: Mapping[Any, Any], key: str) -> int:
    value = info.get(key)
    return value if isinstance(value, int) and value >= 0 else 0


def _put(nested: dict[Any, Any], path: Any, name: str, value: Any) -> None:
    """Put a value where it lay in what was saved; under its dotted name where that is not said."""
    if not isinstance(path, tuple) or not path or not all(isinstance(each, str | int) for each in path):
        nested[name] = value
        return
    for key in path[:-1]:
        below = nested.setdefault(key, {})
        if not isinstance(below, dict):
            return
        nested = below
    nested[path[-1]] = value


def _listed(value: Any) -> Any:
    """Dictionaries whose keys are 0, 1, ... under `param_groups` were lists."""
    if not isinstance(value, dict):
        return value
    found = {key: _listed(inner) for key, inner in value.items()}
    groups = found.get("param_groups")
    if isinstance(groups, dict) and sorted(map(str, groups)) == sorted(map(str, range(len(groups)))):
        found["param_groups"] = [groups[key] for key in sorted(groups, key=int)]
    return found
