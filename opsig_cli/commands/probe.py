"""opsig probe"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from opsig_cli import options
from opsig_cli.errors import UsageError


def probe(
    run: options.RunArgument,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="INPUT", help="color:sky, color:#87ceeb, an image or .npy file, or sample:N."),
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="A:B:C", help="Checkpoints from A to B, every C-th.")] = None,
    projection: Annotated[
        bool, typer.Option("--projection", help="Iterates along the top eigenvector at the first crossing.")
    ] = False,
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="RUN", help="Project this run, too.")
    ] = None,
    task: options.TaskOption = None,
    device: options.DeviceOption = None,
    backend: options.BackendOption = "torch",
    format: options.FormatOption = None,
    figure: options.FigureOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """What the network makes of chosen inputs at every checkpoint: class probabilities and feature norms.

    With --projection, where runs go along the first one's top eigenvector (run `opsig sharpness` first).

    Example: opsig probe run.h5 --input color:white --input color:black --figure probe.png
    """
    from opsig_cli import curvature, measure, probing, records
    from opsig_cli.trajectory import open_trajectory

    if projection == bool(inputs):
        raise UsageError("give either --input or --projection")
    with ExitStack() as stack:
        trajectory = stack.enter_context(open_trajectory(run))
        if projection:
            runs = [trajectory, *(stack.enter_context(open_trajectory(path)) for path in against or [])]
            with options.progress("projecting", len(runs), quiet) as advance:
                written = probing.project(trajectory, runs, advance)
        else:
            chosen = curvature.select_steps(trajectory, steps)
            session, loaded = measure.open_session(
                trajectory, task, device, backend, lambda text: options.note(text, quiet)
            )
            names = inputs or []
            pictures = probing.gather(loaded, trajectory, names)
            classes = getattr(loaded, "classes", None)
            with options.progress("probing", len(chosen), quiet) as advance:
                written = probing.probe(trajectory, session, chosen, names, pictures, classes, advance)
        if figure:
            from opsig_cli import pictures as drawing

            options.save_figure(figure, drawing.draw_probe, trajectory, written)
    hidden = ("trajectory", "logits", "probabilities")
    rows = [{key: value for key, value in record.items() if key not in hidden} for record in written]
    records.write(written, format, [records.Table(run, rows)])
