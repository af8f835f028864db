"""A smaller copy of a run: rows in order of step, shuffled and deflated."""

from __future__ import annotations

import math

import numpy as np

from opsig_cli.trajectory import sightings
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.naming import describe
from opsig_cli.trajectory.placed import BLOCK_BYTES
from opsig_cli.trajectory.rows import stated_fill
from opsig_cli.trajectory.schema import DIMENSIONS, Field, field_of


def copy_packed(run: Trajectory, copy: Trajectory) -> None:
    """Copy everything of a run into a new file, committing as it goes.

    Attributes, and groups that the schema does not know, come along.
    """
    for key, value in run._file.attrs.items():
        if key not in ("schema_version", "run_id"):  # the copy's own
            copy._file.attrs[key] = value
    for name in run.names():
        field = field_of(name)
        if field.dims[0] == "step":
            _copy_rows(run, copy, field)
        elif field.dims[0] == "sighting":
            continue
        elif name not in copy._file:
            copy.write(name, run.read(name))
        copy.commit()
    for block in sightings.by_step(run):
        sightings.append(copy, block, packed=True)
        copy.commit()
    scales = {name for group, name in DIMENSIONS if not group}
    for name in run._file:
        if name not in copy._file and name not in scales:
            copy._file.copy(run._file[name], copy._file, name)


def _copy_rows(run: Trajectory, copy: Trajectory, field: Field) -> None:
    rows, source = run._rows(field.path.split("/")[0]), run._file[field.path]
    order = rows.order()
    height = max(1, min(64 if source.ndim > 1 else 1024, BLOCK_BYTES // max(1, math.prod(source.shape[1:]) * 8)))
    target = copy._file.create_dataset(
        field.path, (rows.count, *source.shape[1:]), maxshape=(None, *source.shape[1:]), dtype=source.dtype,
        chunks=(min(height, max(1, rows.count)), *(min(n, 1 << 14) for n in source.shape[1:])),
        fillvalue=stated_fill(source.dtype), shuffle=True, compression="gzip", compression_opts=4,
    )  # fmt: skip
    describe(copy._file, target, field)
    for first in range(0, rows.count, target.chunks[0]):
        places = order[first : first + target.chunks[0]]
        ascending = np.argsort(places)
        back = np.empty_like(ascending)
        back[ascending] = np.arange(len(ascending))
        target[first : first + len(places)] = source[places[ascending]][back]
