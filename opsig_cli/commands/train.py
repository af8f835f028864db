"""opsig train"""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from opsig_cli.commands import completions, options
from opsig_cli.errors import OpsigError


def train(
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="RUN", callback=options.check_output, help="Trajectory file to write."),
    ],
    task: options.TaskOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:key=value,...]",
            help="mlp, cnn, resnet18, resnet20|56|110, vgg11, vgg11-bn, vit; gpt for text. With options.",
            autocompletion=completions.among(*completions.MODELS),
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="gd|sgd|momentum|adam|splitsgd|signsgd",
            help="Default: gd, full batch.",
            autocompletion=completions.among(*completions.OPTIMIZERS),
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Default: 0.1.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Number of optimizer steps in all. Default: 1000.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Minibatch; without it momentum and adam are full batch.")
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="Heavy ball's beta. Default: 0.9.")] = None,
    beta1: Annotated[float | None, typer.Option(help="Adam. Default: 0.9.")] = None,
    beta2: Annotated[float | None, typer.Option(help="Adam. Default: 0.999.")] = None,
    sign_learning_rate: Annotated[float | None, typer.Option(min=0, help="SplitSGD's eta_2. Default: 0.001.")] = None,
    dampening: Annotated[float | None, typer.Option(help="SplitSGD's tau. Default: 0.9.")] = None,
    radius: Annotated[
        float | None, typer.Option(min=0, help="SplitSGD's r. Default: a tenth of the first gradient lies below it.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.")] = None,
    seed: Annotated[int | None, typer.Option(help="Initialisation and minibatch order. Default: 0.")] = None,
    track: Annotated[bool, typer.Option("--track", help="Record every sample's loss at every step.")] = False,
    track_every: Annotated[int | None, typer.Option(min=1, help="Record them every N steps.")] = None,
    track_samples: Annotated[
        int | None, typer.Option(min=1, help="Record them of so many samples, drawn with the seed.")
    ] = None,
    track_budget: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, metavar="X", help="Record them as often as takes this share of the time."),
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Default: a twentieth of the run.")] = None,
    checkpoint_pairs: Annotated[
        bool, typer.Option("--checkpoint-pairs", help="Checkpoint the step after each, too.")
    ] = False,
    checkpoint_window: Annotated[
        str | None, typer.Option(metavar="A:B", help="Checkpoint every step from A to B, too.")
    ] = None,
    checkpoint_dtype: Annotated[
        str | None,
        typer.Option(metavar="float32|bfloat16", help="bfloat16: half the size, rounded; the run cannot be resumed."),
    ] = None,
    sharpness_every: Annotated[
        int | None, typer.Option(min=1, help="Measure the top Hessian eigenvalue every N steps.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue RUN from its last checkpoint.")] = False,
    like: Annotated[
        str | None, typer.Option(metavar="RUN", help="From the initial state, with the settings, of another run.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite RUN.")] = False,
    commit_every: Annotated[
        int, typer.Option(min=1, help="Make steps durable, and visible to others, N at a time.")
    ] = 10,
    chunk_size: options.BatchSizeOption = None,
    statistics: Annotated[str | None, typer.Option(metavar="chunk|running", help="Batch norm's statistics.")] = None,
    allow_changed_data: options.AllowOption = False,
    device: options.DeviceOption = None,
    threads: options.ThreadsOption = None,
    backend: options.BackendOption = None,
    format: options.FormatOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Train a network and record its trajectory: checkpoints, scalars, and every sample's loss.

    Example: opsig train --task digits --learning-rate 0.2 --steps 50 --track -o run.h5
    """
    from opsig_cli import records
    from opsig_cli.studies import answers, beginning, training
    from opsig_cli.studies.ranges import parse_range

    first, last = parse_range(checkpoint_window, "--checkpoint-window")
    window = None if checkpoint_window is None else (first or 0, sys.maxsize if last is None else last)
    every_step = track or (track_samples is not None and track_budget is None)
    request = beginning.Request(
        output, task,
        given=dict(
            task=task, model=model, optimizer=optimizer, learning_rate=learning_rate, steps=steps,
            batch_size=batch_size, momentum=momentum, beta1=beta1, beta2=beta2, sign_learning_rate=sign_learning_rate,
            dampening=dampening, radius=radius, weight_decay=weight_decay, seed=seed, chunk_size=chunk_size,
            track_every=track_every or (1 if every_step else None), track_samples=track_samples,
            checkpoint_every=checkpoint_every, checkpoint_pairs=checkpoint_pairs or None, checkpoint_window=window,
            checkpoint_dtype=checkpoint_dtype, sharpness_every=sharpness_every, statistics=statistics, backend=backend,
        ),
        resume=resume, like=like, replace=replace, budget=track_budget, device=device, commit_every=commit_every,
        allow_changed_data=allow_changed_data,
    )  # fmt: skip
    note = partial(options.note, quiet=quiet)
    stop = training.StopRequest()
    with beginning.begun(request, note, options.note) as begun:
        session, settings, start = begun.session, begun.settings, begun.start
        with options.progress("training", settings.steps + 1 - start.step, quiet) as advance, stop.listening():
            written = list(training.run(begun.recorder, session, settings, start, stop, advance))
    records.write(written, format)
    tracked = settings.track_every is not None
    options.conclude(answers.trained(written, output, begun.own_task, session.samples, tracked), quiet, output)
    if stop.asked:
        raise OpsigError(f"interrupted. Continue with: {answers.resuming(output, begun.own_task)}", exit_code=130)
