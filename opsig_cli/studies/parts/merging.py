"""Parts of a run back into its file: each row once, nothing that differs, and what is still missing said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies import curvature
from opsig_cli.studies.parts.share import CURVATURE, OF_SAMPLES, Part, run_id, worded
from opsig_cli.studies.trained import settings_of
from opsig_cli.trajectory.checking import named_steps
from opsig_cli.trajectory.file import Trajectory, open_trajectory
from opsig_cli.trajectory.schema import ROW_GROUPS

AGREES = 1e-4
"""Relative difference up to which the same number, measured on two machines, is the same."""
AT_ONCE = 64 << 20
"""Bytes of rows after which what was taken in is committed."""


def merge(run: Trajectory, paths: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Take the rows of parts into their run; a record of each part, and notes of what is still missing.

    Rows that the run or another part has as well must agree, and stay as they are. Nothing is written before all parts
    have been looked at. Raises OpsigError for a part of another run or of other settings, damaged, or that differs.
    """
    if not paths:
        raise OpsigError("no part is named. Write: opsig merge RUN PART...")
    with ExitStack() as open_parts:
        parts = [open_parts.enter_context(open_trajectory(path)) for path in paths]
        said = [_said(run, part) for part in parts]
        _check_settings(parts, said)
        new = _new_rows(run, parts)
        records = []
        for part, about, rows in zip(parts, said, new, strict=True):
            held = sum(len(part.steps(group)) for group in ROW_GROUPS)
            _take(run, part, rows)
            records.append({
                "trajectory": run.path, "part": part.path, "number": about["part"], "parts": about["parts"],
                "rows": held, "taken": len(rows),
            })  # fmt: skip
        return records, list(_missing(run, parts, said))


def _said(run: Trajectory, part: Trajectory) -> dict[str, Any]:
    """What a part says of itself. Raises OpsigError where it is none of this run."""
    said = part.attributes.get("part_json")
    numbers = (said.get("part"), said.get("parts")) if said else ()
    if not said or not all(isinstance(number, int) and number > 0 for number in numbers):
        raise OpsigError(f"{part.path} is no part of a run. Parts are made by opsig track or sharpness with --part")
    if said.get("of") != run_id(run):
        raise OpsigError(f"{part.path} is a part of another run than {run.path}")
    if not np.array_equal(part.samples, run.samples):
        raise OpsigError(f"{part.path} is of other samples than {run.path}")
    for group in ROW_GROUPS:
        part.check(group, part.steps(group).tolist())
    return said


def _check_settings(parts: Sequence[Trajectory], said: Sequence[dict[str, Any]]) -> None:
    """Raise OpsigError where parts of one kind of measuring were made in different ways."""
    first: dict[str, tuple[Trajectory, dict[str, Any]]] = {}
    for part, about in zip(parts, said, strict=True):
        settings = about.get("settings") or {}
        other, known = first.setdefault(str(settings.get("what")), (part, settings))
        if known != settings:
            raise OpsigError(
                f"{part.path} was measured with {worded(settings)}, and {other.path} with {worded(known)}. "
                "Measure one of them again"
            )
        digests = {p.attributes.get("task_sha256") for p in (part, other)}
        if len(digests) > 1:
            raise OpsigError(f"{part.path} and {other.path} were measured with different code of the task")


def _new_rows(run: Trajectory, parts: Sequence[Trajectory]) -> list[list[tuple[str, int]]]:
    """The rows to be taken from each part, by group and step. Raises OpsigError where two of one do not agree."""
    first: dict[tuple[str, int], Trajectory] = {}
    found: list[list[tuple[str, int]]] = []
    for part in parts:
        found.append([])
        for group in ROW_GROUPS:
            have = set(run.steps(group).tolist())
            for step in part.steps(group).tolist():
                other = run if step in have else first.setdefault((group, step), part)
                if other is part:
                    found[-1].append((group, step))
                    continue
                _require_same(other, part, group, step)
                if group in OF_SAMPLES and _adds(other, part, group, step):
                    found[-1].append((group, step))
    return found


def _adds(one: Trajectory, other: Trajectory, group: str, step: int) -> bool:
    """Whether the other file's row has samples that the one's lacks."""
    return any(
        not one.has(f"{group}/{name}")
        or (np.isfinite(other.row(f"{group}/{name}", step)) & ~np.isfinite(one.row(f"{group}/{name}", step))).any()
        for name in _columns(other, group)
    )


def _require_same(one: Trajectory, other: Trajectory, group: str, step: int) -> None:
    """Raise OpsigError where two files hold different values at a step: beyond rounding, or of an eigenvalue beyond
    what its residuals allow."""
    if group in CURVATURE:
        names, roughness = ["eigenvalue"], float(np.nanmax([f.row(f"{group}/residual", step) for f in (one, other)]))
    else:
        names, roughness = _columns(other, group), 0.0
    for name in names:
        if not one.has(f"{group}/{name}"):
            continue
        left, right = (np.asarray(file.row(f"{group}/{name}", step), np.float64) for file in (one, other))
        both = np.isfinite(left) & np.isfinite(right) if left.shape == right.shape else np.zeros(0, bool)
        off = np.abs(left - right)[both] if left.shape == right.shape else np.array([np.inf])
        scale = np.abs(left[both]).max(initial=1e-6) if group in CURVATURE else np.abs(left[both]) + 1e-6
        if (off > max(AGREES, 2 * roughness) * scale).any():
            raise OpsigError(
                f"{other.path} and {one.path} hold different {group}/{name} at step {step} (by up to {off.max():.3g}). "
                "Measure one of them again"
            )


def _columns(part: Trajectory, group: str) -> list[str]:
    prefix = f"{group}/"
    names = [name.removeprefix(prefix) for name in part.names() if name.startswith(prefix)]
    return [name for name in names if name not in ("step", "checksum")]


def _take(run: Trajectory, part: Trajectory, rows: Sequence[tuple[str, int]]) -> None:
    waiting = 0
    for group, step in rows:
        columns = {name.replace("/", "__"): part.row(f"{group}/{name}", step) for name in _columns(part, group)}
        if step in run.steps(group):  # other samples of the same step
            for name in _columns(run, group):
                held = run.row(f"{group}/{name}", step)
                columns[name] = np.where(np.isfinite(held), held, columns.get(name, held))
            run.rewrite(group, step, **columns)
        else:
            run.append(group, step, **columns)
        waiting += sum(np.asarray(value).nbytes for value in columns.values())
        if waiting > AT_ONCE:
            run.commit()
            waiting = 0
    run.commit()


def _missing(run: Trajectory, parts: Sequence[Trajectory], said: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What of the parts' measuring the run does not have yet, in sentences."""
    seen = set()
    for part, about in zip(parts, said, strict=True):
        settings = about.get("settings") or {}
        for group in (group for group in ROW_GROUPS if len(part.steps(group))):
            if (group, about["parts"]) in seen:
                continue
            seen.add((group, about["parts"]))
            wanted = curvature.select_steps(run, settings.get("steps"))
            have = set(run.steps(group).tolist()) | set(_not_preconditioned(run, group))
            lacking = [step for step in wanted if step not in have]
            if not lacking:
                continue
            numbers = [
                str(n)
                for n in range(1, about["parts"] + 1)
                if set(Part(n, about["parts"]).share(wanted)) & set(lacking)
            ]
            yield (
                f"{group} is still missing at {named_steps(lacking)}, which is part {', '.join(numbers)} of "
                f"{about['parts']}"
            )


def _not_preconditioned(run: Trajectory, group: str) -> list[int]:
    """Steps at which there is nothing to measure: Adam has no preconditioner before its first step."""
    settings = settings_of(run)
    return [] if settings is None or group not in ("preconditioned", "preconditioned_floor") else [settings.began]
