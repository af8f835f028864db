"""Next-token prediction over a text of one's own: every sample is a token with the context before it (App. B).

B sequences of a batch, T their length, V the vocabulary.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.tasks import build, parse_spec
from opsig_zoo.tokens import BYTES, quoted, split
from opsig_zoo.transformers import GPT
from opsig_zoo.windows import Windows, token_losses

SUFFIXES = (".txt", ".md", ".py", ".rst", ".tex")
MAX_BYTES, MAX_FILES = 1 << 30, 100_000
"""Of a text, and entries of a folder that are looked at."""


def _gpt(
    vocabulary: int, context: int, depth: int = 2, width: int = 64, heads: int = 2, bias: bool = True
) -> nn.Module:
    return GPT(vocabulary, context, depth, width, heads, bias)


class Text:
    """Tokens of a file, or of a folder's text files in order of name, each predicted from those before it.

    The text is cut into sequences of `context` tokens; a sample is a position of one, with a context of 1 to `context`
    tokens. `vocabulary`: 256 for bytes, more for a byte-pair encoding of so many tokens, trained on the text. `samples`
    targets, in whole sequences, are spread evenly over the text; 0 means every token. Losses are in nats.
    """

    loss_unit = "nat"

    def __init__(
        self, path: str, vocabulary: int = BYTES, context: int = 32, samples: int = 4000, model: str = "gpt"
    ):  # fmt: skip
        if context < 1 or samples < 0:
            raise ValueError("context must be at least 1, and samples too, or 0 for all")
        self.positions = context
        self.tokens, self._pieces = split(read_text(Path(path)), vocabulary)
        self.windows = Windows(self.tokens, lambda n: self._pieces[self.tokens[n]], context, samples, path)
        self.render, self.label = self.windows.render, self.windows.label
        spec = parse_spec(model)
        if spec.name != "gpt":
            raise UsageError(f"task text has no model '{spec.name}'. Known: gpt")
        self._options = spec.options
        self.classes = tuple(quoted(piece) for piece in self._pieces)
        with torch.device("meta"):
            self.model()  # without its memory: an unknown option is an error now, before a file is made

    def model(self) -> nn.Module:
        """A GPT over the vocabulary."""
        return build(partial(_gpt, len(self._pieces), self.positions), self._options, "model gpt")

    def dataset(self) -> TensorDataset:
        """Tokens, targets and places, (I, T) each of I sequences."""
        return self.windows.dataset()

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of every position, (B, T), NaN without a target."""
        return token_losses(model(batch[0].long()), batch)

    def predictions(self, model: nn.Module, batch: Any) -> Tensor:
        """The likeliest next token, (B, T)."""
        return model(batch[0].long()).argmax(2)


def read_text(path: Path) -> bytes:
    """A file's bytes, or those of a folder's text files in order of name. Raises OpsigError where there are none."""
    files = [path]
    if path.is_dir():
        files = sorted(p for p in islice(path.rglob("*"), MAX_FILES) if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise OpsigError(f"{path} holds no text files ({', '.join(SUFFIXES)})")
    elif not path.is_file():
        raise OpsigError(f"{path} does not exist. Give a text file or a folder of them")
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
