"""Image classification tasks. S images, B a batch's size; pixels are (S, H, W, C)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import TensorDataset

from opsig_cli.errors import OpsigError
from opsig_zoo.models import image_model, last_features
from opsig_zoo.readers import find_idx, read_cifar10, read_idx, shipped

LOSSES = ("cross-entropy", "square")
FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class ImageTask:
    """Images in classes, by a model of opsig's own.

    `pixels` (S, H, W, C) float32, white at 1, or uint8; H = W. They are standardised over the data set, each channel by
    its own mean and standard deviation. `labels` (S,) integers below `len(classes)`. `loss` is cross-entropy in nats
    (on float64 logits: float32 is noise below 1e-6), or the square loss, |logits - one-hot label|^2 / 2.
    """

    def __init__(
        self, pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], model: str, loss: str,
        label_smoothing: float,
    ):  # fmt: skip
        if loss not in LOSSES:
            raise ValueError(f"no loss is called '{loss}'. Known: {', '.join(LOSSES)}")
        if not 0 <= label_smoothing < 1:
            raise ValueError("label_smoothing must be at least 0 and below 1")
        if label_smoothing and loss != "cross-entropy":
            raise ValueError("label_smoothing belongs to cross-entropy")
        if pixels.shape[1] != pixels.shape[2]:
            raise ValueError(f"images must be square, not {pixels.shape[1]} x {pixels.shape[2]}")
        self.pixels = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
        self.labels = labels.astype(np.int64)
        self.classes = classes
        self._model, self._loss, self._smoothing = model, loss, label_smoothing
        self.mean = self.pixels.mean((0, 1, 2), dtype=np.float64).astype(np.float32)
        self.deviation = self.pixels.std((0, 1, 2), dtype=np.float64).astype(np.float32) + np.float32(1e-6)
        with torch.device("meta"):
            self.model()  # without its memory: an unknown model or option is an error now, before a file is made

    @property
    def loss_unit(self) -> str:
        """Nats for cross-entropy."""
        return "nat" if self._loss == "cross-entropy" else "squared error"

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a picture."""
        _, height, width, channels = self.pixels.shape
        return height, width, channels

    def inputs(self, pixels: np.ndarray) -> Tensor:
        """What the model is given for (B, H, W, C) float pixels, white at 1: standardised (B, C, H, W)."""
        standardised = (pixels - self.mean) / self.deviation
        return torch.from_numpy(np.ascontiguousarray(standardised.transpose(0, 3, 1, 2), dtype=np.float32))

    def model(self) -> nn.Module:
        """The model, initialised from torch's seed."""
        _, side, _, channels = self.pixels.shape
        return image_model(self._model, channels, side, len(self.classes))

    def dataset(self) -> TensorDataset:
        """All images and labels."""
        return TensorDataset(self.inputs(self.pixels), torch.from_numpy(self.labels))

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of every image, (B,)."""
        logits = model(batch[0]).double()
        if self._loss == "square":
            return (logits - one_hot(batch[1], len(self.classes))).square().sum(1) / 2
        return cross_entropy(logits, batch[1], reduction="none", label_smoothing=self._smoothing)

    def smoothed_losses(self, model: nn.Module, batch: Any, smoothing: float) -> Tensor:
        """Cross-entropy with labels smoothed by this much, (B,). Raises ValueError for the square loss."""
        if self._loss != "cross-entropy" or not 0 <= smoothing < 1:
            raise ValueError("it belongs to cross-entropy, and is at least 0 and below 1")
        return cross_entropy(model(batch[0]).double(), batch[1], reduction="none", label_smoothing=smoothing)

    def predictions(self, model: nn.Module, batch: Any) -> Tensor:
        """Predicted classes, (B,)."""
        return model(batch[0]).argmax(1)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """What the predicted class is the largest of, (B, classes)."""
        return model(batch[0])

    def features(self, model: nn.Module, batch: Any) -> Tensor:
        """Input of the last linear layer, (B, D)."""
        return last_features(model, batch[0])

    def render(self, i: int) -> Image.Image:
        """The picture as a person sees it; values outside of black and white are cut."""
        pixels = (np.clip(self.pixels[i], 0, 1) * 255).round().astype(np.uint8)
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def label(self, i: int) -> str:
        """The class's name."""
        return self.classes[self.labels[i]]


class Digits(ImageTask):
    """Scikit-learn's 1,797 handwritten digits, 8 x 8; nothing to download."""

    def __init__(self, model: str = "mlp", loss: str = "cross-entropy", label_smoothing: float = 0.0):
        from sklearn.datasets import load_digits

        data: Any = load_digits()
        pixels = (data.images[..., None] / 16).astype(np.float32)
        super().__init__(pixels, data.target, tuple("0123456789"), model, loss, label_smoothing)


class FashionMnist(ImageTask):
    """Fashion-MNIST: the 5,000 images that opsig ships, or with `root` a person's copy of the IDX files.

    `samples`: so many of them from number `start` on; 0 means all that follow. `size`: 28, or a divisor of it, to which
    images are averaged.
    """

    def __init__(
        self, root: str = "", split: str = "train", samples: int = 0, start: int = 0, size: int = 28,
        model: str = "mlp", loss: str = "cross-entropy", label_smoothing: float = 0.0,
    ):  # fmt: skip
        images, labels = fashion_mnist(root, split)
        if not 0 <= start < len(images):
            raise ValueError(f"start must be between 0 and {len(images) - 1}")
        images, labels = first(samples, images[start:], labels[start:])
        super().__init__(shrunk(images, size), labels, FASHION_CLASSES, model, loss, label_smoothing)


class Cifar10(ImageTask):
    """CIFAR-10 from a person's copy under `root`; `samples`: the first so many, 0 means all."""

    def __init__(
        self, root: str = "cifar-10", split: str = "train", samples: int = 0, model: str = "cnn",
        loss: str = "cross-entropy", label_smoothing: float = 0.0,
    ):  # fmt: skip
        _check_split(split)
        images, labels = first(samples, *read_cifar10(Path(root), split))
        super().__init__(images, labels, CIFAR_CLASSES, model, loss, label_smoothing)


def fashion_mnist(root: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (S, 28, 28) uint8 and labels (S,): the shipped subset where `root` is empty."""
    _check_split(split)
    if not root:
        if split != "train":
            raise ValueError("only a part of the training images is shipped. split=test needs root=DIR")
        arrays = shipped("fashion_mnist_5k.npz")
        return arrays["images"], arrays["labels"]
    stem = "train" if split == "train" else "t10k"
    images = read_idx(find_idx(Path(root), f"{stem}-images-idx3-ubyte"))
    labels = read_idx(find_idx(Path(root), f"{stem}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.shape != images.shape[:1] or not len(labels) or labels.max() > 9:
        raise OpsigError(f"{root} is not Fashion-MNIST: images are {images.shape} and labels {labels.shape}")
    return images, labels


def first(samples: int, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first so many images and labels; 0 means all."""
    if not 0 <= samples <= len(images):
        raise ValueError(f"samples must be between 1 and {len(images)}, or 0 for all")
    return images[: samples or None], labels[: samples or None]


def shrunk(images: np.ndarray, size: int) -> np.ndarray:
    """Grey images (S, H, H) uint8 averaged over squares to (S, size, size, 1) float32, white at 1."""
    side = images.shape[1]
    if size < 1 or side % size:
        raise ValueError(f"size must divide {side}")
    factor = side // size
    squares = images.reshape(len(images), size, factor, size, factor)
    return (squares.mean((2, 4), dtype=np.float32) / 255)[..., None]


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError("split is train or test")
