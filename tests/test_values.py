"""Values that vanish or are not finite, what cannot be written, and tasks of other kinds."""

import os
import re
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TASKS

from opsig_cli import tasks
from opsig_cli.analysis.grouping import Grouping, group_by_similarity, pair_anew
from opsig_cli.analysis.significance import p_value, series_p_value
from opsig_cli.backends import load_backend
from opsig_cli.studies import comparing
from opsig_cli.trajectory import placed
from opsig_cli.trajectory.file import create_trajectory, open_trajectory
from opsig_cli.trajectory.states import read_state

OWN = ("--task", f"{TASKS}:Tiny")


def write_losses(path, losses, labels=None):
    """A run of losses (T, S) alone."""
    with create_trajectory(path, np.arange(losses.shape[1])) as run:
        if labels is not None:
            run.write("samples/label", np.array(labels))
        for step, row in enumerate(losses):
            run.append("losses", step, loss=row.astype(np.float32))
    return path


# -- views of blocks


def test_the_share_of_samples_that_rise_is_the_same_wherever_a_block_ends(tmp_path, monkeypatch):
    losses = np.random.default_rng(0).random((40, 30)).astype(np.float32)
    path = write_losses(tmp_path / "run.h5", losses)
    for rows in (1, 3, 7, 40):
        monkeypatch.setattr(placed, "BLOCK_BYTES", rows * losses.itemsize * losses.shape[1])
        with open_trajectory(path) as run:
            kept = [block for _, block in run.blocks("losses/loss")]
            np.testing.assert_array_equal(np.concatenate(kept), losses)
            rising = comparing.series_of(run)["rising"].values
        np.testing.assert_array_equal(rising, (losses[1:] > losses[:-1]).mean(1))


# -- what cannot be written, and code that fails


BAD = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Bad:
    def __init__(self, after=3, wide=False, rate=1.0):
        assert (type(after), type(wide), type(rate)) == (int, bool, float)
        self.after, self.calls = after, 0

    def model(self):
        return nn.Linear(2, 1)

    def dataset(self):
        return TensorDataset(torch.ones(4, 2))

    def losses(self, model, batch):
        self.calls += 1
        return helper(batch) if self.calls > self.after else model(batch[0])[:, 0].square()


def helper(batch):
    return batch["x"]
"""


def test_an_exception_in_a_persons_code_shows_their_frames_and_no_others(opsig, tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    task = f"{tmp_path / 'bad.py'}:Bad:after=5,wide=true,rate=2"  # options take their defaults' types
    failed = opsig("train", "--task", task, "--steps", 9, "-o", tmp_path / "run.h5", "-q")
    assert failed.code == 1
    assert [line.split(", ")[-1] for line in failed.err.splitlines() if "File" in line] == ["in losses", "in helper"]
    assert failed.err.count("bad.py") == 2
    assert failed.err.splitlines()[-1].startswith("opsig: the task's own code failed: TypeError: list indices")
    opsig("train", "--task", task.replace("after=5", "after=x"), "-o", tmp_path / "b.h5").fails(
        2, "after is 'x'", "an integer"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_a_full_or_closed_stdout_is_one_line(tmp_path):
    path = write_losses(tmp_path / "run.h5", np.random.default_rng(0).random((30, 10)))
    command = f"{sys.executable} -m opsig_cli.main mine {path} --quiet"
    for into, words in (("> /dev/full", "stdout cannot be written: No space left"), (">&-", "stdout is closed")):
        for unbuffered in ("", "1"):
            done = subprocess.run(
                f"{command} {into}", shell=True, capture_output=True, text=True,
                env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            )  # fmt: skip
            assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
            assert done.stderr.startswith(f"opsig: {words}")


def test_a_path_that_cannot_be_written_is_found_before_the_work(opsig, tmp_path):
    (tmp_path / "bad.py").write_text("raise SystemExit('the work has begun')")
    task = ("--task", f"{tmp_path / 'bad.py'}:Bad")
    run = tmp_path / "run.h5"
    run.write_bytes(b"not a run, and never opened")
    for option, path, words in (
        ("-o", tmp_path / "none" / "run.h5", "there is no folder"),
        ("-o", tmp_path, "is a folder"),
        ("-o", run, "exists"),
    ):
        opsig("train", *task, option, path).fails(1, words)
    for command in ("mine", "cluster", "sharpness", "probe", "compare"):
        opsig(command, run, "--figure", tmp_path / "none" / "a.png").fails(1, "--figure", "there is no folder")
        opsig(command, run, "--figure", tmp_path / "a.doc").fails(1, "--figure", ".doc")
    opsig("report", run, "-o", tmp_path / "none" / "a.html").fails(1, "there is no folder")
    opsig("import", "--losses", "x.npy", "-o", tmp_path / "none" / "a.h5").fails(1, "there is no folder")
    opsig("simulate", "valley", "-o", run).fails(1, "exists")
    assert not list(tmp_path.glob("*.png"))


# -- steps


def test_steps_that_are_not_there_name_the_nearest(opsig, tiny_run):
    opsig("sharpness", tiny_run, *OWN, "--steps", 7).fails(1, "Nearest: 6, 9, of 21 from 0 to 60")
    opsig("sharpness", tiny_run, *OWN, "--steps", "61:70").fails(1, "Nearest: 60, of 21")
    opsig("sharpness", tiny_run, *OWN, "--steps", "0:60:0").fails(2, "every 0th")
    opsig("sharpness", tiny_run, *OWN, "--steps", "30:3").fails(2, "ends before it begins")
    opsig("train", "-o", tiny_run, "--resume", *OWN, "--steps", 30).fails(1, "at step 60 already", "--steps 30")


def test_a_stored_eigenvalue_that_misses_the_tolerance_is_measured_again(opsig, tiny_run, tmp_path):
    run = shutil.copy(tiny_run, tmp_path / "run.h5")
    steps = ("--steps", "0:9")
    rough = opsig("sharpness", run, *OWN, *steps, "--tolerance", 0.2)
    fine = opsig("sharpness", run, *OWN, "--steps", "3:12", "--tolerance", 1e-4)
    assert "measured already" not in fine.err
    assert re.search(r"measured again: [123] checkpoints", fine.err)
    again = opsig("sharpness", run, *OWN, *steps, "--tolerance", 0.2)
    assert "measured already: 4 of 4" in again.err
    assert max(r["residual"] for r in rough.records[1:]) > 1e-4 > max(r["residual"] for r in again.records[1:])
    assert again.records[0] == rough.records[0]
    assert opsig("verify", run).code == 0


# -- losses and gradients that are not finite


BROKEN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Broken:
    def __init__(self, nan=-1, root=-1):
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        if nan >= 0:
            x[nan, 1] = float("nan")
        if root >= 0:
            x[root] = 0
        self.x, self.root = x, root

    def model(self):
        return nn.Linear(3, 2, bias=False)

    def dataset(self):
        return TensorDataset(self.x)

    def losses(self, model, batch):
        out = model(batch[0]).square().sum(1)
        return out.sqrt() if self.root >= 0 else out

    def label(self, i):
        return f"item {i}"
"""


@pytest.fixture
def broken(tmp_path, opsig):
    (tmp_path / "broken.py").write_text(BROKEN)

    def train(options, *more):
        task = ("--task", f"{tmp_path / 'broken.py'}:Broken{options}", "--steps", 200, "--replace", "-q")
        return opsig("train", *task, "-o", tmp_path / "run.h5", *more)

    return train


def test_train_names_the_sample_whose_loss_or_gradient_is_not_finite(broken, tmp_path, opsig):
    track = ("--track", "--learning-rate", 0.01)
    broken(":nan=7", *track).fails(1, "the loss is not finite at step 0", "the loss of sample 7 (label item 7)")
    with open_trajectory(tmp_path / "run.h5") as run:
        assert np.flatnonzero(~np.isfinite(run.row("losses/loss", 0))).tolist() == [7]
        assert run.steps("checkpoints").tolist() == [0]
    outcome = broken(":nan=7", "--optimizer", "sgd", "--batch-size", 2, "--learning-rate", 0.01, "--seed", 1)
    outcome.fails(1, "the loss is not finite at step ", "the loss of sample 7 (label item 7)")
    assert "learning rate" not in outcome.err
    step = int(outcome.err.split("not finite at step ")[1].split(":")[0])
    assert step > 1
    with open_trajectory(tmp_path / "run.h5") as run:
        assert run.steps("scalars")[-1] == step
        assert np.isnan(run.row("scalars/train_loss", step))
        assert run.steps("checkpoints").tolist() == [0, step - 1]
    task = ("--task", f"{tmp_path / 'broken.py'}:Broken:nan=7")
    opsig("sharpness", tmp_path / "run.h5", *task).fails(1, "the loss of sample 7 is not finite", "no curvature")
    sharp = opsig("sharpness", tmp_path / "run.h5", *task, "--metrics", "sample_sharpness", "--steps", 0).records
    assert [r["sample"] for r in sharp if r["sample_sharpness"] is None] == [7]
    broken(":root=5", *track).fails(
        1, "the gradient is not finite at step 0", "the gradient of sample 5 (label item 5)"
    )


def test_train_speaks_of_the_learning_rate_where_most_losses_are_not_finite(broken, tmp_path):
    outcome = broken("", "--track", "--learning-rate", 1e4, "--optimizer", "momentum", "--checkpoint-every", 100)
    outcome.fails(1, "Try a learning rate below 10000")
    with open_trajectory(tmp_path / "run.h5") as run:
        last = int(run.steps("losses")[-1])
        assert run.steps("checkpoints").tolist() == [0, last - 1]
        state, before = read_state(run, last - 1), run.row("losses/loss", last - 1)
        assert np.isfinite(before).all()
        assert not np.isfinite(run.row("losses/loss", last)).all()
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose((x @ torch.tensor(state.params).view(2, 3).T).square().sum(1), before, rtol=1e-5)


# -- values that vanish


SATURATED = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


class Saturated:
    def __init__(self, steep=200.0):
        self.steep = steep

    def model(self):
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
        with torch.no_grad():
            model[2].weight.mul_(self.steep)
        return model

    def dataset(self):
        draw = torch.Generator().manual_seed(0)
        return TensorDataset(torch.randn(60, 8, generator=draw), torch.randint(0, 3, (60,), generator=draw))

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def test_gradients_that_underflow_have_no_cosine_and_make_no_pair_of_a_group_with_itself(opsig, tmp_path):
    (tmp_path / "s.py").write_text(SATURATED)
    for steep in (1, 200):
        task = ("--task", f"{tmp_path / 's.py'}:Saturated:steep={steep}")
        run = tmp_path / f"{steep}.h5"
        train = ("--learning-rate", 0.3, "--steps", 30, "--track", "--checkpoint-every", 5, "-q")
        assert opsig("train", *task, *train, "-o", run).code == 0
        found = opsig("cluster", run, *task, "--by", "gradient")
        assert found.code == 0, found.err
        pairs = [r for r in found.records if r["kind"] == "pair"]
        assert pairs
        for record in pairs + [r for r in found.records if r["kind"] == "group"]:
            assert abs(record["cohesion"]) < 1 + 1e-9
            if record["kind"] == "pair":
                assert len(set(record["groups"])) == 2
                assert -1 <= record["opposition"] < 0
                measured = [record[name] for name in ("opposition", "opposition_error", "loss_correlation", "shared")]
                assert record["p_value"] == 1 or None not in measured
                assert record["verdict"] != "established" or None not in measured
        loaded, _ = tasks.load(tasks.parse_spec(task[1]))
        session: Any = load_backend("torch").open(loaded)
        with open_trajectory(run) as trajectory:
            state = read_state(trajectory, 0)
        cosines, norms = session.gradient_cosines(state, np.arange(60)), session.gradient_norms(state)
        gone = norms < 1e-15
        assert gone.any() == (steep == 200)
        assert np.isnan(cosines[gone]).all()
        assert np.isnan(cosines[:, gone]).all()
        assert np.isnan(session.mean_cosines(state, np.arange(60), [np.arange(9)])[gone]).all()
        np.testing.assert_allclose(np.diag(cosines)[~gone], 1)
        assert np.abs(cosines[np.ix_(~gone, ~gone)]).max() < 1 + 1e-6


def test_nothing_opposes_itself_and_what_is_not_known_is_not_significant():
    against = np.full((4, 4), -0.9)
    grouping = Grouping(np.array([0, 0, 1, 1]), np.array([-1, -1]), np.full(4, np.nan))
    assert pair_anew(against, grouping, np.zeros((2, 2), bool)).pairs() == [(0, 1)]
    lone = Grouping(np.zeros(4, int), np.array([-1]), np.full(4, np.nan))
    assert pair_anew(against, lone, np.zeros((1, 1), bool)).pairs() == []
    assert p_value(float("nan"), np.zeros(199)) == 1
    assert series_p_value(np.full(20, np.nan), np.arange(20.0)) == 1
    infinite = np.where(np.eye(8) > 0, 1, np.inf)
    assert group_by_similarity(infinite).pairs() == []


# -- tasks of other kinds


OTHERS = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


class Still:
    def __init__(self, scale: float = 0.0):
        self.scale = scale

    def model(self):
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))

    def data(self):
        draw = torch.Generator().manual_seed(0)
        return torch.randn(60, 8, generator=draw), torch.randint(0, 3, (60,), generator=draw)

    def dataset(self):
        return TensorDataset(*self.data())

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none") * self.scale


class Detached(Still):
    def losses(self, model, batch):
        return super().losses(model, batch).detach()


class Counted(Still):
    def losses(self, model, batch):
        return (model(batch[0]).argmax(1) != batch[1]).long()


class Listed(Still):
    def losses(self, model, batch):
        return list(super().losses(model, batch))


class Double(Still):
    def model(self):
        return nn.Linear(8, 3, bias=False).double()

    def data(self):
        x, y = super().data()
        return x.double(), y
"""


@pytest.fixture
def others(tmp_path, opsig):
    (tmp_path / "others.py").write_text(OTHERS)

    def run(command, name, *more):
        task = ("--task", f"{tmp_path / 'others.py'}:{name}")
        if command == "train":
            more = ("-o", tmp_path / "run.h5", "--learning-rate", 0.3, "--track", "--replace", *more)
        else:
            more = (tmp_path / "run.h5", *more)
        return opsig(command, *more, *(() if command == "mine" else task))

    return run


def test_where_no_loss_changes_nothing_moves_and_nothing_is_grouped(others):
    assert others("train", "Still", "--steps", 20).code == 0
    mined = others("mine", "Still", "--top", 3)
    assert "no loss changes" in mined.err
    assert "found: no sample moves" in mined.err
    found = others("cluster", "Still")
    assert found.code == 0, found.err
    assert [r["kind"] for r in found.records] == ["tests"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Detached", "losses() do not depend on what is trained"),
        ("Counted", "losses() do not depend on what is trained"),
        ("Listed", "losses() returned list. It must return a tensor"),
    ],
)
def test_losses_that_nothing_can_be_trained_by_are_refused(others, name, words):
    others("train", name, "--steps", 2).fails(1, words)


def test_a_gradient_that_overflows_before_anything_is_trained_is_not_laid_to_the_learning_rate(others):
    done = others("train", "Still:scale=1e30", "--steps", 2)
    done.fails(1, "the gradient is not finite at step 0", "the scale of losses()")
    assert "learning rate" not in done.err


def test_a_model_in_float64_is_run_in_it(others, tmp_path):
    assert "is kept in float64, and is run in it" in others("train", "Double:scale=1", "--steps", 3).err
    done = others("sharpness", "Double:scale=1", "--steps", 3, "-k", 2)
    with open_trajectory(tmp_path / "run.h5") as run:
        weight = run.row("checkpoints/params", 3).astype(float).reshape(3, 8)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=draw).double().numpy()
    p = np.exp(x @ weight.T)
    p /= p.sum(1, keepdims=True)
    blocks = np.stack([np.diag(row) - np.outer(row, row) for row in p])  # of a softmax's Hessian by its logits
    hessian = np.einsum("nij,na,nb->iajb", blocks, x, x).reshape(24, 24) / 60
    expected = np.linalg.eigvalsh(hessian)[::-1][:2]
    np.testing.assert_allclose([r["eigenvalue"] for r in done.records], expected, rtol=1e-6)


def test_a_loss_that_is_infinite_once_is_not_said_to_stay_so(opsig, tmp_path):
    losses = np.random.default_rng(0).random((40, 20)) + 1
    losses[7, 3] = np.inf
    np.save(tmp_path / "losses.npy", losses)
    assert opsig("import", "--losses", tmp_path / "losses.npy", "-o", tmp_path / "run.h5").code == 0
    found = opsig("mine", tmp_path / "run.h5")
    assert "sample 3 at step 7, though not at all later ones" in found.err
    assert [(r["sample"], r["recovers"]) for r in found.records if r.get("kind") == "not_finite"] == [(3, True)]
