"""Which run a branch comes from, as their files say."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.file import Trajectory, open_trajectory

SUFFIXES = (".h5", ".hdf5")


def identity(run: Trajectory) -> str:
    """What a branch calls the run: its `run_id`, or its path where the file has none."""
    return str(run.attributes.get("run_id") or os.path.abspath(run.path))


def is_branch_of(branch: Trajectory, run: Trajectory) -> bool:
    """Whether a file is a branch of the run: by its identity, or by its path or name where it had none."""
    said = branch.attributes
    if "from_step" not in said:
        return False
    if "run_id" in run.attributes or not said.get("parent_path"):
        return said.get("parent") == identity(run)
    path = str(said["parent_path"])
    beside = os.path.join(os.path.dirname(os.path.abspath(branch.path)), os.path.basename(path))
    return os.path.realpath(run.path) in (os.path.realpath(path), os.path.realpath(beside))


def branches_beside(run: Trajectory) -> list[dict[str, Any]]:
    """The branches of a run that lie in its folder, in order of name; files that cannot be read are passed over."""
    folder = os.path.dirname(os.path.abspath(run.path))
    names = sorted(name for name in os.listdir(folder) if name.endswith(SUFFIXES))
    return branches_among((os.path.join(folder, name) for name in names), run)


def branches_among(paths: Iterable[str], run: Trajectory, strict: bool = False) -> list[dict[str, Any]]:
    """What each of these files that is a branch of the run says of itself: its path, step, change and effects.

    Raises OpsigError, with `strict`, for one that is not.
    """
    found = []
    for path in paths:
        try:
            with open_trajectory(path) as branch:
                ours = is_branch_of(branch, run)
                said = branch.attributes
        except OpsigError:
            if strict:
                raise
            continue
        if ours:
            found.append({
                "path": path, "from_step": said["from_step"], "change": said.get("change", ""),
                "effects": said.get("effects_json") or [],
            })  # fmt: skip
        elif strict:
            raise OpsigError(f"{path} is not a branch of {run.path}")
    return found
