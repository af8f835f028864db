"""opsig track"""

from __future__ import annotations

from opsig_cli import options


def track(
    run: options.RunArgument,
    task: options.TaskOption = None,
    device: options.DeviceOption = None,
    backend: options.BackendOption = "torch",
    format: options.FormatOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Measure every sample's loss at the checkpoints that lack it.

    Example: opsig track run.h5
    """
    from opsig_cli import measure, records
    from opsig_cli.trajectory import open_trajectory

    with open_trajectory(run, "r+") as trajectory:
        trajectory.require("checkpoints/params")
        steps = measure.missing_losses(trajectory)
        skipped = len(trajectory.steps("checkpoints")) - len(steps)
        if skipped:
            options.note(f"{skipped} checkpoints have losses already and are skipped", quiet)
        written = []
        if len(steps):
            session, _ = measure.open_session(trajectory, task, device, backend, lambda text: options.note(text, quiet))
            with options.progress("tracking", len(steps), quiet) as advance:
                for step, losses in measure.fill_losses(trajectory, session, steps):
                    written.append({"trajectory": run, "step": step, "loss": losses.mean(dtype="f8")})
                    advance(note=f"step {step}")
    records.write(written, format)
