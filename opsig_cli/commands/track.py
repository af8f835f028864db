"""opsig track"""

from __future__ import annotations

from functools import partial

from opsig_cli.commands import options


def track(
    run: options.RunArgument,
    task: options.TaskOption = None,
    allow_changed_data: options.AllowOption = False,
    device: options.DeviceOption = None,
    threads: options.ThreadsOption = None,
    backend: options.BackendOption = "torch",
    format: options.FormatOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Measure every sample's loss at the checkpoints that lack it.

    Example: opsig track run.h5
    """
    from opsig_cli import records
    from opsig_cli.studies import answers, tracking
    from opsig_cli.trajectory.file import open_trajectory

    with open_trajectory(run, "r+") as trajectory:
        trajectory.require("checkpoints/params")
        steps = options.without_damage(lambda: tracking.missing_losses(trajectory))
        skipped = len(trajectory.steps("checkpoints")) - len(steps)
        if skipped:
            options.note(f"note: {skipped} checkpoints have losses already and are skipped", quiet)
        written, samples = [], len(trajectory.samples)
        if len(steps):
            note = partial(options.note, quiet=quiet)
            session, _ = options.without_damage(
                lambda: tracking.open_session(trajectory, task, device, backend, note, allow_changed_data)
            )
            with options.progress("tracking", len(steps), quiet) as advance:
                for step, losses in tracking.fill_losses(trajectory, session, steps, allow_changed_data):
                    written.append({"trajectory": run, "step": step, "loss": tracking.mean_loss(losses)})
                    advance(note=f"step {step}")
    records.write(written, format)
    losses = f"the losses of {samples:,} samples at {len(written)} more checkpoints"
    found = f"{losses}, {len(written) + skipped} in all" if written else f"all {skipped} checkpoints had losses"
    follow = answers.command("analyse", run, task=task)
    options.conclude(answers.Answer(found, follow), quiet, run if written else None)
