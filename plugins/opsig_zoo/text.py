"""Next-byte prediction over a text of one's own: every sample is a token with the context before it (App. B)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.tasks import build, parse_spec
from opsig_zoo.architectures import GPT

SUFFIXES = (".txt", ".md", ".py", ".rst", ".tex")
BYTES = 256
SHOWN = 24


def _gpt(context: int, depth: int = 2, width: int = 64, heads: int = 2) -> nn.Module:
    return GPT(BYTES, context, depth, width, heads)


class Text:
    """Bytes of a file, or of a folder's text files in order of name, predicted from the `context` bytes before them.

    `samples` targets are spread evenly over the text. A sample's loss is that of its target byte, in nats.
    """

    classes = tuple(repr(bytes([i]))[2:-1] for i in range(BYTES))

    def __init__(self, path: str, context: int = 32, samples: int = 4000, model: str = "gpt"):
        if context < 1 or samples < 1:
            raise ValueError("context and samples must be at least 1")
        data = np.frombuffer(_read(Path(path)), np.uint8)
        if len(data) <= context:
            raise OpsigError(f"{path} holds {len(data)} bytes, too few for a context of {context}")
        spec = parse_spec(model)
        if spec.name != "gpt":
            raise UsageError(f"task text has no model '{spec.name}'. Known: gpt")
        self._options = spec.options
        self._context = context
        self.targets = np.unique(np.linspace(context, len(data) - 1, samples).round().astype(np.int64))
        self.data = data
        self.model()

    def model(self) -> nn.Module:
        """A GPT over bytes."""
        return build(partial(_gpt, self._context), self._options, "model gpt")

    def dataset(self) -> TensorDataset:
        """Contexts (S, context) and targets (S,)."""
        windows = np.stack([self.data[t - self._context : t] for t in self.targets])
        return TensorDataset(
            torch.from_numpy(windows.astype(np.int64)), torch.from_numpy(self.data[self.targets].astype(np.int64))
        )

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of every target byte, (B,)."""
        return cross_entropy(model(batch[0])[:, -1].double(), batch[1], reduction="none")

    def predictions(self, model: nn.Module, batch: Any) -> Tensor:
        """The likeliest next byte, (B,)."""
        return model(batch[0])[:, -1].argmax(1)

    def label(self, i: int) -> str:
        """The target byte."""
        return self.classes[int(self.data[self.targets[i]])]

    def render(self, i: int) -> str:
        """The end of the context and the target."""
        target = int(self.targets[i])
        before = self.data[max(0, target - min(SHOWN, self._context)) : target].tobytes().decode(errors="replace")
        return f"{before.replace(chr(10), chr(0x21B5))} [{self.label(i)}]"


def _read(path: Path) -> bytes:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise OpsigError(f"{path} holds no text files ({', '.join(SUFFIXES)})")
        return b"\n".join(file.read_bytes() for file in files)
    if not path.is_file():
        raise OpsigError(f"{path} does not exist. Give text:path=FILE or a folder")
    return path.read_bytes()
