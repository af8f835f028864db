"""opsig simulate"""

from __future__ import annotations

from typing import Annotated

import typer

from opsig_cli.commands import options, parsing

app = typer.Typer(help="Simulate the theory: the two-layer linear model, and the toy valley.", no_args_is_help=True)

OutputOption = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="RUN",
        callback=options.check_output,
        help="Write a trajectory, too.",
        show_default=False,
    ),
]
AtOption = Annotated[
    list[float] | None,
    typer.Option("--at", metavar="TIME", help="One more record: the state at this time, or after so many steps."),
]
ReplaceOption = Annotated[bool, typer.Option("--replace", help="Overwrite RUN.")]


@app.command(cls=parsing.Command)
def linear(
    dynamics: Annotated[str, typer.Option(metavar="flow|gd|sampled", help="Gradient flow, or descent.")] = "flow",
    d1: Annotated[int, typer.Option(help="Size of the ordinary part of the input.")] = 10,
    d2: Annotated[int, typer.Option(help="Size of the outlier part.")] = 20,
    alpha: Annotated[float, typer.Option(help="Strength of the outlier feature.")] = 100.0,
    beta_norm: Annotated[float, typer.Option(help="Norm of the target's weights.")] = 5.0,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of descent.")] = 0.0048,
    steps: Annotated[int, typer.Option(min=1, help="Of descent.")] = 1000,
    loss: Annotated[str, typer.Option(metavar="square|cross-entropy", help="Of sampled descent.")] = "square",
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    at: AtOption = None,
    output: OutputOption = None,
    replace: ReplaceOption = False,
    format: options.FormatOption = None,
    figure: options.FigureOption = None,
) -> None:
    """The paper's two-layer linear model with an outlier feature: sharpness falls, rises, and reaches the edge.

    Example: opsig simulate linear --dynamics gd --learning-rate 0.0048 --figure linear.png
    """
    from opsig_cli import records
    from opsig_cli.studies import answers, simulating

    _check_new(output, replace)
    run = simulating.linear(dynamics, d1, d2, alpha, beta_norm, learning_rate, steps, loss, seed)
    written = [{"kind": "run", **run.record}, *simulating.states(run, at or [])]
    _save(run, output, replace, figure)
    tables = [records.Table(run.title, _rows(run.record)), records.Table("at", _states(written[1:]))]
    records.write([{"trajectory": output, **record} for record in written], format, tables[: len(written)])
    options.conclude(answers.simulated(run.record, "linear", output), False, output, figure)


@app.command(cls=parsing.Command)
def valley(
    learning_rate: Annotated[float, typer.Option(min=0, help="Of gradient descent.")] = 0.08,
    steps: Annotated[int, typer.Option(min=1)] = 120,
    at: AtOption = None,
    output: OutputOption = None,
    replace: ReplaceOption = False,
    format: options.FormatOption = None,
    figure: options.FigureOption = None,
) -> None:
    """The paper's toy valley: two opposing losses sharpen as the floor is followed, until they spike.

    Example: opsig simulate valley --figure valley.png
    """
    from opsig_cli import records
    from opsig_cli.studies import answers, simulating

    _check_new(output, replace)
    run = simulating.valley(learning_rate, steps)
    written = [{"kind": "run", **run.record}, *simulating.states(run, at or [])]
    _save(run, output, replace, figure)
    tables = [records.Table(run.title, _rows(run.record)), records.Table("at", _states(written[1:]))]
    records.write([{"trajectory": output, **record} for record in written], format, tables[: len(written)])
    options.conclude(answers.simulated(run.record, "valley", output), False, output, figure)


def _check_new(output: str | None, replace: bool) -> None:
    from opsig_cli.trajectory.file import check_new

    if output is not None:
        check_new(output, replace)


def _save(run, output: str | None, replace: bool, figure) -> None:
    from opsig_cli.studies import simulating

    if output is not None:
        simulating.write(run, output, replace)
    options.save_figure(figure, simulating.draw, run)


def _states(written: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "kind"} for record in written]


def _rows(record) -> list[dict]:
    """A record as one row a number, what holds of a theorem among them; series are left to JSON."""
    rows = []
    for name, value in record.items():
        if isinstance(value, dict):
            rows += [{"quantity": f"{name}: {part}", "value": held} for part, held in value.items()]
        elif not hasattr(value, "shape"):
            rows.append({"quantity": name, "value": value})
    return rows
