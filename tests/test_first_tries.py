"""What people try first with code and logs of their own, and what they are told."""

import os

import numpy as np
import pytest
import torch
from conftest import TASKS

from opsig_cli import Recorder, open_trajectory
from opsig_cli.studies import training
from opsig_cli.studies.importing import doubles
from opsig_cli.trajectory import sightings

FIRST = """
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import TensorDataset

class Two:
    def model(self):
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def dataset(self):
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, (x[:, 0] > 0).float())

    def losses(self, model, batch):
        return binary_cross_entropy_with_logits(model(batch[0])[:, 0].float(), batch[1], reduction="none")

class Autocast(Two):
    def losses(self, model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().losses(model, batch)

class Noisy(Two):
    def losses(self, model, batch):
        return super().losses(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

class Logits(Two):
    def predictions(self, model, batch):
        return model(batch[0])

class Probabilities(Two):
    def predictions(self, model, batch):
        return model(batch[0])[:, 0].sigmoid()

class FeaturesOf(Two):
    def __init__(self, kind="array"):
        self.kind = kind

    def features(self, model, batch):
        kinds = {"array": batch[0].numpy(), "vector": batch[0][:, 0], "mean": batch[0].mean(0, keepdim=True)}
        return kinds[self.kind]

class ByName(Two):
    def dataset(self):
        return {f"image {i}": item for i, item in enumerate(super().dataset())}

class WithTokenizer(Two):
    def model(self):
        return super().model(), "tokenizer"
"""


@pytest.fixture
def trains(opsig, tmp_path):
    (tmp_path / "first.py").write_text(FIRST)

    def train(name):
        own = ("--task", f"{tmp_path / 'first.py'}:{name}")
        done = opsig("train", *own, "--steps", 12, "--checkpoint-every", 2, "--track", "-o", tmp_path / "run.h5", "-q")
        return own, done

    return train


def test_a_model_under_autocast_has_features(trains, opsig, tmp_path):
    own, done = trains("Autocast")
    assert done.code == 0
    found = opsig("cluster", tmp_path / "run.h5", *own, "-q")
    assert found.code == 0, found.err
    pairs = [record for record in found.records if record["kind"] == "pair"]
    assert pairs
    assert all(record["alike"] is not None for record in pairs)


def test_random_losses_are_said_to_be_and_not_laid_to_the_data(trains, opsig, tmp_path):
    own, _ = trains("Noisy")
    opsig("cluster", tmp_path / "run.h5", *own, "-q").fails(1, "is measured again: the task's losses() are random")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "Logits",
            "the task's predictions() returned shape (24, 1) for 24 samples. It must return a tensor of integers",
        ),
        ("Probabilities", "the task's predictions() are not whole numbers"),
        ("ByName", "the task's dataset is a dict, which gives items by key"),
        ("WithTokenizer", "model() returned a tuple, not a torch.nn.Module"),
    ],
)
def test_what_is_no_dataset_model_or_prediction_is_named(trains, name, words):
    trains(name)[1].fails(1, words)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("array", "returned ndarray"), ("vector", "returned shape (24,)"), ("mean", "returned 1 rows for 24 samples")],
)
def test_features_that_are_no_rows_are_refused_in_one_line(trains, opsig, tmp_path, kind, words):
    own, done = trains(f"FeaturesOf:kind={kind}")
    assert done.code == 0
    opsig("cluster", tmp_path / "run.h5", *own, "-q").fails(1, f"the task's features() {words}", "(B, D)")


def test_a_last_checkpoint_under_two_more_names_is_left_out(opsig, tmp_path, monkeypatch):
    for name, step in (("best", 20), ("last", 20), ("step10", 10), ("step20", 20)):
        torch.manual_seed(step)
        torch.save(torch.nn.Linear(5, 3).state_dict(), tmp_path / f"{name}.pt")  # the name is written into the file
    (tmp_path / "linear.py").write_text(
        f"import sys\nsys.path.insert(0, {str(TASKS.parent)!r})\nimport torch\nimport tiny\n"
        "class Linear(tiny.Tiny):\n    def model(self):\n        return torch.nn.Linear(5, 3)\n"
    )
    own = ("--task", f"{tmp_path / 'linear.py'}:Linear")
    state, read = doubles._state, []
    monkeypatch.setattr(doubles, "_state", lambda path, target: read.append(path) or state(path, target))
    found = opsig("import", *sorted(tmp_path.glob("*.pt")), *own, "-o", tmp_path / "run.h5")
    assert found.code == 0, found.err
    assert "best.pt is left out: it holds the same as" in found.err
    assert sum("best.pt" in str(path) for path in read) == 1  # however many it is held against
    with open_trajectory(tmp_path / "run.h5") as run:
        assert run.steps("checkpoints").tolist() == [10, 20]


LINES = [f"{t},{s},{1 / (t + 1)},{(s + (t == 2 and s == 1)) % 2}" for t in range(3) for s in range(4)]
HEADER = "step,sample,loss,label"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ([HEADER, *LINES[:8], HEADER, *LINES[8:]], "log.csv line 10 is the header again"),
        ([HEADER, *LINES, *LINES[8:]], "two losses of sample 0 at step 2. Keep one"),
    ],
)
def test_a_log_of_a_run_that_went_on_says_what_to_take_out(opsig, tmp_path, text, words):
    (tmp_path / "log.csv").write_text("\n".join(text) + "\n")
    opsig("import", "--losses", tmp_path / "log.csv", "-o", tmp_path / "run.h5", "-q").fails(1, words)


def test_a_label_that_changes_in_a_log_is_said_to(opsig, tmp_path):
    (tmp_path / "log.csv").write_text("\n".join([HEADER, *LINES]) + "\n")
    found = opsig("import", "--losses", tmp_path / "log.csv", "-o", tmp_path / "run.h5")
    assert "log.csv: one sample has more than one label, as on line 11; the first of each is taken" in found.err
    with open_trajectory(tmp_path / "run.h5") as run:
        assert run.read("samples/label").tolist() == ["0", "1", "0", "1"]


def test_sightings_below_the_expected_are_not_said_to_exceed_it(opsig, tmp_path):
    with Recorder(tmp_path / "run.h5", samples=4) as recorder:
        for step in range(12):
            recorder.observe(step, range(4), np.array([1.0, 1.0, 1.0, 1.0 - 0.9 * (step == 8)]))
    found = opsig("mine", tmp_path / "run.h5", "--top", 1).err
    assert "found: of 1 sample none exceeds what was to be expected" in found
    assert "1 exceeds the expected at step" in opsig("mine", tmp_path / "run.h5", "--direction", "up").err


def test_where_all_samples_were_looked_at_no_more_are_asked_for(opsig, tmp_path):
    np.save(tmp_path / "losses.npy", np.ones((6, 5)))
    assert opsig("import", "--losses", tmp_path / "losses.npy", "-o", tmp_path / "run.h5").code == 0
    found = opsig("cluster", tmp_path / "run.h5").err
    assert "among 5 samples. These are all" in found
    assert "--top" not in found


def test_an_interrupted_command_says_so(opsig, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("opsig_cli.trajectory.file.open_trajectory", interrupted)
    opsig("info", "run.h5").fails(130, "opsig: interrupted")


def test_an_interrupted_training_says_how_it_goes_on_with_the_task(trains, opsig, tmp_path, monkeypatch):
    listening = training.StopRequest.listening

    def asked(self):
        self.asked = True
        return listening(self)

    monkeypatch.setattr(training.StopRequest, "listening", asked)
    own, done = trains("Two")
    assert done.code == 130
    said = done.err.rpartition("interrupted. Continue with: ")[2].strip()
    assert said == f"opsig train -o {tmp_path / 'run.h5'} --resume --task {own[1]}"
    monkeypatch.undo()
    assert opsig(*said.split()[1:], "-q").code == 0


def test_the_next_command_names_a_tasks_file_from_the_current_folder(trains, opsig, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "first.py").write_text(FIRST)
    path = tmp_path / "runs" / "run.h5"
    assert opsig("train", "--task", "first.py:Two", "--steps", 2, "--track", "-o", path, "-q").code == 0
    monkeypatch.chdir(tmp_path / "runs")
    assert "opsig cluster run.h5 --task ../first.py:Two" in opsig("mine", "run.h5").err


def test_a_batch_that_draws_a_sample_twice_is_counted_twice_where_that_is_said(opsig, tmp_path):
    lines = [f"{t},{s},{s + 1}" for t in range(6) for s in (t % 4, t % 4, (t + 1) % 4)]
    (tmp_path / "log.CSV").write_text("\n".join(["step,sample,loss", *lines]) + "\n")
    asked = ("import", "--losses", tmp_path / "log.CSV", "-o", tmp_path / "run.h5")
    opsig(*asked).fails(1, "two losses of sample 0 at step 0", "--sightings takes both")
    found = opsig(*asked, "--sightings")
    assert "batches had a sample twice, which counts twice, 6 times" in found.err
    with open_trajectory(tmp_path / "run.h5") as run:
        assert sorted(sightings.at(run, 2).tolist()) == [2, 2, 3]
    assert opsig("mine", tmp_path / "run.h5").code == 0


def test_a_run_of_one_step_or_of_one_sample_is_said_to_be_that_and_no_more(opsig, tmp_path):
    np.save(tmp_path / "l.NPY", np.ones((1, 3)))
    os.rename(tmp_path / "l.NPY.npy", tmp_path / "l.NPY")
    one_step = opsig("import", "--losses", tmp_path / "l.NPY", "-o", tmp_path / "step.h5")
    assert "found: 1 step, step 0\n" in one_step.err
    np.save(tmp_path / "s.npy", np.arange(12.0)[:, None] ** 2)
    several = opsig("import", "--losses", tmp_path / "s.npy", "-o", tmp_path / "sample.h5")
    assert "found: 12 steps, steps 0 to 11\n" in several.err
    mined = opsig("mine", tmp_path / "sample.h5")
    assert "sample 0 moves most" in mined.err
    assert "opsig cluster" not in mined.err


def test_a_table_in_place_of_checkpoints_is_known_by_its_ending_in_any_case(opsig, tmp_path):
    (tmp_path / "LOG.CSV").write_text("step,sample,loss\n0,0,1\n")
    opsig("import", tmp_path / "LOG.CSV", "-o", tmp_path / "run.h5").fails(2, f"--losses {tmp_path / 'LOG.CSV'}")


def test_samples_of_one_input_are_not_said_to_look_different(opsig, tmp_path):
    (tmp_path / "same.py").write_text(
        f"import sys\nsys.path.insert(0, {str(TASKS.parent)!r})\nimport tiny\n"
        "class Same(tiny.Tiny):\n    def __init__(self):\n        super().__init__()\n        self.x[:] = self.x[0]\n"
    )
    own = ("--task", f"{tmp_path / 'same.py'}:Same")
    trained = opsig("train", *own, "--steps", 20, "--learning-rate", 0.5, "--track", "-o", tmp_path / "run.h5")
    assert trained.code == 0, trained.err
    pairs = [r for r in opsig("cluster", tmp_path / "run.h5", *own).records if r["kind"] == "pair"]
    assert pairs
    for pair in pairs:
        assert pair["alike"] is None
        assert "their likeness across is only" not in pair["reason"]
