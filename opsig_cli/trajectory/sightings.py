"""Sightings: losses of some samples at a step, which is what a loop over minibatches sees. N sightings, S samples.

They lie in the file as they were recorded, a row each, and are read in blocks of BLOCK. What reads them by step needs
no more memory than that, and 40 bytes for each of the run's sightings where they were not recorded in order of step
(`opsig repack` puts them in order).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.checking import DamagedRows, named_steps, row_checksums
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.naming import describe
from opsig_cli.trajectory.reading import Reading
from opsig_cli.trajectory.rows import fill_of, stated_fill
from opsig_cli.trajectory.schema import field_of

GROUP = "sightings"
COLUMNS = ("sample", "loss", "prediction", "checksum", "step")
"""Columns in the order in which they are written: a sighting counts where its step is there."""
BLOCK = 1 << 17
"""Sightings that are read at a time."""
CHUNK = 1 << 13
"""Sightings of a chunk in the file."""


@dataclass(frozen=True)
class Sightings:
    """Which samples were seen when: `step` and `sample`, its index, (N,) int64; `loss` (N,) float32, NaN where it is
    not known; `prediction` (N,) int64, -1 where it is not known."""

    step: np.ndarray
    sample: np.ndarray
    loss: np.ndarray
    prediction: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, which: Any) -> Sightings:
        return Sightings(self.step[which], self.sample[which], self.loss[which], self.prediction[which])


def joined(parts: list[Sightings]) -> Sightings:
    """Several one after the other."""
    columns = ((part.step, part.sample, part.loss, part.prediction) for part in parts)
    empty = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))
    return Sightings(*(np.concatenate(column) for column in zip(empty, *columns, strict=True)))


def count(run: Reading) -> int:
    """How many sightings a file holds."""
    return run.shape(f"{GROUP}/step")[0] if run.has(f"{GROUP}/step") else 0


def require(run: Reading) -> None:
    """Raise OpsigError where a file holds no sightings."""
    if not count(run):
        raise OpsigError(
            f"{run.path} holds no sightings. Record them in a training loop, recorder.observe(step, samples, losses), "
            "or import a log of them: opsig import --losses FILE"
        )


# -- writing


def append(run: Trajectory, new: Sightings, packed: bool = False) -> None:
    """Add sightings behind those that the file holds, durable with the next commit; `packed`: in compressed chunks."""
    if not len(new):
        return
    first = count(run)
    columns: dict[str, np.ndarray] = {"sample": new.sample, "loss": new.loss, "step": new.step}
    if run.has(f"{GROUP}/prediction") or (new.prediction >= 0).any():
        columns["prediction"] = new.prediction
    checksum = np.zeros(len(new), np.uint32)
    datasets = {}
    for name, values in columns.items():
        path = f"{GROUP}/{name}"
        datasets[name] = _column(run, name, first, packed)
        kind = datasets[name].dtype
        if kind.kind == "u":
            values = np.where(values < 0, fill_of(kind), values)
        columns[name] = np.ascontiguousarray(values, kind)
        checksum ^= row_checksums(path, columns[name])
    columns["checksum"], datasets["checksum"] = checksum, _column(run, "checksum", first, packed)
    run._file[f"{GROUP}/sighting"].resize((first + len(new),))
    for name in COLUMNS:
        if name in columns:
            datasets[name].resize((first + len(new),))
            datasets[name][first:] = columns[name]


def _column(run: Trajectory, name: str, length: int, packed: bool) -> Any:
    """The dataset of a column, made where it is new: the sightings that there are hold the fill."""
    path = f"{GROUP}/{name}"
    if run.has(path):
        return run._file[path]
    field = field_of(path)
    dtype = field.dtype
    if "|" in dtype:
        dtype = "u1" if run.has("class_name") and run.shape("class_name")[0] < 255 else "i4"
    how: dict[str, Any] = {"shuffle": True, "compression": "gzip", "compression_opts": 4} if packed else {}
    dataset = run._file.create_dataset(
        path, (length,), maxshape=(None,), dtype=dtype, chunks=(CHUNK,), fillvalue=stated_fill(np.dtype(dtype)), **how
    )
    describe(run._file, dataset, field)
    return dataset


def drop_after(run: Trajectory, step: int) -> None:
    """Drop the sightings of all later steps."""
    kept, whole = 0, count(run)
    with run.damage(GROUP):
        columns = [run._file[f"{GROUP}/{name}"] for name in COLUMNS if run.has(f"{GROUP}/{name}")]
        for first in range(0, whole, BLOCK):
            part = slice(first, min(first + BLOCK, whole))
            stay = np.flatnonzero(run._file[f"{GROUP}/step"][part] <= step)
            if kept < first or len(stay) < part.stop - first:
                for dataset in columns:
                    dataset[kept : kept + len(stay)] = dataset[part][stay]
            kept += len(stay)
        if kept < whole:
            for dataset in [*columns[::-1], run._file[f"{GROUP}/sighting"]]:  # step first: it says which there are
                dataset.resize((kept,))
    run.forget(GROUP)
    run._sighted_in_order = (0, True)


# -- reading


def blocks(run: Reading) -> Iterator[Sightings]:
    """All sightings as they were recorded, in blocks, held against their checksums once while the file is open.

    Raises DamagedRows for those that are not what was written; and OpsigError for what nobody writes: a step below 0,
    or a sample that the run lacks.
    """
    whole = count(run)
    known = run._checked.get(GROUP)
    if known is None or len(known) < whole:
        damaged = np.setdiff1d(damaged_places(run), run._unsighted)
        if len(damaged):
            raise DamagedRows(run.path, GROUP, _steps_at(run, damaged), lambda: _leave_out(run, damaged, whole))
        run._checked[GROUP] = np.ones(whole, bool)
    ids = np.sort(run.samples)
    for first in range(0, whole, BLOCK):
        last = min(first + BLOCK, whole)
        found = _as_sightings(_raw(run, first, last))
        out = run._unsighted[(run._unsighted >= first) & (run._unsighted < last)] - first
        if len(out):
            found = found[np.setdiff1d(np.arange(len(found)), out)]
        places = np.minimum(np.searchsorted(ids, found.sample), len(ids) - 1)
        odd = np.flatnonzero((ids[places] != found.sample) | (found.step < 0))
        if len(odd):
            raise OpsigError(
                f"{run.path} has a sighting of sample {found.sample[odd[0]]} at step {found.step[odd[0]]}, which is "
                "none of the run's. opsig writes none such"
            )
        yield found


def by_step(run: Reading) -> Iterator[Sightings]:
    """All sightings in order of step, in blocks of whole steps; of a step in the order of recording."""
    pending: list[Sightings] = []
    for block in blocks(run) if _in_order(run) else _sorted(run):
        last = int(np.searchsorted(block.step, block.step[-1])) if len(block) else 0
        if last:
            yield joined([*pending, block[:last]])
            pending = []
        elif pending and len(block) and pending[-1].step[-1] != block.step[0]:
            yield joined(pending)
            pending = []
        pending.append(block[last:])
    if sum(map(len, pending)):
        yield joined(pending)


def batches(run: Reading) -> Iterator[tuple[int, Sightings]]:
    """Each step that has sightings, increasing, and what was seen at it."""
    for block in by_step(run):
        starts = np.flatnonzero(np.diff(block.step, prepend=block.step[0] - 1))
        for first, last in zip(starts, [*starts[1:], len(block)], strict=True):
            yield int(block.step[first]), block[first:last]


def of_samples(run: Reading, samples: np.ndarray) -> Sightings:
    """The sightings of samples, given by index, in order of step."""
    return joined([block[np.isin(block.sample, samples)] for block in by_step(run)])


def at(run: Reading, step: int) -> np.ndarray:
    """Indices of the samples that were seen at a step, (N,), as the file holds them."""
    if not count(run):
        return np.empty(0, np.int64)
    with run.damage(GROUP):
        step_N = run._file[f"{GROUP}/step"]
        places = [
            first + np.flatnonzero(step_N[first : first + BLOCK] == step) for first in range(0, len(step_N), BLOCK)
        ]
        there = np.concatenate(places)
        return run._file[f"{GROUP}/sample"][there[0] : there[-1] + 1][there - there[0]] if len(there) else there


def extent(run: Reading) -> tuple[int, int] | None:
    """The first and the last step that have sightings, None without any."""
    ends = [(int(block.step.min()), int(block.step.max())) for block in blocks(run) if len(block)]
    return (min(first for first, _ in ends), max(last for _, last in ends)) if ends else None


def last_step(run: Reading) -> int | None:
    """The last step that has sightings."""
    with run.damage(GROUP):
        whole = count(run)
        ends = [int(run._file[f"{GROUP}/step"][f : min(f + BLOCK, whole)].max()) for f in range(0, whole, BLOCK)]
    return max(ends, default=None)


def damaged_places(run: Reading) -> np.ndarray:
    """Places in the file of sightings that cannot be read or do not have the checksum stored with them, increasing."""
    found = []
    for first in range(0, count(run), BLOCK):
        last = min(first + BLOCK, count(run))
        try:
            found.append(first + np.flatnonzero(_sums(_raw(run, first, last))))
        except OpsigError:  # which of its chunks is it?
            for start in range(first, last, CHUNK):
                stop = min(start + CHUNK, last)
                try:
                    found.append(start + np.flatnonzero(_sums(_raw(run, start, stop))))
                except OpsigError:
                    found.append(np.arange(start, stop))
    return np.concatenate([np.empty(0, np.int64), *found])


def _sums(columns: dict[str, np.ndarray]) -> np.ndarray:
    """0 for each sighting that is what was written, (N,) uint32."""
    sums = columns.get("checksum", np.zeros(len(columns["step"]), np.uint32)).copy()
    for name, values in columns.items() if "checksum" in columns else ():
        if name != "checksum":
            sums ^= row_checksums(f"{GROUP}/{name}", values)
    return sums


def _raw(run: Reading, first: int, last: int) -> dict[str, np.ndarray]:
    """Columns of some sightings as the file holds them."""
    with run.damage(GROUP):
        return {
            name: run._file[f"{GROUP}/{name}"][first:last] for name in COLUMNS if run.has(f"{GROUP}/{name}")
        }  # fmt: skip


def _as_sightings(raw: dict[str, np.ndarray]) -> Sightings:
    size = len(raw["step"])
    prediction = raw.get("prediction", np.full(size, -1))
    if prediction.dtype.kind == "u":
        prediction = np.where(prediction == fill_of(prediction.dtype), -1, prediction.astype(np.int64))
    loss = raw.get("loss", np.full(size, np.nan, np.float32))
    return Sightings(raw["step"], raw["sample"], loss, prediction.astype(np.int64))


def _in_order(run: Reading) -> bool:
    """Whether sightings were recorded in order of step."""
    whole, found = run._sighted_in_order
    if whole != count(run):
        before, found = -1, True
        for block in blocks(run):
            found &= not len(block) or bool(block.step[0] >= before and np.all(np.diff(block.step) >= 0))
            before = int(block.step[-1]) if len(block) else before
        run._sighted_in_order = count(run), found
    return found


def _sorted(run: Reading) -> Iterator[Sightings]:
    whole = joined(list(blocks(run)))
    order = np.argsort(whole.step, kind="stable")
    for first in range(0, len(whole), BLOCK):
        yield whole[order[first : first + BLOCK]]


def _steps_at(run: Reading, places: np.ndarray) -> list[int]:
    found: set[int] = set()
    for first in range(0, count(run), CHUNK):
        inside = places[(places >= first) & (places < first + CHUNK)] - first
        if len(inside):
            try:
                found.update(_raw(run, first, first + CHUNK)["step"][inside].tolist())
            except OpsigError:  # their steps cannot be read, either
                continue
    return sorted(found)


def _leave_out(run: Reading, damaged: np.ndarray, whole: int) -> str:
    """Present these no more, and say how many they were."""
    steps = _steps_at(run, damaged)
    run.leave_out({GROUP: damaged})
    at = f": {named_steps(steps)}" if steps else ""
    are = "is" if len(damaged) == 1 else "are"
    return f"{run.path}: {len(damaged):,} of {whole:,} sightings {are} damaged and left out{at}"
