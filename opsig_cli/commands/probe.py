"""opsig probe"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from opsig_cli.commands import options
from opsig_cli.errors import UsageError


def probe(
    run: options.RunArgument,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="INPUT", help="color:sky, color:#87ceeb, an image or .npy file, or sample:N."),
    ] = None,
    steps: options.StepsOption = None,
    projection: Annotated[
        bool, typer.Option("--projection", help="Iterates along the top eigenvector at the first crossing.")
    ] = False,
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="RUN", help="Show this run, too, over the first.")
    ] = None,
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
    """What the network makes of chosen inputs at every checkpoint: logits, class probabilities and feature norms.

    Oscillation shows between checkpoints one step apart: `opsig train --checkpoint-window A:B`. With --projection,
    where runs go along the first one's top eigenvector (run `opsig sharpness` first).

    Example: opsig probe run.h5 --input color:white --input color:black --figure probe.png
    """
    from opsig_cli import records
    from opsig_cli.studies import answers, plotting
    from opsig_cli.trajectory.file import open_trajectory

    if projection == bool(inputs):
        raise UsageError("give either --input or --projection")
    with ExitStack() as stack:
        runs = [stack.enter_context(open_trajectory(path)) for path in (run, *(against or []))]
        if plan:
            options.say_plan(
                _plan(runs, inputs or [], steps, task, device, backend, quiet, allow_changed_data), format, quiet
            )
            return
        if projection:
            from opsig_cli.studies import probing

            def project():
                with options.progress("projecting", len(runs), quiet) as advance:
                    return probing.project(runs[0], runs, steps, advance)

            written = options.without_damage(project)
            summaries = [record for record in written if record["kind"] == "summary"]
            if any(record["reversals"] is None for record in summaries):
                options.note("note: reversals need checkpoints at every step: train --checkpoint-window A:B", quiet)
            options.save_figure(figure, plotting.draw_projection, runs[0], written)
            shown = [{key: value for key, value in record.items() if key != "kind"} for record in summaries]
            tables = [records.Table(f"{run}: along its top eigenvector", shown)]
        else:
            written, drawn = options.without_damage(
                lambda: _inputs(runs, inputs or [], steps, task, device, backend, quiet, allow_changed_data)
            )
            options.save_figure(figure, plotting.draw_probe, runs, written, drawn)
            hidden = ("trajectory", "logits", "probabilities")
            rows = [{key: value for key, value in record.items() if key not in hidden} for record in written]
            tables = [records.Table(run, rows)]
    records.write(written, format, tables)
    options.conclude(answers.probed(written, run), quiet, figure)


def _inputs(runs, names: list[str], steps, task, device, backend, quiet: bool, allow_changed_data: bool):
    """Records of all runs, and the pictures that were shown to them."""
    from opsig_cli.studies import curvature, pace, planning, probing, tracking
    from opsig_cli.trajectory.states import read_state

    written, drawn = [], None
    for trajectory in runs:
        chosen = curvature.select_steps(trajectory, steps)
        session, loaded = tracking.open_session(
            trajectory, task, device, backend, lambda text: options.note(text, quiet), allow_changed_data
        )
        shown = probing.gather(loaded, trajectory, names)
        stages = [planning.Stage("outputs", len(chosen), len(names))]
        planning.require(session, "probe", stages, read_state(trajectory, chosen[0]))
        drawn = shown if drawn is None else drawn
        classes = getattr(loaded, "classes", None)
        bar = options.progress("probing", len(chosen), quiet)
        with bar as shown_bar, pace.paced(session, shown_bar, len(chosen)) as advance:
            written += probing.probe(trajectory, session, chosen, names, shown, classes, advance)
    return written, drawn


def _plan(runs, names: list[str], steps, task, device, backend, quiet: bool, allow_changed_data: bool):
    """What the inputs take through all runs' checkpoints; a projection reads the files alone."""
    from opsig_cli.studies import curvature, planning, tracking
    from opsig_cli.studies.results import planned
    from opsig_cli.trajectory.states import read_state

    found = []
    for trajectory in runs:
        chosen = curvature.select_steps(trajectory, steps)
        state = read_state(trajectory, chosen[0])
        if not names:
            found.append(planning.plan_of_file(trajectory.path, "probe", 4 * state.params.nbytes))
            continue
        session, _ = tracking.open_session(
            trajectory, task, device, backend, lambda text: options.note(text, quiet), allow_changed_data
        )
        stages = [planning.Stage("outputs", len(chosen), len(names))]
        found.append(planning.plan(trajectory.path, session, backend, "probe", stages, state, len(chosen)))
    return planned(*found)
