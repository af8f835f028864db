"""Refuses HDF5 files that could reach outside themselves or cost more than they hold, before anything is read.

External and soft links, virtual datasets and external raw storage make HDF5 open other files, and overwrite them when
the file is open for writing; a few bytes can declare terabytes; variable-length data and damaged references can hang
the library. None of it occurs in a file that opsig writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h5py
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t, h5z  # pyright: ignore[reportAttributeAccessIssue]

MAX_OBJECTS = 4096
MAX_DEPTH = 8
MAX_CHUNK_BYTES = 64 << 20
"""A chunk is unpacked whole: this bounds the memory that a decompression bomb takes."""
MAX_ATTRIBUTE_BYTES = 1 << 20
MAX_RATIO = 1100
"""Deflate packs at most 1032 to 1, so data may not be larger than this times what is stored."""
SPARE_BYTES = 64 << 20
"""Declared but never written data up to this size is harmless."""
FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}


class Refused(Exception):
    """Why the file is not opened, and which object of it is to blame."""


def vet(file: h5py.File, file_bytes: int, will_read: Callable[[str], bool]) -> None:
    """Walk every object of an open file of this size without following links; `will_read`: which datasets will be read.

    Raises Refused.
    """
    stored = _vet_group(file.id, "/", set(), file_bytes, will_read, 0)
    if stored > file_bytes:
        raise Refused(f"its datasets claim {stored:,} bytes and the file has {file_bytes:,}: they overlap")


def _vet_group(
    group: Any, path: str, seen: set[Any], file_bytes: int, will_read: Callable[[str], bool], depth: int
) -> int:
    """Vet a group and what is in it; returns how many bytes its datasets say that they take in the file."""
    stored = 0
    if depth > MAX_DEPTH:
        raise Refused(f"{path} lies more than {MAX_DEPTH} groups deep")
    _vet_attributes(group, path)
    for index in range(group.get_num_objs()):
        name = group.get_objname_by_idx(index)
        place = path.rstrip("/") + "/" + name.decode(errors="replace")
        kind = group.links.get_info(name).type
        if kind != h5l.TYPE_HARD:
            raise Refused(f"{place} is a link to somewhere else")
        info = h5o.get_info(group, name)
        if info.addr in seen or len(seen) >= MAX_OBJECTS:
            raise Refused(f"{place} is another name of an object" if info.addr in seen else "it has too many objects")
        seen.add(info.addr)
        if info.type == h5o.TYPE_GROUP:
            stored += _vet_group(h5g.open(group, name), place, seen, file_bytes, will_read, depth + 1)
        elif info.type == h5o.TYPE_DATASET:
            stored += _vet_dataset(h5d.open(group, name), place, file_bytes, will_read(place[1:]))
        else:
            raise Refused(f"{place} is neither a group nor a dataset")
    return stored


def _vet_dataset(dataset: Any, path: str, file_bytes: int, will_be_read: bool) -> int:
    _vet_type(dataset.get_type(), path)
    settings = dataset.get_create_plist()
    layout = settings.get_layout()
    if layout == h5d.VIRTUAL:
        raise Refused(f"{path} takes its data from other files")
    if settings.get_external_count():
        raise Refused(f"{path} keeps its data in other files")
    space = dataset.get_space()
    if space.get_simple_extent_type() != h5s.SIMPLE and space.get_simple_extent_type() != h5s.SCALAR:
        raise Refused(f"{path} holds no array")
    item = dataset.get_type().get_size()
    declared = space.get_simple_extent_npoints() * item
    stored = dataset.get_storage_size()
    if stored > file_bytes:
        raise Refused(f"{path} claims more bytes than the file has")
    ratio = 1
    if layout == h5d.CHUNKED:
        chunk = item
        for length in settings.get_chunk():
            chunk *= length
        if chunk > MAX_CHUNK_BYTES:
            raise Refused(f"{path} has chunks of {chunk >> 20} MiB")
        for number in range(settings.get_nfilters()):
            if settings.get_filter(number)[0] not in FILTERS:
                raise Refused(f"{path} is packed by a filter that opsig does not use")
            ratio = MAX_RATIO
    if will_be_read and declared > ratio * stored + SPARE_BYTES:
        raise Refused(f"{path} declares {declared:,} bytes and holds {stored:,}")
    _vet_attributes(dataset, path)
    return stored


def _vet_attributes(owner: Any, path: str) -> None:
    for index in range(h5a.get_num_attrs(owner)):
        attribute = h5a.open(owner, index=index)
        place = f"attribute {attribute.name.decode(errors='replace')} of {path}"
        _vet_type(attribute.get_type(), place)
        if attribute.get_storage_size() > MAX_ATTRIBUTE_BYTES:
            raise Refused(f"{place} is larger than {MAX_ATTRIBUTE_BYTES >> 20} MiB")


def _vet_type(kind: Any, path: str) -> None:
    allowed = (h5t.INTEGER, h5t.FLOAT, h5t.STRING)
    if kind.get_class() == h5t.ENUM or kind.get_class() not in allowed:
        raise Refused(f"{path} is neither numbers nor text of a fixed length")
    if kind.get_class() == h5t.STRING and kind.is_variable_str():
        raise Refused(f"{path} is text of variable length; store text of a fixed length")
