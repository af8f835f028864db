"""Which run a file is of, and at which commit: a stamp of 64 bytes at one place of the file.

The root attribute `run_id` is a random number in 32 hexadecimal digits, made with the file and kept for good. The
dataset `commit` holds it once more, followed by 24 digits drawn anew for every commit and 8 of a crc32. It is
contiguous and so stays where it is in the file: a log can say which file it is for, and at which commit, to a reader
that has not even begun to parse HDF5.
"""

from __future__ import annotations

import os
import re
import zlib
from typing import Any

import h5py
import numpy as np

COMMIT = "commit"
STAMP_BYTES = 64
_RUN_ID = re.compile(r"[0-9a-f]{32}")


def new_run_id() -> str:
    """A random run id."""
    return os.urandom(16).hex()


def is_run_id(text: Any) -> bool:
    """Whether this is a run id."""
    return isinstance(text, str) and _RUN_ID.fullmatch(text) is not None


def new_stamp(run_id: bytes) -> bytes:
    """The stamp of a new commit of this run."""
    body = run_id[:32] + os.urandom(12).hex().encode()
    return body + b"%08x" % zlib.crc32(body)


def is_whole(stamp: bytes) -> bool:
    """Whether these bytes are one stamp, not halves of two."""
    return stamp[-8:] == b"%08x" % zlib.crc32(stamp[:-8])


def create_stamp(file: h5py.File, run_id: str) -> int:
    """Give the file its place for stamps, and return the place."""
    dataset = file.create_dataset(COMMIT, data=np.bytes_(new_stamp(run_id.encode())))
    dataset.attrs["long_name"] = np.bytes_(b"run id, a number of the last commit, and their crc32")
    dataset.attrs["units"] = np.bytes_(b"1")
    return dataset.id.get_offset()


def place_of_stamp(file: h5py.File) -> int | None:
    """Where in the file the stamp is, or None in files of schema 1.0, which have none.

    Raises ValueError where it is no stamp.
    """
    if COMMIT not in file:
        return None
    dataset: Any = file[COMMIT]
    place = dataset.id.get_offset() if isinstance(dataset, h5py.Dataset) else None
    if not place or dataset.dtype != np.dtype(f"S{STAMP_BYTES}") or dataset.shape != ():
        raise ValueError(f"the dataset {COMMIT} is not text of {STAMP_BYTES} bytes")
    return place
