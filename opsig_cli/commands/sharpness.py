"""opsig sharpness"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from opsig_cli.commands import options


def sharpness(
    run: options.RunOrRecords,
    count: Annotated[
        int | None, typer.Option("-k", min=1, help="Eigenvalues. Default: 1, with --name 4.", show_default=False)
    ] = None,
    steps: options.StepsOption = None,
    tolerance: Annotated[
        float, typer.Option(help="Residual |Hv - av| / |a| to reach; of a sample, over the largest size.")
    ] = 1e-3,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Of samples: gradient_norm, curvature, sample_sharpness. Of the loss: trace, critical_sharpness.",
        ),
    ] = None,
    random: Annotated[int, typer.Option("--random", min=0, help="Measure so many random samples, too.")] = 0,
    slice_step: Annotated[
        int | None, typer.Option("--slice", metavar="STEP", help="Losses of groups along the top eigenvector.")
    ] = None,
    span: Annotated[float, typer.Option(min=0, help="How far the slice goes each way.")] = 0.2,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="floor|iterate",
            help="Eigenvalues at the floor of the valley, between iterates that bounce, or where these stand. "
            "Default: the floor where the run alternates at period two.",
        ),
    ] = None,
    name: Annotated[
        bool, typer.Option("--name", help="Who stands at the two ends of each eigenvector. Default step: the last.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="The Hessian itself for Adam, without preconditioner.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random samples.")] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Measure what was measured again.")] = False,
    part: options.PartOption = None,
    output: options.PartOutput = None,
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
    """The largest eigenvalues of the loss's Hessian along a run, against the optimizer's stability threshold.

    With --metrics, curvature of single samples instead: those of records on stdin, of --random, or all. With --slice,
    the losses of the groups that `opsig cluster` piped in, along the top eigenvector. With --name, the samples on the
    two sides of each eigenvector, which a step along it sets against each other, and their part of the eigenvalue.

    sample_sharpness, the top eigenvalue a of a sample's own Hessian H, comes with its residual: |Hv - av| over the
    largest size of an eigenvalue of H.

    Example: opsig sharpness run.h5 -k 2 --steps 0:400:2 --figure sharpness.png
    """
    from opsig_cli import records
    from opsig_cli.studies import door, ends

    path, piped = options.records_of(run)
    found = door.sharpness(
        path, k=count, steps=steps, tolerance=tolerance, metrics=metrics, random=random, slice=slice_step, span=span,
        at=at, name=name, plain=plain, seed=seed, replace=replace, part=part, output=output,
        plan=plan, records=piped, task=task,
        device=device, backend=backend, allow_changed_data=allow_changed_data, note=partial(options.note, quiet=quiet),
        progress=partial(options.progress, quiet=quiet),
    )  # fmt: skip
    options.save_figure(figure, found.figure)
    records.write(found, format, [records.Table(found.title, ends.rows(found) if name else _rows(found))])
    options.say(found.damage, False)
    options.say(found.notes, quiet)
    options.conclude(found.answer, quiet, figure)


def _rows(records: list[dict]) -> list[dict]:
    """Records shortened to what a person reads: columns that say the same of every eigenvalue are left to JSON."""
    rows = []
    hidden = ["trajectory", "layer_fraction", "losses", "density_nodes", "density_weights", "preconditioned", "at"]
    if all(record.get("converged") for record in records):
        hidden.append("converged")
    for record in records:
        row = {key: value for key, value in record.items() if key not in hidden}
        if record.get("layer_fraction"):
            name, share = max(record["layer_fraction"].items(), key=lambda item: item[1])
            row["most in"] = f"{name} {share:.0%}"
        rows.append(row | record.get("losses", {}))
    return rows
