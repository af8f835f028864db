"""What a person asks of `branch`, and what can be refused before anything is opened or trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.settings import Settings
from opsig_cli.studies import curvature
from opsig_cli.studies.branching.changes import Change
from opsig_cli.trajectory.file import Trajectory


@dataclass(frozen=True)
class Request:
    """Which branches to train, and how. `settings` are the run's.

    `draws`: controls of each kind; `track_every` None: as often as the run did, and every step of full batches.
    """

    settings: Settings
    from_steps: Sequence[int]
    steps: int
    changes: Sequence[Change]
    output: str
    draws: int = 3
    sharpness: bool = False
    track_every: int | None = None
    replace: bool = False

    def check(self, run: Trajectory) -> None:
        """Raise UsageError or OpsigError for what cannot be done: a step without a checkpoint, a file in the way.

        Raises DamagedRows for what is damaged of the rows that branches are held against, before any is trained.
        """
        if self.steps < 1:
            raise UsageError(f"--steps {self.steps} leads nowhere. Give at least 1")
        if not self.from_steps:
            raise UsageError("--from is missing. Give the step of a checkpoint")
        for step in self.from_steps:
            run.row("checkpoints/params", step)
        for group in ("losses", "scalars"):
            run.check(group, run.steps(group).tolist())
        for group in ("checkpoints", *curvature.PLACE):  # the floor of a step takes two checkpoints more
            near = {step + ahead for step in self.from_steps for ahead in range(3)}
            run.check(group, near & set(run.steps(group).tolist()))
        for path in self.paths().values():
            _check_path(path, run, self.replace)

    def paths(self) -> dict[tuple[int, int], str]:
        """Every branch's file by step and number of the change: `output` where there is one, else its name tells."""
        stem, suffix = os.path.splitext(self.output)
        found: dict[tuple[int, int], str] = {}
        for step in self.from_steps:
            for number, change in enumerate(self.changes):
                parts = [f"from-{step}"] * (len(self.from_steps) > 1) + [change.slug] * (len(self.changes) > 1)
                name = "-".join([stem, *parts])
                taken = name + suffix in found.values()
                found[step, number] = f"{name}-{number + 1}{suffix}" if taken else name + suffix
        return found

    def schedule(self, settings: Settings, step: int) -> Settings:
        """The settings of a future from a step on: where it ends, and what of it is recorded."""
        track_every = self.track_every or (1 if settings.batch_size is None else settings.track_every)
        return settings.scheduled(
            steps=step + self.steps, track_every=track_every or max(1, self.steps // 20),
            checkpoint_every=max(1, self.steps // 10),
        )  # fmt: skip


def _check_path(path: str, run: Trajectory, replacing: bool) -> None:
    if os.path.exists(path) and os.path.samefile(path, run.path):
        raise UsageError(f"-o {path} is the run itself. Name another file")
    if os.path.isdir(path):
        raise OpsigError(f"-o {path} is a folder. Name a file in it")
    if os.path.exists(path) and not replacing:
        raise OpsigError(f"{path} exists. Overwrite it with --replace, or name another file")
    if not Path(path).parent.is_dir():
        raise OpsigError(f"-o {path}: there is no folder {Path(path).parent}")
