"""What tokens cost: tracking beside a plain evaluation, and gradient cosines beside backward passes one by one.

    python benchmarks/tokens.py [--sequences 1000] [--length 256] [--width 128] [--depth 4] [--vocabulary 2000]

A GPT with tied embeddings on random tokens. Ratios are of seconds of processor time, in turns in one process. Tokens
that share sequences, and as many in sequences of their own, are held against autograd one token at a time.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from opsig_torch import TorchBackend
from opsig_zoo.transformers import GPT
from opsig_zoo.windows import token_losses
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


class Tokens:
    """Random tokens, in sequences."""

    def __init__(self, sequences: int, length: int, vocabulary: int, depth: int, width: int):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, vocabulary, (sequences, length + 1), generator=generator)
        self.positions = length
        self._shape = (vocabulary, length, depth, width, 4)

    def model(self):
        return GPT(*self._shape)

    def dataset(self):
        return TensorDataset(self.tokens[:, :-1], self.tokens[:, 1:])

    def losses(self, model, batch):
        return token_losses(model(batch[0]), batch)

    def predictions(self, model, batch):
        return model(batch[0]).argmax(2)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of a call, and what it returned."""
    begin = time.process_time()
    found = run()
    return time.process_time() - begin, found


def evaluation(session) -> float:
    """A plain pass, as one writes it: the mean loss, batches as the session has them."""
    model, (tokens, targets) = session.flat.model.eval(), session.task.dataset().tensors
    total = 0.0
    with torch.inference_mode():
        for first in range(0, len(tokens), session.batch_size):
            some = slice(first, first + session.batch_size)
            total += float(cross_entropy(model(tokens[some]).flatten(0, 1), targets[some].flatten(), reduction="sum"))
    return total / targets.numel()


def one_by_one(session, samples: np.ndarray) -> None:
    """A forward and a backward pass of each token's sequence."""
    for sample in samples.tolist():
        loss = session.losses_of([sample])[0]
        torch.autograd.grad(loss, session.flat.parameters)


def exact(session, samples: np.ndarray) -> np.ndarray:
    rows = []
    for sample in samples.tolist():
        found = torch.autograd.grad(session.losses_of([sample])[0], session.flat.parameters)
        rows.append(torch.cat([part.reshape(-1) for part in found]).double())
    rows = torch.stack(rows)
    rows /= rows.norm(dim=1, keepdim=True)
    return (rows @ rows.T).numpy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    o = parser.parse_args()
    task = Tokens(o.sequences, o.length, o.vocabulary, o.depth, o.width)
    session = TorchBackend().open(task, "cpu")
    state = session.initial(0)
    print(f"{o.sequences} sequences of {o.length} tokens, {len(state.params):,} parameters, {session.device_name}")
    session.losses([state])
    pairs = [
        (seconds(lambda: evaluation(session))[0], seconds(lambda: session.losses([state]))[0]) for _ in range(o.repeats)
    ]
    plain, track = np.median(pairs, 0)
    print(f"tracking: {track:.1f} s, a plain pass {plain:.1f} s: {np.median([b / a for a, b in pairs]):.2f} times")
    generator = np.random.default_rng(0)
    count = min(o.tokens, o.sequences)
    apart = generator.permutation(o.sequences)[:count] * o.length + generator.integers(0, o.length, count)
    shared = np.arange(count) % max(1, count // 20) * o.length + generator.integers(0, o.length, count)
    with session.at(state):
        one_by_one(session, apart[:5])
    session.gradient_cosines(state, apart[:20])
    for words, samples in (("in sequences of their own", apart), ("of which 20 share a sequence", shared)):
        with session.at(state):
            bare, _ = seconds(lambda samples=samples: one_by_one(session, samples))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        took, found = seconds(lambda samples=samples: session.gradient_cosines(state, samples))
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        some = generator.permutation(count)[:20]
        with session.at(state):
            off = np.abs(found[np.ix_(some, some)] - exact(session, samples[some])).max()
        print(
            f"cosines of {count} tokens {words}: {took:.1f} s, one by one {bare:.1f} s: {took / bare:.2f} times; "
            f"{more:.0f} MiB more at most; off by {off:.1e} at most"
        )


if __name__ == "__main__":
    main()
