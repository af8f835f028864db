"""Whether natural pairs come back from run to run: unplanted Fashion-MNIST, several initialisations.

    python benchmarks/natural.py [--seeds 3] [--keep FOLDER]

Each seed trains an MLP on the same 5,000 images by full-batch gradient descent and clusters with the defaults. For
every two seeds it prints how many established pairs of one have a counterpart in the other: the same labels on both
sides (the most common of each side), and with the members of both sides in common: the smaller Jaccard index of the two
sides, mean over counterparts, against that of a random relabelling of members within their class.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
from planted import opsig

Pair = tuple[frozenset[str], dict[str, set[int]]]


def pairs_of(path: Path) -> list[Pair]:
    """The established pairs of a run: the labels of both sides, and the members by label."""
    records = opsig("cluster", str(path), "-q")
    members: dict[int, set[int]] = {}
    for record in records:
        if record["kind"] == "member" and record["mined"]:
            members.setdefault(record["group"], set()).add(record["sample"])
    found = []
    for record in records:
        if record["kind"] == "pair" and record["verdict"] == "established":
            labels = [next(iter(mix)) for mix in record["labels"]]
            sides = dict(zip(labels, (members[group] for group in record["groups"]), strict=True))
            found.append((frozenset(labels), sides))
    return found


def overlap(one: Pair, other: Pair) -> float:
    """The smaller Jaccard index of the two sides."""
    return min(len(one[1][k] & other[1][k]) / len(one[1][k] | other[1][k]) for k in one[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        runs = []
        for seed in range(options.seeds):
            path = folder / f"f{seed}.h5"
            if not path.exists():
                opsig("train", "--task", "fashion-mnist", "--learning-rate", "0.1", "--steps", "400", "--track", "-q",
                      "--seed", str(seed), "-o", str(path))  # fmt: skip
            runs.append(pairs_of(path))
            print(f"seed {seed}: " + "; ".join(" / ".join(sorted(labels)) for labels, _ in runs[-1]), flush=True)
    generator = np.random.default_rng(0)
    for (i, one), (j, other) in itertools.permutations(enumerate(runs), 2):
        matched = [[q for q in other if q[0] == p[0]] for p in one]
        best = [max(overlap(p, q) for q in found) for p, found in zip(one, matched, strict=True) if found]
        chance = [overlap(p, shuffled(q, runs, generator)) for p, qs in zip(one, matched, strict=True) for q in qs]
        print(
            f"seed {i} in {j}: {len(best)} of {len(one)} pairs have the same labels; "
            f"overlap of members {np.mean(best) if best else 0:.2f}, by chance {np.mean(chance) if chance else 0:.2f}"
        )


def shuffled(pair: Pair, runs: list[list[Pair]], generator: np.random.Generator) -> Pair:
    """The pair with as many members drawn from all those grouped under its labels in any run."""
    sides = {}
    for label, members in pair[1].items():
        pool = sorted(set().union(*(q[1][label] for run in runs for q in run if label in q[1])))
        sides[label] = set(generator.choice(pool, len(members), replace=False).tolist())
    return pair[0], sides


if __name__ == "__main__":
    main()
