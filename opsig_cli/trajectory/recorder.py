"""Writing a run as it happens: what `opsig train` uses, and what a training loop of one's own can use.

S samples, P parameters, N of the samples given at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self
from urllib.parse import unquote

import numpy as np

from opsig_cli.backends import State, Tensor
from opsig_cli.errors import OpsigError
from opsig_cli.trajectory import external, given, sightings
from opsig_cli.trajectory.file import Trajectory, create_trajectory, open_trajectory
from opsig_cli.trajectory.modules import layout_of, state_of
from opsig_cli.trajectory.rows import to_bfloat16
from opsig_cli.trajectory.schema import FIELDS, ROW_GROUPS, logged_name
from opsig_cli.trajectory.sightings import Sightings
from opsig_cli.trajectory.states import read_layout, write_layout

COSTS, PATIENCE = 0.005, 10.0
"""Part of the time that commits take at most, and seconds that they are put off at most."""
HELD = 1 << 16
"""Sightings that are held before they are written, where no commit comes first."""
HELD_CELLS = 1 << 22
"""Losses of all samples, NaN among them, that are held likewise."""
RECENT = 8
"""Steps whose samples are remembered, so that one that is observed twice shows at once."""
SLOTS = [name.rpartition("/")[2] for name in FIELDS if name.startswith("checkpoints/optimizer/")]
SCALARS = {name.removeprefix("scalars/") for name in FIELDS if name.startswith("scalars/")} - {"step", "checksum"}
"""Scalars that the schema knows and commands look at."""


class Recorder:
    """Appends steps to a trajectory and commits them; the file exists, and opens, from the first line on.

    `samples`: their number, or their indices in the dataset. `labels`: text a sample; `classes`: names behind
    predictions; `layout`: names and shapes of the parameters, where checkpoints are given as `State`. `resume` goes on
    with a file that exists: `last_step` says what it holds, and `rewind` goes back to a checkpoint. Steps become
    durable together: with each checkpoint, at the end, also where an exception ends the loop, and between them every
    `commit_every` calls of `record` or `observe`, by default as often as commits take COSTS of the time (a second or so
    apart, PATIENCE seconds at most). `bfloat16` keeps checkpoints at half the size: parameters alone, rounded, from
    which a run cannot be continued. Raises OpsigError where an argument is not what it must be, or the file cannot be
    written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        samples: int | Sequence[int],
        *,
        labels: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        layout: Iterable[Tensor] | None = None,
        attributes: Mapping[str, Any] | None = None,
        resume: bool = False,
        replace: bool = False,
        commit_every: int | None = None,
        bfloat16: bool = False,
    ):
        if resume and replace:
            raise OpsigError("resume=True goes on with a file and replace=True overwrites it. Give one of them")
        if commit_every is not None and commit_every < 1:
            raise OpsigError(f"commit_every is {commit_every}, and must be a number of calls, at least 1")
        ids = given.as_ids(samples)
        stated = given.as_attributes(attributes or {})
        texts = {} if labels is None else {"samples/label": given.as_texts("labels", labels, len(ids))}
        if classes is not None:
            texts["class_name"] = given.as_texts("classes", classes)
        if resume and not os.path.exists(path):
            raise OpsigError(f"{os.fspath(path)} does not exist. Leave resume=True out to begin it")
        if not resume and not replace and os.path.exists(path):
            raise OpsigError(f"{os.fspath(path)} exists. Go on with it by resume=True, or overwrite it by replace=True")
        self._run = open_trajectory(path, "r+") if resume else create_trajectory(path, ids, stated, replace=replace)
        try:
            if resume:
                _check_ids(self._run, ids)
                self._run.set_attributes(**stated)
            for name, values in texts.items():
                _write_once(self._run, name, values)
            if layout is not None:
                self._keep_layout("layout", list(layout))
            began = time.monotonic()
            self._run.commit()
            self._committed = time.monotonic()
            self._cost = self._committed - began  # the seconds that the last commit took
        except BaseException:
            self._run.abort()
            raise
        self._ids = self._run.samples
        self._order = None if np.array_equal(self._ids, np.arange(len(self._ids))) else np.argsort(self._ids)
        self._unwritten: list[Sightings] = []
        self._held: dict[str, dict[int, Mapping[str, Any]]] = {}  # rows that are not written yet, by group and step
        self._recent: dict[int, np.ndarray] = {}
        self._last_observed = sightings.last_step(self._run)
        self._resighted = -1  # a step gone back to, whose sightings stay until it is observed again
        self._classes = self._run.shape("class_name")[0] if self._run.has("class_name") else None
        self._commit_every = commit_every
        self._bfloat16 = bfloat16
        if "checkpoints/params" in self._run._file:
            self._bfloat16 = self._run._file["checkpoints/params"].dtype.kind == "u"
        self._closed = False
        self._process = os.getpid()
        self._looked_at: set[str] = set()
        self._uncommitted = 0
        self._frozen: np.ndarray | None = None
        self._rewound: tuple[int, set[str]] = (-1, set())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()  # a row that was not finished does not count: see Trajectory.append

    def __repr__(self) -> str:
        if not self._run._file:
            return f"Recorder({self._run.path}: closed)"
        held = {group: self.run.steps(group) for group in ROW_GROUPS}
        said = [f"{group} at {len(s):,} steps, {s[0]} to {s[-1]}" for group, s in held.items() if len(s)]
        if seen := sightings.count(self._run) + sum(map(len, self._unwritten)):
            said.append(f"{seen:,} sightings up to step {self._last_observed}")
        return f"Recorder({self._run.path}: {'; '.join(said) or 'nothing recorded'})"

    @property
    def run(self) -> Trajectory:
        """The file, with everything that was recorded so far."""
        self._require_open()
        self._write()
        return self._run

    @property
    def last_step(self) -> int | None:
        """The last step of which anything is recorded; None for a new file."""
        run = self.run
        last = [int(run.steps(group)[-1]) for group in ROW_GROUPS if len(run.steps(group))]
        return max([*last, *([] if self._last_observed is None else [self._last_observed])], default=None)

    def record(
        self,
        step: int,
        *,
        scalars: Mapping[str, float] | None = None,
        losses: Any = None,
        predictions: Any = None,
        samples: Sequence[int] | None = None,
        model: Any = None,
        optimizer: Any = None,
        state: State | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what is known at a step: a number of optimizer steps taken so far, so that 0 is before the first.

        `losses` and `predictions` are (S,), NaN and -1 for samples that were not measured; or (N,), of the `samples`
        with these dataset indices. `scalars`: numbers by any name; the schema's own, such as train_loss, are what
        commands look at. `model`, with its `optimizer`, is a torch model, or a tree of JAX's arrays with optax's state,
        that becomes a checkpoint; or `state` does, of which `source` says where it is from: path, bytes, sha256. A step
        may be recorded in several calls as long as none gives what another gave. Nothing is written where OpsigError is
        raised.
        """
        self._require_open()
        step = given.as_step(step)
        plan: list[tuple[str, dict[str, Any]]] = []
        if scalars is not None:
            numbers = given.as_scalars(scalars)
            own = {name: number for name, number in numbers.items() if name in SCALARS}
            free = {logged_name(name): number for name, number in numbers.items() if name not in own}
            plan += [("scalars", own)] if own else []
            plan += [("logged", free)] if free else []
        if losses is not None or predictions is not None:
            plan.append(("losses", self._samples(losses, predictions, samples)))
        elif samples is not None:
            raise OpsigError("samples says which samples losses or predictions are of. Give these, too")
        if model is not None and state is not None:
            raise OpsigError("model and state are two ways to give a checkpoint. Give one of them")
        if model is not None:
            self._check_layout("model", layout_of(model))
            state = state_of(model, optimizer, step)
        if state is not None:
            plan.append(("checkpoints", self._checkpoint(step, state, source)))
        if (optimizer is not None and model is None) or (source is not None and (state is None or model is not None)):
            raise OpsigError("optimizer goes with model, and source with state. Give these, too")
        if not plan:
            raise OpsigError(f"there is nothing to record at step {step}. Give losses, scalars, model or state")
        rows = [self._merged(step, *part) for part in plan]
        if model is not None:
            self._keep_layout("model", layout_of(model))
        if state is not None:
            self._keep_frozen(state.frozen)
        for (group, _), row in zip(plan, rows, strict=True):
            self._put(group, step, row)
        self._count(state is not None)

    def observe(self, step: int, samples: Sequence[int], losses: Any, predictions: Any = None) -> None:
        """Write what a step saw of the samples in its batch: `losses`, and `predictions` where known, (N,) each, of the
        `samples` with these dataset indices.

        A step may be observed in several calls (batches that are accumulated, the shares of processes), each with
        other samples; one that the batch drew twice counts twice. NaN is a loss that is not known. Nothing is written
        where OpsigError is raised.
        """
        self._require_open()
        step = given.as_step(step)
        wanted = self._ids[self._places(samples, once=False)]
        values = given.as_losses(losses, len(wanted))
        predicted = np.full(len(wanted), -1)
        if predictions is not None:
            predicted = given.as_predictions(predictions, len(wanted), self._classes)
        again = step == self._resighted
        seen = np.empty(0, np.int64) if again else self._seen_at(step)
        if len(seen) and len(twice := np.intersect1d(seen, wanted)):
            raise OpsigError(self._twice(step, f"sample {twice[0]}"))
        if again:
            self._resighted = -1
            sightings.drop_after(self._run, step - 1)
        self._unwritten.append(Sightings(np.full(len(wanted), step), wanted, values, predicted))
        self._recent[step] = np.concatenate([seen, wanted])
        if len(self._recent) > RECENT:
            del self._recent[min(self._recent)]
        self._last_observed = max(step, -1 if self._last_observed is None else self._last_observed)
        if sum(map(len, self._unwritten)) >= HELD:
            self._write_sightings()
        self._count()

    def _refer(
        self, step: int, state: State, extents: Sequence[external.Extent], hashes: dict[str, str],
        size: tuple[int, int], source: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Write a checkpoint whose parameters and moments stay in files, `state` having its buffers and frozen
        parameters alone; commits. `hashes`, `size`: see `external.columns_of`."""
        if "checkpoints/params" in self._run._file:
            raise OpsigError(f"{self._run.path} holds its checkpoints itself, and refers to none in other files")
        self._check_frozen(state.frozen)
        columns = external.columns_of(extents, hashes, size, self._run.path)
        columns |= {"buffers": state.buffers} if state.buffers.size else {}
        for name, column in columns.items():
            path = f"checkpoints/{name.replace('__', '/')}"
            if self._run.has(path) and self._run.shape(path)[1:] != column.shape:
                raise OpsigError(
                    f"{self._run.path} has no room for a checkpoint of {size[0]} files and {size[1]} stretches. Import "
                    "all of them at once, with --replace"
                )
        self._keep_frozen(state.frozen)
        self._run.append("checkpoints", step, **columns, **{f"source__{name}": value for name, value in source.items()})
        self.commit()

    def rewind(self, step: int) -> None:
        """Go back to a step, as to the checkpoint that a loop continues from after a crash: what was recorded of later
        steps is dropped, at once and for good. What is recorded of `step` itself stays until it is recorded again."""
        self._require_open()
        step = given.as_step(step)
        self._write()
        self._run.rewind(step)
        sightings.drop_after(self._run, step)
        self._recent, self._last_observed = {}, sightings.last_step(self._run)
        self._resighted = step
        self._rewound = step, {group for group in ROW_GROUPS if step in self._run.steps(group)}
        self.commit()

    def commit(self) -> None:
        """Make what was recorded so far durable, and visible to others."""
        self._require_open()
        began = time.monotonic()
        self._write()
        self._run.commit()
        self._uncommitted = 0
        self._committed = time.monotonic()
        self._cost = self._committed - began

    def _count(self, at_once: bool = False) -> None:
        """Commit where enough was recorded since the last commit, or `at_once`."""
        self._uncommitted += 1
        if self._commit_every is None:
            due = time.monotonic() - self._committed >= min(PATIENCE, self._cost / COSTS)
        else:
            due = self._uncommitted >= self._commit_every
        if at_once or due:
            self.commit()

    def _write(self) -> None:
        """Hand what is held to the file, where it waits for the commit: HDF5 takes as long for a row as for many."""
        for group in list(self._held):
            self._run.append_rows(group, self._held[group])
            del self._held[group]
        self._write_sightings()

    def _write_sightings(self) -> None:
        if self._unwritten:
            sightings.append(self._run, sightings.joined(self._unwritten))
            self._unwritten = []

    def _seen_at(self, step: int) -> np.ndarray:
        """The samples that were observed at a step so far."""
        if step in self._recent:
            return self._recent[step]
        if self._last_observed is None or step > self._last_observed:
            return np.empty(0, np.int64)
        self._write_sightings()
        return sightings.at(self._run, step)

    def close(self) -> None:
        """Commit and close: the file is complete then. In a forked child nothing happens: the file is its parent's."""
        if not self._closed and os.getpid() == self._process:
            self._closed = True
            try:
                self._write()
            finally:
                self._run.close()

    def _require_open(self) -> None:
        path = self._run.path
        if os.getpid() != self._process:
            raise OpsigError(
                f"{path} is written by process {self._process}, from which this one was forked. Record there"
            )
        if not self._run._file:
            raise OpsigError(f"{path} is closed. Go on with it by Recorder('{path}', ..., resume=True)")

    def _samples(self, losses: Any, predictions: Any, samples: Any) -> dict[str, np.ndarray]:
        """Columns of the row group `losses`, (S,) each."""
        places = np.arange(len(self._ids)) if samples is None else self._places(samples)
        columns: dict[str, np.ndarray] = {}
        if losses is not None:
            columns["loss"] = np.full(len(self._ids), np.nan, np.float32)
            columns["loss"][places] = given.as_losses(losses, len(places))
        if predictions is not None:
            columns["prediction"] = np.full(len(self._ids), -1)
            columns["prediction"][places] = given.as_predictions(predictions, len(places), self._classes)
        return columns

    def _places(self, samples: Any, once: bool = True) -> np.ndarray:
        wanted = given.as_indices(samples, once)
        places = np.minimum(wanted, len(self._ids) - 1)
        if self._order is not None:
            places = np.searchsorted(self._ids, wanted, sorter=self._order)
            places = self._order[np.minimum(places, len(self._order) - 1)]
        if len(unknown := wanted[self._ids[places] != wanted]):
            raise OpsigError(f"samples names {unknown[0]}, which is none of the run's {len(self._ids):,} samples")
        return places

    def _checkpoint(self, step: int, state: State, source: Mapping[str, Any] | None) -> dict[str, Any]:
        """Columns of the row group `checkpoints`."""
        if self._run.has(external.EXTENTS):
            raise OpsigError(f"{self._run.path} keeps its checkpoints in other files, and takes none into itself")
        if not isinstance(state, State):
            raise OpsigError(f"state must be a State, not {type(state).__name__}. A model of torch is given as model=")
        if state.step != step:
            raise OpsigError(f"state is of step {state.step}, and is recorded at step {step}")
        params = given.as_vector("state.params", state.params, np.float32)
        buffers = given.as_vector("state.buffers", state.buffers, np.float64)
        columns: dict[str, Any] = {"params": to_bfloat16(params) if self._bfloat16 else params}
        columns |= {"buffers": buffers} if buffers.size else {}
        for name, row in state.optimizer.items():
            if name not in SLOTS:
                raise OpsigError(f"state.optimizer['{name}'] has no place in a file. Known: {', '.join(SLOTS)}")
            if not self._bfloat16:
                columns[f"optimizer__{name}"] = np.asarray(row)
        for name, row in columns.items():
            path = f"checkpoints/{name.replace('__', '/')}"
            expected = self._run.shape(path)[1:] if self._run.has(path) else row.shape
            if name != "params" and FIELDS[path].dims[-1] != "buffer":
                expected = params.shape if FIELDS[path].dims[-1] == "parameter" else ()
            if row.shape != expected:
                raise OpsigError(f"state has {name.rpartition('__')[2]} of shape {row.shape}, and not {expected}")
        if not params.size:
            raise OpsigError(
                "the model trains nothing: it has no parameter with requires_grad, and needs no checkpoint"
            )
        self._check_frozen(state.frozen)
        parts = {"parameter": params, "buffer": buffers, "frozen": state.frozen}
        for kind, row in parts.items() if self._run.has("layout/name") else ():
            size = sum(tensor.size for tensor in read_layout(self._run) if tensor.kind == kind)
            if row.size != size:
                raise OpsigError(f"state has {row.size:,} {kind} entries, and the layout {size:,}")
        if unknown := set(source or {}) - {"path", "bytes", "sha256"}:
            raise OpsigError(f"source has '{min(unknown)}', and may have path, bytes and sha256")
        return columns | {f"source__{name}": value for name, value in (source or {}).items()}

    def _keep_frozen(self, frozen: np.ndarray) -> None:
        """Write the parameters that are not trained, once."""
        if frozen.size and not self._run.has("frozen/params"):
            self._run.write("frozen/params", frozen)
        self._frozen = frozen

    def _check_frozen(self, frozen: np.ndarray) -> None:
        """Raise OpsigError where a later state has other parameters that are not trained."""
        if not frozen.size or frozen is self._frozen or not self._run.has("frozen/params"):
            return
        if not np.array_equal(self._run.frozen, frozen.astype(np.float32), equal_nan=True):
            raise OpsigError(
                f"{self._run.path} holds frozen parameters that are not those of this state. What changes is trained: "
                "its requires_grad must be True"
            )

    def _keep_layout(self, argument: str, layout: list[Tensor]) -> None:
        self._check_layout(argument, layout)
        if not self._run.has("layout/name"):
            write_layout(self._run, layout)

    def _check_layout(self, argument: str, layout: list[Tensor]) -> None:
        if self._run.has("layout/name") and read_layout(self._run) != layout:
            raise OpsigError(f"{argument} has other parameters or buffers than {self._run.path} holds checkpoints of")

    def _merged(self, step: int, group: str, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """The whole row: these columns and what earlier calls gave. Raises OpsigError where both gave a number."""
        if step in self._held.get(group, ()):
            self._write()
        if not self._holds(group, step) or (step == self._rewound[0] and group in self._rewound[1]):
            return columns
        if group == "checkpoints":
            raise OpsigError(self._twice(step, "a checkpoint"))
        paths = [n for n in self._run.names() if n.startswith(f"{group}/") and not n.endswith(("/step", "/checksum"))]
        row = {path.removeprefix(f"{group}/"): np.asarray(self._run.row(path, step)) for path in paths}
        adds = False
        for name, value in columns.items():
            new = np.asarray(value)
            old = row.get(name, np.full_like(new, np.nan if new.dtype.kind == "f" else -1))
            known, gives = (~np.isnan(x) if x.dtype.kind == "f" else x >= 0 for x in (old, new))
            if (clash := np.flatnonzero(known & gives)).size:
                what = f"a {name} of sample {self._ids[clash[0]]}" if group == "losses" else unquote(name)
                raise OpsigError(self._twice(step, what))
            adds |= bool(gives.any())
            row[name] = np.where(gives, new, old)
        if not adds:
            raise OpsigError(self._twice(step, group))
        return row

    def _twice(self, step: int, what: str) -> str:
        return f"{self._run.path} has {what} at step {step} already. To go back there after a crash: rewind({step})"

    def _holds(self, group: str, step: int) -> bool:
        """Whether a row group has a row of this step, without a look at all of them each time."""
        if group not in self._looked_at:
            self._run.steps(group)  # raises where they are not what was written
            self._looked_at.add(group)
        return self._run.holds(group, step)

    def _put(self, group: str, step: int, row: Mapping[str, Any]) -> None:
        if not self._holds(group, step):
            if group == "checkpoints" or self._commit_every is not None or self._run.has_place(group, step):
                self._run.append(group, step, **row)
            else:
                self._held.setdefault(group, {})[step] = row
                if len(self._held[group]) * len(self._ids) > HELD_CELLS:
                    self._write()
            return
        self._run.rewrite(group, step, **row)
        if step == self._rewound[0]:
            self._rewound[1].discard(group)


def _write_once(run: Trajectory, name: str, values: np.ndarray) -> None:
    """Write a dataset that the file may hold already, if it is the same."""
    if not run.has(name):
        run.write(name, values)
    elif run.read(name).tolist() != values.tolist():
        argument = "classes" if name == "class_name" else "labels"
        raise OpsigError(f"{argument} are not those that {run.path} holds. Leave them out, or begin anew: replace=True")


def _check_ids(run: Trajectory, ids: np.ndarray) -> None:
    kept = run.samples
    if len(kept) != len(ids):
        raise OpsigError(f"{run.path} was recorded over {len(kept):,} samples, and {len(ids):,} are given")
    if not np.array_equal(kept, ids):
        raise OpsigError(f"samples are not those that {run.path} was recorded over")
