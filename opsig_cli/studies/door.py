"""The Python door: `mine`, `cluster`, `sharpness` and `branch` with the options of the commands, under the same names.

The commands call exactly these functions, so that a notebook and a shell never differ. `run` is a path, or a trajectory
that `open_trajectory` gave. Each returns `Records`: a list of dictionaries with `.frame()`, `.figure()`, `.notes`, and
`.damage`, which names rows of the file that are damaged: the records are those of the run without them.
All raise OpsigError, whose text says what is wrong, where, and what to do.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from opsig_cli import backends
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.studies import (
    answers,
    curvature,
    ends,
    floor,
    kept,
    measured,
    mining,
    missing,
    planning,
    sighted,
    slopes,
    tracking,
)
from opsig_cli.studies.branching import changes, flow, fork, naming, request
from opsig_cli.studies.clustering import agreement, explaining, finding, keeping, neighbours, selecting
from opsig_cli.studies.clustering import records as clustered
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.studies.filled import filled
from opsig_cli.studies.numbers import loss_unit, percent
from opsig_cli.studies.parts import share
from opsig_cli.studies.ranges import parse_range
from opsig_cli.studies.results import Note, Progress, Records, opened, quietly, unseen
from opsig_cli.studies.trained import other_loss, settings_of
from opsig_cli.trajectory.checking import without_damage
from opsig_cli.trajectory.file import Trajectory

Run = str | os.PathLike | Trajectory


def mine(
    run: Run, *, top: int = 40, step: int | None = None, window: str | None = None, score: str | None = None,
    direction: str = "both", share: int | None = None,
) -> Records:  # fmt: skip
    """The samples whose loss moves most, one record each, the largest score first (the paper's section 2).

    Before them, of kind "not_finite", samples whose loss is not finite while the others' are.

    Of a run that saw its samples batch by batch (sightings), `change` is what a loss exceeds the trend of all and the
    sample's own level by, and with `step` the rows of that step's batch are ranked by their shares of its excess.

    `step`: rank by the change of this one step; `window`: steps "A:B" to look at, both ends included; `score`: one of
    `mining.SCORES`, or as the run allows; `direction`: "up", "down" or "both"; `share`: add each sample's part of the
    whole loss's change at this step.
    """
    from opsig_cli.studies import drawing

    if step is not None and window is not None:
        raise UsageError("--step and --window exclude each other. Give one of them")
    span = parse_range(window, "--window")
    damage: list[str] = []
    origin = back = None
    with opened(run) as trajectory:

        def work():
            nonlocal origin, back
            if sighted.chosen(trajectory, step):
                found = sighted.find(trajectory, top, score, step, span, direction)
                return found, sighted.records(trajectory, found, share), found.broken
            options = {"top": top, "score": score, "step": step, "window": span, "direction": direction}
            origin = kept.origin_of(trajectory, options) if mining.takes_long(trajectory) else None
            back = kept.read_back(trajectory, "mined", mining.Movers, origin)
            if back is not None:
                trajectory.check("losses", trajectory.steps("losses")[back.row].tolist())
            found = mining.find(trajectory, top, score, step, span, direction) if back is None else back
            records = mining.records(filled(trajectory, found.known), found, share)
            return found, records, missing.not_finite(trajectory, found.known)

        found, records, broken = without_damage(work, damage.append)
        unit, own = loss_unit(trajectory), answers.task_of(trajectory, None)
        grouped = len(trajectory.steps("checkpoints")) > 1
    if back is None and not isinstance(run, Trajectory):
        kept.keep(trajectory.path, "mined", origin, found)
    notes = [found.note] if found.note else []
    if share is not None:
        of = {"movement": f"of all movement at step {share}", "share": "of the change there"}
        known = {name: [r.get(f"{name}_at_step") for r in records] for name in of}
        said = [f"{percent(sum(p or 0 for p in known[name]))} {words}" for name, words in of.items()
                if any(p is not None for p in known[name])]  # fmt: skip
        notes.append(f"these {len(records)} samples carry {', and '.join(said) or f'nothing of step {share}'}")

    def draw():
        with opened(run, like=trajectory) as again:
            if isinstance(found, sighted.Sighted):
                return drawing.draw_sighted(again, found, records)
            return drawing.draw_movers(filled(again, found.known), found, records)

    title = f"{trajectory.path}: samples that move most, by {found.score_name}"
    if isinstance(found, sighted.Sighted):
        answer = answers.sighted(records, trajectory.path, step, grouped, own)
    else:
        answer = answers.mined(broken + records, trajectory.path, unit, own)
    return Records(broken + records, notes=notes, damage=damage, title=title, draw=draw, answer=answer)


def cluster(
    run: Run, *, by: str | None = None, top: int | None = None, window: str | None = None, join: bool | None = None,
    sketch: int | None = None, explain: int | None = None, truth: bool = False, test: str = "replay",
    budget: int | None = None, replace: bool = False, sample: int | None = None, verdict: Sequence[str] = (),
    pair: Sequence[int] = (), records: Sequence[dict[str, Any]] | None = None, task: str | None = None,
    device: str | None = None, backend: str | None = None, allow_changed_data: bool = False, note: Note = quietly,
    progress: Progress = unseen,
) -> Records:  # fmt: skip
    """Groups of samples that move together and the pairs that oppose: records of kind "pair", "group" and "member".

    Before them, of kind "not_finite", samples whose loss is not finite while the others' are.

    `by`: "gradient", "slope", "loss" or "both", or as the run allows; `top`: samples to mine first; `records`: those
    of `mine`, to be grouped instead; `window`: steps "A:B", those that were mined by default; `join`: add samples that
    were not mined but align; `sketch`: estimate cosines from so many numbers a sample; `explain`: add records of kind
    "explain" that take the change at this step apart; `truth`: add one of kind "agreement" with the sides that a task
    planted; `test`: "replay" repeats training with a pair's samples silent, for at most `budget` steps in all,
    "held-out" looks at checkpoints that had no part in finding it, "none" leaves both out of the verdict; `sample`: add
    one record of kind "sample" that says which groups are against this sample, and of kind "neighbour" those of its
    nearest opponents and allies; `verdict`, `pair`: give and draw the pairs of these verdicts or numbers alone, with
    their groups and members. What was found with the same options, and nothing has changed since, is read from the
    file, unless `replace`; of a `run` that is a path it is kept there.
    """
    chosen = selecting.Selection(verdict, pair)
    if chosen and sample is not None:
        raise UsageError("--sample is of one sample's opponents. Leave --verdict and --pair out")
    return _cluster(
        run, keeping.Keeper(replace), by, top, window, join, sketch, explain, truth, test, budget, sample, chosen,
        records, task, device, backend, allow_changed_data, note, progress,
    )  # fmt: skip


def _cluster(
    run: Run, keeper: keeping.Keeper, by: str | None, top: int | None, window: str | None, join: bool | None,
    sketch: int | None, explain: int | None, truth: bool, test: str, budget: int | None, sample: int | None,
    chosen: selecting.Selection, records: Sequence[dict[str, Any]] | None, task: str | None, device: str | None,
    backend: str | None, allow_changed_data: bool, note: Note, progress: Progress,
) -> Records:  # fmt: skip
    from opsig_cli.studies import describing, drawing

    if by not in (None, *finding.BY):
        raise UsageError(f"--by is one of {', '.join(finding.BY)}, not '{by}'")
    if test not in finding.TESTS:
        raise UsageError(f"--test is one of {', '.join(finding.TESTS)}, not '{test}'")
    if by in ("loss", "slope") and sketch is not None:
        raise UsageError(f"--sketch is of gradients, which --by {by} does not take. Leave one of them out")
    samples = None if records is None else _samples_of(records)
    span = parse_range(window, "--window") if window else mining.mined_window(records or [])
    damage: list[str] = []
    if not isinstance(run, Trajectory):
        describing.renew(run, task, note)
    with opened(run) as trajectory:
        if sample is not None:
            mining.positions_of(trajectory, [sample])  # refused before anything is loaded
        if explain is not None and not sighted.chosen(trajectory):
            explaining.row_of(trajectory, explain)

        def work():
            found = keeper.find(
                trajectory, by, top, task, device, backend, note, progress, note, samples=samples, window=span,
                join=join, sketch=sketch, test=test, budget=budget, allow_changed_data=allow_changed_data,
            )  # fmt: skip
            whole, broken = found.whole(trajectory), missing.not_finite(trajectory, found.movers.known)
            written = broken + clustered.records(trajectory, found.clusters)
            near = None
            if sample is not None:
                near = neighbours.near_to(
                    trajectory, whole, found.clusters, sample, task, device, backend, note, progress, allow_changed_data
                )
                written += neighbours.records(trajectory, found.clusters, near)
            if explain is not None:
                written += explaining.explain(whole, found.clusters, explain)
            if truth:
                written.append(agreement.agreement(trajectory, found.clusters))
            return found, written, near

        found, written, near = without_damage(work, damage.append)
        answer, unit = answers.of_clusters(trajectory, found, written, task), loss_unit(trajectory)
    if not isinstance(run, Trajectory):
        keeper.keep(trajectory.path)
    written = chosen.of(written)
    clusters, notes = found.clusters, list(found.notes)
    if explain is not None and not clusters.window.steps_T[0] <= explain <= clusters.window.steps_T[-1]:
        first, last = clusters.window.steps_T[[0, -1]].tolist()
        notes.append(f"step {explain} is outside of steps {first} to {last}, in which the groups were found")
    if records is not None and samples:
        notes.append(
            f"grouped are the {len(samples)} samples of the records alone: opsig cluster {trajectory.path} also takes "
            "those with the largest gradients, so that its groups and pairs can have other numbers"
        )
    if chosen and clusters.pairs:
        shown = sum(record["kind"] == "pair" for record in written)
        notes.append(f"of {len(clusters.pairs)} pairs {shown or 'none'} {'is' if shown < 2 else 'are'} {chosen.words}")
    if not clusters.pairs:
        more = "Mine more: opsig mine --top" if records else "Look at more: --top, or other steps: --window"
        notes.append(f"no opposing pair was found among {len(clusters.position)} samples. {more}")

    def draw():
        with opened(run, like=trajectory) as again:
            whole = found.whole(again) if found.view is None else measured.again(found.view, again)
            if near is not None:
                return drawing.draw_neighbours(whole, clusters, near, written)
            return drawing.draw_pairs(whole, clusters, written, len(clusters.pairs), bool(chosen))

    return Records(written, notes=notes, damage=damage, title=trajectory.path, draw=draw, answer=answer, unit=unit)


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
            if plan:
                chosen_steps = divided.share(chosen_steps) if divided else chosen_steps
                row = 4 * trajectory.shape("checkpoints/params")[1]
                return planning.plan(trajectory, session, backend, "sharpness", chosen_steps, k or 1, row)
            if not wanted and (other := other_loss(trajectory, settings_of(trajectory))):
                note(f"note: measured of the mean loss of all samples, while {trajectory.path} minimises {other}")
            if "gradient_norm" in of_samples and getattr(session, "couples_samples", False):
                note("note: with batch norm in chunks, gradient norms hold each chunk's statistics fixed")
            if "sample_sharpness" in of_samples:
                backends.require(session, backends.SampleSharpness, backend, "sample_sharpness")
            if slice is not None:
                groups = _groups_of(trajectory, records or [])
                return curvature.slice_records(trajectory, session, slice, span, groups)
            if of_samples:
                chosen = _chosen(trajectory, records or [], random, seed)
                how = {"what": ",".join(of_samples), "steps": steps, "tolerance": tolerance}
                with _measured_apart(trajectory, divided, output, share.OF_SAMPLES, how) as into:
                    own_steps = divided.share(chosen_steps) if divided else chosen_steps
                    with progress("curvature", len(own_steps)) as advance:
                        return curvature.sample_records(
                            into, session, own_steps, chosen, of_samples, tolerance, advance, keep=divided is not None
                        )
            if wanted:
                with progress("curvature", len(chosen_steps)) as advance:
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
                own_steps = divided.share(chosen_steps) if divided else chosen_steps
                return _eigenvalues(
                    into, session, own_steps, k or 1, tolerance, (place, words), plain, replace, note, progress
                )

        written = without_damage(work, damage.append)
        rates, minibatches = _rates(trajectory), _minibatches(trajectory)
    if isinstance(written, Records):
        return written
    measured = ("residual", "sample_sharpness_residual")
    groups_named = _names_of(records or []) if slice is not None else {}
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
    with progress("eigenvectors", len(missing)) as advance:
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
    with progress("sharpness", len(missing)) as advance:
        for step in curvature.measure(run, session, group, missing, count, tolerance):
            advance(note=f"step {step}")
    if rough:
        note(f"measured again: {rough} checkpoints, held to a residual above the tolerance {tolerance:g}")
    found = curvature.records(run, group, steps, tolerance, k)
    if settings_of(run) is None:
        note("no stability threshold: the file does not say how it was trained. Recorder takes that as settings_json")
    return found


def branch(
    run: Run, *, from_step: int | Sequence[int], steps: int, output: str | os.PathLike, drop: Sequence[str] = (),
    weight: Sequence[str] = (), each: bool = False, optimizer: str | None = None, learning_rate: float | None = None,
    batch_size: int | None = None, momentum: float | None = None, clip_norm: float | None = None,
    label_smoothing: float | None = None, seed: int | None = None, into_edge: bool = False, out_of_edge: bool = False,
    draws: int = 3, sharpness: bool = False, track_every: int | None = None, assume: Sequence[str] = (),
    replace: bool = False, records: Sequence[dict[str, Any]] | None = None, task: str | None = None,
    device: str | None = None, backend: str | None = None, allow_changed_data: bool = False, note: Note = quietly,
    progress: Progress = unseen,
) -> Records:  # fmt: skip
    """Train a run on from a checkpoint with something changed, and beside it unchanged: records of kind "branch".

    `drop` and `weight` ("NAME=W") name samples: "pair:1", "group:3", "label:Coat", "17,18", or "-", those of `records`;
    groups are those of `records`, or found as `cluster` finds them. The options of training replace the run's;
    `into_edge` and `out_of_edge` choose the learning rate from the sharpness at the fork, with records of kind "group".
    `each`: a branch for each change instead of one for all. `output`: the branch's file, a trajectory like any other;
    of several, each name tells its change. `draws`: controls with as many random samples, and of the same labels.
    `sharpness`: measure it at the end of each future. `assume`: "KEY=VALUE" of what an imported run does not tell.
    """
    from opsig_cli.studies import drawing

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

        def find_groups() -> list[dict[str, Any]]:
            note(f"groups are those of: opsig cluster {trajectory.path}")
            found = _cluster(
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
        written, damage=damage, title=title, draw=lambda: drawing.draw_branches(panels, path, unit),
        answer=answers.branched(written, path), unit=unit,
    )  # fmt: skip


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


def _samples_of(records: Sequence[dict[str, Any]]) -> list[int]:
    """The samples that records name, each once, in order; those that are not finite have nothing to measure."""
    named = (r["sample"] for r in records if isinstance(r.get("sample"), int) and r.get("kind") != "not_finite")
    return list(dict.fromkeys(named))


def _chosen(run: Trajectory, records: Sequence[dict[str, Any]], random: int, seed: int) -> dict[str, np.ndarray]:
    """Positions of the samples to measure by the name of their set."""
    chosen = {}
    ids = _samples_of(records)
    if records and not ids:
        raise OpsigError(
            "records on stdin name no samples. Pipe those that mine prints, or cluster's members: "
            "jq -c 'select(.kind==\"member\")'"
        )
    if ids:
        chosen["chosen"] = mining.positions_of(run, ids)
    if random:
        rest = np.setdiff1d(np.arange(len(run.samples)), chosen.get("chosen", []))
        chosen["random"] = np.sort(np.random.default_rng(seed).choice(rest, min(random, len(rest)), replace=False))
    return chosen or {"all": np.arange(len(run.samples))}


def _names_of(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What the groups that members in the records name are called everywhere: by those that they were found with."""
    labels: dict[int, dict[int, str | None]] = {}
    for record in records:
        if isinstance(record.get("sample"), int) and isinstance(record.get("group"), int) and record.get("mined", True):
            labels.setdefault(record["group"], {})[record["sample"]] = record.get("label")
    named = {}
    for group, found in labels.items():
        mix = dict(Counter(str(label) for label in found.values() if label is not None).most_common())
        named[f"G{group}"] = f"G{group}: {describe(mix, len(found))}"
    return named


def _groups_of(run: Trajectory, records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Positions of the groups whose members the records name."""
    members: dict[str, list[int]] = {}
    for record in records:
        if isinstance(record.get("sample"), int) and record.get("group") is not None:
            members.setdefault(f"G{record['group']}", []).append(record["sample"])
    if records and not members:
        raise OpsigError("records on stdin name no members of groups. Pipe those that opsig cluster prints")
    return {name: mining.positions_of(run, list(dict.fromkeys(ids))) for name, ids in members.items()}
