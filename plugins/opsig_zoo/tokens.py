"""Text as tokens: its bytes, or a byte-pair encoding trained on it; and how a token is written for a person."""

from __future__ import annotations

import numpy as np

from opsig_cli.errors import OpsigError

BYTES = 256


def split(data: bytes, vocabulary: int) -> tuple[np.ndarray, list[bytes]]:
    """Token ids of a text, (N,) int64, and the bytes of every token.

    A vocabulary of 256 is the text's bytes. A larger one is a byte-pair encoding with the rules of GPT-2 (on bytes, in
    pieces that do not cross from words to spaces and signs), trained on this very text: the same text gives the same
    ids. It has fewer tokens where the text has too few pairs that recur. What is not UTF-8 becomes U+FFFD there.
    Raises ValueError for a vocabulary below 256, and OpsigError where the library is not installed.
    """
    if vocabulary < BYTES:
        raise ValueError(f"vocabulary must be {BYTES} (bytes), or more for byte pairs")
    if vocabulary == BYTES:
        return np.frombuffer(data, np.uint8).astype(np.int64), [bytes([i]) for i in range(BYTES)]
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise OpsigError("a vocabulary beyond bytes needs tokenizers. Run: pip install 'opsig[text]'") from error
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    text = data.decode(errors="replace")
    tokenizer.train_from_iterator([text], trainer)
    values = _byte_values(alphabet)
    pieces = [b""] * tokenizer.get_vocab_size()
    for piece, number in tokenizer.get_vocab().items():
        pieces[number] = bytes(values[c] for c in piece)
    return np.array(tokenizer.encode(text).ids, np.int64), pieces


def _byte_values(alphabet: list[str]) -> dict[str, int]:
    """The byte behind each of GPT-2's 256 characters: bytes that print stand for themselves, the others come in order
    from U+0100 on."""
    own = [c for c in alphabet if ord(c) < BYTES]
    others = (i for i in range(BYTES) if chr(i) not in own)
    return {c: ord(c) if ord(c) < BYTES else next(others) for c in alphabet}


def quoted(piece: bytes) -> str:
    r"""A token in quotes, its spaces and line breaks visible; a part of a character as bytes.

    >>> print(quoted(b" the"), quoted(b"\n"), quoted("\u00e9".encode()), quoted(b"\xc3"))
    ' the' '\n' 'é' b'\xc3'
    """
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)
