"""Whether a pair makes its own swing: training repeated for some steps from a held-out checkpoint, with both sides at
weight zero, and with as many random others of the same labels.

S samples of the run, T steps of a replay, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from opsig_cli.analysis.evidence import period_two, swing
from opsig_cli.analysis.verdicts import Silenced
from opsig_cli.backends import Session, State, Training
from opsig_cli.errors import OpsigError
from opsig_cli.settings import Settings
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.clustering.weighing import related
from opsig_cli.studies.filled import LOSS, as_recorded, targets_of
from opsig_cli.studies.missing import labels_of
from opsig_cli.studies.replaying import for_losses, replays
from opsig_cli.studies.trained import settings_at, weights_of, why_not_repeated
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

LENGTH = 5
"""Steps of a replay. At the edge a swing neither grows nor dies, so that whatever takes a little off the curvature lets
it die in the end: silent pairs and their controls differ in how fast, and that shows in the first steps."""
SETTLING = 1
"""Steps before a replay counts: the first is the last one that was made by all samples."""
BUDGET = 400
"""Steps that are repeated by default, each at the cost of a training step: as many as train the demo's run."""
SWINGS = 1.0
"""A pair can be tested by silence at a checkpoint where both its sides swing more than samples do on average."""
LEAST = 0.1
"""The same, and at least by this part of its largest swing at a held-out checkpoint: where it has hardly begun, R is
that of how others move."""


@dataclass
class Outcome:
    """What silencing showed of each pair, by its number from 0; of the others, why they were not tested, and R of their
    curvature, `curved`, where that was measured, and the pairs set `aside` for that; from where, and how many
    replays."""

    silenced: dict[int, list[Silenced]]
    untested: dict[int, str]
    steps: list[int]
    replays: int = 0
    curved: dict[int, list[float]] = field(default_factory=dict)
    aside: dict[int, list[int]] = field(default_factory=dict)


def replayable(run: Trajectory, session: Session) -> Settings | None:
    """How the run trains, to be repeated from its checkpoints; None where its file does not tell or nobody can."""
    try:
        settings = Settings.stored(run.attributes, run.path)
    except OpsigError:
        return None
    return settings if settings.optimizer in session.optimizers else None


def silence(
    run: Trajectory, session: Session, clusters: Clusters, held_out: np.ndarray, budget: int,
    advance: Callable[..., None], seed: int = 0,
) -> Outcome:  # fmt: skip
    """Silence each pair that swings, the family that it belongs to with it, at the held-out checkpoints.

    Pairs that move most come first, and `budget` bounds the steps repeated. Controls are drawn anew at each checkpoint
    from samples outside of what is silenced, with the same labels where there are as many, those in no group first.
    """
    pairs = clusters.grouping.pairs()
    steps = [int(step) for step in held_out]
    settings = replayable(run, session)
    lacking = [] if settings is None else [why_not_repeated(run, settings, step) for step in steps]
    if settings is None or any(lacking):
        why = "how it was trained is not known, to repeat it"
        why = next((f"training cannot be repeated: {words}" for words in lacking if words), why)
        return Outcome({}, dict.fromkeys(range(len(pairs)), why), [])
    outcome = Outcome({}, {}, [])
    labels = strata_of(run)
    members = [clusters.position[clusters.grouping.members(g)] for g in range(len(clusters.grouping.partner_G))]
    grouped = np.concatenate([np.empty(0, np.int64), *members])
    left = budget // LENGTH
    repeated = Repeated(run, session, settings)
    known = {step: recorded(run, step) for step in steps}
    lacking_steps = [step for step in steps if known[step] is None][:left]
    for step, losses_TS in zip(lacking_steps, repeated((step, None, None) for step in lacking_steps), strict=True):
        known[step] = losses_TS
        advance(note=f"step {step}")
    left, outcome.replays = left - len(lacking_steps), len(lacking_steps)
    outcome.steps += lacking_steps
    plains = {step: losses_TS for step, losses_TS in known.items() if losses_TS is not None}
    affordable: dict[int, list[tuple[list[int], list[int]]]] = {step: [] for step in plains}
    for unit, numbers in units_of(clusters):
        for step in plains:
            swinging = [n for n in numbers if step in swinging_at(plains, [members[g] for g in pairs[n]])]
            if swinging and left < 2:
                outcome.untested |= dict.fromkeys(swinging, "the budget of replays did not reach as far (--budget)")
            elif swinging:
                affordable[step].append((unit, swinging))
                left -= 2
    # all of a checkpoint in turn: they have their first gradient in common
    tried = [(step, *of_unit) for step, units in affordable.items() for of_unit in units]

    def silenced() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for step, unit, _ in tried:
            silent = np.concatenate([members[group] for group in unit])
            yield step, silent, silent
            yield step, controls_of(labels, silent, grouped, np.random.default_rng([seed, step, *unit])), silent

    replayed = repeated(silenced())
    for step, _, swinging in tried:
        without, controlled = next(replayed), next(replayed)
        outcome.replays += 2
        outcome.steps += [step] if step not in outcome.steps else []
        advance(2, note=f"step {step}")
        for n in swinging:
            outcome.silenced.setdefault(n, []).append(
                compared(step, [members[group] for group in pairs[n]], plains[step], without, controlled)
            )
    for n in range(len(pairs)):
        if n not in outcome.silenced and n not in outcome.untested:
            outcome.untested[n] = _why_not(plains, [members[g] for g in pairs[n]])
    return outcome


def recorded(run: Trajectory, step: int) -> np.ndarray | None:
    """The run's own losses (T, S) from a checkpoint on, which a replay of all samples would repeat; None where they are
    not all in the file."""
    raw = as_recorded(run)
    if not raw.has(LOSS):
        return None
    steps = raw.steps("losses")
    first = int(np.searchsorted(steps, step))
    if not np.array_equal(steps[first : first + LENGTH + 1], np.arange(step, step + LENGTH + 1)):
        return None
    losses_TS = raw.rows(LOSS, first, first + LENGTH + 1)
    return losses_TS if np.isfinite(losses_TS[:, targets_of(run)]).all() else None


def strata_of(run: Trajectory) -> np.ndarray:
    """What controls are drawn within, (S,): the samples' labels, or one stratum for all where there are none."""
    labels = labels_of(run)
    if labels is not None:
        return labels
    return np.where(targets_of(run), 0, -1)  # a sample without a loss stands for none that has one


def compared(step: int, sides: list[np.ndarray], *losses_TS: np.ndarray) -> Silenced:
    """A pair's swing when all train, when its samples are silent, and when their controls are."""
    both = np.concatenate(sides)
    whole = [_swing(losses[:, both]) for losses in losses_TS]
    parts = [[_swing(losses[:, side]) for losses in losses_TS[1:]] for side in sides]
    ratios = [silent / controls if controls > 0 else float("nan") for silent, controls in parts]
    return Silenced(step, whole[0], whole[1], whole[2], float(np.max(ratios)))


def units_of(clusters: Clusters) -> list[tuple[list[int], list[int]]]:
    """What is silenced at once, groups, and for which pairs: a family for all its pairs, else the pair itself; those
    that move most first."""
    pairs = clusters.grouping.pairs()
    units: dict[tuple[int, ...], list[int]] = {}
    related_groups = related(clusters)
    for number, pair in enumerate(pairs):
        family = next((groups for groups in related_groups if set(pair) <= set(groups)), list(pair))
        units.setdefault(tuple(family), []).append(number)
    weight = {unit: max(clusters.pairs[n].movement for n in numbers) for unit, numbers in units.items()}
    return [(list(unit), units[unit]) for unit in sorted(units, key=lambda unit: -np.nan_to_num(weight[unit]))]


def controls_of(
    labels: np.ndarray, silent: np.ndarray, grouped: np.ndarray, generator: np.random.Generator,
    aside: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """As many samples that are neither silent nor set aside, with the same labels as far as there are such; any others
    make up.

    Of each label those in no group come first: a control that took in another pair, which may swing the whole run,
    would show what that pair does.
    """
    outside = np.setdiff1d(np.arange(len(labels)), silent if aside is None else np.concatenate([silent, aside]))
    alone = ~np.isin(outside, grouped)
    chosen = []
    for label, count in zip(*np.unique(labels[silent], return_counts=True), strict=True):
        same = labels[outside] == label
        chosen += _drawn([outside[same & alone], outside[same & ~alone]], int(count), generator)
    drawn = np.concatenate(chosen)
    rest = ~np.isin(outside, drawn)
    missing = len(silent) - len(drawn)
    return np.concatenate([drawn, *_drawn([outside[rest & alone], outside[rest & ~alone]], missing, generator)])


def _drawn(pools: list[np.ndarray], count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """So many samples at random, from the first pool as far as it reaches."""
    found = []
    for pool in pools:
        found.append(generator.choice(pool, min(count, len(pool)), replace=False))
        count -= len(found[-1])
    return found


class Repeated:
    """Losses (T, S) of all samples, or of those that are wanted, each time that training is repeated from a checkpoint
    with some samples silent, or None; NaN of the others, and from the step at which they stop being finite."""

    def __init__(self, run: Trajectory, session: Session, settings: Settings):
        self._run, self._session, self._settings = run, session, settings
        self._weights = weights_of(run)

    def __call__(self, asked: Iterable[tuple[int, np.ndarray | None, np.ndarray | None]]) -> Iterator[np.ndarray]:
        """Asked by checkpoint, the silent samples' positions, and those of the wanted."""
        for snapshots in replays(self._session, self._trainings(asked)):
            losses = np.full((LENGTH + 1, self._session.samples), np.nan, np.float32)
            for row, snapshot in enumerate(snapshots):
                losses[row] = snapshot.losses
            yield losses[:, self._run.samples]

    def _trainings(
        self, asked: Iterable[tuple[int, np.ndarray | None, np.ndarray | None]]
    ) -> Iterator[tuple[Training, State]]:
        samples, couples = self._run.samples, getattr(self._session, "couples_samples", False)
        state = None
        for step, silent, wanted in asked:
            if state is None or state.step != step:
                state = read_state(self._run, step)
            weights = self._weights
            if silent is not None:
                weights = np.ones(self._session.samples) if weights is None else weights.copy()
                weights[samples[silent]] = 0
            tracked = None if wanted is None or couples else np.sort(samples[wanted])
            yield for_losses(settings_at(self._run, self._settings, step), state, LENGTH, weights, tracked), state


def _swing(losses_TM: np.ndarray) -> float:
    return swing(losses_TM[SETTLING:])


def swings(plain: np.ndarray, sides: list[np.ndarray]) -> bool:
    """Whether both sides turn back and forth, and more than samples do on average."""
    everybody = _with_losses(plain)
    return all(period_two(plain[:, side]) > 0 and _swing(plain[:, side]) > SWINGS * _swing(everybody) for side in sides)


def _with_losses(plain: np.ndarray) -> np.ndarray:
    """The losses of those that have one: a sample without a target has none."""
    return plain[:, np.isfinite(plain[0])]


def swinging_at(plains: Mapping[int, np.ndarray], sides: list[np.ndarray]) -> list[int]:
    """The checkpoints, of those from which losses (T, S) are given, at which a pair can be tested by silence."""
    both = np.concatenate(sides)
    swing_at = {step: _swing(plain[:, both]) for step, plain in plains.items() if swings(plain, sides)}
    return [step for step, own in swing_at.items() if own >= LEAST * max(swing_at.values())]


def _why_not(plains: dict[int, np.ndarray], sides: list[np.ndarray]) -> str:
    """Why a pair could not be tried."""
    if not plains:
        return "no training was repeated (--budget)"
    if all(not period_two(_with_losses(plain)) > 0 for plain in plains.values()):
        return "the run does not swing at the checkpoints held out, so that silence says nothing"
    if all(not period_two(plain[:, side]) > 0 for plain in plains.values() for side in sides):
        return "its losses do not swing, so that silence says nothing"
    return "one side or both swing less than samples do on average, so that silence says nothing"
