"""Next-token prediction over a text of one's own: every sample is a token with the context before it (App. B).

S samples, B a batch's size, N tokens of the text.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.tasks import build, parse_spec
from opsig_zoo.tokens import BYTES, quoted, split
from opsig_zoo.transformers import GPT

SUFFIXES = (".txt", ".md", ".py", ".rst", ".tex")
MAX_BYTES, MAX_FILES = 1 << 30, 100_000
"""Of a text, and entries of a folder that are looked at."""
SHOWN = 80
"""Characters of a context that a person is shown, its last ones."""


def _gpt(
    vocabulary: int, context: int, depth: int = 2, width: int = 64, heads: int = 2, bias: bool = True
) -> nn.Module:
    return GPT(vocabulary, context, depth, width, heads, bias)


class Text:
    """Tokens of a file, or of a folder's text files in order of name, predicted from the `context` tokens before them.

    `vocabulary`: 256 for bytes, more for a byte-pair encoding of so many tokens, trained on the text. `samples` targets
    are spread evenly over the text; 0 means every token. A sample's loss is that of its target, in nats.
    """

    loss_unit = "nat"

    def __init__(
        self, path: str, vocabulary: int = BYTES, context: int = 32, samples: int = 4000, model: str = "gpt"
    ):  # fmt: skip
        if context < 1 or samples < 0:
            raise ValueError("context must be at least 1, and samples too, or 0 for all")
        self.tokens, self._pieces = split(_read(Path(path)), vocabulary)
        if len(self.tokens) <= context:
            raise OpsigError(f"{path} holds {len(self.tokens)} tokens, too few for a context of {context}")
        spec = parse_spec(model)
        if spec.name != "gpt":
            raise UsageError(f"task text has no model '{spec.name}'. Known: gpt")
        self._options, self._context = spec.options, context
        self.classes = tuple(quoted(piece) for piece in self._pieces)
        last = len(self.tokens) - 1
        count = min(samples or last, last - context + 1)
        self.targets = np.linspace(context, last, count).round().astype(np.int64)
        with torch.device("meta"):
            self.model()  # without its memory: an unknown option is an error now, before a file is made

    def model(self) -> nn.Module:
        """A GPT over the vocabulary."""
        return build(partial(_gpt, len(self._pieces), self._context), self._options, "model gpt")

    def dataset(self) -> TensorDataset:
        """Contexts (S, context) and targets (S,)."""
        windows = np.lib.stride_tricks.sliding_window_view(self.tokens, self._context)
        contexts = windows[self.targets - self._context]
        return TensorDataset(torch.from_numpy(contexts), torch.from_numpy(self.tokens[self.targets]))

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of every target, (B,)."""
        return cross_entropy(model(batch[0], last=True).double(), batch[1], reduction="none")

    def predictions(self, model: nn.Module, batch: Any) -> Tensor:
        """The likeliest next token, (B,)."""
        return model(batch[0], last=True).argmax(1)

    def label(self, i: int) -> str:
        """The target, in quotes."""
        return self.classes[self.tokens[self.targets[i]]]

    def render(self, i: int) -> str:
        """The end of the context, its line breaks visible, and the target in brackets."""
        place = int(self.targets[i])
        before = b"".join(self._pieces[token] for token in self.tokens[max(0, place - self._context) : place])
        shown = before.decode(errors="backslashreplace")[-SHOWN:].replace(
            "\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
        )
        return f"{shown}[{self.label(i).removeprefix('b')[1:-1]}]"


def _read(path: Path) -> bytes:
    files = [path]
    if path.is_dir():
        files = sorted(p for p in islice(path.rglob("*"), MAX_FILES) if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise OpsigError(f"{path} holds no text files ({', '.join(SUFFIXES)})")
    elif not path.is_file():
        raise OpsigError(f"{path} does not exist. Give text:path=FILE or a folder")
    try:
        sizes = [file.stat().st_size for file in files]
        if sum(sizes) > MAX_BYTES:
            raise OpsigError(f"{path} holds more than {MAX_BYTES >> 20} MiB of text")
        parts = []
        for file, size in zip(files, sizes, strict=True):
            with open(file, "rb") as opened:
                parts.append(opened.read(size))  # some of the system's files never end
    except OSError as error:
        raise OpsigError(f"{error.filename or path}: {error.strerror}") from error
    return b"\n".join(parts)
