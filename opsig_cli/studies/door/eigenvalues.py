"""`sharpness`: curvature of the whole loss and of single samples along a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli import backends
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.studies import answers, curvature, ends, floor, foreseen, slopes, tracking
from opsig_cli.studies.door import named
from opsig_cli.studies.pace import paced
from opsig_cli.studies.parts import share
from opsig_cli.studies.results import Note, Progress, Records, Run, opened, quietly, unseen
from opsig_cli.studies.trained import backend_of, other_loss, settings_of
from opsig_cli.trajectory.checking import without_damage
from opsig_cli.trajectory.file import Trajectory


def sharpness(
    run: Run, *, k: int | None = None, steps: str | None = None, tolerance: float = 1e-3, metrics: str | None = None,
    random: int = 0, slice: int | None = None, span: float = 0.2, at: str | None = None, name: bool = False,
    plain: bool = False, seed: int = 0, replace: bool = False, part: str | None = None, output: str | None = None,
    plan: bool = False, records: Sequence[dict[str, Any]] | None = None, task: str | None = None,
    device: str | None = None, backend: str | None = None, allow_changed_data: bool = False, note: Note = quietly,
    progress: Progress = unseen,
) -> Records:  # fmt: skip
    """The largest eigenvalues of the loss's Hessian along a run, measured where they are missing and kept in its file.

    With `metrics` ("gradient_norm,curvature", ...), of single samples or of the whole loss instead: those that
    `records` name, `random` ones drawn with `seed`, or all. With `slice`, mean losses along the top eigenvector through
    this step, `span` each way, of the groups that `records` name. With `name`, who stands at the two ends of each
    eigenvector: records of kind "eigenvector". `k`: eigenvalues, 1 or with `name` 4; `steps`: checkpoints "A:B:C", all
    or with `name` the last; `tolerance`: residual |Hv - av| / |a| to reach; `at`: "floor" or "iterate", or as the run
    does; `plain`: without Adam's preconditioner; `replace`: measure anew. `part`: "I/N", of so many shares of the
    checkpoints this one, into the file `output`, which `opsig merge` takes in. `plan`: only say what it takes.
    """
    from opsig_cli.studies import drawing, plotting

    wanted = [metric for metric in (metrics or "").split(",") if metric]
    asked = _Asked(
        wanted, k, steps, tolerance, slice, span, at, name, plain, replace, share.part_of(part, output), output,
        records or [], random, seed,
    )  # fmt: skip
    asked.check()
    writes = asked.keeps and not asked.part
    damage: list[str] = []
    with opened(run, "r+" if writes else "r") as trajectory:
        if writes and not trajectory.writable:
            raise OpsigError(f"{trajectory.path} is open for reading. Eigenvalues are kept in it: open it with 'r+'")
        backend = backend_of(trajectory, backend)

        def open_session() -> backends.Session:
            session, _ = tracking.open_session(trajectory, task, device, backend, note, allow_changed_data)
            backends.require(session, backends.Curvature, backend, "curvature")
            return session

        def work() -> list[dict[str, Any]]:
            chosen = asked.chosen_steps(trajectory, note)
            session = tracking.opened_later(open_session) if asked.keeps and not plan else open_session()
            takes = asked.takes(trajectory, chosen)
            if plan:
                return takes.plan(trajectory, session, backend)
            if wanted:  # what solves for eigenvalues refuses by itself, when its checkpoint is loaded
                takes.require(trajectory, session)
            return _measured(asked, trajectory, session, backend, chosen, note, progress)

        written = without_damage(work, damage.append)
        rates, minibatches = _rates(trajectory), _minibatches(trajectory)
    if isinstance(written, Records):
        return written
    measured = ("residual", "sample_sharpness_residual")
    groups_named = named.names_of(asked.records) if slice is not None else {}
    unmet = sum(any((r.get(key) or 0) > tolerance for key in measured) for r in written)
    notes = [f"{unmet} eigenvalues did not reach the tolerance; see their residuals"] if unmet else []

    def draw():
        with opened(run, like=trajectory) as again:
            return drawing.draw_ends(again, written) if name else plotting.draw_curvature(again, written, groups_named)

    title = trajectory.path
    if any(record.get("preconditioned") for record in written):
        title += ": preconditioned Hessian"
    if any(record.get("at") == "floor" for record in written):
        title += ", at the floor of the valley"
    answer = answers.sharp(written, trajectory.path, task, rates, minibatches)
    if asked.part and answer:
        answer = answers.Answer(answer.found, answers.command("merge", trajectory.path, str(output)))
    return Records(written, notes=notes, damage=damage, title=title, draw=draw, answer=answer)


@dataclass(frozen=True)
class _Asked:
    """What `sharpness` is asked to measure, of which checkpoints, and how; see there."""

    metrics: list[str]
    k: int | None
    steps: str | None
    tolerance: float
    slice: int | None
    span: float
    at: str | None
    name: bool
    plain: bool
    replace: bool
    part: share.Part | None
    output: str | None
    records: Sequence[dict[str, Any]]
    random: int
    seed: int

    @property
    def of_samples(self) -> list[str]:
        """The metrics of single samples among those that are asked for."""
        return [metric for metric in self.metrics if metric in curvature.SAMPLE_METRICS]

    @property
    def keeps(self) -> bool:
        """Whether what is measured is kept in the run's file."""
        return not self.metrics and self.slice is None

    @property
    def count(self) -> int:
        """K, of eigenpairs."""
        return self.k or (ends.NAMED if self.name else 1)

    def check(self) -> None:
        """Raise UsageError for what is unknown, or excludes another."""
        known = (*curvature.SAMPLE_METRICS, *curvature.STEP_METRICS)
        for metric in self.metrics:
            if metric not in known:
                raise UsageError(f"no metric is called '{metric}'. Known: {', '.join(known)}")
        if self.of_samples and len(self.of_samples) < len(self.metrics):
            others = ",".join(metric for metric in self.metrics if metric not in self.of_samples)
            raise UsageError(
                f"{','.join(self.of_samples)} is of single samples and {others} of the whole loss. Measure one after "
                f"the other: --metrics {others}"
            )
        if self.at not in (None, *floor.PLACES):
            raise UsageError(f"--at is one of {', '.join(floor.PLACES)}, not '{self.at}'")
        if self.at == "floor" and not self.keeps:
            raise UsageError("--metrics and --slice are measured where the iterates stand. Leave --at floor out")
        if self.name and (not self.keeps or self.plain):
            raise UsageError("--name is of what decides stability. Leave --metrics, --slice and --plain out")
        apart = self.name or self.slice is not None or self.replace or (self.metrics and not self.of_samples)
        if self.part and apart:
            raise UsageError(
                "parts are of eigenvalues and of single samples' metrics. Leave --part, or the other option, out"
            )

    def chosen_steps(self, run: Trajectory, note: Note) -> list[int]:
        """The checkpoints to measure, all parts' together."""
        if self.slice is not None:
            return curvature.select_steps(run, str(self.slice))
        chosen = curvature.select_steps(run, self.steps)
        if few := curvature.few_words(run, self.steps, chosen):
            note(few)
        return chosen[-1:] if self.name and self.steps is None else chosen

    def own(self, steps: list[int]) -> list[int]:
        """Of these checkpoints, those of this part."""
        return self.part.share(steps) if self.part else steps

    def chosen_samples(self, run: Trajectory) -> dict[str, np.ndarray]:
        """Positions of the samples to measure by the name of their set; none where no metric is of samples."""
        return named.chosen(run, self.records, self.random, self.seed) if self.of_samples else {}

    def takes(self, run: Trajectory, steps: list[int]) -> foreseen.Foreseen:
        """What measuring these checkpoints takes."""
        if self.slice is not None:
            return foreseen.along(self.own(steps))
        if not self.metrics:
            return foreseen.eigenvalues(run, self.own(steps), self.count, self.name)
        samples = len(np.unique(np.concatenate([*self.chosen_samples(run).values(), []])))
        row = 8 * len(run.samples) * len(self.of_samples) if self.part else 0
        return foreseen.metrics(run, self.own(steps), self.metrics, samples, row)

    @contextmanager
    def rows_in(self, run: Trajectory, groups: Sequence[str], **settings: Any) -> Iterator[Trajectory]:
        """The run, whose rows of these groups are a part's where there is one."""
        if self.part is None:
            yield run
            return
        settings |= {"steps": self.steps, "tolerance": self.tolerance}
        with share.opened_part(run, self.part, str(self.output), groups, settings) as divided:
            yield divided


def _measured(
    asked: _Asked, run: Trajectory, session: backends.Session, backend: str | None, steps: list[int], note: Note,
    progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """Records of what is asked for at these checkpoints."""
    if asked.keeps and (other := other_loss(run, settings_of(run))):
        note(f"note: measured of the mean loss of all samples, while {run.path} minimises {other}")
    if "gradient_norm" in asked.metrics and getattr(session, "couples_samples", False):
        note("note: with batch norm in chunks, gradient norms hold each chunk's statistics fixed")
    if "sample_sharpness" in asked.metrics:
        backends.require(session, backends.SampleSharpness, backend, "sample_sharpness")
    if asked.slice is not None:
        groups = named.groups_of(run, asked.records)
        return curvature.slice_records(run, session, asked.slice, asked.span, groups)
    if asked.metrics:
        return _metrics(asked, run, session, steps, note, progress)
    if asked.name:
        return _ends(asked, run, session, backend, steps, note, progress)
    return _eigenvalues(asked, run, session, steps, note, progress)


def _metrics(
    asked: _Asked, run: Trajectory, session: backends.Session, steps: list[int], note: Note, progress: Progress
) -> list[dict[str, Any]]:
    """Metrics of single samples, or of the whole loss."""
    own = asked.own(steps) if asked.of_samples else steps
    rows = asked.rows_in(run, share.OF_SAMPLES, what=",".join(asked.of_samples))
    with (
        rows as into,
        progress("curvature", len(own)) as shown,
        paced(session, shown, len(own), backends.PRODUCTS) as advance,
    ):
        if not asked.of_samples:
            return curvature.step_records(run, session, own, asked.metrics, advance, note)
        return curvature.sample_records(
            into, session, own, asked.chosen_samples(run), asked.of_samples, asked.tolerance, advance,
            keep=asked.part is not None,
        )  # fmt: skip


def _minibatches(run: Trajectory) -> str | None:
    """What the run's minibatches are, in words; None where its batches are full, or it does not say."""
    settings = settings_of(run)
    if settings is None or settings.batch_size is None:
        return None
    return f"batches of {settings.batch_size:,}" if settings.batch_size else "minibatches"


def _rates(run: Trajectory) -> dict[int, float]:
    """The learning rate of every step that the file tells it of."""
    if not run.has("scalars/learning_rate"):
        return {}
    steps = run.steps("scalars")
    try:
        return dict(zip(steps.tolist(), run.rows("scalars/learning_rate", 0, len(steps)).tolist(), strict=True))
    except OpsigError:  # a damaged row: the answer goes without
        return {}


def _ends(
    asked: _Asked, run: Trajectory, session: backends.Session, backend: str | None, steps: list[int], note: Note,
    progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """Who stands at the ends of eigenvectors, measured where they are missing."""
    if asked.replace:
        run.remove("slopes")
    run.check("slopes", set(run.steps("slopes").tolist()) & set(steps))
    place, words = _place_of_name(run, session, steps, asked.at)
    missing, held = slopes.check_kept(run, steps, asked.count, place)
    if missing:
        backends.require(session, backends.Slopes, backend, "slopes")
    if words:
        note(words)
    bar = progress("eigenvectors", len(missing))
    with bar as shown, paced(session, shown, len(missing), asked.count * backends.PRODUCTS) as advance:
        for step in slopes.measure(run, session, missing, held, asked.tolerance, place):
            advance(note=f"step {step}")
    return ends.records(run, steps, asked.count, place)


def _eigenvalues(
    asked: _Asked, run: Trajectory, session: backends.Session, steps: list[int], note: Note, progress: Progress
) -> list[dict[str, Any]]:
    """The largest eigenvalues, measured where they are missing or rougher than the tolerance."""
    place, words = floor.choose_place(run, session, steps, asked.at)
    how = {"what": "eigenvalues", "k": asked.count, "at": place, "plain": asked.plain}
    with asked.rows_in(run, share.CURVATURE, **how) as into:
        own, group = asked.own(steps), curvature.group_of(None if asked.plain else settings_of(into), place)
        if asked.replace:
            into.remove(group)
        into.check(group, set(into.steps(group).tolist()) & set(own))
        count = curvature.count_to_measure(into, group, asked.count)
        if words:
            note(words)
        missing, rough = curvature.to_measure(into, group, own, asked.count, asked.tolerance)
        if len(missing) < len(own):
            note(f"measured already: {len(own) - len(missing)} of {len(own)} checkpoints")
        bar = progress("sharpness", len(missing))
        with bar as shown, paced(session, shown, len(missing), backends.PRODUCTS) as advance:
            for step in curvature.measure(into, session, group, missing, count, asked.tolerance):
                advance(note=f"step {step}")
        if rough:
            note(f"measured again: {rough} checkpoints, held to a residual above the tolerance {asked.tolerance:g}")
        found = curvature.records(into, group, own, asked.tolerance, asked.count)
        if settings_of(into) is None:
            note(
                "no stability threshold: the file does not say how it was trained. Recorder takes that as settings_json"
            )
        return found


def _place_of_name(
    run: Trajectory, session: backends.Session, steps: list[int], at: str | None
) -> tuple[str, str | None]:
    """Where to measure slopes, and a note: where the file has others, if a person does not say."""
    if at is None and (kept := set(slopes.places_kept(run).values())):
        return kept.pop(), None
    place, words = floor.choose_place(run, session, steps, at)
    if at is None and place == "iterate" and (why := floor.why_no_floor(run, steps[-1])):
        words = f"note: measured at the iterates, as {run.path} has no floor: {why}"
    return place, words
