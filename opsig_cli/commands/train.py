"""opsig train"""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from opsig_cli.commands import completions, options
from opsig_cli.errors import OpsigError, UsageError


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
    from dataclasses import replace as varied

    from opsig_cli import records, tasks
    from opsig_cli.backends import State, load_backend
    from opsig_cli.settings import Settings
    from opsig_cli.studies import answers, tracking, training
    from opsig_cli.studies.ranges import parse_range
    from opsig_cli.trajectory.file import check_new, cut_off_at_birth, open_trajectory
    from opsig_cli.trajectory.states import check_trained, in_order_of, read_state

    if resume and replace:
        raise UsageError("--resume continues a run and --replace overwrites it. Give one of them")
    if track_budget is not None and (resume or track or track_every):
        raise UsageError(
            "--track-budget says how often losses are recorded. Leave --track, --track-every, --resume out"
        )
    if resume and like is not None:
        raise UsageError("--resume continues a run and --like begins another. Give one of them")
    first, last = parse_range(checkpoint_window, "--checkpoint-window")
    window = None if checkpoint_window is None else (first or 0, sys.maxsize if last is None else last)
    every_step = track or (track_samples is not None and track_budget is None)
    given = dict(
        task=task, model=model, optimizer=optimizer, learning_rate=learning_rate, steps=steps, batch_size=batch_size,
        momentum=momentum, beta1=beta1, beta2=beta2, sign_learning_rate=sign_learning_rate, dampening=dampening,
        radius=radius, weight_decay=weight_decay, seed=seed, chunk_size=chunk_size,
        track_every=track_every or (1 if every_step else None), track_samples=track_samples,
        checkpoint_every=checkpoint_every,
        checkpoint_pairs=checkpoint_pairs or None, checkpoint_window=window, checkpoint_dtype=checkpoint_dtype,
        sharpness_every=sharpness_every, statistics=statistics,
        backend=backend,
    )  # fmt: skip
    kept: tuple[str, int] | None = None
    if resume and cut_off_at_birth(output):
        options.note(f"{output} was cut off before it had its name: beginning with the options of this command", quiet)
        resume = False
    if resume:
        with open_trajectory(output) as run:
            kept = output, len(run.samples)
            settings = Settings.stored(run.attributes, output).resumed(given, output)
            reached = max(run.steps("checkpoints"), default=0)
            if reached > settings.steps:
                raise OpsigError(
                    f"{output} is at step {reached} already, past --steps {settings.steps}. Give more steps"
                )
    elif like is not None:
        with open_trajectory(like) as run:
            kept = like, len(run.samples)
            settings = Settings.stored(run.attributes, like).varied(given)
            initial = read_state(run, 0)
    else:
        settings = Settings.of(given)
    if not resume:
        check_new(output, replace)
    spec = tasks.parse_spec(task or settings.task, settings.model)
    if task is None and tasks.is_own(spec):  # a file is never a reason to run code that the command does not name
        of = output if resume else like
        raise OpsigError(f"{of} was trained with a task of your own. Give it again: --task {settings.task}")
    if task is None and like is not None and tasks.reads_files(spec):  # what they hold would go into the new run
        raise OpsigError(f"{like} was trained on files that it names: {settings.task}. Give the task again: --task")
    if kept is not None:
        tasks.check_recorded(spec if task is None else varied(spec, options={}), *kept)
    loaded, spec = tasks.load(spec)
    session = load_backend(settings.backend).open(loaded, device, settings.chunk_size, settings.statistics)
    session.tell = partial(options.note, quiet=quiet)
    options.note(f"device: {session.device_name}", quiet)
    if like is not None:
        with open_trajectory(like) as run:
            tracking.check_model(run, session)
            in_order_of(run, session)
    if track_budget is not None:
        settings = settings.budgeted(track_budget, session.samples)
        options.note(f"losses are recorded every {settings.track_every} steps", quiet)
    start = session.initial(settings.seed)
    if settings.batch_size is None and getattr(session, "drops_out", False):
        options.note("note: full-batch training leaves the model's dropout out. With --batch-size it is on", quiet)
    if like is not None:
        start = State(0, initial.params, initial.buffers, frozen=initial.frozen)
    if resume:
        recorder = training.resumed_recorder(output, session, commit_every)
    else:
        training.check_optimizer(settings.optimizer, session)
        recorder = training.new_recorder(output, settings, session, loaded, spec, replace, commit_every)
        if like is not None:  # what a seed does not tell, for a run that is killed before its first checkpoint
            recorder.record(0, state=start)
    written = []
    stop = training.StopRequest()
    with recorder:
        if resume:
            note = partial(options.note, quiet=quiet)
            check_trained(recorder.run, session.layout)
            options.without_damage(lambda: tracking.check_data(recorder.run, session, note, allow_changed_data))
            start = training.resume_point(recorder, session, loaded, settings, options.note)
            options.note(f"resuming at step {start.step} of {settings.steps}", quiet)
        with options.progress("training", settings.steps + 1 - start.step, quiet) as advance, stop.listening():
            written.extend(training.run(recorder, session, settings, start, stop, advance))
    records.write(written, format)
    tracked = settings.track_every is not None
    options.conclude(
        answers.trained(written, output, task if tasks.is_own(spec) else None, session.samples, tracked), quiet, output
    )
    if stop.asked:
        follow = answers.resuming(output, task if tasks.is_own(spec) else None)
        raise OpsigError(f"interrupted. Continue with: {follow}", exit_code=130)
