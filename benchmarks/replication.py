"""Whether what `opsig cluster` says of a pair holds at a checkpoint that had no part in finding or testing it.

    python benchmarks/replication.py [--only demo,planted] [--runs 3] [--first 0] [--keep FOLDER]
        [--json FILE | --from FILES]

Every run is trained, or taken from the folder, and clustered with the defaults. Each pair with a verdict by silence is
silenced again, with controls drawn anew, at the checkpoint farthest from all that were used at which it swings, of the
six farthest; of a pair whose curvature decided R of that is measured anew. A row a run: pairs
called established and how many of them have R below the threshold there (a half by silence, a third of curvature);
the same of those called refuted; and each R, with C before that of curvature.
"""

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from planted import opsig
from shards import Row, by_kind, cost, keep, kept, parser_of, wanted

from opsig_cli import open_trajectory
from opsig_cli.analysis.verdicts import OWN, SILENCES
from opsig_cli.studies import tracking
from opsig_cli.studies.clustering import curving, finding, silencing
from opsig_cli.studies.clustering.clusters import PairWeight

TASKS = Path(__file__).with_name("null_tasks.py")
LABELS = "planted:pairs=1,side=2,strength=0.001,label_noise=0.9999,samples=1000"
RUNS = {
    "demo": ("fashion-mnist", ("--learning-rate", "0.1", "--steps", "400", "--checkpoint-every", "20")),
    "random labels": (LABELS, ("--learning-rate", "0.2", "--steps", "400", "--checkpoint-every", "10")),
    "random labels 2": (f"{TASKS}:RandomLabels:classes=2", ("--learning-rate", "0.1", "--steps", "300",
                        "--checkpoint-every", "10")),
    "random labels 3": (f"{TASKS}:RandomLabels:classes=3", ("--learning-rate", "0.1", "--steps", "300",
                        "--checkpoint-every", "10")),
    "planted": ("planted:samples=600,side=20", ("--learning-rate", "0.1", "--steps", "400", "--checkpoint-every",
                "10")),
    "regression": (f"{TASKS}:Offsets", ("--learning-rate", "0.1", "--steps", "500", "--checkpoint-every", "10")),
}  # fmt: skip


TRIED = 6


def again(path: Path, task: str | None) -> list[dict]:
    """Verdict, by what, R's and R anew of every pair that silence, or its curvature, decided."""
    with open_trajectory(path) as run:
        found = finding.find(run, None, None, task, "cpu", "torch", lambda text: None,
                             lambda label, total: nullcontext(lambda count=1, note="": None))  # fmt: skip
        clusters = found.clusters
        session, _ = tracking.open_session(run, task, "cpu", "torch", lambda text: None)
        settings = silencing.replayable(run, session)
        assert settings is not None
        used = np.array(clusters.tests.found_on + clusters.tests.held_out)
        steps = run.steps("checkpoints")
        inside = steps[(steps > clusters.tests.held_out[0]) & (steps < clusters.tests.held_out[-1])]
        far = inside[np.argsort(-np.abs(inside[:, None] - used).min(1), kind="stable")][:TRIED].tolist()
        repeated = silencing.Repeated(run, session, settings)
        plains = dict(zip(far, repeated((step, None, None) for step in far), strict=True))
        rows = []
        for unit, numbers in silencing.units_of(clusters):
            members = {g: clusters.position[clusters.grouping.members(g)] for g in unit}
            silent = np.concatenate(list(members.values()))
            for n in numbers:
                pair = clusters.pairs[n]
                if len(pair.silenced) < 2 or by_curvature(pair):
                    continue
                sides = [members[g] for g in clusters.grouping.pairs()[n]]
                least = silencing.LEAST * max(one.plain for one in pair.silenced)
                for step in far:
                    controls = silencing.controls_of(
                        silencing.strata_of(run), silent, clusters.position[clusters.grouping.group_M >= 0],
                        np.random.default_rng([1, step, *unit]),
                    )  # fmt: skip
                    if not silencing.swings(plains[step], sides):
                        continue
                    anew = silencing.compared(
                        step, sides, plains[step], *repeated([(step, silent, None), (step, controls, None)])
                    )
                    if anew.plain >= least:
                        rows.append({"verdict": pair.verdict, "by": "silence", "anew": anew.ratio,
                                     "before": [one.ratio for one in pair.silenced]})  # fmt: skip
                        break
        curved = {n for n, pair in enumerate(clusters.pairs) if by_curvature(pair)}
        shown = clusters.numbers()
        named = {number for n in curved for number in clusters.pairs[n].aside} | {shown[n] for n in curved}
        aside = [n for n, number in enumerate(shown) if number in named]
        left = curving.curvature_left(
            run, session, clusters, curved, np.array(far[:1]), lambda *a, **k: None, seed=1, aside=aside
        )  # fmt: skip
        return rows + [
            {"verdict": clusters.pairs[n].verdict, "by": "curvature", "before": list(clusters.pairs[n].curved),
             "anew": anew}
            for n, (anew,) in left.items()
        ]  # fmt: skip


def by_curvature(pair: PairWeight) -> bool:
    """Whether it is its curvature that decided on a pair."""
    return bool(pair.curved) and not (pair.silenced and pair.verdict != "established")


def row_of(folder: Path, name: str, seed: int) -> Row:
    """What replicates in one run."""
    task, training = RUNS[name]
    path = folder / f"{name.replace(' ', '-')}-{seed}.h5"
    spec = task if name == "demo" else f"{task}{',' if '=' in task else ':'}seed={seed}"
    if not path.exists():
        opsig("train", "--task", spec, *training, "--seed", str(seed), "--track", "-q", "-o", str(path))
    pairs = again(path, spec if task.startswith(str(TASKS)) else None)
    return {"kind": name, "seed": seed, "pairs": pairs}


def holds(pair: dict) -> bool:
    """Whether R anew is below the threshold."""
    return pair["anew"] < (OWN if pair.get("by") == "curvature" else SILENCES)


def told(rows: list[Row]) -> str:
    """How many established, and refuted, pairs of these runs have R below its threshold anew."""
    words = []
    for verdict in ("established", "refuted"):
        own = [pair for row in rows for pair in row["pairs"] if pair["verdict"] == verdict]
        words.append(f"{len(own)} {verdict}, {sum(map(holds, own))} of them below the threshold anew")
    return "; ".join(words)


def main() -> None:
    parser = parser_of(__doc__, RUNS, 3)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    rows = kept(options.files or ())
    with tempfile.TemporaryDirectory() as temporary:
        for name, seed in wanted(options) if not options.files else ():
            begin = time.process_time()
            rows.append(keep(options, row_of(options.keep or Path(temporary), name, seed), begin))
    for name, own in by_kind(rows, RUNS):
        print(f"{name}, {len(own)} runs: {told(own)}; {cost(own)}")
        for row in own:
            words = [
                f"{pair['verdict']} {'C ' * (pair.get('by') == 'curvature')}"
                f"{', '.join(f'{r:.2f}' for r in pair['before'])} then {pair['anew']:.2f}"
                for pair in row["pairs"]
            ]
            print(f"    {row['seed']}: " + "; ".join(words))


if __name__ == "__main__":
    main()
