"""Results that live in a run's file with what made them, and are read back where nothing has changed.

A result is known by its origin: the options that made it, the content of the run that it was made from, the task with
its code and data, and the versions of everything that computes. Results of one group, `clusters` or `mined`, lie in one
dataset, the newest first: a line of JSON that says of each its origin and its bytes, and then the results themselves.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Collection
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from opsig_cli import tasks
from opsig_cli.backends import ENTRY_POINT_GROUP
from opsig_cli.errors import OpsigError
from opsig_cli.settings import Settings
from opsig_cli.studies.curvature import GROUPS
from opsig_cli.studies.packed import pack, unpack
from opsig_cli.trajectory.content import content_of
from opsig_cli.trajectory.datasets import UNREADABLE
from opsig_cli.trajectory.file import Trajectory, open_trajectory
from opsig_cli.trajectory.locks import try_lock

FORMAT = 1
KEPT = 4
"""Results that a group holds; the oldest makes room."""
KEPT_BYTES = 256 << 20
"""And so many bytes of them; a single result that is larger is not kept."""
WITHOUT = {"clusters", "mined", *GROUPS.values()}
"""Groups of which no result is made: results themselves, and eigenvalues."""
LIBRARIES = ("opsig", "numpy", "scipy", "scikit-learn", "torch", "jax")

Origin = dict[str, Any]


def origin_of(
    run: Trajectory, options: dict[str, Any], task: str | None = None, backend: str | None = None
) -> Origin | None:
    """What a result of these options would be made from, of the file alone without a `backend`; None where that cannot
    be told, so that none is kept."""
    try:
        content = content_of(run, WITHOUT)
        told = {"packages": []} if backend is None else _task(run, task)
    except (OpsigError, OSError):  # what is wrong is for the study to meet, if it is concerned
        return None
    if content is None or told is None:
        return None
    plugins = set() if backend is None else {"opsig_linalg", *_packages(ENTRY_POINT_GROUP, backend)}
    code = {"opsig_cli", *plugins, *told.pop("packages")}
    return json.loads(
        json.dumps({
            "options": options, "content": content, "task": told,
            "code": {name: _digest(_sources(name)) for name in sorted(code)},
            "versions": {name: _version(name) for name in LIBRARIES},
        })
    )  # fmt: skip


def read_back(run: Trajectory, group: str, kind: type, origin: Origin | None, any_of: Collection[str] = ()) -> Any:
    """The result of this type and origin that the run's file holds, else None; options in `any_of` may be others."""
    if origin is None or not run.has(f"{group}/kept"):
        return None

    def known(made: Origin) -> Origin:
        return made | {"options": {name: value for name, value in made["options"].items() if name not in any_of}}

    try:
        for made, data in _results(run, group):
            if known(made) == known(origin):
                return unpack(kind, data)
    except (OpsigError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or no result of opsig's
        return None
    return None


def latest(run: Trajectory, group: str, kind: type) -> Any:
    """The result that was kept last, whatever it is of, or None: for names that are offered, not for numbers."""
    try:
        return next((unpack(kind, data) for _, data in _held(run, group)), None)
    except (OpsigError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(path: str, group: str, origin: Origin | None, result: Any) -> None:
    """Write a result into the run's file, in a commit of its own.

    It is not kept, and nothing is said, where the run changed since, somebody reads or writes it, or it cannot be
    written: the result has been handed on, and is computed again next time.
    """
    if origin is None or not os.access(path, os.W_OK):
        return
    try:
        data = pack(result)
        if len(data) > KEPT_BYTES or not _alone(path):
            return
        with open_trajectory(path, "r+") as run:
            if content_of(run, WITHOUT) != origin["content"]:
                return
            others = [(made, found) for made, found in _held(run, group) if made != origin]
            _write(run, group, [(origin, memoryview(data)), *others])
    except (OpsigError, *UNREADABLE):  # of a damaged file HDF5 may say anything when it is written
        return


def _write(run: Trajectory, group: str, results: list[tuple[Origin, memoryview]]) -> None:
    kept, size = [], 0
    for made, data in results[:KEPT]:
        size += len(data)
        if size <= KEPT_BYTES:
            kept.append((made, data))
    said = {"format": FORMAT, "results": [{"origin": made, "bytes": len(data)} for made, data in kept]}
    whole = b"".join([json.dumps(said).encode(), b"\n", *(data for _, data in kept)])
    run.remove(group)
    run.write(f"{group}/kept", np.frombuffer(whole, np.uint8))


def _held(run: Trajectory, group: str) -> list[tuple[Origin, memoryview]]:
    """The results that the file holds; none where they cannot be read, so that they are written anew."""
    try:
        return _results(run, group) if run.has(f"{group}/kept") else []
    except (OpsigError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _results(run: Trajectory, group: str) -> list[tuple[Origin, memoryview]]:
    whole = run.read(f"{group}/kept").tobytes()
    end = whole.index(b"\n")
    said = json.loads(whole[:end])
    found, place = [], end + 1
    for each in said["results"] if said["format"] == FORMAT else []:
        found.append((each["origin"], memoryview(whole)[place : place + each["bytes"]]))
        place += each["bytes"]
    return found


def _alone(path: str) -> bool:
    """Whether nobody has the file open: a commit would make others wait, or be made to."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return try_lock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def _task(run: Trajectory, task: str | None) -> dict[str, Any] | None:
    """The task by name, the files that it reads, and the packages that its code is in; None for one that the command
    line must name, or that a run does not tell."""
    try:
        stored = Settings.stored(run.attributes, run.path)
    except OpsigError:
        stored = None
    if task is None and stored is None:
        return {"name": None, "packages": []}
    spec = tasks.parse_spec(task or stored.task, stored.model if stored else None)  # pyright: ignore
    told: dict[str, Any] = {"name": str(spec), "model": spec.model, "packages": []}
    told["files"] = {key: _seen(Path(spec.options[key])) for key in sorted(tasks.FILES & spec.options.keys())}
    if not tasks.is_own(spec):
        return told | {"packages": sorted(_packages(tasks.ENTRY_POINT_GROUP, spec.name))}
    if task is None:
        return None
    place = spec.name.rpartition(":")[0]
    if place.endswith(".py"):
        return told | {"own": _digest([Path(place)])}
    return told | {"packages": [place.split(".")[0]]}


def _seen(path: Path) -> list[list[Any]]:
    """Names, sizes and times of a file, or of all files in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _packages(group: str, name: str) -> set[str]:
    """Top packages of the installed plugins of this name."""
    return {entry.value.split(":")[0].split(".")[0] for entry in metadata.entry_points(group=group, name=name)}


def _sources(package: str) -> list[Path]:
    """The source files of a package, which is not imported."""
    spec = util.find_spec(package)
    if spec is None:
        return []
    folders = list(spec.submodule_search_locations or [])
    return sorted(file for folder in folders for file in Path(folder).rglob("*.py")) or [Path(spec.origin or "")]


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes() if file.is_file() else b"")
    return found.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
