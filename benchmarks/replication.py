"""Whether what `opsig cluster` says of a pair holds at a checkpoint that had no part in finding or testing it.

    python benchmarks/replication.py [--only demo,planted] [--seeds 3] [--keep FOLDER]

Every run is trained, or taken from the folder, and clustered with the defaults. Each pair with a verdict by silence is
silenced again, with controls drawn anew, at the checkpoint farthest from all that were used. A row a run: pairs called
established and how many of them have R below a half there; the same of those called refuted; and each pair's R's.
"""

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from planted import opsig

from opsig_cli import open_trajectory
from opsig_cli.analysis.verdicts import SILENCES
from opsig_cli.studies import tracking
from opsig_cli.studies.clustering import finding, silencing

TASKS = Path(__file__).with_name("null_tasks.py")
LABELS = "planted:pairs=1,side=2,strength=0.001,label_noise=0.9999,samples=1000"
RUNS = {
    "demo": ("fashion-mnist", ("--learning-rate", "0.1", "--steps", "400", "--checkpoint-every", "20")),
    "random labels": (LABELS, ("--learning-rate", "0.2", "--steps", "400", "--checkpoint-every", "10")),
    "planted": ("planted:samples=600,side=20", ("--learning-rate", "0.1", "--steps", "400", "--checkpoint-every",
                "10")),
    "regression": (f"{TASKS}:Offsets", ("--learning-rate", "0.1", "--steps", "500", "--checkpoint-every", "10")),
}  # fmt: skip


def again(path: Path, task: str | None) -> list[tuple[str, list[float], float]]:
    """Verdict, R's and R anew of every pair that silence decided."""
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
        step = int(inside[np.abs(inside[:, None] - used).min(1).argmax()])
        replay = silencing.Replay(run, session, settings, step)
        plain = replay(None)
        rows = []
        for unit, numbers in silencing.units_of(clusters):
            decided = [n for n in numbers if len(clusters.pairs[n].silenced) > 1]
            if not decided:
                continue
            members = {g: clusters.position[clusters.grouping.members(g)] for g in unit}
            silent = np.concatenate(list(members.values()))
            controls = silencing.controls_of(
                silencing.strata_of(run), silent, clusters.position[clusters.grouping.group_M >= 0],
                np.random.default_rng([1, step, *unit]),
            )  # fmt: skip
            without, controlled = replay(silent), replay(controls)
            for n in decided:
                sides = [members[g] for g in clusters.grouping.pairs()[n]]
                anew = silencing.compared(step, sides, plain, without, controlled)
                pair = clusters.pairs[n]
                rows.append((pair.verdict, [one.ratio for one in pair.silenced], anew.ratio))
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for name in options.only.split(","):
            task, training = RUNS[name]
            for seed in range(options.first, options.first + options.seeds):
                path = folder / f"{name.replace(' ', '-')}-{seed}.h5"
                spec = task if name == "demo" else f"{task}{',' if '=' in task else ':'}seed={seed}"
                own = spec if task.startswith(str(TASKS)) else None
                if not path.exists():
                    opsig("train", "--task", spec, *training, "--seed", str(seed), "--track", "-q", "-o", str(path))
                rows = again(path, own)
                for verdict in ("established", "refuted"):
                    anew = [r for kind, _, r in rows if kind == verdict]
                    below = sum(r < SILENCES for r in anew)
                    print(f"{name} {seed}: {len(anew)} {verdict}, {below} of them below {SILENCES} anew", flush=True)
                told = "; ".join(
                    f"{verdict} {', '.join(f'{r:.2f}' for r in before)} then {r:.2f}" for verdict, before, r in rows
                )
                print(f"    {told}", flush=True)


if __name__ == "__main__":
    main()
