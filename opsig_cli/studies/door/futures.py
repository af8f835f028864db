"""`branch`: a run trained on from a checkpoint with something changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from opsig_cli.studies import answers, planning, tracking
from opsig_cli.studies.branching import changes, flow, fork, naming, request
from opsig_cli.studies.branching import planned as branching
from opsig_cli.studies.clustering import keeping, selecting
from opsig_cli.studies.door.groups import found_groups
from opsig_cli.studies.numbers import loss_unit
from opsig_cli.studies.results import Note, Progress, Records, Run, opened, planned, quietly, unseen
from opsig_cli.trajectory.checking import without_damage
from opsig_cli.trajectory.states import read_state


def branch(
    run: Run, *, from_step: int | Sequence[int], steps: int, output: str | os.PathLike, drop: Sequence[str] = (),
    weight: Sequence[str] = (), each: bool = False, optimizer: str | None = None, learning_rate: float | None = None,
    batch_size: int | None = None, momentum: float | None = None, clip_norm: float | None = None,
    label_smoothing: float | None = None, seed: int | None = None, into_edge: bool = False, out_of_edge: bool = False,
    draws: int = 3, sharpness: bool = False, track_every: int | None = None, assume: Sequence[str] = (),
    replace: bool = False, plan: bool = False, records: Sequence[dict[str, Any]] | None = None,
    task: str | None = None, device: str | None = None, backend: str | None = None, allow_changed_data: bool = False,
    note: Note = quietly, progress: Progress = unseen,
) -> Records:  # fmt: skip
    """Train a run on from a checkpoint with something changed, and beside it unchanged: records of kind "branch".

    `drop` and `weight` ("NAME=W") name samples: "pair:1", "group:3", "label:Coat", "17,18", or "-", those of `records`;
    groups are those of `records`, or found as `cluster` finds them. The options of training replace the run's;
    `into_edge` and `out_of_edge` choose the learning rate from the sharpness at the fork, with records of kind "group".
    `each`: a branch for each change instead of one for all. `output`: the branch's file, a trajectory like any other;
    of several, each name tells its change. `draws`: controls with as many random samples, and of the same labels.
    `sharpness`: measure it at the end of each future. `assume`: "KEY=VALUE" of what an imported run does not tell.
    `plan`: only say what it takes.
    """
    from opsig_cli.studies import plotting

    given = dict(optimizer=optimizer, learning_rate=learning_rate, batch_size=batch_size, momentum=momentum,
                 clip_norm=clip_norm, label_smoothing=label_smoothing, seed=seed)  # fmt: skip
    settings = {key: value for key, value in given.items() if value is not None}
    edges = [edge for edge, wanted in (("into", into_edge), ("out of", out_of_edge)) if wanted]
    asked_for = changes.changes_of(drop, weight, settings, edges, each)
    with opened(run) as trajectory:
        trajectory.require("checkpoints/params")
        asked = request.Request(
            fork.told(trajectory, task, fork.assumed(assume)), [from_step] if isinstance(from_step, int) else from_step,
            steps, asked_for, os.fspath(output), draws, sharpness, track_every, replace,
        )  # fmt: skip
        damage: list[str] = []

        def work():
            asked.check(trajectory)
            return tracking.open_run(trajectory, task, device, backend, note, allow_changed_data)

        session, loaded, spec = without_damage(work, damage.append)
        stages, state = branching.stages_of(asked, session), read_state(trajectory, asked.from_steps[0])
        if plan:
            disk, forks = branching.disk_of(asked, trajectory), len(asked.from_steps)
            return planned(planning.plan(trajectory.path, session, backend, "branch", stages, state, forks, disk))
        planning.require(session, "branch", stages, state)

        def find_groups() -> list[dict[str, Any]]:
            note(f"groups are those of: opsig cluster {trajectory.path}")
            found = found_groups(
                trajectory, keeping.Keeper(any_of=("test", "budget")), None, None, None, None, None, None, False,
                "replay", 0, None, selecting.Selection(), None, task, device, backend, allow_changed_data, note,
                progress,
            )  # fmt: skip
            damage.extend(found.damage)
            return found

        names = naming.Names(trajectory, records, find_groups)
        path, unit = trajectory.path, loss_unit(trajectory)
        written, panels = flow.branch(
            flow.Asked(trajectory, asked, session, loaded, spec, names, note, progress)
        )  # fmt: skip
    title = f"{trajectory.path}: futures from step {', '.join(map(str, asked.from_steps))}"
    return Records(
        written, damage=damage, title=title, draw=lambda: plotting.draw_branches(panels, path, unit),
        answer=answers.branched(written, path), unit=unit,
    )  # fmt: skip
