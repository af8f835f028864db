"""Whether natural pairs come back from run to run: unplanted Fashion-MNIST, several initialisations.

    python benchmarks/natural.py [--runs 3] [--first 0] [--keep FOLDER] [--json FILE | --from FILES]

Each seed trains an MLP on the same 5,000 images by full-batch gradient descent and clusters with the defaults. For
every two seeds it prints how many established pairs of one have a counterpart in the other: the same labels on both
sides (the most common of each side), and with the members of both sides in common: the smaller Jaccard index of the two
sides, mean over counterparts, against that of a random relabelling of members within their class.
"""

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from planted import opsig
from shards import Row, cost, keep, kept, parser_of, wanted

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


def row_of(folder: Path, seed: int) -> Row:
    """The established pairs of one initialisation."""
    path = folder / f"f{seed}.h5"
    if not path.exists():
        opsig("train", "--task", "fashion-mnist", "--learning-rate", "0.1", "--steps", "400", "--track", "-q",
              "--seed", str(seed), "-o", str(path))  # fmt: skip
    sides = [{label: sorted(members) for label, members in sides.items()} for _, sides in pairs_of(path)]
    return {"kind": "natural", "seed": seed, "pairs": sides}


def main() -> None:
    parser = parser_of(__doc__, ["natural"], 3)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    rows = kept(options.files or ())
    with tempfile.TemporaryDirectory() as temporary:
        for _, seed in wanted(options) if not options.files else ():
            begin = time.process_time()
            rows.append(keep(options, row_of(options.keep or Path(temporary), seed), begin))
    seeds = [row["seed"] for row in rows]
    runs = [[(frozenset(sides), {k: set(v) for k, v in sides.items()}) for sides in row["pairs"]] for row in rows]
    for row, pairs in zip(rows, runs, strict=True):
        print(
            f"seed {row['seed']}: " + "; ".join(" / ".join(sorted(labels)) for labels, _ in pairs) + f"; {cost([row])}"
        )
    generator = np.random.default_rng(0)
    for (i, one), (j, other) in itertools.permutations(zip(seeds, runs, strict=True), 2):
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
