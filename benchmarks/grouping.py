"""What grouping costs: gradient cosines against passes over the same samples, and clustering in CPU seconds and memory.

    python benchmarks/grouping.py [--samples 10000] [--large] [--only clustering,cosines,sketch]

The cosines' part trains nothing: it takes fresh models on Fashion-MNIST. `--large` adds a vision transformer and an MLP
of ten million parameters (some minutes). The clustering's part plants eight pairs of groups in a similarity of
`--samples` rows, most of which belong nowhere, and weighs what it finds as `opsig cluster` does. The sketch's part
holds sketched cosines against exact ones.
"""

import argparse
import resource
import time

import numpy as np
import torch
from opsig_torch import TorchBackend
from opsig_zoo import FashionMnist

from opsig_cli.analysis import grouping, significance, stability


def peak() -> int:
    """The most memory this process has used so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def cosines(model: str, count: int) -> None:
    """Cost of all cosines of `count` samples in forward and backward passes over them."""
    task = FashionMnist(model=model, samples=count)
    session = TorchBackend().open(task, "cpu")
    state, everybody = session.initial(0), np.arange(count)
    rows = []
    for _ in range(1 if len(state.params) > 1e6 else 4):
        begin = time.process_time()
        session.gradient_cosines(state, everybody)
        middle = time.process_time()
        with session.at(state):
            for _, batch in session.batches.in_pieces(session.inference_batch()):
                torch.autograd.grad(task.losses(session.flat.model, batch).sum(), session.flat.parameters)
        rows.append((middle - begin, time.process_time() - middle))
    own, passes = np.median(rows, axis=0)
    print(
        f"{model} ({len(state.params):,} parameters): cosines of {count} samples cost {own / passes:.2f} passes; ",
        end="",
    )
    print(f"M x P would take {4 * count * len(state.params) >> 20:,} MB; peak {peak():,} MB", flush=True)


def clustering(count: int) -> None:
    """CPU seconds and memory of grouping and of its evidence, without making the similarity and the likeness."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((count, 64)).astype(np.float32)
    for group in range(16):  # eight directions, both ways
        rows[group * 50 : (group + 1) * 50, group // 2] += 20 * (-1) ** group
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    rows[:, :8] = np.abs(rows[:, :8])  # both sides of a pair look alike
    likeness = rows @ rows.T
    begin, before = time.process_time(), peak()
    found = grouping.group_by_similarity(similarity, likeness_MM=likeness)
    middle = time.process_time()
    stable = stability.resampled(similarity, found, likeness_MM=likeness)
    significance.gaussian_null(similarity, likeness, None)
    end = time.process_time()
    truth = np.where(np.arange(count) < 800, np.arange(count) // 50, -1)
    right = [(truth[found.members(a)[0]], truth[found.members(b)[0]]) for a, b in found.pairs()]
    planted = sum(a >= 0 and a // 2 == b // 2 for a, b in right)
    print(f"{count} samples: grouped in {middle - begin:.1f} s, evidence {end - middle:.1f} s; ", end="")
    print(f"peak {peak():,} MB, {before:,} MB before; {planted} of 8 planted pairs among {len(right)}, ", end="")
    print(f"stability of the planted ones at least {min(sorted(stable.pair.values())[-8:]):.2f}", flush=True)


def sketch(model: str, count: int) -> None:
    """Error and cost of sketched cosines."""
    task = FashionMnist(model=model, samples=count)
    session = TorchBackend().open(task, "cpu")
    state, everybody = session.initial(0), np.arange(count)
    begin = time.process_time()
    exact = session.gradient_cosines(state, everybody)
    whole = time.process_time() - begin
    upper = np.triu_indices(count, 1)
    strongest = np.argsort(exact[upper])[: len(upper[0]) // 100]
    for size in (1024, 4096, 16384):
        begin = time.process_time()
        rows = session.gradient_sketch(state, everybody, size, 0)
        estimate = (rows @ rows.T)[upper]
        own = time.process_time() - begin
        errors = estimate - exact[upper]
        band = 3 * np.sqrt(2 / size)
        found = np.isin(strongest, np.argsort(estimate)[: len(strongest)]).mean()
        print(
            f"{model} ({len(state.params):,} parameters): sketch of {size}: root mean square error "
            f"{np.sqrt((errors**2).mean()):.4f} = {np.sqrt((errors**2).mean() * size):.2f} / root of size; "
            f"{(np.abs(errors) > band).mean():.2e} outside the band of {band:.3f}; finds {found:.0%} of the 1% most "
            f"negative; {own / whole:.1f} x the time of exact cosines of {count} samples",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only", default="clustering,cosines,sketch")
    options = parser.parse_args()
    if "clustering" in options.only:
        clustering(options.samples)
    if "sketch" in options.only:
        sketch("mlp", 512)
        sketch("cnn", 512)
    if "cosines" in options.only:
        cosines("mlp", 512)
        cosines("cnn", 512)
    if "cosines" in options.only and options.large:
        cosines("mlp:width=2300,depth=3", 2000)
        cosines("vit:width=384,depth=6", 512)


if __name__ == "__main__":
    main()
