"""The trajectory file: create, open, commit, close.

S samples. A reader of the rest needs only `open_trajectory`, `create_trajectory`, and the methods of `Trajectory` and
of what it stands on, `Reading` and `Writing`. How commits become durable is `store.py`'s concern.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory import frames
from opsig_cli.trajectory.conforming import check_shapes, check_version
from opsig_cli.trajectory.datasets import as_value
from opsig_cli.trajectory.identity import create_stamp, is_run_id, new_run_id, place_of_stamp
from opsig_cli.trajectory.locks import writer_of
from opsig_cli.trajectory.pending import NEW_SUFFIX
from opsig_cli.trajectory.redo_log import LOG_SUFFIX
from opsig_cli.trajectory.schema import SCHEMA_VERSION, is_known
from opsig_cli.trajectory.snapshot import SnapshotFile
from opsig_cli.trajectory.store import RedoFile
from opsig_cli.trajectory.vetting import Refused, vet
from opsig_cli.trajectory.writing import Writing

if TYPE_CHECKING:
    import pandas
    import xarray


def create_trajectory(
    path: str | os.PathLike,
    samples: np.ndarray | Sequence[int],
    attributes: Mapping[str, Any] | None = None,
    *,
    replace: bool = False,
) -> Trajectory:
    """Start a new file for the samples with these indices, (S,) integers; `attributes` is its provenance.

    Raises OpsigError where the file exists (unless `replace`), is being written, or cannot be written.
    """
    path = _followed(path)
    check_new(path, replace)
    stated = dict(attributes or {})
    if not is_run_id(stated.get("run_id")):
        stated["run_id"] = new_run_id()
    with file_errors(path):
        store = RedoFile(path, create=True)
        try:
            run = Trajectory(path, h5py.File(store, "w", libver=("v110", "v110"), rdcc_nbytes=0), store)
            run.set_attributes(schema_version=".".join(map(str, SCHEMA_VERSION)), **stated)
            run.write("sample", np.asarray(samples, np.int64))
            store.stamp_at(create_stamp(run._file, stated["run_id"]), stated["run_id"])
            run.commit()
        except BaseException:
            store.close()
            raise
    return run


def check_new(path: str, replace: bool) -> None:
    """Raise OpsigError where a new file would take the place of another, unless `replace`."""
    if os.path.exists(path) and not replace:
        raise OpsigError(f"{path} exists. Continue it with --resume, or overwrite it with --replace")


def open_trajectory(path: str | os.PathLike, mode: str = "r") -> Trajectory:
    """Open a file for reading ("r": one consistent state, also while it is written) or for appending ("r+").

    Raises OpsigError where there is no such file, it is not a trajectory, its schema is newer than this program, it is
    damaged or could reach outside itself, or, for appending, another process writes to it.
    """
    path = _followed(path)
    if not os.path.exists(path):
        if writer := writer_of(path):
            raise OpsigError(f"{path} is only being created, by {writer}. Try again in a moment")
        raise OpsigError(f"{path} does not exist")
    run = _open_snapshot(path)
    if mode == "r":
        return run
    with run.damage("the stamp of its last commit"):
        run_id, place = as_value(run._file.attrs.get("run_id")), place_of_stamp(run._file)
        there = os.fstat(run._store.fd)
    run.abort()
    with file_errors(path):
        store = RedoFile(path, stamp=place or 0, like=there)
        try:
            run = Trajectory(path, h5py.File(store, "r+", libver=("v110", "v110"), rdcc_nbytes=0), store)
            if place is None or not is_run_id(run_id):  # a file of schema 1.0 becomes one of this version
                run_id = new_run_id()
                run.set_attributes(run_id=run_id, schema_version=".".join(map(str, SCHEMA_VERSION)))
                place = create_stamp(run._file, run_id) if place is None else place
            store.stamp_at(place, run_id)
        except BaseException:
            store.let_go()
            raise
    return run


def _followed(path: str | os.PathLike) -> str:
    """The file that a link leads to: its log lies beside it, whatever the name by which it is opened."""
    path = os.fspath(path)
    return os.path.realpath(path) if os.path.islink(path) else path


def cut_off_at_birth(path: str) -> bool:
    """Whether a writer was killed before the file had its name, which it gets with its first commit."""
    left = (path + LOG_SUFFIX, path + NEW_SUFFIX)
    return not os.path.exists(path) and any(map(os.path.exists, left)) and writer_of(path) is None


def _open_snapshot(path: str) -> Trajectory:
    with file_errors(path):
        store = SnapshotFile(path)
    try:
        with file_errors(path):
            file = h5py.File(store, "r", rdcc_nbytes=0)
        run = Trajectory(path, file, store)
        with run.damage("its structure"):
            vet(file, store.size, is_known)
            check_version(run)
            check_shapes(run)
        return run
    except Refused as refusal:
        store.close()
        raise OpsigError(f"{path} is refused: {refusal}") from refusal
    except BaseException:
        store.close()
        raise


class Trajectory(Writing):
    """One run's file. A context manager; rows appended since the last `commit` become readable together.

    Leaving it after an error drops what was not committed.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def frame(self, name: str = "losses/loss") -> pandas.DataFrame:
        """Rows as a pandas frame: "losses/loss" (steps x samples, with labels), "scalars", ...; see `frames`."""
        return frames.frame(self, name)

    def dataset(self, group: str = "losses") -> xarray.Dataset:
        """A row group as an xarray Dataset that is read when it is used, while the run is open; see `frames`."""
        return frames.dataset(self, group)

    def commit(self) -> None:
        """Make everything since the last commit durable and readable, together.

        Raises OpsigError on a full disk, with nothing lost: it can be called again.
        """
        assert isinstance(self._store, RedoFile)
        with file_errors(self.path):
            try:
                self._file.flush()
                self._store.commit()
            finally:
                self.path = self._store.path

    def close(self) -> None:
        """Commit and close; a file that was written is one plain HDF5 file afterwards."""
        if isinstance(self._store, RedoFile):
            with file_errors(self.path):
                try:
                    self._file.close()
                    self._store.commit()
                finally:
                    self._store.close()
        else:
            self.abort()

    def abort(self) -> None:
        """Close and drop what was not committed."""
        with file_errors(self.path):
            try:
                self._file.close()
            finally:
                self._store.close()

    def replace_by(self, path: str) -> None:
        """Let another, finished file take this one's place, and close.

        Raises OpsigError where somebody has written to this one although it is open here.
        """
        assert isinstance(self._store, RedoFile)
        with file_errors(self.path):
            try:
                self._file.close()
                self._store.replace_by(path)
            finally:
                self._store.let_go()


@contextmanager
def file_errors(path: str) -> Iterator[None]:
    """What the system says of a file, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OpsigError(f"{path}: the disk is full. Free some space and continue with --resume") from error
        reason = " ".join(str(error).split())
        if "file signature not found" in reason or "truncated" in reason:
            other = "" if "truncated" in reason else ". Of checkpoints or a log, opsig import makes a run"
            raise OpsigError(f"{path} is not a readable HDF5 file{other}") from error
        name = error.filename if isinstance(error.filename, str) else path
        about = "" if os.path.abspath(name) == os.path.abspath(path) else f" ({name})"
        raise OpsigError(f"{path}: {error.strerror or reason}{about}") from error
