"""Draws the shipped subset from the full IDX files: python make_fashion_mnist_5k.py DIR

500 training images of each class, in a seeded random order, with their index in the full set.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from opsig_zoo.images import fashion_mnist

SEED = 20231107
PER_CLASS = 500


def main(root: str) -> None:
    images, labels = fashion_mnist(root, "train")
    generator = np.random.default_rng(SEED)
    chosen = [generator.choice(np.flatnonzero(labels == c), PER_CLASS, replace=False) for c in range(10)]
    index = generator.permutation(np.concatenate(chosen))
    path = Path(__file__).with_name("fashion_mnist_5k.npz")
    np.savez_compressed(
        path, images=images[index], labels=labels[index].astype(np.uint8), source_index=index.astype(np.int32)
    )
    print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")


if __name__ == "__main__":
    main(sys.argv[1])
