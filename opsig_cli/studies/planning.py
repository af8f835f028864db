"""What a measuring command will take, before it begins: memory, disk, and passes over the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsig_cli import backends
from opsig_cli.backends import Need, Session
from opsig_cli.studies.results import Records
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

WHAT = {"track": "losses", "sharpness": "eigenpairs", "cluster": "gradients"}
GIB = 1 << 30


def plan(
    run: Trajectory,
    session: Session,
    backend: str | None,
    command: str,
    steps: Sequence[int],
    count: int,
    row_bytes: int,
) -> Records:
    """One record: what `command` takes to measure these checkpoints, each of which adds a row of so many bytes.

    Raises OpsigError for a backend that does not know.
    """
    backends.require(session, backends.Plans, backend, "a plan")
    need: Need = session.needs(WHAT[command], count, read_state(run, int(steps[0])))  # pyright: ignore
    fits = need.least <= need.bound
    record: dict[str, Any] = {
        "trajectory": run.path, "command": command, "checkpoints": len(steps),
        "passes": round(need.passes * len(steps), 1), "memory_least": need.least, "memory_most": need.most,
        "memory_bound": need.bound, "fits": fits, "disk": row_bytes * len(steps), "device": session.device_name,
    }  # fmt: skip
    notes = [] if fits else [f"needs at least {need.least / GIB:.1f} GiB: --memory {need.least / GIB + 0.1:.1f}GiB"]
    return Records([record], notes=notes, title=f"{run.path}: plan of {command}")
