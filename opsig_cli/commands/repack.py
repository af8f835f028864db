"""opsig repack"""

from __future__ import annotations

from typing import Annotated

import typer

from opsig_cli.commands import options


def repack(
    run: options.RunArgument,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="PATH", callback=options.check_output, help="Default: in place, once it is whole."
        ),
    ] = None,
    format: options.FormatOption = None,
) -> None:
    """Compress a finished run; every number stays the same to the bit.

    Example: opsig repack run.h5
    """
    from opsig_cli import records
    from opsig_cli.studies import answers
    from opsig_cli.trajectory import integrity

    made = integrity.repack(run, output or run)
    records.write([made], format)
    smaller = f"{made['bytes_before']:,} bytes before, {made['bytes']:,} now, every number the same"
    options.conclude(answers.Answer(smaller, answers.command("verify", made["trajectory"])), False, made["trajectory"])
