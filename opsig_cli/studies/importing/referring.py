"""Checkpoints that a run refers to: where in their files the numbers of a state lie."""

from __future__ import annotations

import os
from collections.abc import Mapping

from opsig_cli.backends import Tensor
from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing import checkpoints, names, optimizers
from opsig_cli.studies.importing.entries import Entry
from opsig_cli.trajectory import external
from opsig_cli.trajectory.external import Extent


def extents_of(content: checkpoints.Content, layout: list[Tensor], fit: names.Fit, path: str) -> list[Extent]:
    """Where each trained parameter and each moment of it lies. Raises OpsigError where one does not lie in a file as it
    is: compressed, in another order, or made out of others."""
    found: list[Extent] = []
    for tensor in layout:
        if tensor.kind == "parameter":
            found += _of(content.tensors[fit.keys[tensor.name]], tensor, "checkpoints/params", path)
    if content.optimizers:
        for tensor, slots in optimizers.matched(content.optimizers[0], layout, fit.prefix)[0]:
            for name, entry in slots.items():
                found += _of(entry, tensor, f"checkpoints/optimizer/{name}", path)
    return found


def _of(entry: Entry, tensor: Tensor, kind: str, path: str) -> list[Extent]:
    pieces = entry.pieces()
    if pieces is None or sum(piece.count for piece in pieces) != tensor.size:
        raise OpsigError(
            f"{path} holds {tensor.name} compressed, in another order, or as a part of another: it cannot be read from "
            "there. Leave --reference out"
        )
    if other := next((piece.dtype for piece in pieces if piece.dtype not in external.DTYPES), None):
        raise OpsigError(
            f"{path} holds {tensor.name} in {other}, which is not read by reference. Leave --reference out"
        )
    return [Extent(kind, tensor.offset + piece.start, piece.count, piece.path, piece.offset, piece.dtype)
            for piece in pieces]  # fmt: skip


def files_of(extents: list[Extent]) -> list[str]:
    """The files that these lie in, in order of first use."""
    return list(dict.fromkeys(each.path for each in extents))


def hashes_of(extents: list[Extent], source: checkpoints.Source) -> Mapping[str, str]:
    """The SHA-256 of each of these files, by its path; `source` knows of the weights'. Raises OSError."""
    known = source.hashes
    return {path: known.get(os.path.abspath(path)) or external.sha256_of(path) for path in files_of(extents)}
