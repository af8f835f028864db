"""The command line: the app, and the one place where errors become one line and an exit code."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, TextIO, cast

import typer

from opsig_cli.backends import Meets, load_backend
from opsig_cli.commands import (
    analyse,
    branch,
    cluster,
    compare,
    import_,
    info,
    merge,
    mine,
    probe,
    repack,
    report,
    sharpness,
    simulate,
    track,
    train,
    verify,
)
from opsig_cli.commands.launched import launched, value_of
from opsig_cli.commands.parsing import Command, Commands
from opsig_cli.errors import OpsigError
from opsig_cli.tasks import own_frames

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How a person may have said that threads are to wait."""

app = typer.Typer(
    name="opsig",
    cls=Commands,
    help="Find the opposing groups of samples that make a neural network's training loss oscillate and spike.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command)(train.train)
app.command("import", cls=Command)(import_.import_)
app.command(cls=Command)(track.track)
app.command(cls=Command)(sharpness.sharpness)
app.command(cls=Command)(analyse.analyse)
app.command(cls=Command)(mine.mine)
app.command(cls=Command)(probe.probe)
app.command(cls=Command)(cluster.cluster)
app.command(cls=Command)(branch.branch)
app.command(cls=Command)(report.report)
app.command(cls=Command)(compare.compare)
app.command(cls=Command)(info.info)
app.command(cls=Command)(merge.merge)
app.command(cls=Command)(verify.verify)
app.command(cls=Command)(repack.repack)
app.add_typer(simulate.app, name="simulate", cls=Commands)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"opsig {version('opsig')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


OBJECTS = 10_000
"""New objects after which Python looks for circles among them: torch makes 400,000 as it loads, and none goes."""


def run() -> None:
    """Run the command line; the entry point `opsig`."""
    gc.set_threshold(OBJECTS)
    if not any(name in os.environ for name in WAITING):
        # Before torch loads OpenMP, whose threads spin while they wait and, beside other work, take the cores from
        # those that they wait for.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pipe ends us silently
    if sys.stderr is None:  # closed by the caller; print(file=None) would take stdout in its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    _guarded(_alone_or_together)


def _guarded(work: Callable[[], None]) -> None:
    """Turn the errors of what is run into one line and an exit code."""
    try:
        with _checked_stdout():
            work()
    except OpsigError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if frames := own_frames(error):
            _show_own(error, frames)
        if (said := _of_the_machine(error)) is None:
            raise
        _fail(said, 1)


def _alone_or_together() -> None:
    """Run the command; where several processes were started together, the first does, and the others serve it."""
    launch = launched(sys.argv[1:])
    if launch is None:
        app()
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch would show its own stack where another process dies
    name = value_of("--backend", sys.argv) or "torch"
    backend = load_backend(name)
    if not isinstance(backend, Meets):
        raise OpsigError(f"backend {name} works on one process. Start it without torchrun, or with --part")

    def share() -> None:
        with backend.meeting(launch.rank, launch.size) as serve:
            serve() if launch.rank else app()

    code = None
    try:
        _guarded(share)
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        code if isinstance(code, int) else int(code is not None)
    )  # torch's threads abort now and then as Python ends


def _of_the_machine(error: Exception) -> str | None:
    """What a shortage or a failing disk means to a person, or None for what is a defect of ours."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return "out of memory. Use a smaller --chunk-size or fewer samples"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return f"a library cannot be loaded: {error}" if isinstance(error, ImportError) else None


@contextmanager
def _checked_stdout() -> Iterator[None]:
    """What cannot be printed, such as on a full disk, is an OpsigError inside, whoever prints it."""
    stream = sys.stdout
    if stream is None:
        raise OpsigError("stdout is closed. Send it to a file, or to /dev/null")
    sys.stdout = cast(TextIO, _Checked(stream))
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    finally:
        sys.stdout = stream


PLAIN = str.maketrans({
    "\u2212": "-", "\u00b1": "+-", "\u2026": "...", "\u2192": "->", "\u00d7": "x", "\u2264": "<=", "\u2265": ">=",
    "\u2013": "-", "\u2423": "_", "\ufffd": "?",
})  # fmt: skip
"""What signs are on a terminal that does not have them; of what is not here, its code is shown."""


class _Checked:
    """A stream whose errors name it; after one, what is left to print is dropped: the interpreter tries again."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._try(lambda: self._stream.write(text))
        except UnicodeEncodeError:  # a terminal without UTF-8
            plain, encoding = text.translate(PLAIN), self._stream.encoding
            return self._try(lambda: self._stream.write(plain.encode(encoding, "backslashreplace").decode(encoding)))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            raise OpsigError(f"stdout cannot be written: {error.strerror or error}") from error


def _show_own(error: Exception, frames: list[traceback.FrameSummary]) -> NoReturn:
    """An exception in a person's own code: what it says, and where in that code; nothing of ours around it."""
    from opsig_cli.records import printable

    if os.environ.get("OPSIG_DEBUG"):
        raise error
    lines = "".join(traceback.format_list(frames)).rstrip().split("\n")
    print("\n".join(map(printable, lines)), file=sys.stderr)
    _fail(f"the task's own code failed: {type(error).__name__}: {error}", 1)


def _fail(message: str, code: int) -> NoReturn:
    message = " ".join(message.split())
    try:
        from opsig_cli.records import printable

        message = printable(message)
    except (MemoryError, ImportError):  # then it is about just that, and is ours
        pass
    print(f"opsig: {message}", file=sys.stderr)
    sys.stderr.flush()
    if os.environ.get("OPSIG_DEBUG"):
        raise
    sys.exit(code)


if __name__ == "__main__":
    run()
