"""How well `opsig cluster` recovers planted pairs: scenarios x seeds, through the command line.

    python benchmarks/planted.py [--seeds 5] [--only easy,shared] [--by both,loss] [--small] [--keep FOLDER]
        [--first 0] [--json FILE | --from FILES]

Every scenario trains an MLP on 2,000 planted Fashion-MNIST images by full-batch gradient descent (minibatch SGD where
it says so), mines and clusters with the defaults, and compares with the truth. `--small`: 600 images, sides of 15, and
400 steps. `--keep` trains only what the folder does not hold yet. A line per scenario: the adjusted Rand index of the
planted sides (mean, and worst seed), over all planted samples and over the mined ones; precision and recall of the
established pairs; how many other samples were grouped; and rivals' index over the same samples: the label alone (a side
is a label), and k-means on last-layer gradients, which is given the planted samples alone and their number of sides.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from shards import Row, by_kind, cost, keep, kept, parser_of, wanted

from opsig_cli import open_trajectory
from opsig_cli.main import run

TASKS = Path(__file__).with_name("null_tasks.py")

GD = ("--learning-rate", "0.1", "--steps", "600")
SCENARIOS = {
    "easy": ("", GD),
    "same classes": ("same_classes=true", GD),
    "distractors": ("distractors=4", GD),
    "six pairs": ("pairs=6,patch=3", GD),
    "two pairs": ("pairs=2", GD),
    "one pair": ("pairs=1", GD),
    "unequal sizes": ("unequal=true", GD),
    "jittered": ("pairs=3,jitter=1", GD),
    "label noise": ("label_noise=0.05", GD),
    "native classes": ("native=true", GD),
    "shared patch": ("shared=true", GD),
    "below the edge": ("", ("--learning-rate", "0.02", "--steps", "300", "--checkpoint-every", "15")),
    "momentum SGD": (
        "",
        (
            "--optimizer",
            "momentum",
            "--batch-size",
            "64",
            "--learning-rate",
            "0.02",
            "--steps",
            "600",
            "--track-every",
            "10",
            "--checkpoint-every",
            "10",
        ),
    ),
    "five labels": (f"{TASKS}:FiveLabels", ("--learning-rate", "0.2", "--steps", "400", "--checkpoint-every", "10")),
    "regression": (f"{TASKS}:Offsets", ("--learning-rate", "0.1", "--steps", "500", "--checkpoint-every", "10")),
    "minibatch SGD": ("", ("--optimizer", "sgd", "--batch-size", "100", "--learning-rate", "0.05", "--steps", "600")),
}


def opsig(*arguments: str) -> list[dict]:
    """The records that a command prints. Raises RuntimeError with its words where it fails."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["opsig", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run()
    except SystemExit as exit:
        if exit.code:
            raise RuntimeError(err.getvalue()) from None
    finally:
        sys.argv = before
    return [json.loads(line) for line in out.getvalue().splitlines()]


def trained(folder: Path, name: str, seed: int, small: bool = False) -> Path:
    """The run of a scenario, made where it is not there."""
    _, training = SCENARIOS[name]
    if small and training is GD:
        training = ("--learning-rate", "0.1", "--steps", "400", "--checkpoint-every", "10")
    path = folder / f"{name.replace(' ', '-')}-{seed}.h5"
    if not path.exists():
        part = path.with_suffix(".part")
        track = () if "--track-every" in training else ("--track",)
        opsig("train", "--task", spec(name, seed, small), *training, "--seed", str(seed), *track, "--replace", "-q",
              "-o", str(part))  # fmt: skip
        part.rename(path)
    return path


def spec(name: str, seed: int, small: bool) -> str:
    """The task of a scenario, as --task takes it."""
    task, _ = SCENARIOS[name]
    if task.startswith(str(TASKS)):
        return f"{task}:seed={seed}"
    options = [task, "samples=600,side=15" if small else "", f"seed={seed}"]
    return "planted:" + ",".join(filter(None, options))


def rivals(path: Path, task_spec: str) -> tuple[float, float]:
    """The adjusted Rand index of the planted sides by the label alone, and by k-means on last-layer gradients."""
    import torch
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    from opsig_cli import tasks
    from opsig_cli.trajectory.states import read_state

    with open_trajectory(path) as opened:
        truth = opened.read("samples/truth")
        inside = truth >= 0
        alone = np.nan
        if opened.has("samples/label"):
            alone = adjusted_rand_score(truth[inside], opened.read("samples/label")[inside])
        state = read_state(opened, int(opened.steps("checkpoints")[-1]))
    task, _ = tasks.load(tasks.parse_spec(task_spec))
    model = task.model()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(state.params.astype(np.float32)), model.parameters())
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    kept: list[torch.Tensor] = []
    last.register_forward_hook(lambda module, given, result: kept.extend((given[0].detach(), result)))
    batch = [tensor[np.flatnonzero(inside)] for tensor in task.dataset().tensors]  # pyright: ignore
    losses = task.losses(model, batch)
    (error,) = torch.autograd.grad(losses.sum(), kept[1])
    rows = torch.einsum("bi,bj->bij", error.double(), kept[0].double()).flatten(1).numpy()
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    found = KMeans(len(np.unique(truth[inside])), n_init=10, random_state=0).fit_predict(rows)
    return float(alone), float(adjusted_rand_score(truth[inside], found))


def row_of(path: Path, kind: str, task: str, by: str, seed: int) -> Row:
    """The agreement of one run with its truth, or of the rivals."""
    if by == "rivals":
        return dict(zip(("label", "means"), rivals(path, task), strict=True)) | {"kind": kind, "by": by, "seed": seed}
    own = ("--task", task) if task.startswith(str(TASKS)) else ()
    records = opsig("cluster", str(path), *own, "--by", by, "--truth", "-q")
    verdicts = Counter(record["verdict"] for record in records if record["kind"] == "pair")
    return records[-1] | {"kind": kind, "by": by, "seed": seed, "verdicts": verdicts}


def main() -> None:
    parser = parser_of(__doc__, SCENARIOS, 5)
    parser.add_argument("--by", default="both,loss")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    rows = kept(options.files or ())
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        for name, seed in wanted(options) if not options.files else ():
            begin = time.process_time()
            path, task = trained(folder, name, seed, options.small), spec(name, seed, options.small)
            for by in (*options.by.split(","), "rivals"):
                rows.append(keep(options, row_of(path, name, task, by, seed), begin))
                begin = time.process_time()
    for name, own in by_kind(rows, SCENARIOS):
        for by in ("both", "gradient", "slope", "loss"):
            if found := [row for row in own if row["by"] == by]:
                print(f"{name:15} {by:8} {summary(found)}; {len(found)} runs, {cost(found)}")
        if found := [row for row in own if row["by"] == "rivals"]:
            label, means = (np.mean([row[key] for row in found]) for key in ("label", "means"))
            print(f"{name:15} rivals   ARI of the label alone {label:.2f}, of k-means {means:.2f}", flush=True)


def summary(rows: list[Row]) -> str:
    """One line of the agreements of all seeds."""
    keys = ("adjusted_rand_index", "adjusted_rand_index_mined", "pair_precision", "pair_recall", "planted_mined",
            "planted", "other_grouped")  # fmt: skip
    values = {key: np.array([np.nan if row[key] is None else row[key] for row in rows], float) for key in keys}
    rand, mined = values["adjusted_rand_index"], values["adjusted_rand_index_mined"]
    judged = values["pair_precision"][np.isfinite(values["pair_precision"])]
    precision, recall = judged.mean() if len(judged) else np.nan, values["pair_recall"].mean()
    found = values["planted_mined"].sum() / values["planted"].sum()
    verdicts = sum((Counter(row["verdicts"]) for row in rows), Counter())
    return (
        f"ARI {rand.mean():.3f} ({rand.min():.3f}), of the mined {mined.mean():.3f} ({mined.min():.3f}); "
        f"pairs: precision {precision:.3f}, recall {recall:.3f}, {dict(verdicts)}; planted mined {found:.2f}, "
        f"others grouped {values['other_grouped'].mean():.0f}"
    )


if __name__ == "__main__":
    main()
