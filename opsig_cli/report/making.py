"""Making the page of a run: groups found, everything gathered, the file written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsig_cli.errors import UsageError
from opsig_cli.report import content, page
from opsig_cli.studies.branching import lineage
from opsig_cli.studies.clustering import finding, keeping, selecting
from opsig_cli.studies.clustering import records as clustered
from opsig_cli.studies.results import Note, Progress
from opsig_cli.trajectory.checking import without_damage
from opsig_cli.trajectory.file import Trajectory


@dataclass(frozen=True)
class Made:
    """What was found, its records as `cluster` prints them, the one of the page, and rows that were left out; `keeper`
    keeps what was found once the run is closed."""

    found: finding.Found
    records: list[dict[str, Any]]
    page: dict[str, Any]
    damage: list[str]
    keeper: keeping.Keeper


def make(
    run: Trajectory, path: Path, command: str, *, by: str | None = None, top: int | None = None,
    branches: Sequence[str] | None = None, chosen: selecting.Selection | None = None, task: str | None = None,
    device: str | None = None, backend: str | None = None, allow_changed_data: bool = False, replace: bool = False,
    note: Note, progress: Progress,
) -> Made:  # fmt: skip
    """Find a run's groups and write the page of them to `path`; `command`: the one that made it, for the page.

    `branches`: files of branches to list, None for those in the run's folder; `chosen`: the pairs to show, all by
    default. Raises OpsigError where the page cannot be written, or groups cannot be found.
    """
    if by not in (None, *finding.BY):
        raise UsageError(f"--by is one of {', '.join(finding.BY)}, not '{by}'")
    said: list[str] = []
    damage: list[str] = []

    def warn(text: str) -> None:
        if not text.startswith("device:"):
            said.append(text.removeprefix("note: "))
        note(text)

    keeper = keeping.Keeper()
    page.check_output(path, run.path, replace)
    beside = (
        lineage.branches_beside(run) if branches is None else lineage.branches_among(branches, run, strict=True)
    )  # fmt: skip

    def work():
        said.clear()
        found = keeper.find(
            run, by, top, task, device, backend, warn, progress, note, allow_changed_data=allow_changed_data
        )  # fmt: skip
        written = clustered.records(run, found.clusters)
        return found, written, content.gather(found.whole(run), found, written, task, [*damage, *said], beside, chosen)

    found, written, shown = without_damage(work, damage.append)
    size = page.write(path, page.render(shown, command))
    pairs = [record for record in written if record["kind"] == "pair"]
    made = {
        "kind": "report", "trajectory": run.path, "path": str(path), "pairs": len(pairs),
        "established": len(clustered.established(pairs)), "bytes": size,
    }  # fmt: skip
    return Made(found, written, made, damage, keeper)
