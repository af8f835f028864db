"""opsig cluster"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from opsig_cli.commands import completions, movers, options

ERROR = " (+-: standard error over held-out checkpoints)"


def cluster(
    run: options.RunOrRecords,
    by: options.ByOption = None,
    top: options.TopOption = None,
    window: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Steps to look at, both ends included. Default: those that were mined."),
    ] = None,
    join: Annotated[
        bool | None,
        typer.Option("--join/--no-join", help="Add samples that were not mined but align with a group. Default: join."),
    ] = None,
    sketch: Annotated[
        int | None,
        typer.Option(
            "--sketch", metavar="K", min=1, help="Estimate cosines from K numbers a sample; what is found is re-scored."
        ),
    ] = None,
    explain: Annotated[
        int | None, typer.Option("--explain", metavar="STEP", help="Take the change at this step apart into groups.")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample", metavar="N", min=0, help="Who opposes this sample: groups, nearest opponents and allies."
        ),
    ] = None,
    verdict: options.VerdictOption = None,
    pair: options.PairOption = None,
    truth: Annotated[bool, typer.Option("--truth", help="Compare with the sides that the task planted.")] = False,
    test: Annotated[
        str,
        typer.Option(
            metavar="replay|held-out|none",
            help="Try pairs by repeating training with their samples silent, or on held-out checkpoints alone.",
            autocompletion=completions.among("replay", "held-out", "none"),
        ),
    ] = "replay",
    budget: Annotated[
        int | None, typer.Option("--budget", min=0, help="Training steps to repeat in all. Default: 400.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Find groups anew that the file holds.")] = False,
    task: options.TaskOption = None,
    allow_changed_data: options.AllowOption = False,
    device: options.DeviceOption = None,
    threads: options.ThreadsOption = None,
    backend: options.BackendOption = None,
    plan: options.PlanOption = False,
    memory: options.MemoryOption = None,  # set by its callback
    format: options.FormatOption = None,
    figure: options.FigureOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Group the samples that move most, and name the groups that pull against each other.

    Takes a run, which it mines itself (the samples whose loss moves most, and as many with the largest gradients), or
    the records of `opsig mine` on stdin.

    The table has of each pair: the verdict, the mean cosine across on checkpoints that had no part in finding it, how
    alike its sides look against within, R (its swing when it is silent, over that when as many others are), the part of
    all samples' movement that it makes up at the step where its sides move apart most, and the p-value. Pairs are
    numbered by that part, the strongest first; after +- stands a standard error over held-out checkpoints.

    `--verdict established` shows those pairs alone, in the table, the pipe and the figure, `--pair 1` one of them.

    Example: opsig mine run.h5 --top 400 | opsig cluster - --figure pairs.png
    """
    from opsig_cli import records
    from opsig_cli.studies import answers, door
    from opsig_cli.studies.clustering import explaining, neighbours
    from opsig_cli.studies.clustering import tables as shortened

    path, piped = options.records_of(run)
    found = door.cluster(
        path, by=by, top=top, window=window, join=join, sketch=sketch, explain=explain, truth=truth, test=test,
        budget=budget, sample=sample, verdict=verdict or (), pair=pair or (), replace=replace, plan=plan, records=piped,
        task=task, device=device, backend=backend, allow_changed_data=allow_changed_data, note=options.once(quiet),
        progress=partial(options.progress, quiet=quiet),
    )  # fmt: skip
    if plan:
        options.say_plan(found, format, quiet)
        return
    options.save_figure(figure, found.figure)
    options.say(found.damage, False)
    options.say(found.notes, quiet)
    tables = movers.not_finite_tables(found)
    if sample is not None:
        tables.append(records.Table(f"{found.title}: sample {sample}", neighbours.sample_table(found)))
        for relation, name in (("opponent", "nearest opponents"), ("ally", "nearest allies")):
            tables.append(records.Table(name, neighbours.neighbour_table(found, relation)))
        records.write(found, format, tables)
        near = found.answer if figure is None or found.answer is None else answers.Answer(found.answer.found)
        options.conclude(near, quiet, figure)
        return
    head = "chosen pairs" if verdict or pair else shortened.headline(found)
    rows = shortened.pair_table(found)
    tables.append(records.Table(f"{found.title}: {head}", rows, shortened.narrow_rows(rows)))
    if said := shortened.sentence_table(found):
        tables.append(records.Table(f"in words{ERROR}", said))
    if alone := shortened.alone_table(found):
        tables.append(records.Table(f"groups that no other opposes{ERROR}", alone))
    if explained := found.of("explain"):
        shown = explaining.explain_table(explained)
        tables.append(
            records.Table(
                f"the change at step {explain}, summed over samples{found.unit and ', in ' + found.unit}", shown
            )
        )
    for agreed in found.of("agreement"):
        shown = [{"measure": key.replace("_", " "), "value": value} for key, value in list(agreed.items())[2:]]
        tables.append(records.Table("agreement with the planted truth", shown))
    records.write(found, format, tables)
    options.conclude(found.answer, quiet, figure)
