"""Files of torch.save, and plain pickles, opened without running what they name.

A file, or a part of one, gives the containers, numbers, tensors and stand-ins of `pickles`. Tensors are mapped from the
file when they are read.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import re
import struct
import zipfile
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.entries import SIZES, Entry, Piece
from opsig_cli.studies.importing.pickles import STORAGES, Reader
from opsig_cli.studies.importing.stand_ins import Storage, StoredTensor

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Segments that torch.compile, FSDP and activation checkpointing put anywhere into a name."""
MAX_EXPANSION, SPARE_BYTES = 100, 64 << 20
"""An archive may unpack to so many times its size, and to this much in any case."""
REMEDY = "Save the model's state_dict() alone, with torch.save, and import that"
LEGACY = 0x1950A86A20F9469CFC6C
"""The number that a file of torch.save from before 1.6 begins with, and its version."""
LEGACY_VERSION = 1001
LOCAL_HEADER = 30


class TorchFile:
    """A file from which tensors are read: mapped once, when the first is."""

    def __init__(self, path: str, size: int):
        self.path, self._size, self._mapped = path, size, None

    def tensor(self, described: StoredTensor) -> Any:
        """A tensor over the mapped bytes; a copy where they are not aligned."""
        import torch

        storage = described.storage
        if storage.offset is None or storage.offset + storage.size * SIZES[storage.dtype] > self._size:
            raise ValueError("a tensor lies outside the file")
        if self._mapped is None:
            self._mapped = torch.UntypedStorage.from_file(self.path, False, self._size)
        part: Any = self._mapped[storage.offset : storage.offset + storage.size * SIZES[storage.dtype]]
        if storage.offset % SIZES[described.dtype]:
            part = part.clone()
        empty = torch.empty(0, dtype=getattr(torch, described.dtype))
        return empty.set_(part, described.first, described.shape, described.strides)

    def pieces(self, described: StoredTensor) -> list[Piece] | None:
        """One piece, where the tensor lies in its own order."""
        dense, expected = 1, []
        for length in reversed(described.shape):
            expected.append(dense)
            dense *= max(1, length)
        inside = zip(described.shape, described.strides, reversed(expected), strict=True)
        if any(length > 1 and stride != wanted for length, stride, wanted in inside):
            return None
        offset = (described.storage.offset or 0) + described.first * SIZES[described.dtype]
        return [Piece(self.path, offset, described.dtype, 0, described.numel())]


class Window(io.RawIOBase):
    """A part of a mapped file as a file of its own."""

    def __init__(self, mapped: Any, start: int, stop: int):
        super().__init__()
        self._mapped, self._start, self._stop, self._place = mapped, start, stop, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: self._start, os.SEEK_CUR: self._place, os.SEEK_END: self._stop}[whence]
        if base + offset < self._start:
            raise OSError("a seek before the start")
        self._place = base + offset
        return self._place - self._start

    def tell(self) -> int:
        return self._place - self._start

    def read(self, count: int | None = -1) -> bytes:
        stop = self._stop if count is None or count < 0 else min(self._stop, self._place + count)
        found = self._mapped[self._place : stop]
        self._place += len(found)
        return found

    def readline(self, size: int | None = -1) -> bytes:
        """To the next end of line: how text stands in old pickles."""
        stop = self._stop if size is None or size < 0 else min(self._stop, self._place + size)
        end = self._mapped.find(b"\n", self._place, stop)
        return self.read((stop if end < 0 else end + 1) - self._place)


def load(path: str, start: int = 0, length: int | None = None) -> Any:
    """What a torch.save file, or a part of a file, holds. Raises OpsigError, in one line, where it is damaged or
    another kind of file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise ValueError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                stop = size if length is None else start + length
                if not 0 <= start <= stop <= size:
                    raise ValueError("it ends too early")
                return _load(Window(mapped, start, stop), path, start, TorchFile(path, size))
    except OSError as error:
        raise OpsigError(f"{path}: {error.strerror or error}") from error
    except (MemoryError, OpsigError):
        raise
    except Exception as error:  # a malformed pickle can raise anything
        raise OpsigError(f"{path} is not a readable torch.save file ({first_words(error)})") from error


def _load(window: Window, path: str, start: int, file: TorchFile) -> Any:
    begins = window.read(4)
    window.seek(0)
    if begins == b"PK\x03\x04":
        return _load_zip(window, path, start, file)
    if begins[:1] == b"\x80":
        return _load_legacy(window, path, start, file)
    raise ValueError("it does not begin like one")


def _load_zip(window: Window, path: str, start: int, file: TorchFile) -> Any:
    with zipfile.ZipFile(window) as archive:
        check_expansion(archive, path)
        parts = {part.filename: part for part in archive.infolist()}
        pickled = next((name for name in parts if name.endswith("data.pkl") and name.count("/") <= 1), None)
        if pickled is None:
            raise ValueError("it holds no data.pkl")
        top = pickled.removesuffix("data.pkl")
        if f"{top}constants.pkl" in parts:
            raise OpsigError(f"{path} is a TorchScript program, which is not run here. {REMEDY}")
        if f"{top}byteorder" in parts and archive.read(f"{top}byteorder") != b"little":
            raise OpsigError(f"{path} was written on a machine of the other byte order. Save it again on this one")
        content = archive.read(pickled)
        storages: dict[str, Storage] = {}

        def storage(pid: Any) -> Storage:
            dtype, key, place, count, _ = _storage_id(pid)
            if place == "meta":
                return Storage(dtype, count)
            if key not in storages:
                part = parts.get(f"{top}data/{key}")
                if part is None:
                    raise ValueError(f"it lacks its part data/{key[:20]}")
                if part.compress_type != zipfile.ZIP_STORED:
                    raise OpsigError(
                        f"{path} holds compressed tensors, as torch.save writes none. Load it and save it again"
                    )
                window.seek(part.header_offset)
                name, extra = struct.unpack("<HH", window.read(LOCAL_HEADER)[26:30])
                begin = start + part.header_offset + LOCAL_HEADER + name + extra
                if count * SIZES[dtype] > part.file_size:
                    raise ValueError(f"its part data/{key[:20]} is shorter than its tensors")
                storages[key] = Storage(dtype, count, file, begin)
            known = storages[key]
            return known if known.dtype == dtype else Storage(dtype, count, file, known.offset)

        return Reader(io.BytesIO(content), path, storage).load()


def _load_legacy(window: Window, path: str, start: int, file: TorchFile) -> Any:
    """A file from before torch 1.6, whose storages follow its pickles; or a pickle alone."""
    first = Reader(window, path).load()
    if first != LEGACY:
        return first
    if Reader(window, path).load() != LEGACY_VERSION:
        raise ValueError("its version is not known")
    about = Reader(window, path).load()
    if not isinstance(about, dict) or about.get("little_endian") is not True:
        raise ValueError("it was written on a machine of the other byte order")
    storages: dict[str, Storage] = {}
    views: list[tuple[Storage, str, int]] = []

    def storage(pid: Any) -> Any:
        if isinstance(pid, tuple) and pid and pid[0] == "module":
            return pid[1] if len(pid) > 1 else None  # a class, of which old files keep the source
        dtype, key, place, count, view = _storage_id(pid)
        if place == "meta":
            return Storage(dtype, count)
        if count * SIZES[dtype] > file._size:
            raise ValueError("a storage is larger than the file")
        root = storages.setdefault(key, Storage(dtype, count, file))
        if view is None:
            return root
        made = Storage(dtype, int(view[2]), file)
        views.append((made, key, int(view[1])))
        return made

    loaded = Reader(window, path, storage).load()
    for key in Reader(window, path).load():
        count = struct.unpack("<q", window.read(8))[0]
        known = storages[key]
        if count != known.size:
            raise ValueError("a storage is not of the size that its tensors have")
        known.offset = start + window.tell()
        window.seek(count * SIZES[known.dtype], os.SEEK_CUR)
    for made, key, place in views:
        offset = storages[key].offset
        made.offset = None if offset is None or place < 0 else offset + place * SIZES[made.dtype]
    return loaded


def _storage_id(pid: Any) -> tuple[str, str, Any, int, Any]:
    """Type, key, device, numbers and view of a storage. Raises UnpicklingError for any other persistent id."""
    if not (isinstance(pid, tuple) and 5 <= len(pid) <= 6 and pid[0] == "storage"):
        raise pickle.UnpicklingError("it refers to what is no storage")
    kind = str(getattr(pid[1], "kind", "")).rpartition(".")[2]
    if kind not in STORAGES or type(pid[4]) is not int or pid[4] < 0:
        raise pickle.UnpicklingError(f"a storage of the type {kind[:40]}")
    return STORAGES[kind], str(pid[2]), pid[3], pid[4], pid[5] if len(pid) > 5 else None


def check_expansion(archive: zipfile.ZipFile, path: str) -> None:
    """Raise OpsigError where an archive unpacks to far more than it is, as numbers of a run never do."""
    whole = sum(part.file_size for part in archive.infolist())
    if whole > MAX_EXPANSION * os.path.getsize(path) + SPARE_BYTES:
        raise OpsigError(f"{path} would unpack to {whole:,} bytes, more than {MAX_EXPANSION} times its size")


def is_plain(value: Any) -> bool:
    """Whether this is a tensor of numbers that a file holds: not a sparse or a nested one, nor one without data."""
    return isinstance(value, Entry) and getattr(value, "held", True)


def number_of(value: Any) -> int | float | None:
    """A number, or that in a tensor of one; None for anything else."""
    if isinstance(value, Entry) and is_plain(value) and math.prod(value.shape) == 1:
        value = value.read().item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def first_words(error: BaseException) -> str:
    """An error in a few words: its first sentence."""
    text = " ".join(str(error).split())
    text = re.split(r"(?<=[a-z0-9)])\. | Please | Check the documentation", text.strip())[0]
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:160]
