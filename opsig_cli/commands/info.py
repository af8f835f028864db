"""opsig info"""

from __future__ import annotations

from opsig_cli.commands import options

TAKES = {
    "momentum": ("momentum", "splitsgd"),
    "beta1": ("adam",),
    "beta2": ("adam",),
    "epsilon": ("adam",),
    "sign_learning_rate": ("splitsgd",),
    "dampening": ("splitsgd",),
}
"""Optimizers that take a setting; all take the others."""


def info(run: options.RunArgument, format: options.FormatOption = None) -> None:
    """What a trajectory file holds.

    Example: opsig info run.h5 --format json
    """
    import os

    from opsig_cli import records
    from opsig_cli.studies import answers
    from opsig_cli.trajectory import external, sightings
    from opsig_cli.trajectory.file import open_trajectory
    from opsig_cli.trajectory.schema import ROW_GROUPS

    def recorded(trajectory):
        """Steps of every row group; the first and the last row of each are held against their checksums."""
        rows = {group: trajectory.steps(group) for group in ROW_GROUPS}
        for group, steps in rows.items():
            trajectory.check(group, {int(step) for step in (*steps[:1], *steps[-1:])})
        return rows

    with open_trajectory(run) as trajectory:
        attributes = trajectory.attributes
        own = answers.task_of(trajectory, None)
        referred = options.without_damage(lambda: external.totals(trajectory))
        rows = options.without_damage(lambda: recorded(trajectory))
        seen = options.without_damage(lambda: sightings.extent(trajectory))
        ends = [int(steps[-1]) for steps in rows.values() if len(steps)] + ([seen[1]] if seen else [])
        settings = attributes.get("settings_json") or {}
        record = {
            "trajectory": run,
            "task": attributes.get("task"),
            "steps": max(ends, default=None),
            "samples": len(trajectory.samples),
            "parameters": trajectory.shape("checkpoints/params")[1] if trajectory.has("checkpoints/params") else None,
            "frozen_parameters": trajectory.shape("frozen/params")[0] if trajectory.has("frozen/params") else 0,
            "checkpoints": len(rows["checkpoints"]),
            "sightings": sightings.count(trajectory),
            "groups": trajectory.groups(),
            "bytes": os.path.getsize(run),
            "state": attributes.get("state"),
            "backend": settings.get("backend"),
        } | referred
        if "from_step" in attributes:
            record |= {key: attributes.get(key) for key in ("parent_path", "from_step", "change")}
        optimizer = settings.get("optimizer")
        settings = {key: value for key, value in settings.items() if optimizer in TAKES.get(key, (optimizer,))}
        settings = {key: value for key, value in settings.items() if key != "began" or value}
        rows_recorded = [
            {"group": group, "rows": len(s), "first": s[0], "last": s[-1]} for group, s in rows.items() if len(s)
        ]
        if seen:
            counted = {"group": sightings.GROUP, "rows": record["sightings"], "first": seen[0], "last": seen[1]}
            rows_recorded.append(counted)
    about = [{"what": key, "value": value} for key, value in (record | settings).items() if value is not None]
    records.write([record], format, [records.Table("", about), records.Table("rows", rows_recorded)])
    options.conclude(answers.described(record, own), False)
