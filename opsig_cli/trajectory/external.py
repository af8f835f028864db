"""Checkpoints that a run keeps by reference: which numbers of which files they are, and reading them from there.

An extent is a stretch of numbers in a file that is a stretch of a row, (P,): parameters, or a moment of the optimizer.
What is read is held against the file's size and the extent's checksum, so that a file that has changed is refused.
`run` is an open `Reading`, which stands on this.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.rows import from_bfloat16

EXTENTS, PATH = "checkpoints/external/extent", "checkpoints/external/path"
KINDS = (
    "checkpoints/params", "checkpoints/optimizer/momentum_buffer", "checkpoints/optimizer/exp_avg",
    "checkpoints/optimizer/exp_avg_sq",
)  # fmt: skip
"""What a stretch can be of: the dataset that would hold it. Append only."""
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}
"""How numbers can lie in a file, by the names that torch has for it, and how numpy reads them. Append only."""
BLOCK = 16 << 20
"""Bytes of a file in memory at a time."""
LONGEST_PATH = 512


@dataclass(frozen=True)
class Extent:
    """`count` numbers from byte `offset` of a file on, which are numbers `place` on of the row of `kind`."""

    kind: str
    place: int
    count: int
    path: str
    offset: int
    dtype: str


def columns_of(
    extents: Sequence[Extent], hashes: dict[str, str], size: tuple[int, int], run: str
) -> dict[str, np.ndarray]:
    """Columns of the row group `checkpoints` for a state that lies in files; `size`: room for files and for extents.

    `hashes`: the SHA-256 of each file. The files are read for their extents' checksums. Raises OpsigError where a path
    is longer than its place.
    """
    files = list(hashes)
    table = np.full((7, size[1]), -1, np.int64)
    for i, each in enumerate(extents):
        crc = 0
        for data in _blocks(each.path, each.offset, each.count * np.dtype(DTYPES[each.dtype]).itemsize):
            crc = zlib.crc32(data, crc)
        kind, dtype = KINDS.index(each.kind), list(DTYPES).index(each.dtype)
        table[:, i] = kind, each.place, each.count, files.index(each.path), each.offset, dtype, crc
    paths = [os.fsencode(seen_from(run, file)) for file in files]
    if long := next((path for path in paths if len(path) > LONGEST_PATH), None):
        raise OpsigError(f"{os.fsdecode(long)[:80]}... is longer than {LONGEST_PATH} bytes. Import it from its folder")
    none = size[0] - len(files)
    return {
        "external__path": np.array([*paths, *[b""] * none], f"S{LONGEST_PATH}"),
        "external__bytes": np.array([*(os.path.getsize(file) for file in files), *[-1] * none], np.int64),
        "external__sha256": np.array([*(hashes[file].encode() for file in files), *[b""] * none], "S64"),
        "external__extent": table,
    }


def holds(run: Any, name: str) -> bool:
    """Whether a run keeps this dataset in other files."""
    if name not in KINDS or EXTENTS not in run._file or name in run._file:
        return False
    return name == KINDS[0] or bool((run._file[EXTENTS][:, 0, :] == KINDS.index(name)).any())


def parameters(run: Any) -> int:
    """How many parameters a checkpoint has."""
    kinds, sizes = run.read("layout/kind"), run.read("layout/size")
    return int(sizes[kinds == "parameter"].sum())


def row(run: Any, name: str, position: int) -> np.ndarray:
    """A checkpoint's numbers as if the run held them, (P,) float32; NaN where it has none of this kind.

    Raises OpsigError where a file is not there, or is not what it was.
    """
    table = run.rows(EXTENTS, position, position + 1)[0]
    files = _files(run, position)
    found = np.full(parameters(run), np.nan, np.float32)
    own = table[:, table[0] == KINDS.index(name)]
    if own.size and name != KINDS[0]:
        found[:] = 0  # what has no state beside others that do was never stepped
    names = list(DTYPES)
    for _, place, count, file, offset, dtype, crc in own.T.tolist():
        if not (0 <= file < len(files) and 0 <= dtype < len(names) and 0 <= place <= place + count <= len(found)):
            raise OpsigError(f"{run.path}: {EXTENTS} names what is not there, as opsig writes none")
        path, size = files[file]
        kind = np.dtype(DTYPES[names[dtype]])
        if not 0 <= offset <= offset + count * kind.itemsize <= size:
            raise OpsigError(f"{run.path}: {EXTENTS} reaches past the end of {path}, as opsig writes none")
        seen = 0
        for data in _blocks(path, offset, count * kind.itemsize):
            seen = zlib.crc32(data, seen)
            values = np.frombuffer(data, kind)
            found[place : place + len(values)] = from_bfloat16(values) if names[dtype] == "bfloat16" else values
            place += len(values)
        if seen != crc:
            raise OpsigError(_changed(path, run.path))
    return found


def _files(run: Any, position: int) -> list[tuple[str, int]]:
    """Where a checkpoint's files are, and their sizes. Raises OpsigError where one is absent or of another size."""
    found = []
    paths = run.rows(PATH, position, position + 1)[0]
    sizes = run.rows("checkpoints/external/bytes", position, position + 1)[0]
    for kept, size in zip(paths.tolist(), sizes.tolist(), strict=True):
        if kept:
            path = resolved(run.path, kept)
            found.append((path, size))
            try:
                status = os.stat(path)
            except OSError as error:
                raise OpsigError(
                    f"{path}, in which {run.path} keeps a checkpoint, cannot be read: {error.strerror}. Bring it back, "
                    "or import the run again"
                ) from error
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                raise OpsigError(_changed(path, run.path))
    return found


def _changed(path: str, run: str) -> str:
    return f"{path} has changed since {run} was made of it. Bring the file back, or import the run again"


def resolved(run: str, kept: bytes) -> str:
    """Where a file is: a path that is not absolute begins at the folder of the run."""
    return os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(run)), os.fsdecode(kept)))


def seen_from(run: str, path: str) -> str:
    """A path as a run keeps it: as it was given where that is absolute, else from the folder of the run."""
    if os.path.isabs(path):
        return path
    return os.path.relpath(os.path.abspath(path), os.path.dirname(os.path.abspath(run)))


def _blocks(path: str, offset: int, length: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(offset)
        while length > 0:
            data = file.read(min(BLOCK, length))
            if not data:
                raise OpsigError(f"{path} ends before the numbers that are wanted of it")
            length -= len(data)
            yield data


def sha256_of(path: str) -> str:
    """SHA-256 of a file. Raises OSError."""
    summed = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            summed.update(data)
    return summed.hexdigest()


def changed_steps(run: Any) -> tuple[list[int], str | None]:
    """Steps whose files are not what they were, each file read once through, and what is wrong with the first."""
    steps, damaged, reason = run.steps("checkpoints").tolist(), [], None
    known: dict[str, str] = {}
    for position, step in enumerate(steps):
        try:
            hashes = run.rows("checkpoints/external/sha256", position, position + 1)[0].tolist()
            for (path, _), expected in zip(_files(run, position), filter(None, hashes), strict=True):
                if path not in known:
                    known[path] = sha256_of(path)
                if known[path] != expected.decode():
                    raise OpsigError(_changed(path, run.path))
        except (OpsigError, OSError) as error:
            damaged.append(step)
            reason = reason or str(error)
    return damaged, reason


def totals(run: Any) -> dict[str, Any]:
    """How many files a run refers to, and their bytes; nothing for a run that holds its checkpoints.

    Raises DamagedRows.
    """
    if PATH not in run._file:
        return {}
    count = len(run.steps("checkpoints"))
    columns = (run.rows(name, 0, count).ravel().tolist() for name in (PATH, "checkpoints/external/bytes"))
    known = {path: size for path, size in zip(*columns, strict=True) if path}
    return {"referenced_files": len(known), "referenced_bytes": sum(known.values())}


def rebase(run: Any, before: str, after: str) -> None:
    """Let a copy of the run `before` that becomes the file `after` refer to the same files: paths that are not absolute
    begin at the folder of the run."""
    folder = os.path.dirname(os.path.abspath(after))
    columns = run._rows("checkpoints").columns(run._file, "checkpoints")
    names = [name for name in columns if not name.endswith(("/step", "/checksum"))]
    for position, step in enumerate(run.steps("checkpoints").tolist()):
        row = {name.removeprefix("checkpoints/").replace("/", "__"): run.rows(name, position, position + 1)[0]
               for name in names}  # fmt: skip
        kept = row["external__path"].tolist()
        moved = [each if not each or os.path.isabs(os.fsdecode(each))
                 else os.fsencode(os.path.relpath(resolved(before, each), folder)) for each in kept]  # fmt: skip
        row["external__path"] = np.array(moved, f"S{LONGEST_PATH}")
        run.rewrite("checkpoints", step, **row)
