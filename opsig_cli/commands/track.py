"""opsig track"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import numpy as np

from opsig_cli.commands import options


def track(
    run: options.RunArgument,
    part_text: options.PartOption = None,
    output: options.PartOutput = None,
    task: options.TaskOption = None,
    allow_changed_data: options.AllowOption = False,
    device: options.DeviceOption = None,
    threads: options.ThreadsOption = None,
    backend: options.BackendOption = None,
    plan: options.PlanOption = False,
    memory: options.MemoryOption = None,  # set by its callback
    format: options.FormatOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Measure every sample's loss at the checkpoints that lack it.

    With --part, of a share of the checkpoints, into a file of its own: on any machine, in any order.

    Example: opsig track run.h5
    """
    from opsig_cli import records
    from opsig_cli.studies import answers, describing, planning, tracking
    from opsig_cli.studies.parts import share
    from opsig_cli.trajectory.file import open_trajectory

    part = share.part_of(part_text, output)
    if part is None and not plan:
        describing.renew(run, task, partial(options.note, quiet=quiet))
    with open_trajectory(run, "r" if part else "r+") as whole, ExitStack() as stack:
        whole.require("checkpoints/params")
        trajectory = whole
        if part:
            trajectory = stack.enter_context(
                share.opened_part(whole, part, str(output), share.LOSSES, {"what": "losses"})
            )
        steps = options.without_damage(lambda: tracking.missing_losses(trajectory))
        everything = whole.steps("checkpoints").tolist()
        mine = part.share(everything) if part else everything
        steps = steps[np.isin(steps, mine)]
        if skipped := len(mine) - len(steps):
            options.note(f"note: {skipped} checkpoints have losses already and are skipped", quiet)
        written, samples = [], len(trajectory.samples)
        if len(steps):
            note = partial(options.note, quiet=quiet)
            session, _ = options.without_damage(
                lambda: tracking.open_session(whole, task, device, backend, note, allow_changed_data)
            )
            if plan:
                wanted = planning.plan(whole, session, backend, "track", steps.tolist(), 1, 4 * len(whole.samples))
                records.write(wanted, format)
                options.say(wanted.notes, quiet)
                return
            with options.progress("tracking", len(steps), quiet) as advance:
                for step, losses in tracking.fill_losses(trajectory, session, steps, allow_changed_data):
                    written.append({"trajectory": output or run, "step": step, "loss": tracking.mean_loss(losses)})
                    advance(note=f"step {step}")
    records.write(written, format)
    losses = f"the losses of {samples:,} samples at {len(written)} more checkpoints"
    found = f"{losses}, {len(written) + skipped} in all" if written else f"all {skipped} checkpoints had losses"
    follow = answers.command("merge", run, str(output)) if part else answers.command("analyse", run, task=task)
    options.conclude(answers.Answer(found, follow), quiet, (output or run) if written else None)
