"""All of a branching in order: forks, what changes, controls, every future once, records. S samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opsig_cli import tasks
from opsig_cli.backends import Session, targets_of
from opsig_cli.errors import UsageError
from opsig_cli.studies import comparing, training
from opsig_cli.studies.branching import controls, effects, writing
from opsig_cli.studies.branching.changes import Change
from opsig_cli.studies.branching.controls import Control
from opsig_cli.studies.branching.effects import Panel, Places
from opsig_cli.studies.branching.fork import Fork, fork_of
from opsig_cli.studies.branching.futures import Future, Futures, Plan
from opsig_cli.studies.branching.likeness import Likeness
from opsig_cli.studies.branching.naming import Names
from opsig_cli.studies.branching.request import Request
from opsig_cli.studies.results import Note, Progress
from opsig_cli.trajectory.file import Trajectory

EVERYBODY, NOBODY = 0, 1
"""Where all samples, and none, are tallied."""


@dataclass(frozen=True)
class Asked:
    """The request with all that is opened for it, which every fork shares."""

    run: Trajectory
    request: Request
    session: Session
    task: tasks.Task
    spec: tasks.TaskSpec
    names: Names
    note: Note
    progress: Progress


@dataclass(frozen=True)
class Branch:
    """One branch to train: `changed` (M,) are the samples whose weight is not 1; `controls` come along."""

    path: str
    change: Change
    plan: Plan
    changed: np.ndarray
    controls: list[Control]

    def controlled(self, fork: Fork) -> Iterator[Plan]:
        """What to train for each control."""
        for control in self.controls:
            yield replace(self.plan, weights=fork.weighted(control.weights_S))


def branch(asked: Asked) -> tuple[list[dict[str, Any]], list[Panel]]:
    """Train every branch and its controls from every fork; records, and what to draw."""
    request, paths = asked.request, asked.request.paths()
    forks = [
        fork_of(asked.run, request.settings, step, step + request.steps, asked.note) for step in request.from_steps
    ]
    records: list[dict[str, Any]] = []
    panels: list[Panel] = []
    for fork in forks:
        branches = [_branch(asked, fork, change, paths[fork.step, n]) for n, change in enumerate(request.changes)]
        found = _Stretch(asked, fork, branches).train()
        records += found[0]
        panels += found[1]
    return records, panels


def _branch(asked: Asked, fork: Fork, change: Change, path: str) -> Branch:
    """What one change means at a fork. Raises UsageError where it leaves no sample, or the task cannot do it."""
    ids = asked.run.samples
    factors = np.ones(asked.session.samples)
    for name, weight in change.weights:
        factors[ids[asked.names.positions(name)]] *= weight
    if not fork.weighted(factors).any():
        raise UsageError(f"{change.words}: no sample is left to train on. Drop fewer")
    if "label_smoothing" in change.settings and not hasattr(asked.task, "smoothed_losses"):
        raise UsageError("--label-smoothing: the task has no smoothed_losses(model, batch, smoothing)")
    settings, start = fork.changed(change, asked.session, asked.note)
    training.check_optimizer(settings.optimizer, asked.session)
    changed = np.flatnonzero(factors != 1)
    weights = fork.weighted(factors) if len(changed) else fork.weights
    plan = Plan(asked.request.schedule(settings, fork.step), start, weights)
    labels = asked.run.read("samples/label")[np.argsort(ids)] if asked.run.has("samples/label") else None
    found, lacks = controls.drawn(factors, labels, asked.request.draws, targets_of(asked.session))
    for words in lacks:
        asked.note(f"note: {change.words}: {words}")
    return Branch(path, change, plan, changed, found)


class _Stretch:
    """Everything from one fork on: which sets of samples are tallied, and each future."""

    def __init__(self, asked: Asked, fork: Fork, branches: list[Branch]):
        self._asked, self._fork, self._branches = asked, fork, branches
        self._base = Plan(asked.request.schedule(fork.settings, fork.step), fork.state, fork.weights)
        self._sets: list[np.ndarray] = [np.flatnonzero(targets_of(asked.session)), np.empty(0, np.int64)]
        self._places = [[self._tally(one.changed, control) for control in [None, *one.controls]] for one in branches]
        self._groups: dict[int, int] = {}
        if any(one.change.edge for one in branches):
            for group, positions in asked.names.groups().items():
                self._groups[group] = len(self._sets)
                self._sets.append(asked.run.samples[positions])

    def _tally(self, changed: np.ndarray, control: Control | None) -> Places:
        """Tally those that a branch changes and those that neither it nor the control touches."""
        untouched = targets_of(self._asked.session).copy()
        untouched[changed] = False
        if control is not None:
            untouched[control.changed] = False
        self._sets += [changed, untouched]
        return Places(EVERYBODY, len(self._sets) - 2, len(self._sets) - 1)

    def train(self) -> tuple[list[dict[str, Any]], list[Panel]]:
        """Train each future once, the unchanged one first; records, and what to draw."""
        asked, stop, likeness = self._asked, training.StopRequest(), Likeness(self._fork)
        same = next((one for one in self._branches if one.plan.is_like(self._base)), None)
        futures = (same is None) + sum(1 + len(one.controls) for one in self._branches)
        total = futures * (asked.request.steps + 1)
        with asked.progress("branching", total) as advance, stop.listening():
            labels = comparing.label_numbers(asked.run)
            if labels is not None:
                labels = labels[np.argsort(asked.run.samples)]
            futures = Futures(asked.session, self._sets, labels, asked.request.sharpness, advance)
            if same is None:
                unchanged = futures.in_memory(self._base, stop, likeness.add)
            else:
                unchanged = futures.into_file(self._base, self._recorder(same), stop, likeness.add)
            asked.note(f"note: {likeness.words()}")
            records, panels = [self._unchanged_record(unchanged, likeness)], []
            for one, places in zip(self._branches, self._places, strict=True):
                future = unchanged if one is same else futures.into_file(one.plan, self._recorder(one), stop)
                controlled = [futures.in_memory(plan, stop) for plan in one.controlled(self._fork)]
                written = self._records(one, places, unchanged, [future, *controlled])
                writing.keep_effects(one.path, written)
                records += written
                panels.append(effects.panel(
                    f"{one.change.words}, from step {self._fork.step}", places, unchanged, [future, *controlled],
                    [one.change.words, *(control.kind for control in one.controls)],
                ))  # fmt: skip
        return records, panels

    def _recorder(self, one: Branch):
        asked = self._asked
        return writing.recorder(
            one.path, asked.run, asked.session, asked.spec, one.change, one.plan, asked.request.replace
        )  # fmt: skip

    def _records(
        self, one: Branch, places: list[Places], unchanged: Future, futures: list[Future]
    ) -> list[dict[str, Any]]:
        """Records of a branch, of its controls, and at the edge of every group."""
        common = {
            "trajectory": one.path, "parent": self._asked.run.path, "from_step": self._fork.step,
            "change": one.change.words,
        }  # fmt: skip
        written: list[dict[str, Any]] = []
        for control, place, future in zip([None, *one.controls], places, futures, strict=True):
            written.append({
                "kind": "branch", **common, "control": None if control is None else control.kind,
                "draw": None if control is None else control.draw,
                "samples_changed": len(one.changed if control is None else control.changed),
                **effects.trained_with(one.plan.settings), **effects.beside(future, unchanged, place),
            })  # fmt: skip
        written[0]["sentence"] = effects.sentence(written[0], written[1:])
        if one.change.edge:
            rates = one.plan.settings.learning_rate, self._fork.settings.learning_rate
            written += effects.group_records(common, self._groups, futures[0], unchanged, rates)
        return written

    def _unchanged_record(self, unchanged: Future, likeness: Likeness) -> dict[str, Any]:
        """The control that changes nothing: every sample is untouched."""
        path, places = self._asked.run.path, Places(EVERYBODY, NOBODY, EVERYBODY)
        return {
            "kind": "branch", "trajectory": path, "parent": path, "from_step": self._fork.step, "change": "nothing",
            "control": "unchanged", "draw": None, "samples_changed": 0,
            **effects.trained_with(self._fork.settings), **effects.beside(unchanged, unchanged, places),
            "replay_difference": likeness.difference,
        }  # fmt: skip
