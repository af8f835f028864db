"""All of a branching in order: forks, what changes, controls, every future once, records. S samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from opsig_cli import tasks
from opsig_cli.backends import Session
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.records import plain
from opsig_cli.settings import Settings
from opsig_cli.studies import comparing, training
from opsig_cli.studies.branching import controls, effects, lineage
from opsig_cli.studies.branching.changes import Change
from opsig_cli.studies.branching.controls import Control
from opsig_cli.studies.branching.effects import Places
from opsig_cli.studies.branching.fork import Fork, check_task, fork_of
from opsig_cli.studies.branching.futures import Future, Futures, Plan
from opsig_cli.studies.branching.likeness import Likeness
from opsig_cli.studies.branching.naming import Names
from opsig_cli.studies.results import Note, Progress
from opsig_cli.trajectory.file import Trajectory, open_trajectory
from opsig_cli.trajectory.recorder import Recorder

KEPT = ("samples/label", "samples/thumbnail", "samples/text", "samples/truth", "samples/feature")
"""What a branch's file takes over from the run's, so that every command can read it alone."""
NOBODY = 1
"""Where the empty set is tallied."""


@dataclass(frozen=True)
class Request:
    """What a person asks for. `track_every` None: as often as the run did, and every step of full batches."""

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
        """Raise UsageError or OpsigError for what cannot be done, before anything is opened or trained."""
        if self.steps < 1:
            raise UsageError(f"--steps {self.steps} leads nowhere. Give at least 1")
        if not self.from_steps:
            raise UsageError("--from is missing. Give the step of a checkpoint")
        for step in self.from_steps:
            run.row("checkpoints/params", step)
        for path in self.paths().values():
            _check_path(path, run, self.replace)

    def paths(self) -> dict[tuple[int, int], str]:
        """Every branch's file by step and number of the change: `output` where there is one, else its name tells."""
        stem, suffix = os.path.splitext(self.output)
        found: dict[tuple[int, int], str] = {}
        for step in self.from_steps:
            for number, change in enumerate(self.changes):
                parts = [f"from-{step}"] * (len(self.from_steps) > 1) + [change.slug] * (len(self.changes) > 1)
                path = "-".join([stem, *parts]) + suffix
                taken = path in found.values()
                found[step, number] = f"{path.removesuffix(suffix)}-{number + 1}{suffix}" if taken else path
        return found


@dataclass(frozen=True)
class Asked:
    """The parts that every fork shares."""

    run: Trajectory
    request: Request
    session: Session
    task: tasks.Task
    spec: tasks.TaskSpec
    names: Names
    note: Note
    progress: Progress


@dataclass(frozen=True)
class Line:
    """One future of the samples that a branch did not touch: what it is of, steps (T,) and mean losses (T,)."""

    of: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Panel:
    """A branch to be drawn: its title, its own line, the unchanged one, and the controls'."""

    title: str
    branch: Line
    unchanged: Line
    controls: list[Line]


@dataclass(frozen=True)
class _Branch:
    """One branch on its way."""

    path: str
    change: Change
    plan: Plan
    changed: np.ndarray
    controls: list[Control] = field(default_factory=list)


def branch(asked: Asked) -> tuple[list[dict[str, Any]], list[Panel]]:
    """Train every branch and its controls from every fork; records, and what to draw."""
    request, paths = asked.request, asked.request.paths()
    forks = [
        fork_of(asked.run, request.settings, step, step + request.steps, asked.note) for step in request.from_steps
    ]
    records: list[dict[str, Any]] = []
    panels: list[Panel] = []
    for fork in forks:
        check_task(fork, asked.session)
        branches = [
            _branch(asked, fork, change, paths[fork.step, number]) for number, change in enumerate(request.changes)
        ]
        _from(asked, fork, branches, records, panels)
    return records, panels


def _from(
    asked: Asked, fork: Fork, branches: list[_Branch], records: list[dict[str, Any]], panels: list[Panel]
) -> None:
    """Train all of one fork."""
    groups = asked.names.groups() if any(branch.change.edge for branch in branches) else {}
    ids = asked.run.samples
    sets: list[np.ndarray] = [np.arange(asked.session.samples), np.empty(0, np.int64)]
    places: dict[tuple[int, int], Places] = {}  # of a branch, and of its controls by number, -1 being its own
    for b, one in enumerate(branches):
        for c, control in enumerate([None, *one.controls], -1):
            outside = np.ones(asked.session.samples, bool)
            outside[one.changed] = False
            if control is not None:
                outside[control.changed] = False
            sets += [one.changed, outside]
            places[b, c] = Places(0, len(sets) - 2, len(sets) - 1)
    group_places = {group: len(sets) + number for number, group in enumerate(groups)}
    sets += [ids[positions] for positions in groups.values()]
    base = Plan(_schedule(asked.request, fork.settings, fork.step), fork.state, None)
    plans = {base.key}
    for one in branches:
        plans |= {one.plan.key, *(_controlled(one, control).key for control in one.controls)}
    stop = training.StopRequest()
    likeness = Likeness(fork)
    with asked.progress("branching", len(plans) * (asked.request.steps + 1)) as advance, stop.listening():
        labels = comparing.label_numbers(asked.run)
        futures = Futures(
            asked.session, sets, None if labels is None else labels[np.argsort(ids)], asked.request.sharpness, advance
        )
        same = next((one for one in branches if one.plan.key == base.key), None)
        if same is None:
            unchanged = futures.in_memory(base, stop, likeness.add)
        else:
            unchanged = futures.into_file(base, _recorder(asked, fork, same), stop, likeness.add)
        asked.note(f"note: {likeness.words()}")
        records.append(_unchanged_record(asked, fork, unchanged, likeness))
        for b, one in enumerate(branches):
            future = unchanged
            if one is not same:
                future = futures.into_file(one.plan, _recorder(asked, fork, one), stop)
            controlled = [futures.in_memory(_controlled(one, control), stop) for control in one.controls]
            _report(asked, fork, one, future, unchanged, controlled, [places[b, c] for c in range(-1, len(controlled))],
                    group_places, records, panels)  # fmt: skip


def _report(
    asked: Asked, fork: Fork, one: _Branch, future: Future, unchanged: Future, controlled: list[Future],
    places: list[Places], groups: dict[int, int], records: list[dict[str, Any]], panels: list[Panel],
) -> None:  # fmt: skip
    """Records of a branch, kept in its file too, and what to draw of it."""
    common = {
        "trajectory": one.path, "parent": asked.run.path, "from_step": fork.step, "change": one.change.words,
    }  # fmt: skip
    own = {
        "kind": "branch", **common, "control": None, "draw": None, "samples_changed": len(one.changed),
        **effects.settings_of_record(one.plan.settings), **effects.beside(future, unchanged, places[0]),
    }  # fmt: skip
    others = [
        {
            "kind": "branch", **common, "control": control.kind, "draw": control.draw,
            "samples_changed": len(control.changed), **effects.settings_of_record(one.plan.settings),
            **effects.beside(found, unchanged, place),
        }
        for control, found, place in zip(one.controls, controlled, places[1:], strict=True)
    ]  # fmt: skip
    own["sentence"] = effects.sentence(own, others)
    written = [own, *others]
    if one.change.edge:
        rates = one.plan.settings.learning_rate, fork.settings.learning_rate
        written += effects.group_records(common, groups, future, unchanged, rates)
    with open_trajectory(one.path, "r+") as file:
        file.set_attributes(effects_json=[{key: plain(value) for key, value in r.items()} for r in written])
    records += written
    lines = [_line(name, found, place) for name, found, place in [
        (one.change.words, future, places[0]), ("unchanged", unchanged, places[0]),
        *((control.kind, found, place)
          for control, found, place in zip(one.controls, controlled, places[1:], strict=True)),
    ]]  # fmt: skip
    panels.append(Panel(f"{one.change.words}, from step {fork.step}", lines[0], lines[1], lines[2:]))


def _line(name: str, future: Future, places: Places) -> Line:
    return Line(name, future.course.steps_T, future.course.means_TK[:, places.untouched])


def _unchanged_record(asked: Asked, fork: Fork, unchanged: Future, likeness: Likeness) -> dict[str, Any]:
    """The control that changes nothing: all samples are untouched."""
    places = Places(0, NOBODY, 0)
    return {
        "kind": "branch", "trajectory": asked.run.path, "parent": asked.run.path, "from_step": fork.step,
        "change": "nothing", "control": "unchanged", "draw": None, "samples_changed": 0,
        **effects.settings_of_record(fork.settings), **effects.beside(unchanged, unchanged, places),
        "replay_difference": likeness.difference,
    }  # fmt: skip


def _branch(asked: Asked, fork: Fork, change: Change, path: str) -> _Branch:
    """What one change means at a fork. Raises UsageError where it leaves no sample, or the task cannot do it."""
    ids = asked.run.samples
    weights = np.ones(asked.session.samples)
    for name, weight in change.weights:
        weights[ids[asked.names.positions(name)]] *= weight
    if not weights.any():
        raise UsageError(f"{change.words}: no sample is left to train on. Drop fewer")
    if "label_smoothing" in change.settings and not hasattr(asked.task, "smoothed_losses"):
        raise UsageError("--label-smoothing: the task has no smoothed_losses(model, batch, smoothing)")
    settings, start = fork.changed(change, asked.session, asked.note)
    training.check_optimizer(settings.optimizer, asked.session)
    changed = np.flatnonzero(weights != 1)
    plan = Plan(_schedule(asked.request, settings, fork.step), start, weights if len(changed) else None)
    labels = asked.run.read("samples/label")[np.argsort(ids)] if asked.run.has("samples/label") else None
    found, lacks = controls.drawn(weights, labels, asked.request.draws)
    for words in lacks:
        asked.note(f"note: {change.words}: {words}")
    return _Branch(path, change, plan, changed, found)


def _controlled(one: _Branch, control: Control) -> Plan:
    return replace(one.plan, weights=control.weights_S)


def _schedule(request: Request, settings: Settings, step: int) -> Settings:
    """The settings of a future: where it ends, and what of it is recorded."""
    track_every = request.track_every or (1 if settings.batch_size is None else settings.track_every)
    return replace(
        settings, steps=step + request.steps, track_every=track_every or max(1, request.steps // 20),
        checkpoint_every=max(1, request.steps // 10), checkpoint_pairs=False, checkpoint_window=None,
        checkpoint_dtype="float32", sharpness_every=0,
    )  # fmt: skip


def _recorder(asked: Asked, fork: Fork, one: _Branch) -> Recorder:
    """The branch's new file: what the samples are, where it comes from, what changed, and the fork's checkpoint."""
    run, spec = asked.run, asked.spec
    recorder = Recorder(
        one.path,
        asked.session.samples,
        layout=asked.session.layout,
        attributes=training.provenance(one.plan.settings, asked.session)
        | {
            "task": str(spec), "task_source": spec.source, "task_sha256": spec.digest,
            "parent": lineage.identity(run), "parent_path": os.path.abspath(run.path), "from_step": fork.step,
            "change": one.change.words, "change_json": one.change.stored_form(),
        },
        replace=asked.request.replace,
    )  # fmt: skip
    order = np.argsort(run.samples)
    for name in KEPT:
        if run.has(name):
            recorder.run.write(name, run.read(name)[order])
    if run.has("class_name"):
        recorder.run.write("class_name", run.read("class_name"))
    if one.plan.weights is not None:
        recorder.run.write("samples/weight", one.plan.weights)
    recorder.record(fork.step, state=one.plan.start)
    return recorder


def _check_path(path: str, run: Trajectory, replacing: bool) -> None:
    if os.path.exists(path) and os.path.samefile(path, run.path):
        raise UsageError(f"-o {path} is the run itself. Name another file")
    if os.path.exists(path) and not replacing:
        raise OpsigError(f"{path} exists. Overwrite it with --replace, or name another file")
    if not (Path(path).parent).is_dir():
        raise OpsigError(f"-o {path}: there is no folder {Path(path).parent}")
