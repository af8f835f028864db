"""Sightings: what a loop over minibatches sees of its samples, kept, and who made the loss of a batch jump."""

import gzip
import json
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TASKS
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from opsig_cli import OpsigError, Recorder, cluster, mine, open_trajectory
from opsig_cli.analysis.sightings import Expectation, trend
from opsig_cli.trajectory import sightings

S = 12
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.h5"


def seen_in(path) -> sightings.Sightings:
    with open_trajectory(path) as run:
        return sightings.joined(list(sightings.by_step(run)))


def test_what_is_observed_is_read_back_and_by_plain_h5py(path):
    with Recorder(path, samples=[3, 5, 8], classes=["a", "b"]) as recorder:
        recorder.observe(0, [5, 3], torch.tensor([1.5, 2.5], requires_grad=True))
        recorder.observe(0, [8], torch.tensor([0.5], dtype=torch.bfloat16))
        recorder.observe(4, np.array([8, 8]), [float("nan"), 4], predictions=[1, -1])
        assert recorder.last_step == 4
        assert "5 sightings up to step 4" in repr(recorder)
    with h5py.File(path) as file:
        assert file["sightings/step"][:].tolist() == [0, 0, 0, 4, 4]
        assert file["sightings/sample"][:].tolist() == [5, 3, 8, 8, 8]
        np.testing.assert_array_equal(file["sightings/loss"], [1.5, 2.5, 0.5, np.nan, 4])
        assert file["sightings/prediction"][:].tolist() == [255, 255, 255, 1, 255]
        assert file["sightings/loss"].attrs["units"] == b"nat"
    assert seen_in(path).prediction.tolist() == [-1, -1, -1, 1, -1]
    netCDF4 = pytest.importorskip("netCDF4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        with netCDF4.Dataset(path) as file:
            assert file["sightings/loss"].dimensions == ("sighting",)
            assert file["sightings/loss"].shape == (5,)


REFUSED = {
    "too few losses": (([1, 2], [1.0]), r"losses must be 2 numbers.*shape \(1,\)"),
    "text": (([1], ["a"]), "losses must be 1 numbers"),
    "an unknown sample": (([1, 12], [1.0, 2.0]), "samples names 12, which is none of the run's 12"),
    "half a sample": (([1.5], [1.0]), "samples must be dataset indices"),
    "no samples": (([], []), "samples must be dataset indices"),
    "an unknown class": (([1], [1.0], [3]), "predictions holds 3"),
    "a sample twice": (([7], [1.0]), r"has sample 7 at step 4 already.*rewind\(4\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_of_it_is_written(case, path):
    arguments, words = REFUSED[case]
    with Recorder(path, samples=S, classes=["a", "b", "c"]) as recorder:
        recorder.observe(4, [7], [1.0])
        with pytest.raises(OpsigError, match=words):
            recorder.observe(4, *arguments)
    assert seen_in(path).sample.tolist() == [7]


@pytest.mark.parametrize("step", [0.5, -1, "3", None, True])
def test_a_step_is_a_whole_number_from_0_on(step, path):
    with Recorder(path, samples=S) as recorder, pytest.raises(OpsigError, match=r"step is .* must be a whole number"):
        recorder.observe(step, [1], [1.0])


def test_a_loop_that_goes_back_to_a_checkpoint_drops_what_came_after(path):
    with Recorder(path, samples=S) as recorder:
        for step in range(6):
            recorder.observe(step, [step, step + 1], [1.0, 2.0])
    with Recorder(path, samples=S, resume=True) as recorder:
        with pytest.raises(OpsigError, match="has sample 3 at step 2 already"):
            recorder.observe(2, [3], [1.0])
        recorder.rewind(3)
        assert recorder.last_step == 3
        recorder.observe(3, [9], [7.0])  # in place of what was seen at this step
        recorder.observe(3, [10], [8.0])
    assert seen_in(path).step.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert seen_in(path).sample.tolist()[-2:] == [9, 10]


@given(
    steps=st.lists(st.integers(0, 9), min_size=1, max_size=60), block=st.integers(1, 9), back=st.integers(0, 9),
    calls=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_sightings_come_back_by_step_however_they_were_recorded(tmp_path_factory, steps, block, back, calls):
    path = tmp_path_factory.mktemp("seen") / "run.h5"
    step_N, sample_N = np.array(steps), np.arange(len(steps)) % S
    whole = sightings.Sightings(step_N, sample_N, step_N + sample_N / 16, np.full(len(steps), -1))
    was = sightings.BLOCK, sightings.CHUNK
    sightings.BLOCK, sightings.CHUNK = block, 4
    try:
        with Recorder(path, samples=S) as recorder:
            for part in np.array_split(np.arange(len(steps)), calls):
                sightings.append(recorder.run, whole[part])
            sightings.drop_after(recorder.run, back)
        with open_trajectory(path) as run:
            found = list(sightings.batches(run))
            assert not len(sightings.damaged_places(run))
    finally:
        sightings.BLOCK, sightings.CHUNK = was
    assert [step for step, _ in found] == sorted({step for step in steps if step <= back})
    for step, batch in found:
        assert batch.sample.tolist() == sample_N[step_N == step].tolist()
        np.testing.assert_array_equal(batch.loss, step + batch.sample / 16)


def spiked(path, spike=20, width=64, steps=30, excess=3.0, seed=0):
    """Samples at levels of their own, seen in order, and three of them `excess` above theirs at one step."""
    draw = np.random.default_rng(seed)
    level = 1 + draw.random(4 * width)
    with Recorder(path, samples=4 * width) as recorder:
        for step in range(steps):
            batch = (np.arange(width) + step * width) % (4 * width)
            losses = level[batch] + 0.01 * draw.standard_normal(width)
            losses[:3] += excess if step == spike else 0
            recorder.observe(step, batch, losses)
    return (np.arange(width) + spike * width) % (4 * width)


def test_the_rows_that_made_a_batch_jump_are_named_and_their_shares_add_up(path, opsig):
    batch = spiked(path)
    done = opsig("mine", path, "--step", 20, "--top", 64)
    rows = done.records
    assert {row["sample"] for row in rows[:3]} == set(batch[:3].tolist())
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["share"] for row in rows[:3]) > 0.9
    for row in rows[:3]:
        assert row["change"] == pytest.approx(3, abs=0.15)
        assert row["change"] == pytest.approx(row["loss_after"] - row["loss_before"])
        assert row["previous_step"] == 16
        assert row["window"] == [20, 20]
        assert row["batch"] == 64
    assert "3 of them carry 90%" in done.err
    over = opsig("mine", path, "--top", 3)
    assert {(row["sample"], row["step"]) for row in over.records} == {(int(s), 20) for s in batch[:3]}
    assert "see --step 20" in over.err
    opsig("mine", path, "--step", 77).fails(1, "no sightings at step 77. Nearest: 29")
    opsig("mine", path, "--score", "oscillation").fails(2, "needs the losses of all samples")
    assert opsig("mine", path, "--step", 20, "--direction", "down").records[0]["change"] < 0
    shares = opsig("mine", path, "--window", "19:21", "--share", 20, "--top", 3).records
    assert [row["share_at_step"] for row in shares] == pytest.approx([row["share"] for row in rows[:3]])


def test_samples_that_are_not_finite_and_a_run_that_ends_so_are_told_apart(path, opsig):
    with Recorder(path, samples=20) as recorder:
        for step in range(12):
            losses = np.full(20, 1.0 if step < 10 else np.nan)
            losses[4] = np.inf if 3 < step < 10 else losses[4]
            recorder.observe(step, range(20), losses)
    done = opsig("mine", path, "--top", 3, "--figure", path.with_suffix(".png"))
    assert [(r["sample"], r["step"]) for r in done.records if r.get("kind") == "not_finite"] == [(4, 4)]
    assert "from step 10 on no loss is finite" in done.err
    assert "see --step" not in done.err
    assert "no loss of the 20 rows of step 11 is finite" in opsig("mine", path, "--step", 11).err
    assert "is the first that has sightings" in opsig("mine", path, "--step", 0).err


@pytest.mark.parametrize("score", ["change", "variation", "surprise"])
def test_every_score_puts_those_that_jumped_first(path, opsig, score):
    batch = spiked(path)
    rows = opsig("mine", path, "--window", "10:29", "--score", score, "--top", 3).records
    assert {row["sample"] for row in rows} == set(batch[:3].tolist())
    assert {row["score_name"] for row in rows} == {score}


def test_a_sample_at_its_own_level_is_as_expected():
    """Constant losses: what lasts of a deviation is learned to be all of it, and nobody exceeds the expected."""
    level = np.linspace(1, 6, 4000)
    expectation = Expectation(4000, trend(np.full(100, level.mean()), np.full(100, 4000)))
    for t in range(100):
        found = expectation(t, np.arange(4000), level)
    assert expectation.lasting == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(found.expected, level, atol=0.01)
    assert found.before.tolist() == [98] * 4000


def test_of_deviations_that_are_noise_nothing_is_expected_to_last():
    draw = np.random.default_rng(0)
    expectation = Expectation(4000, trend(np.full(100, 2.0), np.full(100, 4000)))
    for t in range(100):
        expectation(t, np.arange(4000), 2 + draw.standard_normal(4000))
    assert expectation.lasting < 0.05


def test_a_run_that_jumps_and_stays_is_above_the_expected_where_it_jumps():
    means = np.where(np.arange(60) < 40, 1.0, 5.0)
    usual = trend(means, np.full(60, 64))
    assert usual.before[40] == 1.0  # no step looks ahead of itself
    assert usual.before[59] == 5.0


def test_damaged_sightings_are_found_left_out_and_named(path, opsig):
    spiked(path)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        file["sightings/loss"][20 * 64 + 1] = 99.0
    outcome = opsig("verify", path)
    assert outcome.code == 1
    assert [(r["name"], r["damaged"]) for r in outcome.records if r["damaged"]] == [("sightings", [20 * 64 + 1])]
    done = opsig("mine", path, "--step", 20, "--top", 64)
    assert len(done.records) == 63
    assert "1 of 1,920 sightings is damaged and left out: step 20" in done.err
    assert opsig("info", path).records[0]["sightings"] == 1920


def test_a_sighting_of_a_sample_that_the_run_lacks_is_refused(path, opsig):
    spiked(path)
    with Recorder(path, samples=256, resume=True) as recorder:
        odd = sightings.Sightings(np.array([31]), np.array([999]), np.ones(1, np.float32), np.array([-1]))
        sightings.append(recorder.run, odd)
    opsig("mine", path).fails(1, "sighting of sample 999 at step 31")
    assert opsig("verify", path).code == 1


def test_a_repacked_run_has_its_sightings_in_order(path, opsig, tmp_path):
    with Recorder(path, samples=S) as recorder:
        for step in (3, 1, 2):
            recorder.observe(step, np.arange(S), np.arange(S) + step, predictions=np.arange(S))
    before = opsig("mine", path, "--step", 3).out
    assert opsig("repack", path).code == 0
    with h5py.File(path) as file:
        assert file["sightings/step"][:].tolist() == np.repeat([1, 2, 3], S).tolist()
    assert opsig("mine", path, "--step", 3).out == before
    assert opsig("verify", path).code == 0


def test_sightings_beside_rows_of_all_samples(path, opsig):
    """Sightings are mined where there are more of them, or where the step that is asked for has no rows."""
    spiked(path)
    with Recorder(path, samples=256, resume=True) as recorder:
        for step in (10, 11, 20):
            recorder.record(step, losses=np.arange(256.0) * step)
    assert opsig("mine", path, "--step", 20).records[0]["seen"] == "sighting"
    assert "seen" not in opsig("mine", path, "--step", 11).records[0]
    assert opsig("mine", path, "--step", 20, "--figure", path.with_suffix(".png")).code == 0
    assert path.with_suffix(".png").stat().st_size > 10_000


# -- logs


LINES = [
    (step, 3 * sample, 1 + step / 8 + sample) for step in range(8) for sample in ((2 * step) % 6, (2 * step + 1) % 6)
]


def logs(folder) -> dict[str, Path]:
    """The same log as loggers write it."""
    text = "".join(f"{float(t)},{s}.0,{v},ok\n" for t, s, v in LINES)
    objects = [{"global_step": t, "idx": s, "train_loss": v} for t, s, v in LINES]
    batches = {}
    for t, s, v in LINES:
        found = batches.setdefault(t, {"step": t, "sample_ids": [], "losses": []})
        found["sample_ids"].append(s)
        found["losses"].append(v)
    written = {
        "a.csv": "\ufeffStep,sample_id,loss/train,note\n" + text,
        "b.tsv": "iteration\tguid\tloss\tnote\n" + text.replace(",", "\t"),
        "c.csv.gz": "_step,index,train/loss,note\n" + text,
        "d.jsonl": "\n".join(map(json.dumps, objects)),
        "e.jsonl.gz": "\n".join(map(json.dumps, batches.values())),
        "f.csv": "_step;id;loss;note\n" + "e0;".join(text.replace(",", ";").split(";", 0)),
    }
    for name, content in written.items():
        data = content.encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return {name: folder / name for name in written}


def test_a_log_of_batches_is_taken_as_sightings_in_every_format(opsig, tmp_path):
    for name, file in logs(tmp_path).items():
        run = tmp_path / f"{name}.h5"
        done = opsig("import", "--losses", file, "-o", run)
        assert done.code == 0, done.err
        assert "taken as sightings" in done.err, name
        seen = seen_in(run)
        assert list(zip(seen.step.tolist(), seen.sample.tolist(), strict=True)) == [(t, s) for t, s, _ in LINES], name
        np.testing.assert_array_equal(seen.loss, np.float32([v for _, _, v in LINES]))
        assert not any("not finite" in line or "diverged" in line for line in opsig("mine", run).err.splitlines())


def test_parquet_is_a_log_like_any_other(opsig, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet is read by it")
    import pyarrow.parquet as parquet

    step, sample, loss = zip(*LINES, strict=True)
    parquet.write_table(pyarrow.table({"_step": step, "uid": sample, "loss": loss}), tmp_path / "l.parquet")
    assert opsig("import", "--losses", tmp_path / "l.parquet", "-o", tmp_path / "run.h5").code == 0
    assert seen_in(tmp_path / "run.h5").sample.tolist() == list(sample)
    zeros = np.zeros(8_000_000)
    huge = pyarrow.table({"step": zeros, "id": zeros, "loss": zeros})
    parquet.write_table(huge, tmp_path / "huge.parquet", compression="zstd")
    opsig("import", "--losses", tmp_path / "huge.parquet", "-o", tmp_path / "x.h5").fails(1, "would unpack to")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    opsig("import", "--losses", tmp_path / "bad.parquet", "-o", tmp_path / "x.h5").fails(1, "not readable")


def test_text_ids_are_kept_as_names(opsig, tmp_path):
    lines = [f"{t},doc-{s},{v},{'even' if s % 2 == 0 else 'odd'}" for t, s, v in LINES]
    (tmp_path / "l.csv").write_text("step,key,value,label\n" + "\n".join(lines))
    arguments = ("--losses", tmp_path / "l.csv", "-o", tmp_path / "run.h5")
    opsig("import", *arguments).fails(1, "no column sample. It has: step, key, value, label", "--sample-column")
    columns = ("--sample-column", "key", "--loss-column", "value")
    assert opsig("import", *arguments, *columns).code == 0
    rows = opsig("mine", tmp_path / "run.h5").records
    assert {row["name"] for row in rows} <= {f"doc-{s}" for _, s, _ in LINES}
    assert all(row["label"] == ("even" if int(row["name"][4:]) % 2 == 0 else "odd") for row in rows)
    assert "doc-" in opsig("mine", tmp_path / "run.h5", "--format", "table").out
    assert opsig("import", *arguments, *columns, "--append").code == 0
    assert len(seen_in(tmp_path / "run.h5")) == len(LINES)


def test_a_nearly_full_table_is_rows_with_gaps_and_a_sparse_one_can_be(opsig, tmp_path):
    full = [(t, s, t + s) for t in range(10) for s in range(6)]
    full[7] = (*full[7][:2], "")
    (tmp_path / "gap.csv").write_text("step,sample,loss\n" + "".join(f"{t},{s},{v}\n" for t, s, v in full))
    opsig("import", "--losses", tmp_path / "gap.csv", "-o", tmp_path / "gap.h5")
    with open_trajectory(tmp_path / "gap.h5") as run:
        assert np.isnan(run.losses()).sum() == 1
        assert not sightings.count(run)
    (tmp_path / "sparse.csv").write_text("step,sample,loss\n" + "".join(f"{t},{s},{v}\n" for t, s, v in LINES))
    opsig("import", "--losses", tmp_path / "sparse.csv", "--rows", "-o", tmp_path / "rows.h5")
    with open_trajectory(tmp_path / "rows.h5") as run:
        assert np.isfinite(run.losses()).sum() == len(LINES)


@pytest.mark.parametrize("kind", ["npy", "npz", "jsonl", "objects"])
def test_the_order_of_the_data_says_who_was_in_a_batch(kind, opsig, tmp_path):
    order = [[0, 1, 2], [3, 4, 5], [0, 3], [1, 4, 5]]
    padded = np.full((4, 3), -1)
    for row, batch in zip(padded, order, strict=True):
        row[: len(batch)] = batch
    file = tmp_path / f"order.{kind if kind != 'objects' else 'jsonl'}"
    if kind == "npy":
        np.save(file, padded)
    elif kind == "npz":
        np.savez(file, order=padded, steps=np.arange(4))
    else:
        lines = [{"step": t, "indices": b} for t, b in enumerate(order)] if kind == "objects" else order
        file.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "s.csv").write_text("step,loss\n0,1\n1,1\n2,4\n3,1\n")
    run = tmp_path / "run.h5"
    assert opsig("import", "--order", file, "--scalars", tmp_path / "s.csv", "-o", run).code == 0
    done = opsig("mine", run, "--step", 2)
    assert {row["sample"] for row in done.records} == {0, 3}
    assert "had 2 rows in its batch, whose logged loss is 4" in done.err
    assert all(row["change"] is None and row["share"] is None for row in done.records)
    whole = opsig("mine", run, "--format", "table")
    assert whole.code == 0
    assert opsig("mine", run, "--top", 2).records[0]["sample"] in (0, 3)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("o.jsonl", "[1, 2]\n[3, -1]\n", "line 2 must be a list of sample indices"),
        ("o.jsonl", '{"step": 3, "indices": [1]}\n{"step": 3, "indices": [2]}', "line 2: step 3 comes after step 3"),
        ("o.jsonl", "", "names no samples"),
        ("o.npy", "x", "is not readable"),
        ("o.txt", "1", "ends in neither .npy, .npz nor .jsonl"),
    ],
)
def test_malformed_orders_are_refused(opsig, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    opsig("import", "--order", tmp_path / name, "-o", tmp_path / "run.h5").fails(1, name, words)
    assert not (tmp_path / "run.h5").exists()


# -- groups behind a spike, and checkpoints that come later


def test_a_planted_spike_is_traced_to_its_rows_and_to_the_pair_behind_them(tmp_path):
    """One small seed of benchmarks/spike_log.py."""
    from spike_log import measure

    found = measure(0, 6000, str(tmp_path))
    assert found["precision"] >= 0.9
    assert found["shares"] == pytest.approx(1)
    assert found["pair"]["precision"] > 0.9
    assert found["pair"]["recall"] > 0.5
    assert found["pair"]["opposition"] < -0.5


def test_many_behind_a_spike_are_grouped_by_rows(tmp_path, opsig, monkeypatch):
    path = tmp_path / "run.h5"
    observed(path, checkpoints=(8, 12, 16))
    files = [tmp_path / f"step{step}.pt" for step in (8, 12, 16)]
    assert opsig("import", *files, "--task", f"{TASKS}:Tiny", "--batch-size", 20, "--append", "-o", path).code == 0
    asked = ["cluster", path, "--task", f"{TASKS}:Tiny", "--top", 40, "--test", "none", "--replace"]
    whole = opsig(*asked)
    monkeypatch.setattr("opsig_cli.analysis.gram.MOST_FORMED", 20)
    found = opsig(*asked)
    assert "samples, more than 20, are grouped by rows of sketches" in found.err

    def sides(records):
        return {record["sample"]: record["group"] for record in records if record["kind"] == "member"}

    assert len(sides(found.records)) > 20
    both = sides(whole.records).keys() & sides(found.records).keys()
    assert adjusted_rand_score(*[[sides(one.records)[sample] for sample in both] for one in (whole, found)]) > 0.9
    monkeypatch.setattr("opsig_cli.studies.clustering.asked.MOST_GROUPED", 30)
    opsig(*asked).fails(1, "60 samples cannot be compared with each other", "Give at most 10")


def observed(path, steps=24, checkpoints=()):
    """Tiny, trained by a loop of one's own that observes its batches."""
    sys.path.insert(0, str(TASKS.parent))
    from tiny import Tiny

    task = Tiny()
    torch.manual_seed(0)
    model, data = task.model(), task.dataset()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    order = torch.Generator().manual_seed(3)
    with Recorder(path, samples=60) as recorder:
        for step in range(steps):
            if step in checkpoints:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
                           path.parent / f"step{step}.pt")  # fmt: skip
            index = torch.randperm(60, generator=order)[:20]
            losses = task.losses(model, data[index])
            recorder.observe(step, index, losses)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()


def test_checkpoints_are_added_to_a_run_of_losses_alone(tmp_path, opsig):
    path = tmp_path / "run.h5"
    observed(path, checkpoints=(8, 12, 16))
    opsig("cluster", path).fails(1, "holds sightings and 0 checkpoints", "opsig mine")
    files = [tmp_path / f"step{step}.pt" for step in (8, 12, 16)]
    done = opsig("import", *files, "--task", f"{TASKS}:Tiny", "--batch-size", 20, "--append", "-o", path)
    assert done.code == 0, done.err
    with open_trajectory(path) as run:
        assert run.steps("checkpoints").tolist() == [8, 12, 16]
        assert run.attributes["settings_json"]["optimizer"] == "momentum"
        assert run.read("samples/label").tolist()[:3] == ["red", "green", "blue"]
        assert sightings.count(run) == 24 * 20
    again = opsig("import", *files, "--task", f"{TASKS}:Tiny", "--append", "-o", path)
    assert "3 of 3 steps are in" in again.err
    here = ["cluster", path, "--task", f"{TASKS}:Tiny", "--window", "10:14"]
    planned = opsig(*here, "--plan").records[0]
    assert (planned["fits"], planned["checkpoints"]) == (True, 3)
    assert planned["passes"] > 3
    opsig(*here, "--memory", "64MiB").fails(1, "cluster needs at least", "Give --memory")
    grouped = opsig(*here, "--figure", tmp_path / "p.png")
    assert grouped.code == 0, grouped.err
    assert "checkpoints of steps 8, 12, 16, the nearest to steps 10 to 14" in grouped.err
    assert opsig("report", path, "--task", f"{TASKS}:Tiny").code == 0
    assert path.with_suffix(".html").stat().st_size > 10_000
    opsig("cluster", path, "--task", f"{TASKS}:Tiny", "--by", "loss").fails(2, "saw its samples batch by batch")
    assert opsig("track", path, "--task", f"{TASKS}:Tiny").code == 0
    assert cluster(path, task=f"{TASKS}:Tiny", test="none").of("tests")
    assert mine(path, step=11)[0]["seen"] == "sighting"


def test_checkpoints_are_added_to_a_run_of_all_losses(tmp_path, opsig):
    sys.path.insert(0, str(TASKS.parent))
    from tiny import Tiny

    task, path = Tiny(), tmp_path / "run.h5"
    torch.manual_seed(0)
    model = task.model()
    with Recorder(path, samples=60) as recorder, torch.no_grad():
        for step in range(4):
            recorder.record(step, losses=task.losses(model, task.dataset()[:]))
    torch.save({"model": model.state_dict(), "step": 2}, tmp_path / "c.pt")
    given = ("--task", f"{TASKS}:Tiny", "--append", "-o", path)
    assert opsig("import", tmp_path / "c.pt", *given).code == 0
    assert opsig("cluster", path, "--task", f"{TASKS}:Tiny", "--test", "none").code == 0
    other = Tiny(samples=61).model()
    torch.save({"model": other.state_dict(), "step": 3}, tmp_path / "d.pt")
    opsig("import", tmp_path / "d.pt", "--task", f"{TASKS}:Tiny:samples=61", "--append", "-o", path).fails(
        1, "60 samples", "61"
    )


def test_sightings_that_were_committed_outlive_a_kill(tmp_path):
    code = (
        "import os, numpy as np\n"
        "from opsig_cli import Recorder\n"
        "recorder = Recorder('run.h5', samples=100, commit_every=5)\n"
        "for step in range(13):\n"
        "    recorder.observe(step, np.arange(10), np.full(10, step))\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 9
    assert seen_in(tmp_path / "run.h5").step.tolist() == np.repeat(np.arange(10), 10).tolist()
