"""A trajectory file as datasets by their path in the schema: what there is, whole datasets, and the provenance.

S samples, F parameters that are not trained.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory import external
from opsig_cli.trajectory.rows import known_names
from opsig_cli.trajectory.schema import ATTRIBUTES, field_of
from opsig_cli.trajectory.snapshot import SnapshotFile
from opsig_cli.trajectory.store import RedoFile

UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError, OverflowError)
"""What HDF5 and numpy raise on a damaged file."""


class Datasets:
    """One open file. Datasets are named by their path in the schema, as "losses/loss"."""

    def __init__(self, path: str, file: h5py.File, store: SnapshotFile):
        self.path = path
        self._file: Any = file  # h5py's items are untyped
        self._store = store
        self._frozen: np.ndarray | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """The file's provenance as Python values. Raises OpsigError where one is not what the schema says."""
        found = {}
        with self.damage("an attribute"):
            for key, value in self._file.attrs.items():
                found[key] = json.loads(value) if key.endswith("_json") else as_value(value)
        for key, value in found.items():
            if not isinstance(value, ATTRIBUTES.get(key, object)):
                what = {str: "text", int: "a whole number", dict: "an object of JSON", list: "a list of JSON"}[
                    ATTRIBUTES[key]
                ]
                raise OpsigError(f"{self.path}: the attribute {key} is not {what}, as opsig writes it")
        return found

    @property
    def writable(self) -> bool:
        """Whether rows can be appended."""
        return isinstance(self._store, RedoFile)

    @property
    def samples(self) -> np.ndarray:
        """Dataset index of every sample, (S,) int64."""
        return self.read("sample")

    @property
    def frozen(self) -> np.ndarray:
        """The parameters that are not trained, (F,) float32, empty where all are: one array, read once."""
        if self._frozen is None and self.has("frozen/params"):
            self._frozen = self.read("frozen/params")
            self._frozen.flags.writeable = False
        return np.empty(0, np.float32) if self._frozen is None else self._frozen

    def has(self, name: str) -> bool:
        """Whether the dataset or group is in the file."""
        return name in self._file or external.holds(self, name)

    def require(self, name: str) -> None:
        """Raise OpsigError, naming the command that makes it, where the dataset is not in the file."""
        if not self.has(name):
            field = field_of(name)
            how = "Record it in a run of its own: opsig train, or opsig import CHECKPOINT... --task TASK"
            if field.made_by and (name == "checkpoints/params" or self.has("checkpoints/params")):
                how = f"Run: {field.made_by} {self.path}"
            raise OpsigError(f"{self.path} lacks {name} ({field.long_name}). {how}")

    def groups(self) -> list[str]:
        """Names of the groups in the file, sorted."""
        return sorted(name for name, item in self._file.items() if isinstance(item, h5py.Group))

    def names(self) -> list[str]:
        """Names of the schema's datasets that are in the file, in the schema's order."""
        return known_names(self._file)

    def read(self, name: str) -> np.ndarray:
        """A whole dataset; fixed-length strings come back as str objects. Raises OpsigError where it is damaged."""
        self.require(name)
        with self.damage(name):
            dataset = self._file[name]
            values = dataset[()]
            checksum = dataset.attrs.get("checksum")
            if checksum is not None and checksum != zlib.crc32(values.tobytes()):
                raise ValueError("its checksum is wrong")
            return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values

    @contextmanager
    def damage(self, what: str) -> Iterator[None]:
        """Whatever HDF5 raises on a damaged file becomes one line."""
        try:
            yield
        except UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise OpsigError(
                f"{self.path}: {what} is damaged: {reason}. See what is intact: opsig verify {self.path}"
            ) from error


def as_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value
