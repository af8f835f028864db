"""opsig compare"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from opsig_cli.commands import options


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Trajectory files.", show_default=False)],
    test: Annotated[
        str | None, typer.Option("--test", metavar="TASK", help="Accuracy of the last checkpoint on this task, too.")
    ] = None,
    device: options.DeviceOption = None,
    threads: options.ThreadsOption = None,
    backend: options.BackendOption = None,
    format: options.FormatOption = None,
    figure: options.FigureOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """How runs differ: loss, accuracy, share of samples that rise, sharpness against its threshold, signed share.

    One record a run; the figure lays them over each other. `opsig train --like RUN` makes runs that share their
    beginning; a run and its branches are compared from the fork on, as far as the branches go.

    Example: opsig compare gd.h5 adam.h5 --figure compared.png
    """
    from opsig_cli import records
    from opsig_cli.studies import answers, comparing, plotting
    from opsig_cli.trajectory.file import open_trajectory

    with ExitStack() as stack:
        opened = [stack.enter_context(open_trajectory(path)) for path in runs]

        def work():
            span = comparing.since_fork(opened)
            series = [comparing.series_of(run) for run in opened]
            if span:
                series = [{name: line.between(*span) for name, line in found.items()} for found in series]
                series = [{name: line for name, line in found.items() if len(line.steps)} for found in series]
            until = None if span is None else span[1]
            written = [comparing.summarise(run, found, until) for run, found in zip(opened, series, strict=True)]
            if test is not None:
                for run, record in zip(opened, written, strict=True):
                    record["test_accuracy"] = _test_accuracy(run, test, device, backend)
            options.save_figure(figure, plotting.draw_compared, opened, series)
            return written, span

        written, span = options.without_damage(work)
        own = {run.path: answers.task_of(run, None) for run in opened}
    if span:
        options.note(f"note: compared from the fork on, steps {span[0]} to {span[1]}", quiet)
    records.write(written, format, [records.Table("", _rows(written))])
    options.conclude(answers.compared(written, own), quiet, figure)


def _rows(written: list[dict]) -> list[dict]:
    """Records under short names, with what any of the runs has; the seed goes last."""
    short = {
        "trajectory": "run",
        "from_step": "from",
        "learning_rate": "rate",
        "sign_learning_rate": "sign rate",
        "batch_size": "batch",
    }
    short |= {"signed_fraction": "signed", "test_accuracy": "test accuracy"}
    names = [name for name in written[0] if any(record[name] is not None for record in written)]
    names.sort(key=lambda name: name == "seed")
    return [{short.get(name, name): record[name] for name in names} for record in written]


def _test_accuracy(run, test: str, device: str | None, backend: str | None) -> float:
    from opsig_cli import backends, tasks
    from opsig_cli.errors import UsageError
    from opsig_cli.studies import comparing
    from opsig_cli.studies.trained import backend_of, settings_of

    settings = settings_of(run)
    loaded, _ = tasks.load(tasks.parse_spec(test, None if settings is None else settings.model))
    if not all(hasattr(loaded, name) for name in ("predictions", "label", "classes")):
        raise UsageError(f"--test {test}: the task has no predictions, labels or classes")
    session = backends.load_backend(backend_of(run, backend)).open(loaded, device, None, "running")
    return comparing.accuracy_on(run, session, loaded)
