"""`sharpness`: curvature of the whole loss and of single samples along a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from opsig_cli import backends
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.studies import answers, curvature, ends, floor, foreseen, slopes, tracking
from opsig_cli.studies.door import named
from opsig_cli.studies.pace import paced
from opsig_cli.studies.parts import share
from opsig_cli.studies.results import Note, Progress, Records, Run, opened, quietly, unseen
from opsig_cli.studies.trained import other_loss, settings_of
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
    from opsig_cli.studies import drawing

    wanted = [name for name in (metrics or "").split(",") if name]
    known = (*curvature.SAMPLE_METRICS, *curvature.STEP_METRICS)
    for metric in wanted:
        if metric not in known:
            raise UsageError(f"no metric is called '{metric}'. Known: {', '.join(known)}")
    if at not in (None, *floor.PLACES):
        raise UsageError(f"--at is one of {', '.join(floor.PLACES)}, not '{at}'")
    if at == "floor" and (wanted or slice is not None):
        raise UsageError("--metrics and --slice are measured where the iterates stand. Leave --at floor out")
    if name and (wanted or slice is not None or plain):
        raise UsageError("--name is of what decides stability. Leave --metrics, --slice and --plain out")
    of_samples = [metric for metric in wanted if metric in curvature.SAMPLE_METRICS]
    keeps = not wanted and slice is None
    divided = share.part_of(part, output)
    if divided and (name or slice is not None or replace or set(wanted) - set(of_samples)):
        raise UsageError(
            "parts are of eigenvalues and of single samples' metrics. Leave --part, or the other option, out"
        )
    with opened(run, "r+" if keeps and not divided else "r") as trajectory:
        if keeps and not divided and not trajectory.writable:
            raise OpsigError(f"{trajectory.path} is open for reading. Eigenvalues are kept in it: open it with 'r+'")
        damage: list[str] = []

        def work():
            chosen_steps = curvature.select_steps(trajectory, steps if slice is None else str(slice))
            if slice is None and (few := curvature.few_words(trajectory, steps, chosen_steps)):
                note(few)
            if name and steps is None:
                chosen_steps = chosen_steps[-1:]

            def open_session() -> backends.Session:
                session, _ = tracking.open_session(trajectory, task, device, backend, note, allow_changed_data)
                backends.require(session, backends.Curvature, backend, "curvature")
                return session

            session = tracking.opened_later(open_session) if keeps and not plan else open_session()
            own_steps = divided.share(chosen_steps) if divided else chosen_steps
            if wanted:
                chosen = named.chosen(trajectory, records or [], random, seed) if of_samples else {}
                samples = len(np.unique(np.concatenate([*chosen.values(), []])))
                row = 8 * len(trajectory.samples) * len(of_samples) if divided else 0
                takes = foreseen.metrics(trajectory, own_steps, wanted, samples, row)
            else:
                count = k or (ends.NAMED if name else 1)
                takes = foreseen.eigenvalues(trajectory, own_steps, count, name)
            if slice is not None:
                takes = foreseen.along(own_steps)
            if plan:
                return takes.plan(trajectory, session, backend)
            if wanted:  # what solves for eigenvalues refuses by itself, when its checkpoint is loaded
                takes.require(trajectory, session)
            if not wanted and (other := other_loss(trajectory, settings_of(trajectory))):
                note(f"note: measured of the mean loss of all samples, while {trajectory.path} minimises {other}")
            if "gradient_norm" in of_samples and getattr(session, "couples_samples", False):
                note("note: with batch norm in chunks, gradient norms hold each chunk's statistics fixed")
            if "sample_sharpness" in of_samples:
                backends.require(session, backends.SampleSharpness, backend, "sample_sharpness")
            if slice is not None:
                groups = named.groups_of(trajectory, records or [])
                return curvature.slice_records(trajectory, session, slice, span, groups)
            if of_samples:
                how = {"what": ",".join(of_samples), "steps": steps, "tolerance": tolerance}
                apart = _measured_apart(trajectory, divided, output, share.OF_SAMPLES, how)
                with (
                    apart as into,
                    progress("curvature", len(own_steps)) as shown,
                    paced(session, shown, len(own_steps), backends.PRODUCTS) as advance,
                ):
                    return curvature.sample_records(
                        into, session, own_steps, chosen, of_samples, tolerance, advance, keep=divided is not None
                    )
            if wanted:
                with (
                    progress("curvature", len(chosen_steps)) as shown,
                    paced(session, shown, len(chosen_steps), backends.PRODUCTS) as advance,
                ):
                    return curvature.step_records(trajectory, session, chosen_steps, wanted, advance, note)
            if name:
                return _ends(
                    trajectory, session, backend, chosen_steps, k or ends.NAMED, tolerance, at, replace, note, progress
                )
            place, words = floor.choose_place(trajectory, session, chosen_steps, at)
            how = {
                "what": "eigenvalues",
                "k": k or 1,
                "at": place,
                "plain": plain,
                "steps": steps,
                "tolerance": tolerance,
            }
            with _measured_apart(trajectory, divided, output, share.CURVATURE, how) as into:
                return _eigenvalues(
                    into, session, own_steps, k or 1, tolerance, (place, words), plain, replace, note, progress
                )

        written = without_damage(work, damage.append)
        rates, minibatches = _rates(trajectory), _minibatches(trajectory)
    if isinstance(written, Records):
        return written
    measured = ("residual", "sample_sharpness_residual")
    groups_named = named.names_of(records or []) if slice is not None else {}
    unmet = sum(any((r.get(key) or 0) > tolerance for key in measured) for r in written)
    notes = [f"{unmet} eigenvalues did not reach the tolerance; see their residuals"] if unmet else []

    def draw():
        with opened(run, like=trajectory) as again:
            return drawing.draw_ends(again, written) if name else drawing.draw_curvature(again, written, groups_named)

    title = trajectory.path
    if any(record.get("preconditioned") for record in written):
        title += ": preconditioned Hessian"
    if any(record.get("at") == "floor" for record in written):
        title += ", at the floor of the valley"
    answer = answers.sharp(written, trajectory.path, task, rates, minibatches)
    if divided and answer:
        answer = answers.Answer(answer.found, answers.command("merge", trajectory.path, str(output)))
    return Records(written, notes=notes, damage=damage, title=title, draw=draw, answer=answer)


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
    run: Trajectory, session: backends.Session, backend: str | None, steps: list[int], count: int, tolerance: float,
    at: str | None, replace: bool, note: Note, progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """Who stands at the ends of `count` eigenvectors, measured where they are missing."""
    if replace:
        run.remove("slopes")
    have = set(run.steps("slopes").tolist()) & set(steps)
    run.check("slopes", have)
    place, words = _place_of_name(run, session, steps, at)
    missing, held = slopes.check_kept(run, steps, count, place)
    if missing:
        backends.require(session, backends.Slopes, backend, "slopes")
    if words:
        note(words)
    bar = progress("eigenvectors", len(missing))
    with bar as shown, paced(session, shown, len(missing), count * backends.PRODUCTS) as advance:
        for step in slopes.measure(run, session, missing, held, tolerance, place):
            advance(note=f"step {step}")
    return ends.records(run, steps, count, place)


@contextmanager
def _measured_apart(
    run: Trajectory, part: share.Part | None, output: str | None, groups: Sequence[str], settings: dict[str, Any]
) -> Iterator[Trajectory]:
    """The run, whose rows of these groups are a part's where there is one."""
    if part is None:
        yield run
        return
    with share.opened_part(run, part, str(output), groups, settings) as divided:
        yield divided


def _eigenvalues(
    run: Trajectory, session: backends.Session, steps: list[int], k: int, tolerance: float,
    where: tuple[str, str | None], plain: bool, replace: bool, note: Note, progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """The `k` largest eigenvalues, measured where they are missing or rougher than the tolerance.

    `where`: the place, and what to say of it.
    """
    place, words = where
    group = curvature.group_of(None if plain else settings_of(run), place)
    if replace:
        run.remove(group)
    run.check(group, set(run.steps(group).tolist()) & set(steps))
    count = curvature.count_to_measure(run, group, k)
    if words:
        note(words)
    missing, rough = curvature.to_measure(run, group, steps, k, tolerance)
    if len(missing) < len(steps):
        note(f"measured already: {len(steps) - len(missing)} of {len(steps)} checkpoints")
    bar = progress("sharpness", len(missing))
    with bar as shown, paced(session, shown, len(missing), backends.PRODUCTS) as advance:
        for step in curvature.measure(run, session, group, missing, count, tolerance):
            advance(note=f"step {step}")
    if rough:
        note(f"measured again: {rough} checkpoints, held to a residual above the tolerance {tolerance:g}")
    found = curvature.records(run, group, steps, tolerance, k)
    if settings_of(run) is None:
        note("no stability threshold: the file does not say how it was trained. Recorder takes that as settings_json")
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
