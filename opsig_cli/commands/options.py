"""Options and arguments that several commands share, and what they turn into."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from opsig_cli.commands import completions
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.figures.canvas import SUFFIXES

if TYPE_CHECKING:
    from opsig_cli.studies.answers import Answer


def use_threads(context: typer.Context, threads: int | None) -> int | None:
    """Let numeric libraries, torch above all, take so many threads: they ask when they are loaded, which is later."""
    if threads is not None and not context.resilient_parsing:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    return threads


def check_output(context: typer.Context, path: Any) -> Any:
    """Raise OpsigError, before any work is done, where nothing can be written at a path that was given."""
    if path is not None and not context.resilient_parsing:
        _check_writable("-o", Path(path))
    return path


def check_format(context: typer.Context, name: str | None) -> str | None:
    """Raise UsageError, before any work is done, for a format that is not known."""
    if not context.resilient_parsing:
        from opsig_cli import records

        records.check_format(name)
    return name


def check_figure(context: typer.Context, path: Path | None) -> Path | None:
    """The same of a picture, whose name's ending must be one that is known."""
    if path is not None and not context.resilient_parsing:
        if path.suffix.lower() not in SUFFIXES:
            raise OpsigError(f"--figure {path}: pictures are saved as {', '.join(SUFFIXES)}, not '{path.suffix}'")
        _check_writable("--figure", path)
    return path


def _check_writable(option: str, path: Path) -> None:
    try:
        if not path.parent.is_dir():
            raise OpsigError(f"{option} {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise OpsigError(f"{option} {path} is a folder. Name a file in it")
        if path.exists() and not os.access(path, os.W_OK):
            raise OpsigError(f"{option} {path}: the file cannot be written")
        with tempfile.TemporaryFile(dir=path.parent):  # asks the file system itself: root may do what modes forbid
            pass
    except OSError as error:
        raise OpsigError(f"{option} {path}: {error.strerror or error}") from error


Result = TypeVar("Result")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Trajectory file (HDF5).", show_default=False)]
RunOrRecords = Annotated[
    str, typer.Argument(metavar="RUN|-", help="Trajectory file, or - for records on stdin.", show_default=False)
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="NAME[:key=value,...] of an installed task, or file.py:Name of your own. Default: the run's.",
        show_default=False,
        autocompletion=completions.tasks,
    ),
]
AllowOption = Annotated[
    bool, typer.Option("--allow-changed-data", help="Go on where the task's losses are not those that were recorded.")
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="table|json|csv",
        callback=check_format,
        help="Default: table on a terminal, JSON lines in a pipe.",
        autocompletion=completions.among("table", "json", "csv"),
    ),
]
FigureOption = Annotated[
    Path | None,
    typer.Option("--figure", metavar="PATH", callback=check_figure, help="Save the picture (.png, .pdf or .svg)."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="cpu|cuda",
        help="Default: the best.",
        autocompletion=completions.among("cpu", "cuda"),
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Installed backend. Default: the run's, or torch.",
        autocompletion=completions.backends,
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, callback=use_threads, help="Of the CPU. Default: one for each core."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
PartOption = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        help="Measure the I-th of N shares of the checkpoints, into the file of -o; `opsig merge` takes it in.",
        show_default=False,
    ),
]
PartOutput = Annotated[
    str | None,
    typer.Option(
        "-o", metavar="PATH", callback=check_output, help="Where a part goes. In a SLURM array the task is the part."
    ),
]
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def set_memory(context: typer.Context, text: str | None) -> str | None:
    """Bound what sessions take from now on. Raises UsageError for what is no size."""
    if not context.resilient_parsing:
        from opsig_cli.studies.tracking import MEMORY

        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B?)", text or "", re.IGNORECASE) if text else None
        if text and found is None:
            raise UsageError(f"--memory '{text}' is no size. Write --memory 12GiB")
        MEMORY.set(int(float(found[1]) * _UNITS[found[2].upper().removeprefix("B")]) if found else None)
    return text


MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        callback=set_memory,
        help="Memory that measuring may take, such as 12GiB. Default: what is free, less a tenth.",
        show_default=False,
    ),
]
PlanOption = Annotated[
    bool, typer.Option("--plan", help="Say what it takes of memory, disk and passes over the data, and stop.")
]
BatchSizeOption = Annotated[
    int | None, typer.Option("--chunk-size", min=1, help="Samples per forward pass when all are measured.")
]
PageOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="PATH", callback=check_output, help="Default: the run's name with .html."),
]
ReplacePageOption = Annotated[
    bool, typer.Option("--replace", help="Overwrite PATH even if it is no report of opsig's.")
]
TopOption = Annotated[
    int | None, typer.Option("--top", min=2, help="Samples to mine first. Default: a fifth, 200 to 2,000.")
]
ByOption = Annotated[
    str | None,
    typer.Option(
        metavar="gradient|slope|loss|both",
        help="What must align: gradients, slopes along the Hessian's leading eigenvectors, loss changes, or gradients "
        "and losses both. Default: both; without checkpoints, loss.",
        autocompletion=completions.among("gradient", "slope", "loss", "both"),
    ),
]
VerdictOption = Annotated[
    list[str] | None,
    typer.Option(
        "--verdict",
        metavar="established|likely|unclear|refuted",
        help="Show pairs of this verdict alone. May be given again.",
        show_default=False,
        autocompletion=completions.among("established", "likely", "unclear", "refuted"),
    ),
]
PairOption = Annotated[
    list[int] | None,
    typer.Option("--pair", metavar="N", help="Show this pair alone. May be given again.", show_default=False),
]
WindowOption = Annotated[str | None, typer.Option(metavar="A:B", help="Steps to look at, both ends included.")]
StepsOption = Annotated[
    str | None,
    typer.Option(
        metavar="A:B[:C]",
        help="Checkpoints of steps A to B, both included, of these every C-th; or one step. Default: all.",
    ),
]


def note(text: str, quiet: bool = False) -> None:
    """Say something on stderr."""
    if not quiet:
        from opsig_cli.records import printable

        print(printable(text), file=sys.stderr)


def once(quiet: bool) -> Callable[[str], None]:
    """A note that says nothing twice, for commands that open a run more than once."""
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            note(text, quiet)

    return say_once


def without_damage(work: Callable[[], Result]) -> Result:
    """What `work()` returns, done without the rows that prove damaged on the way; stderr says which, even if quiet."""
    from opsig_cli.trajectory.checking import without_damage

    return without_damage(work, lambda words: note(f"note: {words}"))


@contextmanager
def progress(label: str, total: int, quiet: bool) -> Iterator[Any]:
    """A progress bar with an ETA on stderr where that is a terminal; yields `advance(count=1, note="")`."""
    if quiet or not sys.stderr.isatty():
        yield lambda count=1, note="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, note="")
        yield lambda count=1, note="": bar.update(task, advance=count, note=note)


def trajectory_of(records: list[dict[str, Any]]) -> str:
    """The one trajectory that records speak of. Raises OpsigError where they name none or several."""
    named = {str(record["trajectory"]) for record in records if record.get("trajectory")}
    if len(named) != 1:
        found = ", ".join(sorted(named)) or "none"
        raise OpsigError(f"records on stdin must name one trajectory. They name: {found}")
    return named.pop()


def save_figure(path: Path | None, draw: Any, *arguments: Any) -> None:
    """Save the figure that `draw` returns; a path that cannot be written is a user's error."""
    if path is None:
        return
    from opsig_cli.figures import canvas

    try:
        canvas.save(draw(*arguments), path)
    except (OSError, ValueError) as error:
        raise OpsigError(f"--figure {path}: {' '.join(str(error).split())}") from error


def records_of(run: str) -> tuple[str, list[dict[str, Any]] | None]:
    """The trajectory that `run` names and, where it is "-", the records on stdin that name it, read to their end."""
    if run != "-":
        return run, None
    from opsig_cli import records

    piped = records.read(sys.stdin)
    return trajectory_of(piped), piped


def conclude(answer: Answer | None, quiet: bool, *wrote: Path | str | None) -> None:
    """End a command on stderr: which files it wrote, what it found, and what to do next."""
    sys.stdout.flush()  # what was found stands above
    for path in filter(None, wrote):
        note(f"wrote: {path}", quiet)
    if answer is not None:
        for line in _lines("found: ", answer.found):
            note(line, quiet)
        if answer.next is not None:
            note(f"next:  {answer.next}", quiet)


def say_plan(found: Any, format: str | None, quiet: bool) -> None:
    """Print what --plan found, and what does not fit."""
    from opsig_cli import records

    rows = [{key: _plan_cell(key, value) for key, value in record.items() if key != "trajectory"} for record in found]
    records.write(found, format, [records.Table(found.title, rows)])
    say(found.damage, False)
    say(found.notes, quiet)


def _plan_cell(key: str, value: Any) -> Any:
    from opsig_cli.backends import worded

    return worded(value) if value is not None and ("memory" in key or key == "disk") else value


def _lines(head: str, text: str) -> list[str]:
    """What is said, on a terminal with each of its parts on lines of its own under the first; elsewhere on one line."""
    if not sys.stderr.isatty():
        return [head + text]
    room = max(20, shutil.get_terminal_size().columns - len(head))
    parts = [line for part in text.split("; ") for line in textwrap.wrap(part, room, break_on_hyphens=False)]
    return [(" " * len(head) if place else head) + line for place, line in enumerate(parts)]


def say(notes: list[str], quiet: bool) -> None:
    """Say notes on stderr, one a line."""
    for words in notes:
        note(f"note: {words}", quiet)
