"""Losses without checkpoints, or beside them, become a run: arrays and tables, well formed or not."""

import sys

import numpy as np
import pytest
from conftest import TASKS

from opsig_cli.trajectory.file import open_trajectory

sys.path.insert(0, str(TASKS.parent))
from saved_checkpoints import OWN, imports, save, weights


def test_losses_alone_make_a_run_that_is_mined_and_grouped(opsig, tmp_path):
    generator = np.random.default_rng(0)
    swing = np.cumsum(generator.standard_normal(60))
    sides = np.repeat([1.0, -1.0, 0.0], [10, 10, 20])
    losses = (60 + np.outer(swing, sides) + 0.3 * generator.standard_normal((60, 40))).astype(np.float32)
    np.save(tmp_path / "a.npy", losses)
    labels = [f"s{i}" for i in range(40)]
    np.savez(tmp_path / "b.npz", loss=losses, steps=np.arange(60), labels=labels, predictions=losses.astype(int))
    order = generator.permutation(losses.size)
    lines = [f"{i // 40},{i % 40},{losses.flat[i]!r}".replace("np.float32(", "").replace(")", "") for i in order]
    (tmp_path / "c.csv").write_text("\ufeffstep, sample,loss\n" + "\n".join(lines) + "\n\n")
    (tmp_path / "s.csv").write_text("step,loss,lr,colour\n" + "".join(f"{t},{t / 2},0.1,red\n" for t in range(60)))
    grouped = []
    for name in ("a.npy", "b.npz", "c.csv"):
        run = tmp_path / "run.h5"
        done = opsig("import", "--losses", tmp_path / name, "--scalars", tmp_path / "s.csv", "-o", run, "--replace")
        assert done.code == 0, done.err
        assert "columns without a place in a trajectory: colour" in done.err
        assert len(done.records) == 60
        with open_trajectory(run) as kept:
            np.testing.assert_array_equal(kept.rows("losses/loss", 0, 60), losses)
            assert kept.row("scalars/train_loss", 7) == 3.5
            if name == "b.npz":
                assert kept.read("samples/label").tolist() == labels
                assert kept.row("losses/prediction", 5).tolist() == losses[5].astype(int).tolist()
        assert opsig("mine", run).code == 0
        members = [r for r in opsig("cluster", run).records if r["kind"] == "member"]
        grouped.append({frozenset(r["sample"] for r in members if r["group"] == g) for g in (1, 2)})
    assert grouped == [{frozenset(range(10)), frozenset(range(10, 20))}] * 3
    opsig("import", "--losses", tmp_path / "a.npy", "--steps", ",".join(map(str, range(0, 120, 2))), "-o",
          tmp_path / "e.h5")  # fmt: skip
    assert opsig("info", tmp_path / "e.h5").records[0]["steps"] == 118
    file = save(tmp_path, "c5.pt", weights())
    opsig("import", file, *OWN, "-o", tmp_path / "e.h5", "--append").fails(1, "40 samples", "has 60")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step,sample\n1,2\n", "has no column loss"),
        ("step,sample,loss\n", "a header and no lines"),
        ("step,sample,loss\n1,2\n", "line 2 has 2 values, not 3"),
        ("step,sample,loss\n1,2,x\n", "line 2: loss is 'x'"),
        ("step,sample,loss\n1.5,2,1\n", "line 2: step is '1.5'"),
        ("step,sample,loss\n1,2,1\n1,2,3\n", "two losses of sample 2 at step 1"),
        ("\x00\x01", "has no column step"),
        ("", "is empty"),
    ],
)
def test_malformed_tables_of_losses_are_refused_by_line(opsig, tmp_path, text, words):
    (tmp_path / "l.csv").write_text(text)
    opsig("import", "--losses", tmp_path / "l.csv", "-o", tmp_path / "x.h5").fails(1, "l.csv", words)
    assert not (tmp_path / "x.h5").exists()


def test_malformed_arrays_of_losses_are_refused(opsig, tmp_path):
    def refused(array, *words, **arrays):
        if arrays:
            np.savez(tmp_path / "l.npz", **arrays)
        else:
            np.save(tmp_path / "l.npy", array, allow_pickle=True)
        name = "l.npz" if arrays else "l.npy"
        opsig("import", "--losses", tmp_path / name, "-o", tmp_path / "x.h5").fails(1, name, *words)

    refused(np.zeros(3), "must be numbers of shape (steps, samples)")
    refused(np.array([[object()]]), "is not readable")
    refused(np.zeros((2, 2), "U3"), "must be numbers")
    refused(None, "has no array 'losses'", other=np.zeros((2, 2)))
    refused(None, "steps must be 2 increasing", losses=np.zeros((2, 2)), steps=[3, 3])
    refused(None, "labels must be one a sample", losses=np.zeros((2, 2)), labels=["a"])
    refused(None, "predictions must be integers", losses=np.zeros((2, 2)), predictions=np.zeros((2, 2)))
    (tmp_path / "l.feather").touch()
    opsig("import", "--losses", tmp_path / "l.feather", "-o", tmp_path / "x.h5").fails(1, "neither .npy, .npz, .csv")


def test_losses_beside_checkpoints_go_to_the_task_s_samples(opsig, tmp_path):
    file = save(tmp_path, "c5.pt", weights())
    np.save(tmp_path / "l.npy", np.ones((6, 60), np.float32))
    run, _ = imports(opsig, tmp_path, file, "--losses", tmp_path / "l.npy")
    with open_trajectory(run) as kept:
        assert kept.steps("losses").tolist() == [0, 1, 2, 3, 4, 5]
        assert kept.steps("checkpoints").tolist() == [5]
    np.save(tmp_path / "l.npy", np.ones((6, 61), np.float32))
    opsig("import", file, *OWN, "--losses", tmp_path / "l.npy", "-o", tmp_path / "x.h5").fails(1, "have a sample 60")
