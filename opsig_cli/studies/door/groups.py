"""`cluster`: groups of samples that move together, and the pairs of them that oppose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsig_cli.errors import UsageError
from opsig_cli.studies import answers, measured, mining, missing, sighted
from opsig_cli.studies.clustering import agreement, explaining, finding, keeping, neighbours, selecting
from opsig_cli.studies.clustering import records as clustered
from opsig_cli.studies.clustering.around import plan as plan_around
from opsig_cli.studies.clustering.asked import plan as plan_of_groups
from opsig_cli.studies.door import named
from opsig_cli.studies.numbers import loss_unit
from opsig_cli.studies.ranges import parse_range
from opsig_cli.studies.results import Note, Progress, Records, Run, opened, planned, quietly, unseen
from opsig_cli.trajectory.checking import without_damage
from opsig_cli.trajectory.file import Trajectory


def cluster(
    run: Run, *, by: str | None = None, top: int | None = None, window: str | None = None, join: bool | None = None,
    sketch: int | None = None, explain: int | None = None, truth: bool = False, test: str = "replay",
    budget: int | None = None, replace: bool = False, sample: int | None = None, plan: bool = False,
    verdict: Sequence[str] = (), pair: Sequence[int] = (), records: Sequence[dict[str, Any]] | None = None,
    task: str | None = None, device: str | None = None, backend: str | None = None, allow_changed_data: bool = False,
    note: Note = quietly, progress: Progress = unseen,
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
    file, unless `replace`; of a `run` that is a path it is kept there. `plan`: only say what it takes.
    """
    chosen = selecting.Selection(verdict, pair)
    if chosen and sample is not None:
        raise UsageError("--sample is of one sample's opponents. Leave --verdict and --pair out")
    return found_groups(
        run, None if plan else keeping.Keeper(replace), by, top, window, join, sketch, explain, truth, test, budget,
        sample, chosen, records, task, device, backend, allow_changed_data, note, progress,
    )  # fmt: skip


def found_groups(
    run: Run, keeper: keeping.Keeper | None, by: str | None, top: int | None, window: str | None, join: bool | None,
    sketch: int | None, explain: int | None, truth: bool, test: str, budget: int | None, sample: int | None,
    chosen: selecting.Selection, records: Sequence[dict[str, Any]] | None, task: str | None, device: str | None,
    backend: str | None, allow_changed_data: bool, note: Note, progress: Progress,
) -> Records:  # fmt: skip
    """What `cluster` gives, of what this keeper has or finds; with None for it, what that takes."""
    from opsig_cli.studies import describing, drawing

    if by not in (None, *finding.BY):
        raise UsageError(f"--by is one of {', '.join(finding.BY)}, not '{by}'")
    if test not in finding.TESTS:
        raise UsageError(f"--test is one of {', '.join(finding.TESTS)}, not '{test}'")
    if by in ("loss", "slope") and sketch is not None:
        raise UsageError(f"--sketch is of gradients, which --by {by} does not take. Leave one of them out")
    samples = None if records is None else named.samples_of(records)
    span = parse_range(window, "--window") if window else mining.mined_window(records or [])
    damage: list[str] = []
    if not isinstance(run, Trajectory):
        describing.renew(run, task, note)
    with opened(run) as trajectory:
        if sample is not None:
            mining.positions_of(trajectory, [sample])  # refused before anything is loaded
        if explain is not None and not sighted.chosen(trajectory):
            explaining.row_of(trajectory, explain)
        if keeper is None:
            plan = plan_around if sighted.chosen(trajectory) else plan_of_groups
            found = without_damage(
                lambda: plan(
                    trajectory, by, top, task, device, backend, note, samples=samples, window=span, join=join,
                    sketch=sketch, test=test, budget=budget, allow_changed_data=allow_changed_data,
                ),
                damage.append,
            )  # fmt: skip
            return planned(found)

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
        count = len(trajectory.samples)
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
        looked = len(clusters.position)
        more = "Mine more: opsig mine --top" if records else "Look at more: --top, or other steps: --window"
        more = "These are all. Look at other steps: --window" if looked == count else more
        notes.append(f"no opposing pair was found among {looked} sample{'s' * (looked != 1)}. {more}")

    def draw():
        with opened(run, like=trajectory) as again:
            whole = found.whole(again) if found.view is None else measured.again(found.view, again)
            if near is not None:
                return drawing.draw_neighbours(whole, clusters, near, written)
            return drawing.draw_pairs(whole, clusters, written, len(clusters.pairs), bool(chosen))

    return Records(written, notes=notes, damage=damage, title=trajectory.path, draw=draw, answer=answer, unit=unit)
