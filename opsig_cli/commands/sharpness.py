"""opsig sharpness"""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from opsig_cli.commands import options
from opsig_cli.errors import OpsigError, UsageError


def sharpness(
    run: options.RunOrRecords,
    count: Annotated[int, typer.Option("-k", min=1, help="Eigenvalues.")] = 1,
    steps: Annotated[
        str | None, typer.Option(metavar="A:B:C", help="Checkpoints of steps A to B, every C-th of them. Default: all.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Residual |Hv - av| / |a| to reach.")] = 1e-3,
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
            "--at",
            metavar="floor|iterate",
            help="Eigenvalues at the floor of the valley, between iterates that bounce, or where these stand. "
            "Default: the floor where the run alternates at period two.",
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="The Hessian itself for Adam, without preconditioner.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random samples.")] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Measure what was measured again.")] = False,
    task: options.TaskOption = None,
    device: options.DeviceOption = None,
    backend: options.BackendOption = "torch",
    format: options.FormatOption = None,
    figure: options.FigureOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """The largest eigenvalues of the loss's Hessian along a run, against the optimizer's stability threshold.

    With --metrics, curvature of single samples instead: those of records on stdin, of --random, or all. With --slice,
    the losses of the groups that `opsig cluster` piped in, along the top eigenvector.

    Example: opsig sharpness run.h5 -k 2 --steps 0:400:2 --figure sharpness.png
    """
    from opsig_cli import backends, records
    from opsig_cli.studies import curvature, tracking
    from opsig_cli.studies.floor import PLACES, choose_place
    from opsig_cli.studies.trained import settings_of
    from opsig_cli.trajectory.file import open_trajectory

    note = partial(options.note, quiet=quiet)
    piped = records.read(sys.stdin) if run == "-" else []
    path = options.trajectory_of(piped) if piped else run
    wanted = [name for name in (metrics or "").split(",") if name]
    known = (*curvature.SAMPLE_METRICS, *curvature.STEP_METRICS)
    for name in wanted:
        if name not in known:
            raise UsageError(f"no metric is called '{name}'. Known: {', '.join(known)}")
    if at not in (None, *PLACES):
        raise UsageError(f"--at is one of {', '.join(PLACES)}, not '{at}'")
    if at is not None and (wanted or slice_step is not None):
        raise UsageError(
            "--at is of eigenvalues; --metrics and --slice are taken at the iterates. Leave one of them out"
        )
    with open_trajectory(path, "r+" if not wanted and slice_step is None else "r") as trajectory:
        chosen_steps = curvature.select_steps(trajectory, steps)
        session, _ = tracking.open_session(trajectory, task, device, backend, note)
        backends.require(session, backends.Curvature, backend, "curvature")
        samples = [name for name in wanted if name in curvature.SAMPLE_METRICS]
        if "gradient_norm" in samples and getattr(session, "couples_samples", False):
            note("note: with batch norm in chunks, gradient norms hold each chunk's statistics fixed")
        if slice_step is not None:
            curvature.select_steps(trajectory, str(slice_step))
            groups = curvature_groups(trajectory, piped)
            written = curvature.slice_records(trajectory, session, slice_step, span, groups)
        elif samples:
            chosen = chosen_samples(trajectory, piped, random, seed)
            with options.progress("curvature", len(chosen_steps), quiet) as advance:
                written = curvature.sample_records(trajectory, session, chosen_steps, chosen, samples, advance)
        elif wanted:
            with options.progress("curvature", len(chosen_steps), quiet) as advance:
                written = curvature.step_records(trajectory, session, chosen_steps, wanted, advance, note)
        else:
            place, words = choose_place(trajectory, session, chosen_steps, at)
            if words:
                note(words)
            settings = None if plain else settings_of(trajectory)
            group = curvature.group_of(settings, place)
            if replace:
                trajectory.remove(group)
            measured = curvature.count_to_measure(trajectory, group, count)
            have = set(trajectory.steps(group).tolist())
            missing = [step for step in chosen_steps if step not in have]
            if len(missing) < len(chosen_steps):
                note(f"measured already: {len(chosen_steps) - len(missing)} of {len(chosen_steps)} checkpoints")
            with options.progress("sharpness", len(missing), quiet) as advance:
                for step in curvature.measure(trajectory, session, group, missing, measured, tolerance):
                    advance(note=f"step {step}")
            written = curvature.records(trajectory, group, chosen_steps, tolerance, count)
        if figure:
            from opsig_cli.studies import drawing

            options.save_figure(figure, drawing.draw_curvature, trajectory, written)
    title = path
    if any(r.get("preconditioned") for r in written):
        title += ": preconditioned Hessian"
    if any(r.get("at") == "floor" for r in written):
        title += ", at the floor of the valley"
    records.write(written, format, [records.Table(title, _rows(written))])
    unmet = [r for r in written if r.get("converged") is False]
    if unmet:
        note(f"note: {len(unmet)} eigenvalues did not reach the tolerance; see their residuals")


def chosen_samples(trajectory, piped: list, random: int, seed: int) -> dict:
    """Positions of the samples to measure by the name of their set."""
    import numpy as np

    from opsig_cli.studies import mining

    chosen = {}
    ids = [r["sample"] for r in piped if isinstance(r.get("sample"), int)]
    if piped and not ids:
        raise OpsigError(
            "records on stdin name no samples. Pipe those that mine prints, or cluster's members: "
            "jq -c 'select(.kind==\"member\")'"
        )
    if ids:
        chosen["chosen"] = mining.positions_of(trajectory, list(dict.fromkeys(ids)))
    if random:
        rest = np.setdiff1d(np.arange(len(trajectory.samples)), chosen.get("chosen", []))
        chosen["random"] = np.sort(np.random.default_rng(seed).choice(rest, min(random, len(rest)), replace=False))
    return chosen or {"all": np.arange(len(trajectory.samples))}


def curvature_groups(trajectory, piped: list) -> dict:
    """Positions of the groups that the records name."""
    from opsig_cli.studies import mining

    members: dict[str, list[int]] = {}
    for record in piped:
        if isinstance(record.get("sample"), int) and record.get("group") is not None:
            members.setdefault(f"G{record['group']}", []).append(record["sample"])
    if piped and not members:
        raise OpsigError("records on stdin name no members of groups. Pipe those that opsig cluster prints")
    return {name: mining.positions_of(trajectory, list(dict.fromkeys(ids))) for name, ids in members.items()}


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
