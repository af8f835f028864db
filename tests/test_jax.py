"""The jax backend as people call it: their models, their mistakes, and a run that both backends share."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TASKS, train_tiny

JAX = TASKS.with_name("tiny_jax.py")


def needs(*names):
    for name in ("jax", "optax", *names):
        pytest.importorskip(name, reason=f"{name} is optional: the extra jax, or a person's own")


def train(path, *more, task="Tiny", steps=30):
    return ("train", "--task", f"{JAX}:{task}", "--backend", "jax", "-o", path, "--steps", steps, "--track",
            "--learning-rate", 0.5, *more)  # fmt: skip


@pytest.fixture(scope="module")
def jax_run(tmp_path_factory):
    """A run that both backends share: begun at torch's first state, trained in JAX."""
    needs()
    folder = tmp_path_factory.mktemp("jax")
    for arguments in (
        train_tiny(folder / "torch.h5", steps=40),
        train(folder / "jax.h5", "--like", folder / "torch.h5", steps=40),
    ):
        done = subprocess.run([sys.executable, "-m", "opsig_cli.main", *map(str, arguments)], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    return folder / "jax.h5"


def test_a_run_that_both_train_from_one_state_is_the_same_to_rounding(jax_run):
    with h5py.File(jax_run) as ours, h5py.File(jax_run.with_name("torch.h5")) as theirs:
        assert ours["layout/name"][:].tolist() != []
        order = {name: place for place, name in enumerate(ours["layout/name"][:])}
        assert sorted(order) == sorted(theirs["layout/name"][:])
        np.testing.assert_allclose(ours["losses/loss"][:15], theirs["losses/loss"][:15], rtol=1e-3, atol=1e-5)
        assert np.array_equal(ours["samples/label"][:], theirs["samples/label"][:])


def test_what_one_backend_trained_the_other_measures_alike(jax_run, opsig):
    found = {}
    for backend, place in (("jax", JAX), ("torch", TASKS)):
        task = ("--task", f"{place}:Tiny", "--backend", backend, "--allow-changed-data")
        sharp = opsig("sharpness", jax_run, "--steps", 40, "-k", 2, "--replace", "--at", "iterate", *task).records
        groups = opsig("cluster", jax_run, "--replace", *task)
        assert groups.code == 0, groups.err
        norms = opsig("sharpness", jax_run, "--steps", 40, "--metrics", "gradient_norm,curvature", *task).records
        found[backend] = [r["eigenvalue"] for r in sharp], groups.records, norms
    (ours, our_groups, our_norms), (theirs, their_groups, their_norms) = found["jax"], found["torch"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for metric in ("gradient_norm", "curvature"):
        values = [np.array([record[metric] for record in records]) for records in (our_norms, their_norms)]
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-4 * np.abs(values[1]).max())
    ours, theirs = ({(r["group"], r["sample"]) for r in records if r["kind"] == "member"}
                    for records in (our_groups, their_groups))  # fmt: skip
    assert ours
    assert ours == theirs


@pytest.mark.parametrize("optimizer", [(), ("--optimizer", "adam"), ("--optimizer", "sgd", "--batch-size", 16)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(opsig, tmp_path, optimizer):
    needs()
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    options = ("--checkpoint-every", 5, "--learning-rate", 0.05, *optimizer)
    assert opsig(*train(whole, *options, steps=12)).code == 0
    assert opsig(*train(parts, *options, steps=7)).code == 0
    again = opsig("train", "-o", parts, "--resume", "--steps", 12, "--task", f"{JAX}:Tiny")
    assert again.code == 0, again.err
    with h5py.File(whole) as a, h5py.File(parts) as b:
        assert np.array_equal(a["losses/loss"][:], b["losses/loss"][:])
        assert np.array_equal(a["checkpoints/params"][-1], b["checkpoints/params"][-1])
    assert opsig("verify", parts).code == 0


@pytest.mark.parametrize(
    ("task", "library", "names"),
    [
        ("Linen", "flax", {"layers_0.kernel", "layers_0.bias", "layers_2.kernel", "layers_2.bias"}),
        ("Nnx", "flax", {"first.kernel", "first.bias", "last.kernel", "last.bias"}),
        ("Equinox", "equinox", {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"}),
        ("Half", "jax", {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}),
        ("Long", "jax", {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}),
    ],
)
def test_models_work_as_people_have_them(opsig, tmp_path, task, library, names):
    needs(library)
    path = tmp_path / "run.h5"
    done = opsig(*train(path, task=task, steps=6))
    assert done.code == 0, done.err
    assert ("half precision" in done.err) == (task == "Half")
    with h5py.File(path) as file:
        assert {name.decode() for name in file["layout/name"][:]} == names
        assert file["losses/loss"][6].mean() < file["losses/loss"][0].mean()
    found = opsig("sharpness", path, "--steps", 6, "--task", f"{JAX}:{task}", "--at", "iterate")
    assert found.records[0]["residual"] < 1e-3


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("Reduced", ("one unreduced loss a sample",)),
        ("Mixed", ("depends on which samples are in its batch",)),
        ("Branching", ("tiny_jax.py, line", "jnp.where or jax.lax.cond")),
        ("Normed", ("mean of the task's parameters is state that is not trained", "group or layer norm")),
        ("Uneven", ("60, 59 rows",)),
    ],
)
def test_mistakes_are_one_line(opsig, tmp_path, task, words):
    needs("flax")
    opsig(*train(tmp_path / "run.h5", task=task)).fails(1, *words)


def test_an_exception_of_a_persons_own_shows_their_lines_only(opsig, tmp_path):
    needs()
    done = opsig(*train(tmp_path / "run.h5", task="Failing"))
    assert done.code == 1
    assert "tiny_jax.py" in done.err
    assert "in losses" in done.err
    assert "the task's own code failed" in done.err
    assert "site-packages" not in done.err
    assert "opsig_jax" not in done.err


def test_a_task_of_the_other_backend_is_named(opsig, tmp_path):
    needs()
    path = tmp_path / "run.h5"
    opsig("train", "--task", f"{JAX}:Tiny", "-o", path).fails(1, "written for the jax backend. Give --backend jax")
    opsig(*train(path)[:2], "digits", *train(path)[3:]).fails(1, "task digits is written for the torch backend")


def test_what_the_backend_lacks_is_refused_by_name(jax_run, opsig):
    task = ("--task", f"{JAX}:Tiny", "--allow-changed-data")
    lacks = "backend jax cannot compute sample_sharpness"
    assert lacks in opsig("sharpness", jax_run, "--metrics", "sample_sharpness", *task).err
    opsig(*train(jax_run.with_name("x.h5"), "--optimizer", "splitsgd")).fails(2, "no optimizer is called 'splitsgd'")
    assert "cannot compute a plan" in opsig("sharpness", jax_run, "--plan", *task).err


def test_without_jax_one_line_names_the_extra(opsig, tmp_path, monkeypatch):
    import opsig_jax

    monkeypatch.setattr(opsig_jax, "find_spec", lambda name: None)
    task = tmp_path / "task.py"
    task.write_text("class T:\n def init(self, key): ...\n def data(self): ...\n def losses(self, p, b): ...\n")
    done = opsig("train", "--task", f"{task}:T", "--backend", "jax", "-o", tmp_path / "run.h5")
    done.fails(1, "needs jax and optax", "pip install 'opsig[jax]'")


def test_neither_the_core_nor_the_torch_backend_imports_jax():
    code = (
        "import sys, opsig_cli, opsig_cli.main, opsig_torch.session, opsig_torch.hessian, opsig_jax\n"
        "sys.exit(any(name in sys.modules for name in ('jax', 'optax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 0


def test_jax_trains_and_measures_without_torch(tmp_path):
    needs()
    task = tmp_path / "task.py"
    task.write_text(
        "import jax, jax.numpy as jnp, numpy as np\n"
        "class Line:\n"
        "    def data(self): return np.arange(12.0).reshape(6, 2), np.ones(6)\n"
        "    def init(self, key): return {'w': jnp.zeros(2)}\n"
        "    def losses(self, p, batch): return (batch[0] @ p['w'] - batch[1]) ** 2\n"
    )
    run = str(tmp_path / "r.h5")
    code = (
        "import sys; from opsig_cli.main import run\n"
        f"sys.argv = ['opsig', 'train', '--task', {str(task) + ':Line'!r}, '--backend', 'jax', '--steps', '3',\n"
        f"            '--learning-rate', '1e-4', '--sharpness-every', '1', '--track', '-o', {run!r}]\n"
        "run()\n"
        "assert 'jax' in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with h5py.File(run) as file:
        x = np.arange(12.0).reshape(6, 2)
        top = np.linalg.eigvalsh(2 * x.T @ x / 6)[-1]
        np.testing.assert_allclose(file["sharpness/eigenvalue"][:, 0], top, rtol=1e-5)
