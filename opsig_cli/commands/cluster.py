"""opsig cluster"""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from opsig_cli.commands import options
from opsig_cli.errors import UsageError


def cluster(
    run: options.RunOrRecords,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="gradient|loss|both",
            help="What must align: gradients, loss changes, or both. Default: both; without checkpoints, loss.",
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", min=2, help="Samples to mine first. Default: a fifth, 200 to 2,000.")
    ] = None,
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
    truth: Annotated[bool, typer.Option("--truth", help="Compare with the sides that the task planted.")] = False,
    task: options.TaskOption = None,
    device: options.DeviceOption = None,
    backend: options.BackendOption = "torch",
    format: options.FormatOption = None,
    figure: options.FigureOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Group the samples that move most, and name the groups that pull against each other.

    Takes a run, which it mines itself (the samples whose loss moves most, and as many with the largest gradients), or
    the records of `opsig mine` on stdin.

    The table has of each pair: the mean cosine across, the correlation of the losses' changes, how alike it looks to
    the network, its part of all movement, the p-value, and how well it comes back when samples are left out.

    Example: opsig mine run.h5 --top 400 | opsig cluster - --figure pairs.png
    """
    from opsig_cli import records
    from opsig_cli.studies import mining
    from opsig_cli.studies.clustering import agreement, explaining, finding
    from opsig_cli.studies.clustering import records as clustered
    from opsig_cli.studies.clustering import tables as shortened
    from opsig_cli.trajectory.file import open_trajectory

    if by not in (None, *finding.BY):
        raise UsageError(f"--by is one of {', '.join(finding.BY)}, not '{by}'")
    if by == "loss" and sketch is not None:
        raise UsageError("--sketch is of gradients, which --by loss does not take. Leave one of them out")
    mined = records.read(sys.stdin) if run == "-" else None
    path = options.trajectory_of(mined) if mined else run
    samples = [r["sample"] for r in mined if isinstance(r.get("sample"), int)] if mined else None
    samples = None if samples is None else list(dict.fromkeys(samples))
    span = options.parse_range(window, "--window") if window else mining.mined_window(mined or [])
    with open_trajectory(path) as trajectory:
        found = finding.find(
            trajectory, by, top, task, device, backend, partial(options.note, quiet=quiet),
            partial(options.progress, quiet=quiet), samples=samples, window=span, join=join,
            sketch=sketch,
        )  # fmt: skip
        clusters = found.clusters
        written = clustered.records(trajectory, clusters)
        agreed = agreement.agreement(trajectory, clusters) if truth else None
        explained = explaining.explain(trajectory, clusters, explain) if explain is not None else []
        if figure:
            from opsig_cli.studies import drawing

            options.save_figure(figure, drawing.draw_pairs, trajectory, clusters, written)
    for words in found.notes:
        options.note(f"note: {words}", quiet)
    if not clusters.pairs:
        more = " Mine more: opsig mine --top" if mined else " Look at more: --top, or other steps: --window"
        options.note(f"no opposing pair was found among {len(clusters.position)} samples.{more}", quiet)
    tables = [records.Table(f"{path}: opposing pairs, the significant ones first", shortened.pair_table(written))]
    if said := shortened.sentence_table(written):
        tables.append(records.Table("in words", said))
    if alone := shortened.alone_table(written):
        tables.append(records.Table("groups that no other opposes", alone))
    if explained:
        written += explained
        shown = explaining.explain_table(explained)
        tables.append(records.Table(f"the change at step {explain}, summed over samples, in nats", shown))
    if agreed:
        written.append(agreed)
        shown = [{"measure": key.replace("_", " "), "value": value} for key, value in list(agreed.items())[2:]]
        tables.append(records.Table("agreement with the planted truth", shown))
    records.write(written, format, tables)
