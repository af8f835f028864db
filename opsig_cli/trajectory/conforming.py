"""Is a file what the schema says, in a version that this program reads?"""

from __future__ import annotations

import h5py

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.datasets import as_value
from opsig_cli.trajectory.reading import Reading
from opsig_cli.trajectory.schema import SCHEMA_VERSION, dimension, field_of

GROWING = ("step", "sighting")
"""Dimensions along which other datasets of a group may be longer than its steps."""


def check_version(run: Reading) -> None:
    """Raise OpsigError where the file states no schema version, or a newer major one."""
    version = str(as_value(run._file.attrs.get("schema_version", ""))).strip()
    if not version:
        raise OpsigError(f"{run.path} is HDF5 but not an opsig trajectory (it states no schema_version)")
    if int(version.split(".")[0]) > SCHEMA_VERSION[0]:
        ours = ".".join(map(str, SCHEMA_VERSION))
        raise OpsigError(f"{run.path} has trajectory schema {version}; this opsig reads up to {ours}. Update opsig")


def check_shapes(run: Reading) -> None:
    """Raise OpsigError where a dataset is not what the schema says: its type, its dimensions, or their lengths."""
    lengths: dict[tuple[str, str], int] = {}
    for name in run.names():
        field, dataset = field_of(name), run._file[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim != len(field.dims):
            raise OpsigError(f"{run.path}: {name} must have the dimensions {', '.join(field.dims)}")
        kinds = field.dtype.replace("S*", dataset.dtype.str[1:]).split("|")
        if dataset.dtype.kind + str(dataset.dtype.itemsize) not in kinds:
            raise OpsigError(f"{run.path}: {name} must be {field.dtype}, not {dataset.dtype}")
        for axis, length in zip(field.dims, dataset.shape, strict=True):
            expected = lengths.setdefault(dimension(field, axis), length)
            if length < expected or (length != expected and axis not in GROWING):
                raise OpsigError(f"{run.path}: {name} has {length} along {axis}, where {expected} are expected")
