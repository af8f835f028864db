"""What measuring a run's curvature will take, stage by stage; see `planning`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsig_cli.backends import Session
from opsig_cli.studies import planning
from opsig_cli.studies.curvature import SLICE_POINTS
from opsig_cli.studies.planning import Count, Stage
from opsig_cli.studies.results import Records, planned
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

SEARCH = 10
"""Forward passes in which critical sharpness is found, about."""
COMMAND = "sharpness"


@dataclass(frozen=True)
class Foreseen:
    """The stages of `sharpness` at these checkpoints, each of which adds a row of so many bytes to a file."""

    steps: Sequence[int]
    stages: Sequence[Stage]
    row: int = 0
    counted: Count | None = None

    def plan(self, run: Trajectory, session: Session, backend: str | None) -> Records:
        """One record of what it takes."""
        state = read_state(run, self.steps[0])
        disk = self.row * len(self.steps)
        return planned(
            planning.plan(run.path, session, backend, COMMAND, self.stages, state, len(self.steps), disk, self.counted)
        )

    def require(self, run: Trajectory, session: Session) -> None:
        """Raise OpsigError where it does not fit the memory."""
        if self.steps and self.stages:
            planning.require(session, COMMAND, self.stages, read_state(run, self.steps[0]), self.counted)


def metrics(run: Trajectory, steps: Sequence[int], names: Sequence[str], samples: int, row: int) -> Foreseen:
    """Metrics, those of single samples for so many."""
    found, times = [], len(steps)
    for name in names:
        match name:
            case "gradient_norm":
                found.append(Stage("norms", times, samples))
            case "curvature":
                known = set(run.steps("sharpness").tolist()) if run.has("sharpness/eigenvector") else set()
                found += [Stage("eigenpairs", len(set(steps) - known)), Stage("curvature", times)]
            case "sample_sharpness":
                found.append(Stage("sample_sharpness", times, samples))
            case "trace":
                found.append(Stage("trace", times))
            case "critical_sharpness":
                found += [Stage("training", times), Stage("losses", times * SEARCH)]
    return Foreseen(steps, [stage for stage in found if stage.times], row)


def eigenvalues(run: Trajectory, steps: Sequence[int], count: int, named: bool) -> Foreseen:
    """So many eigenvalues, and with `named` who stands at their ends."""

    def stages(count: int) -> list[Stage]:
        ends = [Stage("curvature", len(steps) * count)] if named else []
        return [Stage("eigenpairs", len(steps), count), *ends]

    row = 4 * run.shape("checkpoints/params")[1]
    return Foreseen(steps, stages(count), row, Count("-k", count, stages))


def along(steps: Sequence[int]) -> Foreseen:
    """Losses along the top eigenvector through a checkpoint."""
    return Foreseen(steps, [Stage("eigenpairs"), Stage("losses", SLICE_POINTS)])
