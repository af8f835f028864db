"""opsig mine"""

from __future__ import annotations

from typing import Annotated

import typer

from opsig_cli.commands import completions, movers, options


def mine(
    run: options.RunArgument,
    top: Annotated[int, typer.Option("--top", min=1, help="Samples to print.")] = 40,
    step: Annotated[int | None, typer.Option(min=0, help="Rank by the change of this one step.")] = None,
    window: options.WindowOption = None,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="change|oscillation|variation|surprise|slope",
            help="Default: chosen by the run, and said.",
            autocompletion=completions.scores,
        ),
    ] = None,
    direction: Annotated[
        str, typer.Option(metavar="up|down|both", help="Count only rises, only falls, or both by their size.")
    ] = "both",
    share: Annotated[
        int | None, typer.Option("--share", metavar="STEP", help="Add each sample's part of the change at this step.")
    ] = None,
    format: options.FormatOption = None,
    figure: options.FigureOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """The samples whose loss moves most.

    `change` ranks by the largest one-step change of the loss, `oscillation` by its amplitude at period two,
    `variation` by the sum of all changes, and `surprise` by the largest change against the sample's own history.
    `slope` ranks by the slopes along the leading eigenvectors that `opsig sharpness --name` has put into the file.

    The table has of each sample its part of all samples' movement, the sizes of their loss changes summed, at its step.

    Of a run that saw its samples batch by batch, a change is what a loss exceeds the trend of all samples and the
    sample's own level by, and `--step N` says which rows of that batch made its loss jump: their shares add up to 1.

    Example: opsig mine run.h5 --top 20 --figure movers.png
    """
    from opsig_cli import records
    from opsig_cli.studies import door

    found = door.mine(run, top=top, step=step, window=window, score=score, direction=direction, share=share)
    options.save_figure(figure, found.figure)
    options.say(found.damage, False)
    options.say(found.notes, quiet)
    broken = movers.not_finite_tables(found)
    records.write(found, format, [*broken, records.Table(found.title, movers.mover_rows(found))])
    options.conclude(found.answer, quiet, figure)
