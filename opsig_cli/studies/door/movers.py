"""`mine`: the samples whose loss moves most."""

from __future__ import annotations

from opsig_cli.errors import UsageError
from opsig_cli.studies import answers, kept, mining, missing, sighted
from opsig_cli.studies.filled import filled
from opsig_cli.studies.numbers import loss_unit, percent
from opsig_cli.studies.ranges import parse_range
from opsig_cli.studies.results import Records, Run, opened
from opsig_cli.trajectory.checking import without_damage
from opsig_cli.trajectory.file import Trajectory


def mine(
    run: Run, *, top: int = 40, step: int | None = None, window: str | None = None, score: str | None = None,
    direction: str = "both", share: int | None = None,
) -> Records:  # fmt: skip
    """The samples whose loss moves most, one record each, the largest score first (the paper's section 2).

    Before them, of kind "not_finite", samples whose loss is not finite while the others' are.

    Of a run that saw its samples batch by batch (sightings), `change` is what a loss exceeds the trend of all and the
    sample's own level by, and with `step` the rows of that step's batch are ranked by their shares of its excess.

    `step`: rank by the change of this one step; `window`: steps "A:B" to look at, both ends included; `score`: one of
    `mining.SCORES`, or as the run allows; `direction`: "up", "down" or "both"; `share`: add each sample's part of the
    whole loss's change at this step.
    """
    from opsig_cli.studies import drawing

    if step is not None and window is not None:
        raise UsageError("--step and --window exclude each other. Give one of them")
    span = parse_range(window, "--window")
    damage: list[str] = []
    origin = back = None
    with opened(run) as trajectory:

        def work():
            nonlocal origin, back
            if sighted.chosen(trajectory, step):
                found = sighted.find(trajectory, top, score, step, span, direction)
                return found, sighted.records(trajectory, found, share), found.broken
            options = {"top": top, "score": score, "step": step, "window": span, "direction": direction}
            origin = kept.origin_of(trajectory, options) if mining.takes_long(trajectory) else None
            back = kept.read_back(trajectory, "mined", mining.Movers, origin)
            if back is not None:
                trajectory.check("losses", trajectory.steps("losses")[back.row].tolist())
            found = mining.find(trajectory, top, score, step, span, direction) if back is None else back
            records = mining.records(filled(trajectory, found.known), found, share)
            return found, records, missing.not_finite(trajectory, found.known)

        found, records, broken = without_damage(work, damage.append)
        unit, own = loss_unit(trajectory), answers.task_of(trajectory, None)
        alone = len(trajectory.samples) == 1
        grouped = len(trajectory.steps("checkpoints")) > 1 and not alone
    if back is None and not isinstance(run, Trajectory):
        kept.keep(trajectory.path, "mined", origin, found)
    notes = [found.note] if found.note else []
    if share is not None:
        of = {"movement": f"of all movement at step {share}", "share": "of the change there"}
        known = {name: [r.get(f"{name}_at_step") for r in records] for name in of}
        said = [f"{percent(sum(p or 0 for p in known[name]))} {words}" for name, words in of.items()
                if any(p is not None for p in known[name])]  # fmt: skip
        notes.append(f"these {len(records)} samples carry {', and '.join(said) or f'nothing of step {share}'}")

    def draw():
        with opened(run, like=trajectory) as again:
            if isinstance(found, sighted.Sighted):
                return drawing.draw_sighted(again, found, records)
            return drawing.draw_movers(filled(again, found.known), found, records)

    title = f"{trajectory.path}: samples that move most, by {found.score_name}"
    if isinstance(found, sighted.Sighted):
        answer = answers.sighted(records, trajectory.path, step, grouped, own)
    else:
        answer = answers.mined(broken + records, trajectory.path, unit, own, step, alone)
    return Records(broken + records, notes=notes, damage=damage, title=title, draw=draw, answer=answer)
