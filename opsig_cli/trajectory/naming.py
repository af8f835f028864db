"""Meaning, units and named dimensions of datasets, written so that h5py, netCDF4 and xarray all read them."""

from __future__ import annotations

from typing import Any

import numpy as np

from opsig_cli.trajectory.schema import DIMENSIONS, Field, dimension


def describe(file: Any, dataset: Any, field: Field) -> None:
    """Meaning, unit and named dimensions, by the attributes that netCDF4 reads them from."""
    dataset.attrs["long_name"] = np.bytes_(field.long_name.encode())
    dataset.attrs["units"] = np.bytes_(_unit(file, field).encode())
    used = [dimension(field, name) for name in field.dims]
    for (group, name), length in zip(used, dataset.shape, strict=True):
        place = f"{group}/{name}".lstrip("/")
        if place == field.path:
            _make_scale(dataset, group, name, name)
        elif place not in file and name != "step":
            grows = {"maxshape": (None,), "chunks": (1 << 16,)} if name == "sighting" else {}
            scale = file.create_dataset(place, (length,), "u1", **grows)
            _make_scale(scale, group, name, f"This is a netCDF dimension but not a netCDF variable.{length:10d}")
    if len(used) > 1 or used[0][0] != field.path.rpartition("/")[0] or used[0][1] == "sighting":
        dataset.attrs["_Netcdf4Coordinates"] = np.array([DIMENSIONS.index(d) for d in used], np.int32)
    if field.path.split("/")[-1] not in [name for _, name in used]:
        dataset.attrs["_Netcdf4Dimid"] = np.int32(DIMENSIONS.index(used[0]))


def _unit(file: Any, field: Field) -> str:
    """The field's unit; of losses the one that the run states, where it states any."""
    stated = file.attrs.get("loss_unit", b"") if field.units == "nat" else b""
    return (stated.decode("utf-8", "replace") if isinstance(stated, bytes) else str(stated)) or field.units


def _make_scale(dataset: Any, group: str, name: str, words: str) -> None:
    dataset.make_scale(words)
    dataset.attrs["_Netcdf4Dimid"] = np.int32(DIMENSIONS.index((group, name)))
