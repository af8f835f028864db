"""What a person sees of samples whose task has no `render`, and of one that got it later."""

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import TensorDataset

from opsig_cli import Recorder, open_trajectory
from opsig_cli.figures.vectors import SIDE, vector_picture
from opsig_cli.studies.describing import description, thinned
from opsig_cli.studies.pictures import Pictures

OWN = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


class Own:
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(40) % 2
        self.x = torch.randn(40, 8, generator=generator) + 2 * torch.eye(2, 8)[self.y]

    def model(self):
        return nn.Linear(8, 2)

    def dataset(self):
        return TensorDataset(self.x, self.y)

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]).double(), batch[1], reduction="none")

    def label(self, i):
        return ["ant", "bee"][int(self.y[i])]
"""
RENDER = """
    def render(self, i):
        from PIL import Image
        return Image.new("L", (6, 6), i)
"""


class Raw:
    """A task of these items and nothing else that shows them."""

    def __init__(self, items):
        self.items = items

    def dataset(self):
        return self.items


def seen(*inputs, **task):
    """What is kept of samples with these inputs."""
    return description(Raw([(x, 0) for x in inputs]), range(len(inputs)), **task)


def test_channels_first_and_last_are_the_same_picture():
    pixels = np.arange(3 * 8 * 6, dtype=np.float32).reshape(8, 6, 3) / 143
    first, last = (seen(x, x)["samples/thumbnail"] for x in (np.moveaxis(pixels, -1, 0), pixels))
    np.testing.assert_array_equal(first, last)
    np.testing.assert_array_equal(first[0], np.round(255 * pixels))


def test_bytes_are_kept_and_normalised_channels_each_fill_their_range():
    pixels = np.array([[[0, 10], [20, 255]]], np.uint8)
    assert seen(pixels)["samples/thumbnail"][0, :, :, 0].tolist() == pixels[0].tolist()
    normalised = np.stack(
        [np.linspace(-2, 2, 64).reshape(8, 8), np.linspace(-30, 10, 64).reshape(8, 8), np.ones((8, 8))]
    )
    kept = seen(normalised.astype(np.float32))["samples/thumbnail"][0]
    assert (kept[0, 0, :2] == 0).all()
    assert (kept[-1, -1, :2] == 255).all()
    assert np.ptp(kept[:, :, 2]) == 0


def test_pictures_of_several_sizes_stand_in_one_square():
    kept = seen(Image.new("RGB", (20, 10), "red"), Image.new("L", (200, 100), 0))["samples/thumbnail"]
    assert kept.shape == (2, 64, 64, 3)
    assert kept[0, 32, 32].tolist() == [255, 0, 0]
    assert kept[0, 5, 5].tolist() == [255, 255, 255]
    assert kept[1, 32, 1].tolist() == [0, 0, 0]


def test_words_stay_words_and_few_numbers_are_read():
    assert seen("a cat", "a dog")["samples/text"].tolist() == ["a cat", "a dog"]
    assert seen(np.array([0.5, -1.0]))["samples/text"].tolist() == ["x = +0.5, -1"]
    assert seen(np.array([7, 101, 12, 9, 9, 0]))["samples/text"].tolist() == ["x = 7, 101, 12, 9, 9, 0"]
    keyed = Raw([{"index": 3, "values": np.ones(9, np.float32)}])
    assert description(keyed, [0])["samples/vector"].tolist() == [[1.0] * 9]


def test_what_shows_nothing_gets_no_picture():
    assert seen(object(), object()) == {}
    assert seen(np.zeros((2, 2, 2, 2))) == {}
    assert seen(np.zeros(9, np.float32), np.zeros(8, np.float32)) == {}


def test_a_long_series_keeps_its_extremes():
    values = np.random.default_rng(0).normal(size=16_000)
    values[5000], values[9000] = 40, -40
    kept = thinned(values)
    assert len(kept) == 256
    assert kept.max() == 40
    assert kept.min() == -40
    assert kept.argmin() > kept.argmax()


def test_bars_stand_on_zero():
    picture = vector_picture(np.array([1.0, -1.0]), np.full(2, -1.0), np.full(2, 1.0))[:, :, 0] < 128
    half = SIDE // 2
    assert picture[:half, :half].sum() > 500
    assert picture[half + 2 :, half:].sum() > 500
    assert picture[half + 2 :, :half].sum() == 0
    assert picture[: half - 2, half:].sum() == 0


def test_inputs_of_unlike_units_each_have_a_range(tmp_path):
    own = []
    for scale in (1, 100):
        path = tmp_path / f"{scale}.h5"
        with Recorder(path, samples=4) as recorder:
            recorder.record(0, losses=np.ones(4))
            values = np.random.default_rng(1).normal(size=(4, 6)) * [1, 1, 1, 1, 1, scale]
            recorder.run.write("samples/vector", values)
        with open_trajectory(path) as run:
            own.append("own range" in Pictures(run).words)
            assert Pictures(run).tile(2, None, None).picture.shape == (SIDE, SIDE, 1)
    assert own == [False, True]


@pytest.mark.parametrize("begin", ["train", "recorder"])
def test_a_render_that_comes_later_is_taken(opsig, tmp_path, monkeypatch, begin):
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "own.py"
    code.write_text(OWN)
    task = "own.py:Own"
    if begin == "train":
        opsig("train", "--task", task, "--learning-rate", 0.3, "--steps", 12, "--track", "-o", "run.h5")
        with open_trajectory("run.h5") as run:
            assert run.shape("samples/vector") == (40, 8)
    else:
        with Recorder("run.h5", samples=40) as recorder:
            for step in range(12):
                recorder.record(step, losses=np.random.default_rng(step).random(40))
    code.write_text(OWN + RENDER)
    found = opsig("cluster", "run.h5", "--task", task, "--by", "loss", "--test", "none", "--figure", "a.svg")
    assert found.code == 0, found.err
    assert "pictures of 40 samples are those of own.py:Own now" in found.err
    with open_trajectory("run.h5") as run:
        assert not run.has("samples/vector")
        assert run.read("samples/thumbnail")[7, 0, 0] == 7
        assert run.read("samples/label")[1] == "bee"
    again = opsig("cluster", "run.h5", "--task", task, "--by", "loss", "--test", "none")
    assert "pictures" not in again.err


def test_boxes_are_left_away_where_there_is_nothing_to_draw(opsig, tmp_path):
    with Recorder(tmp_path / "run.h5", samples=30) as recorder:
        for step in range(20):
            recorder.record(step, losses=np.random.default_rng(step).random(30))
    opsig("mine", tmp_path / "run.h5", "--figure", tmp_path / "a.svg")
    assert "no picture" not in (tmp_path / "a.svg").read_text()


def test_without_predictions_no_column_speaks_of_them(opsig, tmp_path):
    with Recorder(tmp_path / "run.h5", samples=30) as recorder:
        for step in range(20):
            recorder.record(step, losses=np.random.default_rng(step).random(30))
    shown = opsig("mine", tmp_path / "run.h5", "--format", "table").out
    assert "None" not in shown
    assert "predicted" not in shown
    assert "->" in shown


def test_rows_of_arrays_are_items_too():
    class Arrays:
        def data(self):
            return np.arange(12, dtype=np.float32).reshape(2, 6), np.array([1, 0])

    assert description(Arrays(), range(2))["samples/vector"].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_items_of_a_tensor_dataset_are_pictures():
    import torch

    data = TensorDataset(torch.rand(3, 1, 10, 10), torch.arange(3))
    assert description(Raw(data), range(3))["samples/thumbnail"].shape == (3, 10, 10, 1)
