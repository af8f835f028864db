"""opsig branch"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from opsig_cli.commands import completions, options


def branch(
    run: options.RunOrRecords,
    from_step: Annotated[
        list[int], typer.Option("--from", metavar="STEP", min=0, help="Checkpoint to branch from. May be given again.")
    ],
    steps: Annotated[int, typer.Option(min=1, help="Number of optimizer steps of each branch.")],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="BRANCH", help="File to write; of several, names tell the change.")
    ],
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Leave samples out: pair:N, group:N, label:TEXT, indices as 17,18, or - for the records on stdin.",
            show_default=False,
            autocompletion=completions.names_of_samples,
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=W",
            help="Weigh samples: group:3=0.5. Others count as before.",
            show_default=False,
            autocompletion=completions.names_of_samples,
        ),
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="A branch for each change, instead of one for all.")] = False,
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="As of opsig train; it begins anew.",
            autocompletion=completions.among(*completions.OPTIMIZERS),
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Instead of the run's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Instead of the run's.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Instead of the run's.")] = None,
    clip_norm: Annotated[float | None, typer.Option(min=0, help="Shorten gradients to this norm.")] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(min=0, help="Train on smoothed labels; losses are recorded as before.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the batches' order, and of dropout.")] = None,
    into_edge: Annotated[
        bool, typer.Option("--into-edge", help="Learning rate whose threshold lies below the sharpness at the fork.")
    ] = False,
    out_of_edge: Annotated[
        bool, typer.Option("--out-of-edge", help="Learning rate whose threshold lies above it.")
    ] = False,
    draws: Annotated[
        int, typer.Option(min=0, help="Controls: draws of as many random samples, and of the same labels.")
    ] = 3,
    sharpness: Annotated[bool, typer.Option("--sharpness", help="Measure it at the end of each future.")] = False,
    track_every: Annotated[
        int | None, typer.Option(min=1, help="Record losses every N steps. Default: as the run; all of full batches.")
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="What an imported run does not tell: learning_rate=0.1, batch_size=128, optimizer=sgd.",
            show_default=False,
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite BRANCH.")] = False,
    task: options.TaskOption = None,
    allow_changed_data: options.AllowOption = False,
    device: options.DeviceOption = None,
    threads: options.ThreadsOption = None,
    backend: options.BackendOption = None,
    format: options.FormatOption = None,
    figure: options.FigureOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """What if these samples had not been there, or the learning rate had been another: train on from a checkpoint.

    Each branch is a run like any other, from the fork on. Beside it the same stretch is trained with nothing changed,
    and with as many random samples left out instead; records have each against the unchanged one.

    Takes a run, or records on stdin whose groups it uses: opsig cluster run.h5 | opsig branch - --drop pair:1 ...

    Example: opsig branch run.h5 --from 20 --steps 20 --drop pair:1 -o branch.h5
    """
    from opsig_cli import records
    from opsig_cli.studies import door
    from opsig_cli.studies.branching import effects

    path, piped = options.records_of(run)
    found = door.branch(
        path, from_step=from_step, steps=steps, output=output, drop=drop or (), weight=weight or (), each=each,
        optimizer=optimizer, learning_rate=learning_rate, batch_size=batch_size, momentum=momentum,
        clip_norm=clip_norm, label_smoothing=label_smoothing, seed=seed, into_edge=into_edge, out_of_edge=out_of_edge,
        draws=draws, sharpness=sharpness, track_every=track_every, assume=assume or (), replace=replace, records=piped,
        task=task, device=device, backend=backend, allow_changed_data=allow_changed_data,
        note=options.once(quiet),
        progress=partial(options.progress, quiet=quiet),
    )  # fmt: skip
    options.save_figure(figure, found.figure)
    options.say(found.damage, False)
    options.say(found.notes, quiet)
    rows = effects.table(found)
    tables = [records.Table(found.title, rows, effects.narrow_rows(rows))]
    if gains := effects.group_table(found):
        tables.append(
            records.Table(f"groups' losses against the unchanged future{found.unit and ', in ' + found.unit}", gains)
        )
    records.write(found, format, tables)
    paths = dict.fromkeys(r["trajectory"] for r in found if r.get("control") != "unchanged")
    options.conclude(found.answer, quiet, *paths, figure)
