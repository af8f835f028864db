"""Architectures have their reference's number of parameters, take any size they can, and leave each sample alone."""

import pytest
import torch
from opsig_torch import TorchBackend
from opsig_zoo.architectures import ARCHITECTURES, GPT
from opsig_zoo.models import image_model
from opsig_zoo.text import Text

from opsig_cli.errors import OpsigError

COUNTS = {  # three channels, ten classes
    "resnet18": 11_173_962, "resnet20": 269_722, "resnet56": 853_018, "resnet110": 1_727_962,
    "vgg11": 9_225_610, "vgg11-bn": 9_231_114,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_many_as_in_the_reference(name):
    assert sum(p.numel() for p in ARCHITECTURES[name](3, 32, 10).parameters()) == COUNTS[name]


def test_gpt_has_gpt2s_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(50257, 1024, 12, 768, 12).parameters()) == 124_439_808


@pytest.mark.parametrize("name", ["resnet18:width=8", "resnet20", "vgg11:width=8", "vgg11-bn:width=8", "vit:width=16"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_images_of_any_size_and_channels(name, channels, size):
    model = image_model(name, channels, size, 7).eval()
    x = torch.randn(3, channels, size, size)
    y = model(x)
    assert y.shape == (3, 7)
    torch.testing.assert_close(model(x[1:2]), y[1:2], rtol=1e-4, atol=1e-5)


def test_images_that_are_too_small_are_refused():
    for name, words in (("vgg11", "16 pixels"), ("resnet18", "8 pixels"), ("vit:patch=5", "patches of 5")):
        with pytest.raises(OpsigError, match=words):
            image_model(name, 1, 7, 10)
    with pytest.raises(OpsigError, match="not divisible"):
        image_model("vit:width=10,heads=4", 1, 28, 10)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second \xff file: a\nb\n" * 20)
    (tmp_path / "a.md").write_bytes(b"first file\n" * 20)
    return tmp_path


def test_text_samples_are_bytes_with_their_context(text):
    task = Text(str(text), context=8, samples=50)
    assert bytes(task.data[:5]) == b"first"  # in order of name
    contexts, targets = task.dataset()[:]
    for i in (0, 20, len(targets) - 1):
        place = int(task.targets[i])
        assert bytes(task.data[place - 8 : place]) == bytes(contexts[i].tolist())
        assert task.data[place] == targets[i]
        assert task.render(i).endswith(f"[{task.label(i)}]")


def test_text_losses_do_not_depend_on_the_batch_and_fall(text):
    session = TorchBackend().open(Text(str(text), context=8, samples=60, model="gpt:width=16,depth=1"), "cpu", 7)
    state = session.initial(0)
    other = TorchBackend().open(session.task, "cpu", 60)
    other.initial(0)
    torch.testing.assert_close(
        *(torch.from_numpy(s.losses([state])[0][0]) for s in (session, other)), rtol=1e-4, atol=1e-5
    )
    from opsig_cli.backends import Training

    snapshots = list(session.train(Training("adam", 0.01, 30), state))
    assert snapshots[-1].train_loss < 0.6 * snapshots[0].train_loss


def test_text_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for path, words in (("none.txt", "does not exist"), ("empty.txt", "too few"), ("", "no text files")):
        folder = tmp_path / "folder" if not path else tmp_path
        folder.mkdir(exist_ok=True)
        with pytest.raises(OpsigError, match=words):
            Text(str(folder / path))
