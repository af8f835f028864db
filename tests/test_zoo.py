"""The built-in tasks: their data, their files, and what is planted."""

import gzip
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from opsig_zoo import Chebyshev, Digits, FashionMnist, Planted
from opsig_zoo.readers import read_cifar10, read_idx

from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.tasks import TaskSpec, load


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3, min_side=0, max_side=5)), st.booleans())
def test_idx_files_are_read_back(tmp_path_factory, array, zipped):
    path = tmp_path_factory.mktemp("idx") / "x"
    path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    np.testing.assert_array_equal(read_idx(path), array)


@given(st.binary(max_size=60))
def test_anything_else_is_an_error_of_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("idx") / "x"
    path.write_bytes(data)
    try:
        array = read_idx(path)
    except OpsigError as error:
        assert "\n" not in str(error)
    else:
        assert idx(array) == data


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_gzip_file_is_never_a_traceback(tmp_path_factory, place, value):
    data = bytearray(gzip.compress(idx(np.arange(200, dtype=np.uint8))))
    data[place % len(data)] = value
    path = tmp_path_factory.mktemp("idx") / "x"
    path.write_bytes(bytes(data))
    try:
        read_idx(path)
    except OpsigError as error:
        assert str(path) in str(error)


def cifar(folder, python: bool):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (5, 4, 3072), dtype=np.uint8)
    labels = generator.integers(0, 10, (5, 4))
    for i in range(5):
        if python:
            batch = {b"data": pixels[i], b"labels": labels[i].tolist()}
            (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch, protocol=2))
        else:
            rows = np.concatenate([labels[i][:, None].astype(np.uint8), pixels[i]], 1)
            (folder / f"data_batch_{i + 1}.bin").write_bytes(rows.tobytes())
    return pixels.reshape(20, 3, 32, 32), labels.ravel()


@pytest.mark.parametrize("python", [True, False])
def test_both_versions_of_cifar10_are_read(tmp_path, python):
    expected, expected_labels = cifar(tmp_path, python)
    images, labels = read_cifar10(tmp_path, "train")
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2), expected)
    np.testing.assert_array_equal(labels, expected_labels)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    cifar(tmp_path, python=True)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Malicious(tmp_path / "hacked"), b"labels": []}))
    with pytest.raises(OpsigError, match=r"data_batch_3 is not a CIFAR-10 batch: it asks for posix\.mkdir"):
        read_cifar10(tmp_path, "train")
    assert not (tmp_path / "hacked").exists()


@given(st.binary(max_size=100))
def test_no_bytes_make_the_unpickler_fail_otherwise(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cifar")
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(data)
    with pytest.raises(OpsigError):
        read_cifar10(folder, "train")


def test_a_missing_copy_says_where_to_get_one(tmp_path):
    with pytest.raises(OpsigError, match=r"cs\.toronto\.edu"):
        read_cifar10(tmp_path, "train")


def test_the_shipped_images_are_balanced_and_unique():
    task = FashionMnist()
    assert np.bincount(task.labels).tolist() == [500] * 10
    assert len(np.unique(task.pixels.reshape(5000, -1), axis=0)) == 5000
    x, y = task.dataset()[:]
    assert x.shape == (5000, 1, 28, 28)
    assert abs(x.mean()) < 1e-4
    assert abs(x.std() - 1) < 1e-3
    assert task.label(0) == task.classes[int(y[0])]


def test_shrinking_averages_squares():
    full, small = FashionMnist(samples=3), FashionMnist(samples=3, size=14)
    np.testing.assert_allclose(small.pixels[1, 2, 3, 0], full.pixels[1, 4:6, 6:8, 0].mean(), rtol=1e-6)


@pytest.mark.parametrize(("loss", "smoothing"), [("cross-entropy", 0.0), ("cross-entropy", 0.1), ("square", 0.0)])
def test_losses_follow_their_definition(loss, smoothing):
    task = Digits(loss=loss, label_smoothing=smoothing)
    model = task.model()
    batch = task.dataset()[:9]
    logits = model(batch[0]).detach().double().numpy()
    hot = np.eye(10)[batch[1].numpy()]
    if loss == "square":
        expected = 0.5 * ((logits - hot) ** 2).sum(1)
    else:
        target = (1 - smoothing) * hot + smoothing / 10
        expected = np.log(np.exp(logits).sum(1)) - (target * logits).sum(1)
    np.testing.assert_allclose(task.losses(model, batch).detach().numpy(), expected, rtol=1e-6)


def test_features_are_the_input_of_the_last_linear_layer():
    task = Digits(model="cnn:width=4,depth=2")
    model = task.model()
    batch = task.dataset()[:5]
    last = list(model.modules())[-1]
    torch.testing.assert_close(last(task.features(model, batch)), model(batch[0]))


def test_the_chebyshev_values_are_cosines():
    task = Chebyshev(degree=5)
    np.testing.assert_allclose(task.y, np.cos(5 * np.arccos(task.x)), atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"same_classes": True}, {"unequal": True}, {"jitter": 1}, {"native": True}])
def test_planted_sides_share_a_patch_and_differ_in_label(options):
    task = Planted(**options)
    plain = Planted(strength=1e-3, **options)
    truth = task.truth()
    sides = np.unique(truth)
    assert sides.tolist() == [-1, *range(8)]
    changed = np.abs(task.pixels - plain.pixels).max(3) > 1
    assert not changed[truth < 0].any()
    for pair in range(4):
        a, b = (np.flatnonzero(truth == 2 * pair + half) for half in (0, 1))
        assert len(np.unique(task.labels[a])) == len(np.unique(task.labels[b])) == 1
        assert task.labels[a[0]] != task.labels[b[0]]
        if not options.get("unequal"):
            assert len(a) == len(b) == 30
        assert set(changed[[*a, *b]].sum((1, 2))) == {16}
        if not options.get("jitter"):
            assert len(np.unique(changed[[*a, *b]].reshape(len(a) + len(b), -1), axis=0)) == 1
    if options.get("same_classes"):
        assert len(np.unique(task.labels[truth >= 0])) == 2


def test_planted_options_that_need_room_say_so():
    for options, words in (
        ({"pairs": 20}, "do not fit"),
        ({"side": 300}, "more than the 2000"),
        ({"native": True, "side": 200, "same_classes": True}, "too few images left"),
        ({"shared": True, "pairs": 1}, "needs two pairs"),
    ):
        with pytest.raises(ValueError, match=words):
            Planted(**options)


def test_a_shared_patch_belongs_to_two_pairs_and_distractors_to_none():
    task, plain = (Planted(shared=True, distractors=2, strength=s) for s in (12, 1e-3))
    changed = (np.abs(task.pixels - plain.pixels).max(3) > 1).reshape(2000, -1)
    first, second = (np.flatnonzero(task.truth() == side)[0] for side in (0, 2))
    assert (changed[first] == changed[second]).all()
    assert changed[task.truth() < 0].any(1).sum() == 60


def test_unknown_models_and_options_list_the_known():
    for model, words in (("resnet9", "Known: mlp"), ("mlp:heads=2", "Known: activation, depth, width")):
        with pytest.raises(UsageError, match=words):
            load(TaskSpec("digits", {}, model))
    with pytest.raises(UsageError, match="no activation is called 'step'"):
        load(TaskSpec("digits", {}, "mlp:activation=step"))
    with pytest.raises(UsageError, match="no loss is called 'hinge'"):
        load(TaskSpec("digits", {"loss": "hinge"}))
