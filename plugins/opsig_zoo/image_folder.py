"""Pictures in folders, one folder a class."""

from __future__ import annotations

import warnings
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from opsig_cli.errors import OpsigError
from opsig_zoo.images import ImageTask

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_FILES, MAX_BYTES = 1_000_000, 4 << 30
"""Entries of a folder that are looked at, and of the pictures in memory, in float32."""


class ImageFolder(ImageTask):
    """Pictures of `root`/CLASS/, in order of class and name, cut to squares about their middle and scaled to `size`.

    `samples`: so many of each class at most, the first; 0 means all. `grey`: one channel instead of three.
    """

    def __init__(
        self, root: str, size: int = 32, samples: int = 0, grey: bool = False, model: str = "cnn",
        loss: str = "cross-entropy", label_smoothing: float = 0.0,
    ):  # fmt: skip
        if size < 1 or samples < 0:
            raise ValueError("size must be at least 1, and samples too, or 0 for all")
        classes = _pictures(Path(root), samples)
        paths = [(path, number) for number, found in enumerate(classes.values()) for path in found]
        if len(paths) * size * size * (1 if grey else 3) * 4 > MAX_BYTES:
            raise OpsigError(f"{len(paths):,} pictures of size {size} take more than {MAX_BYTES >> 30} GiB")
        pixels = np.stack([_square(path, size, grey) for path, _ in paths])
        labels = np.array([number for _, number in paths])
        super().__init__(pixels, labels, tuple(classes), model, loss, label_smoothing)


def _pictures(root: Path, samples: int) -> dict[str, list[Path]]:
    """The pictures of every class. Raises OpsigError where there are none, or less than two classes."""
    if not root.is_dir():
        raise OpsigError(f"{root} is not a folder. Give root=DIR with a folder of pictures for every class")
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(p for p in islice(folder.rglob("*"), MAX_FILES) if p.suffix.lower() in SUFFIXES and p.is_file())
        if files:
            found[folder.name] = files[: samples or None]
    if len(found) < 2:
        raise OpsigError(f"{root} holds {len(found)} folders with pictures. A class is a folder, and two are needed")
    return found


def _square(path: Path, size: int, grey: bool) -> np.ndarray:
    """A picture's middle, (size, size, channels) uint8. Raises OpsigError for one that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                side = min(picture.size)
                left, top = ((length - side) // 2 for length in picture.size)
                square = picture.convert("L" if grey else "RGB").crop((left, top, left + side, top + side))
        scaled = square.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    except Exception as error:  # a damaged picture raises almost anything
        raise OpsigError(f"{path} cannot be read as a picture: {' '.join(str(error).split())[:160]}") from error
    return np.asarray(scaled).reshape(size, size, -1)
