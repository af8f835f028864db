"""opsig import"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import typer

from opsig_cli.commands import options


def import_(
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="RUN", callback=options.check_output, help="Trajectory file to write."),
    ],
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Files, folders that are a checkpoint, or folders of them.",
            show_default=False,
        ),
    ] = None,
    task: options.TaskOption = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME[:key=value,...]", help="For an installed task: see opsig train.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="The step that each checkpoint is of, in the order given.")
    ] = None,
    steps_from: Annotated[
        str | None,
        typer.Option(
            metavar="content|name|optimizer",
            help="Default: a step in the content, the optimizer's count, the name, or an epoch in the content.",
        ),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the weights' names begin with, such as ema.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(metavar="gd|sgd|momentum|adam", help="Default: what the checkpoints say.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Default: what the checkpoints say.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Heavy ball's beta.")] = None,
    beta1: Annotated[float | None, typer.Option(help="Adam.")] = None,
    beta2: Annotated[float | None, typer.Option(help="Adam.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the gradient.")] = None,
    batch_size: Annotated[
        str | None, typer.Option(metavar="N|full", help="The run's minibatch, or full. Default: not known.")
    ] = None,
    losses: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Losses: .npy (steps, samples), .npz, or a log with a line for each (.csv, .tsv, .jsonl, .parquet).",
        ),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Who was in each step's batch, without losses: .npy, .npz or .jsonl."),
    ] = None,
    sightings: Annotated[
        bool | None,
        typer.Option(
            "--sightings/--rows",
            help="Take a log as seen batch by batch, or as losses of all samples with gaps. Default: as full as it is.",
        ),
    ] = None,
    step_column: Annotated[str | None, typer.Option(metavar="NAME", help="Of --losses. Default: by its name.")] = None,
    sample_column: Annotated[str | None, typer.Option(metavar="NAME", help="The same.")] = None,
    loss_column: Annotated[str | None, typer.Option(metavar="NAME", help="The same.")] = None,
    prediction_column: Annotated[str | None, typer.Option(metavar="NAME", help="The same.")] = None,
    label_column: Annotated[str | None, typer.Option(metavar="NAME", help="The same.")] = None,
    scalars: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="CSV with step and train_loss, learning_rate, ...; or a trainer's own log."),
    ] = None,
    track: Annotated[
        bool, typer.Option("--track", help="Measure every sample's loss at the checkpoints, too.")
    ] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Leave parameters in their files, and read them when they are measured.")
    ] = False,
    append: Annotated[bool, typer.Option("--append", help="Add the steps that RUN lacks.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite RUN.")] = False,
    chunk_size: options.BatchSizeOption = None,
    statistics: Annotated[
        str | None, typer.Option(metavar="running|chunk", help="Batch norm's statistics. Default: running.")
    ] = None,
    allow_changed_data: options.AllowOption = False,
    device: options.DeviceOption = None,
    threads: options.ThreadsOption = None,
    backend: options.BackendOption = None,
    format: options.FormatOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Make a trajectory from checkpoints that your own training script saved, for every other command to work on.

    Example: opsig import checkpoints/*.pt --task mytask.py:MyTask --learning-rate 0.1 --track -o run.h5
    """
    from opsig_cli import records
    from opsig_cli.studies import answers, sighted
    from opsig_cli.studies.importing import entry
    from opsig_cli.trajectory.file import open_trajectory

    given = dict(
        optimizer=optimizer, learning_rate=learning_rate, momentum=momentum, beta1=beta1, beta2=beta2,
        weight_decay=weight_decay, batch_size=batch_size, chunk_size=chunk_size, statistics=statistics,
    )  # fmt: skip
    columns = dict(
        step=step_column, sample=sample_column, loss=loss_column, prediction=prediction_column, label=label_column
    )
    request = entry.Request(
        output, paths or [], task, model, steps, steps_from, prefix, entry.chosen(given), losses, scalars, track,
        append, replace, device, backend, allow_changed_data, reference,
        {what: name for what, name in columns.items() if name is not None}, sightings, order,
    )  # fmt: skip
    bar = partial(options.progress, quiet=quiet)
    written = entry.run(request, partial(options.note, quiet=quiet), bar)
    rows = [{key: value for key, value in each.items() if key not in ("trajectory", "sha256")} for each in written]
    records.write(written, format, [records.Table(output, rows if len(rows) <= LISTED else summary(rows))])
    tracked = losses is not None or any(r.get("loss") is not None for r in written)
    found = f"{len(written)} {'checkpoint' if paths else 'step'}{'s' * (len(written) != 1)}"
    if written:
        first, last = written[0]["step"], written[-1]["step"]
        found += f", step {first}" if len(written) == 1 else f", steps {first} to {last}"
    else:
        found += " that were not there"
    with open_trajectory(output) as run:
        seen = sighted.chosen(run) and not run.has("checkpoints/params")
    follow = answers.command("mine" if seen else "analyse" if tracked else "track", output, task=None if seen else task)
    options.conclude(answers.Answer(found, follow), quiet, output)


LISTED = 40
"""Steps up to which each has a row; of more, a row says what they are."""


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of steps as one for each source: how many, from which to which, and the first and last loss.

    >>> summary([{"step": 0, "source": "log.csv"}, {"step": 5, "source": "log.csv"}])
    [{'source': 'log.csv', 'steps': 2, 'first': 0, 'last': 5}]
    """
    sources = {row["source"] for row in rows}
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        source = row["source"] if len(sources) <= LISTED else os.path.dirname(row["source"]) or "."
        by_source.setdefault(source, []).append(row)
    found = []
    for source, own in by_source.items():
        losses = [row["loss"] for row in own if row.get("loss") is not None]
        found.append(
            {"source": source, "steps": len(own), "first": own[0]["step"], "last": own[-1]["step"]}
            | ({"first loss": losses[0], "last loss": losses[-1]} if losses else {})
        )
    return found
