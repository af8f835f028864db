"""Folders of orbax: `_METADATA` names the arrays of a tree, which lie beside it in zarr, in a folder each or in one
OCDBT database. They are read with tensorstore, which orbax is built on; orbax and JAX are not loaded."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.array_files import read_json
from opsig_cli.studies.importing.content import Content, collect_numbers
from opsig_cli.studies.importing.entries import Entry, tensor_of
from opsig_cli.studies.importing.pytrees import collect_tree
from opsig_cli.studies.importing.torch_files import SPARE_BYTES, first_words

METADATA, ROOT, DATABASE = "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"
UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of a folder that orbax had not finished writing."""
JSON_ITEM = "metadata"
"""The file of an item that was saved as JSON."""
MAX_DEPTH = 64


def is_checkpoint(folder: str) -> bool:
    """Whether a folder is one checkpoint: a tree, or the items of a step."""
    return UNFINISHED not in os.path.basename(folder) and bool(_trees(folder))


def _trees(folder: str) -> list[str]:
    """The folders of a checkpoint's trees: itself, or one for each item that was saved of a step."""
    if os.path.isfile(os.path.join(folder, METADATA)):
        return [folder]
    names = sorted(os.listdir(folder))
    inside = [name for name in names if os.path.isfile(os.path.join(folder, name, METADATA))]
    if not os.path.isfile(os.path.join(folder, ROOT)):  # checkpoints that lie beside each other have numbers
        inside = [name for name in inside if not any(letter.isdecimal() for letter in name)]
    return [os.path.join(folder, name) for name in inside]


def files(folder: str) -> list[str]:
    """All files of a checkpoint."""
    return sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)


def open_orbax(folder: str, content: Content) -> None:
    """Raises OpsigError where the folder is damaged or incomplete, or tensorstore is absent."""
    trees = _trees(folder)
    for name in sorted(os.listdir(folder)):
        item = os.path.join(folder, name, JSON_ITEM)
        if os.path.isfile(item):
            collect_numbers(read_json(item), content)
    found = {os.path.basename(tree): _tree(tree) for tree in trees}
    try:
        collect_tree(next(iter(found.values())) if len(found) == 1 else found, content)
    except OpsigError:
        raise
    except Exception as error:  # numbers are read at once
        raise OpsigError(f"{folder} cannot be read ({first_words(error)})") from error


def _tree(folder: str) -> dict[str, Any]:
    """The nested tree of a folder, with entries for its arrays."""
    about = read_json(os.path.join(folder, METADATA))
    leaves = about.get("tree_metadata")
    if not isinstance(leaves, dict):
        raise OpsigError(f"{os.path.join(folder, METADATA)} does not say which arrays there are, as orbax does")
    paths = [path for each in leaves.values() if (path := _path(each)) is not None]
    nested: dict[str, Any] = {}
    for path, store in zip(paths, _stores(folder, paths, about), strict=True):
        place = nested
        for key in path[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise OpsigError(f"{folder} holds an array where its {METADATA} says a folder of them: {key[:60]}")
        place[path[-1]] = Entry(tuple(store.shape), partial(_read, store))
    return nested


def _path(leaf: Any) -> list[str] | None:
    """The keys that lead to a leaf; None for one without numbers (None, text, an empty container)."""
    keys = leaf.get("key_metadata") if isinstance(leaf, dict) else None
    value = leaf.get("value_metadata") if isinstance(leaf, dict) else None
    if not isinstance(keys, list) or not keys or len(keys) > MAX_DEPTH or not isinstance(value, dict):
        return None
    if value.get("skip_deserialize") or value.get("value_type") in (
        "None",
        "string",
        "Dict",
        "List",
        "EmptyNamedTuple",
    ):
        return None
    return [str(key.get("key")) if isinstance(key, dict) else "" for key in keys]


def _stores(folder: str, paths: list[list[str]], about: dict[str, Any]) -> list[Any]:
    """The arrays, opened and not read."""
    try:
        import tensorstore  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise OpsigError(
            f"{folder} needs the library tensorstore, by which orbax writes: pip install tensorstore"
        ) from error
    one = os.path.isfile(os.path.join(folder, DATABASE))
    driver = "zarr3" if about.get("use_zarr3") else "zarr"
    complete = bool(about.get("store_array_data_equal_to_fill_value"))
    context = tensorstore.Context({"file_io_concurrency": {"limit": 4}})

    def spec(path: list[str]) -> dict[str, Any]:
        name = ".".join(path)
        base = {"driver": "file", "path": os.path.join(os.path.abspath(folder), "")}
        if one:
            kept: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            if os.path.basename(name) != name or name in ("", ".", ".."):
                raise OpsigError(f"{folder} names an array outside of it: {name[:60]}")
            kept = base | {"path": os.path.join(base["path"], name, "")}
        return {"driver": driver, "kvstore": kept, "fill_missing_data_reads": not complete}

    opening = [(path, tensorstore.open(spec(path), read=True, open=True, context=context)) for path in paths]
    found = []
    for path, each in opening:
        name = ".".join(path)
        try:
            store: Any = each.result()
        except Exception as error:  # the library's own classes
            raise OpsigError(f"{folder} lacks {name[:60]}, or it is damaged ({first_words(error)})") from error
        item, chunk = np.dtype(store.dtype.numpy_dtype).itemsize, store.chunk_layout.read_chunk.shape
        most = 2 ** len(store.shape) * math.prod(store.shape) * item + SPARE_BYTES
        if chunk is not None and math.prod(chunk) * item > most:
            raise OpsigError(f"{folder} holds {name[:60]} in blocks that are larger than it")
        found.append(store)
    return found


def _read(store: Any) -> Any:
    return tensor_of(np.asarray(store.read().result()))
