"""The command line: the app, and the one place where errors become one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from opsig_cli.commands import (
    branch,
    cluster,
    compare,
    import_,
    info,
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
from opsig_cli.commands.options import Command
from opsig_cli.errors import OpsigError

app = typer.Typer(
    name="opsig",
    help="Find the opposing groups of samples that make a neural network's training loss oscillate and spike.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command)(train.train)
app.command("import", cls=Command)(import_.import_)
app.command(cls=Command)(track.track)
app.command(cls=Command)(sharpness.sharpness)
app.command(cls=Command)(mine.mine)
app.command(cls=Command)(probe.probe)
app.command(cls=Command)(cluster.cluster)
app.command(cls=Command)(branch.branch)
app.command(cls=Command)(report.report)
app.command(cls=Command)(compare.compare)
app.command(cls=Command)(info.info)
app.command(cls=Command)(verify.verify)
app.command(cls=Command)(repack.repack)
app.add_typer(simulate.app, name="simulate")


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


def run() -> None:
    """Run the command line; the entry point `opsig`."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pipe ends us silently
    try:
        app()
    except OpsigError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except MemoryError:
        _fail("out of memory. Use a smaller --chunk-size or fewer samples", 1)


def _fail(message: str, code: int) -> None:
    from opsig_cli.records import printable

    print(f"opsig: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.stderr.flush()
    if os.environ.get("OPSIG_DEBUG"):
        raise
    sys.exit(code)


if __name__ == "__main__":
    run()
