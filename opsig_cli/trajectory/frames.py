"""Rows of a run as pandas frames and as xarray datasets that are read when they are used. T steps, S samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.schema import ROW_GROUPS, field_of

if TYPE_CHECKING:
    import pandas
    import xarray

    from opsig_cli.trajectory.reading import Reading


def frame(run: Reading, name: str) -> pandas.DataFrame:
    """A row group's columns of numbers, such as "scalars", or one dataset, such as "losses/loss", with steps as index.

    Columns of a dataset are samples, with their labels as a second level where the file has them, or else places.
    Raises OpsigError for what is not there or has no rows by step.
    """
    import pandas

    group = _group(run, name)
    index = pandas.Index(run.steps(group), name="step")
    if name == group:
        names = [field for field in _columns(run, group) if len(field_of(field).dims) == 1]
        values = {field.removeprefix(f"{group}/"): run.rows(field, 0, len(index)) for field in names}
        return pandas.DataFrame(values, index=index)
    values = run.rows(name, 0, len(index))
    if values.ndim == 1:
        return pandas.DataFrame({name.removeprefix(f"{group}/"): values}, index=index)
    columns: Any = None
    if "sample" in field_of(name).dims:
        columns = pandas.Index(run.samples, name="sample")
        if run.has("samples/label"):
            columns = pandas.MultiIndex.from_arrays([run.samples, run.read("samples/label")], names=["sample", "label"])
    return pandas.DataFrame(values, index=index, columns=columns)


def dataset(run: Reading, group: str = "losses") -> xarray.Dataset:
    """A row group over named dimensions: steps, samples and labels are coordinates, and each variable has its units.

    Nothing is read before it is used, and then no more than what is used; the run must be open still. Raises OpsigError
    for what is not there.
    """
    import xarray
    from xarray.core import indexing

    _group(run, group)
    variables = {}
    for name in _columns(run, group):
        field = field_of(name)
        lazy = indexing.LazilyIndexedArray(_array_of(run, name))
        variables[name.removeprefix(f"{group}/")] = xarray.Variable(
            field.dims, lazy, {"long_name": field.long_name, "units": field.units}
        )
    coordinates: dict[str, Any] = {"step": run.steps(group)}
    if any("sample" in variable.dims for variable in variables.values()):
        coordinates["sample"] = run.samples
        if run.has("samples/label"):
            coordinates["label"] = ("sample", run.read("samples/label"))
    return xarray.Dataset(variables, coordinates, {"trajectory": run.path})


def _group(run: Reading, name: str) -> str:
    group = name.split("/")[0]
    if group not in ROW_GROUPS or not run.has(name):
        have = [found for found in ROW_GROUPS if run.has(found)]
        raise OpsigError(f"{run.path} has no rows called '{name}'. It has: {', '.join(have) or 'none'}")
    return group


def _columns(run: Reading, group: str) -> list[str]:
    left_out = (f"{group}/step", f"{group}/checksum", f"{group}/wide_checksum")
    return [name for name in run.names() if name.startswith(f"{group}/") and name not in left_out]


def _array_of(run: Reading, name: str) -> Any:
    """A dataset of rows as xarray's lazy arrays want it: its shape, its type, and reading by rows and columns."""
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class Rows(BackendArray):
        shape = (len(run.steps(name.split("/")[0])), *run.shape(name)[1:])
        dtype = run.rows(name, 0, 1).dtype

        def __getitem__(self, key: Any) -> Any:
            support = indexing.IndexingSupport.OUTER
            return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

        def _read(self, key: tuple[Any, ...]) -> np.ndarray:
            chosen = np.atleast_1d(np.arange(self.shape[0])[key[0]])
            if not len(chosen):
                return np.empty((0, *self.shape[1:]), self.dtype)[(slice(None), *key[1:])]
            first, stop = int(chosen.min()), int(chosen.max()) + 1
            if len(self.shape) == 2 and not (isinstance(key[1], slice) and key[1] == slice(None)):
                columns = np.atleast_1d(np.arange(self.shape[1])[key[1]])
                values = run.series(name, columns, first, stop)[chosen - first]
                values = values[:, 0] if isinstance(key[1], int | np.integer) else values
            else:
                values = run.rows(name, first, stop)[chosen - first][(slice(None), *key[1:])]
            return values[0] if isinstance(key[0], int | np.integer) else values

    return Rows()
