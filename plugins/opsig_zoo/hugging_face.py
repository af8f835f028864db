"""Causal language models from a folder of Hugging Face's, over a text of one's own. Nothing in the folder is run.

B sequences of a batch, T their length, V the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opsig_cli.errors import OpsigError
from opsig_zoo.text import read_text
from opsig_zoo.tokens import BYTES, quoted
from opsig_zoo.windows import Windows, token_losses

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class HFCausal:
    """A causal language model that transformers builds from `model`, a local folder with its config.json.

    Tokens of `text`, a file or a folder, by the folder's tokenizer.json, or bytes where it has no tokenizer, in
    sequences of `length`; a sample is a position of one. `samples`: about so many targets, spread evenly over the text;
    0 means every token. Weights are those of the folder where it has any, else they are drawn; a run's checkpoints
    bring their own. Attention is the plain computation, which has a second derivative.
    """

    def __init__(self, model: str, text: str, length: int = 256, samples: int = 0):
        try:
            transformers: Any = import_module("transformers")
        except ImportError as error:
            raise OpsigError("hf-causal needs transformers. Run: pip install 'opsig[hf]'") from error
        self._folder = Path(model)
        if not (self._folder / "config.json").is_file():
            raise OpsigError(f"{model} has no config.json. Give model=FOLDER as save_pretrained() writes it")
        self._transformers = transformers
        self._config = self._loaded(transformers.AutoConfig.from_pretrained)
        data = read_text(Path(text))
        tokens, piece, self.classes = _tokenized(self._folder, data)
        self.positions = length
        self.windows = Windows(tokens, piece, length, samples, text)
        self.render, self.label = self.windows.render, self.windows.label
        self._check(tokens, length)
        with torch.device("meta"):
            built = self.model()
        self._takes_places = "position_ids" in inspect.signature(built.forward).parameters
        self._masks = False

    def model(self) -> nn.Module:
        """The model in float32, with the folder's weights where it has them."""
        options = {"attn_implementation": "eager", "dtype": torch.float32}
        auto = self._transformers.AutoModelForCausalLM
        if torch.get_default_device().type == "meta" or not any((self._folder / name).is_file() for name in WEIGHTS):
            model = self._called(auto.from_config, self._config, trust_remote_code=False, **options)
        else:
            model = self._loaded(auto.from_pretrained, config=self._config, weights_only=True, **options)
        if torch.get_default_device().type != "meta":
            self._masks = self._sees_all_before(model.eval())
        return model

    def dataset(self) -> TensorDataset:
        """Tokens, targets and places, (I, T) each of I sequences."""
        return self.windows.dataset()

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of every position, (B, T), NaN without a target."""
        return token_losses(self._logits(model, batch), batch)

    def predictions(self, model: nn.Module, batch: Any) -> Tensor:
        """The likeliest next token, (B, T)."""
        return self._logits(model, batch).argmax(2)

    def _logits(self, model: nn.Module, batch: Any) -> Tensor:
        # a place for every token of every sequence, so that each sample's gradient stays apart
        given = {"position_ids": batch[2].long()} if self._takes_places else {}
        if self._masks:
            given["attention_mask"] = _causal_mask(batch[0])
        return model(input_ids=batch[0].long(), use_cache=False, **given).logits

    def _sees_all_before(self, model: nn.Module) -> bool:
        """Whether a plain causal mask does as the model's own, for the first sequence.

        The library makes masks in ways that torch's transformations do not follow, so that ours is taken where it can.
        """
        batch = [part[None] for part in self.dataset()[0]]
        with torch.no_grad():
            self._masks = False
            own = self._logits(model, batch)
            self._masks = True
            try:
                return torch.allclose(self._logits(model, batch), own, rtol=1e-4, atol=1e-5)
            except Exception:  # a model that takes other masks
                return False

    def _check(self, tokens: np.ndarray, length: int) -> None:
        known, longest = self._config.vocab_size, getattr(self._config, "max_position_embeddings", None)
        if tokens.max(initial=0) >= known:
            raise OpsigError(f"{self._folder} has a vocabulary of {known}, and the text a token {tokens.max()}")
        if longest is not None and length > longest:
            raise ValueError(f"length must be at most {longest}, the model's longest sequence")

    def _loaded(self, load: Callable[..., Any], **options: Any) -> Any:
        return self._called(load, str(self._folder), **LOCAL, **options)

    def _called(self, load: Callable[..., Any], *what: Any, **options: Any) -> Any:
        """What transformers makes of the folder. Raises OpsigError with its first sentence where it makes nothing."""
        logging: Any = self._transformers.utils.logging
        before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # what it says of weights and special tokens is none of a run's
        logging.disable_progress_bar()
        try:
            return load(*what, **options)
        except Exception as error:  # a folder may hold anything
            reason = " ".join(str(error).split()).split(". ")[0][:200]
            raise OpsigError(f"{self._folder} is not a causal model that transformers builds: {reason}") from error
        finally:
            logging.set_verbosity(before)
            if bar:
                logging.enable_progress_bar()


def _causal_mask(tokens: Tensor) -> Tensor:
    """What attention adds to its scores, (1, 1, T, T): nothing where a token sees another, and the least number."""
    ones = torch.ones(tokens.shape[1], tokens.shape[1], device=tokens.device)
    return ones.triu(1)[None, None] * torch.finfo(torch.float32).min


def _tokenized(folder: Path, data: bytes) -> tuple[np.ndarray, Callable[[int], bytes], tuple[str, ...]]:
    """Token ids (N,), the bytes of each token of the text, and the vocabulary's tokens as a person reads them."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if named := [name for name in TOKENIZERS if (folder / name).is_file()]:
            raise OpsigError(
                f"{folder} has a tokenizer ({named[0]}) but no tokenizer.json. Save it with save_pretrained()"
            )
        every = [bytes([i]) for i in range(BYTES)]
        return np.frombuffer(data, np.uint8).astype(np.int64), lambda n: data[n : n + 1], tuple(map(quoted, every))
    from tokenizers import Tokenizer  # transformers needs it, too

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise OpsigError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    text = data.decode(errors="replace")
    encoded = tokenizer.encode(text, add_special_tokens=False)
    ids, ends = np.array(encoded.ids, np.int64), [0, *(end for _, end in encoded.offsets)]
    names = [tokenizer.decode([i]) or str(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]

    def piece(n: int) -> bytes:
        """A token with what stands between it and the one before; of a character in parts the first has it."""
        return text[ends[n] : ends[n + 1]].encode(errors="replace")

    return ids, piece, tuple(quoted(name.encode(errors="replace")) for name in names)
