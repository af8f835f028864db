"""Data is never trusted: whatever a file says of itself costs one line and little time, and no other file is read."""

import gzip
import io
import json
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TASKS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsig_cli import Recorder, State, Tensor
from opsig_cli.records import write
from opsig_cli.trajectory.schema import is_known
from opsig_cli.trajectory.vetting import Refused, vet

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import crafted_logs

TASK = ("--task", f"{TASKS}:Tiny")
READERS = (
    ("info",), ("verify",), ("mine",), ("cluster", "--by", "loss"), ("cluster",), ("compare",), ("track",),
    ("sharpness",), ("probe", "--projection"), ("train", "--resume", "-o"), ("train", "-o", "new.h5", "--like"),
)  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A run of forty digits by an opsig task, with two checkpoints of another, small model."""
    path = tmp_path_factory.mktemp("recorded") / "run.h5"
    layout = [Tensor("w", "parameter", (3,), 0, 3)]
    generator = np.random.default_rng(0)
    with Recorder(path, samples=40, labels=["a"] * 40, layout=layout) as recorder:
        for step in range(30):
            losses = generator.random(40)
            recorder.record(step, losses=losses, scalars={"train_loss": losses.mean()})
        for step in (0, 29):
            recorder.record(step, state=State(step, np.ones(3), np.empty(0)))
    return path


def with_attributes(source: Path, target: Path, **attributes: object) -> Path:
    shutil.copy(source, target)
    with h5py.File(target, "r+", libver=("v110", "v110")) as file:
        for name, value in attributes.items():
            file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value
    return target


def settings_json(**changes: object) -> str:
    return json.dumps({"task": "digits", "steps": 29, "checkpoint_every": 29} | changes)


def refused(opsig, path: Path, readers=READERS, words: str = "") -> None:
    """Every command answers in one line, or does not look at what is wrong."""
    for reader in readers:
        outcome = opsig(*reader, path)
        if outcome.code:
            lines = [line for line in outcome.err.splitlines() if not line.startswith(("device:", "note:"))]
            assert len(lines) == 1, (reader, outcome.err)
            assert len(lines[0]) < 500
        if words:
            assert outcome.code in (1, 2), (reader, outcome.out)
            assert words in outcome.err


def test_attributes_of_another_type_are_refused_by_name(recorded, tmp_path, monkeypatch, opsig):
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "task": 3, "state": np.arange(4), "settings_json": "[1]", "command": np.float64("nan"), "opsig_version": 1,
        "from_step": "30", "parent": 3, "change": 4, "change_json": "[1]", "effects_json": "5",
    }.items():  # fmt: skip
        path = with_attributes(recorded, tmp_path / "run.h5", **{name: value})
        refused(
            opsig, path, (("info",), ("verify",)), f"the attribute {name}" if name != "settings_json" else "settings"
        )
    for version in (7, np.arange(3), "one", "2.0", "\ud7ff"):
        refused(opsig, with_attributes(recorded, tmp_path / "run.h5", schema_version=version), READERS, "run.h5")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["task", "model", "optimizer", "learning_rate", "steps", "batch_size", "beta1", "chunk_size",
                         "checkpoint_every", "checkpoint_window", "seed", "statistics", "track_every", "momentum"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_settings_of_any_shape_cost_a_line(recorded, tmp_path, monkeypatch, opsig, changes):
    monkeypatch.chdir(tmp_path)
    path = with_attributes(recorded, tmp_path / "run.h5", settings_json=settings_json(**changes))
    refused(opsig, path, tuple(r for r in READERS if r[0] not in ("mine",)))


def test_deep_json_costs_a_line(recorded, tmp_path, opsig):
    path = with_attributes(recorded, tmp_path / "run.h5", settings_json="[" * 60_000)
    refused(opsig, path, (("info",), ("verify",), ("compare",)), "run.h5")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model="mlp:width=900000,depth=3"), "holds 3 parameters a checkpoint and the task's model has"),
        (dict(model="mlp:width=10000000"), "names a task with width 10000000"),
        (dict(model="mlp:depth=1000000"), "names a task with depth 1000000"),
        (dict(task="planted:samples=999999999"), "names a task with samples 999999999"),
        (dict(task="text:path=/dev/zero"), "/dev/zero"),
        (dict(task="no-such-task"), "no task is called 'no-such-task'"),
        (dict(backend="no-such-backend"), "no-such-backend"),
    ],
)
def test_a_recorded_task_of_absurd_size_is_not_built(changes, words, recorded, tmp_path, monkeypatch, opsig):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opsig_cli.studies.tracking.check_samples", lambda *_: None)
    monkeypatch.setattr("opsig_cli.studies.training.check_samples", lambda *_: None)
    path = with_attributes(recorded, tmp_path / "run.h5", settings_json=settings_json(**changes))
    like = ("train", "-o", "new.h5", "--like")
    readers = (("train", "--resume", "-o"),) if "backend" in changes else (("cluster",), ("sharpness",), like)
    for reader in readers:
        outcome = opsig(*reader, path)
        assert outcome.code in (1, 2), outcome.out
        assert words in outcome.err or (reader == like and "text" in words + str(changes)), outcome.err
    assert not (tmp_path / "new.h5").exists()


def test_like_reads_no_file_that_the_command_does_not_name(recorded, tmp_path, opsig):
    (tmp_path / "secret.txt").write_text("a secret " * 40)
    for spec in (f"text:path={tmp_path}/secret.txt,context=4,samples=40", f"fashion-mnist:root={tmp_path}"):
        path = with_attributes(recorded, tmp_path / "run.h5", settings_json=settings_json(task=spec))
        outcome = opsig("train", "--like", path, "-o", tmp_path / "new.h5")
        outcome.fails(1, "Give the task again: --task")
        assert not (tmp_path / "new.h5").exists()


def test_csv_holds_no_formulas_and_no_control_characters(recorded, tmp_path, opsig):
    path = tmp_path / "run.h5"
    labels = ["=1+1", "+cmd|' /C calc'!A0", "@SUM(A1)", "-2", "-x", "\t=1", "a\x1b[31mb", "plain, with comma"]
    with Recorder(path, samples=8, labels=labels) as recorder:
        for step in range(3):
            recorder.record(step, losses=np.arange(8) * (-1) ** step)
    out = opsig("mine", path, "--format", "csv").out
    assert "\x1b" not in out
    assert re.search(r"(^|,)\"?[=+@\t]", out) is None
    for kept in ("'=1+1", "'@SUM(A1)", ",-2,", "'-x", "a\ufffd[31mb", '"plain, with comma"'):
        assert kept in out
    stream = io.StringIO()
    write([{"=x": -0.5, "b": None, "c": [1, "=2"]}], "csv", out=stream)
    assert stream.getvalue() == '\'=x,b,c\n-0.5,,"[1, ""=2""]"\n'


def test_archives_and_tables_that_expand_are_refused(tmp_path, opsig):
    zeros = np.zeros((3000, 10_000), np.float32)  # 120 MB in 120 KB
    np.savez_compressed(tmp_path / "losses.npz", losses=zeros)
    np.savez_compressed(tmp_path / "weights.npz", weight=zeros)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "packed.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("packed/extra.pkl", bytes(120_000_000))
    (tmp_path / "wide.csv").write_text("step,sample,loss\n" + "".join(f"{i},{i},1\n" for i in range(6000)))
    with gzip.open(tmp_path / "long.csv.gz", "wb") as packed:
        packed.write(b"step,sample,loss\n" + b"1,2,3\n" * 20_000_000)
    with gzip.open(tmp_path / "line.csv.gz", "wb") as packed:
        packed.write(bytes(30_000_000))
    run = tmp_path / "run.h5"
    for arguments in (
        ("--losses", tmp_path / "losses.npz"), ("--losses", tmp_path / "wide.csv", "--rows"),
        ("--losses", tmp_path / "long.csv.gz"), ("--losses", tmp_path / "line.csv.gz"),
        (tmp_path / "weights.npz", *TASK), (tmp_path / "packed.pt", *TASK),
    ):  # fmt: skip
        outcome = opsig("import", *arguments, "-o", run)
        outcome.fails(1, "would")
        assert not run.exists()


def test_verify_ends_with_a_verdict_and_covers_attributes(recorded, tmp_path, opsig):
    whole = opsig("verify", recorded)
    assert whole.err.startswith(f"found: {recorded} is intact: ")
    assert whole.records[0]["name"] == "attributes"
    broken = with_attributes(recorded, tmp_path / "run.h5", settings_json="{")
    outcome = opsig("verify", broken)
    outcome.fails(1, "is damaged in attributes (")
    assert [r["name"] for r in outcome.records if r["reason"]] == ["attributes"]


@pytest.mark.parametrize("steps", [[0, 1, 1, 3], [-5, 0, 1, 2]])
def test_steps_twice_or_below_0_are_refused(steps, tmp_path, opsig):
    """By a writer that computes the checksums that go with them."""
    from opsig_cli.trajectory.rows import column_checksum

    path = tmp_path / "run.h5"
    with Recorder(path, samples=5) as recorder:
        for step in range(4):
            recorder.record(step, losses=np.arange(5.0) + step)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        for place, step in enumerate(steps):
            row = np.ascontiguousarray(file["losses/loss"][place])
            sums = column_checksum("losses/loss", row) ^ column_checksum("losses/step", np.asarray(step, np.int64))
            file["losses/step"][place], file["losses/checksum"][place] = step, sums if step != -1 else 0
    refused(opsig, path, (("info",), ("mine",), ("cluster", "--by", "loss"), ("compare",)), "twice or below 0")
    assert "losses (4 of 4 rows)" in opsig("verify", path).err


def test_datasets_that_overlap_or_are_of_another_type_are_refused(recorded, tmp_path, opsig):
    path = tmp_path / "run.h5"
    for dtype in ("f8", "f2"):
        shutil.copy(recorded, path)
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            values = file["losses/loss"][()]
            del file["losses/loss"]
            file["losses/loss"] = values.astype(dtype)
        refused(opsig, path, READERS[:3], "losses/loss must be f4")
    with Recorder(path, samples=20_000, replace=True) as recorder:
        for name in ("truth", "feature"):  # 80,000 bytes each
            recorder.run.write(f"samples/{name}", np.zeros(20_000))
    with h5py.File(path) as file, pytest.raises(Refused, match="they overlap"):
        vet(file, 170_000, is_known)  # as if both lay in the same place


def test_a_log_with_right_checksums_and_any_content_costs_one_line(tmp_path, opsig):
    """The long form: benchmarks/crafted_logs.py."""
    source, path = tmp_path / "source.h5", tmp_path / "run.h5"
    crafted_logs.make(source)
    stamp, size = crafted_logs.stamp_of(source), source.stat().st_size
    for seed in range(100, 130):
        shutil.copy(source, path)
        Path(f"{path}.redo").write_bytes(crafted_logs.crafted(stamp, size, random.Random(seed)))
        refused(opsig, path, (crafted_logs.COMMANDS[seed % len(crafted_logs.COMMANDS)],))
        assert path.stat().st_size < 1 << 20
