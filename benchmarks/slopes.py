"""Grouping by slopes along the Hessian's leading eigenvectors, against gradients and against the label alone.

    python benchmarks/slopes.py [--seeds 3] [--only easy,weak] [--keep FOLDER] [--ends RUN]

For each run of a scenario: the adjusted Rand index of the planted sides over all planted samples, of `cluster --by
slope`, of `--by gradient`, and of the labels alone (a side is a label); how many eigenvectors `--by slope` took; and
what both cost in seconds of processor time. Scenarios are those of planted.py, weak features that share one pair of
labels (at 14 x 14 and at 28 x 28), 28 x 28 images, digits, a small convolutional network, and a regression. `--ends`
names the leading eigenvectors of a run that exists, at the floor, at some checkpoints of its second half.
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from opsig_zoo.images import ImageTask
from planted import GD, SCENARIOS, opsig
from sklearn.metrics import adjusted_rand_score
from torch import nn
from torch.utils.data import TensorDataset

from opsig_cli import open_trajectory
from opsig_cli.studies import door


class PlantedDigits(ImageTask):
    """Scikit-learn's digits with a patch of its own in each corner, on two sides of 25 with two labels each.

    `same`: all four pairs set the same two labels against each other.
    """

    def __init__(self, seed: int = 0, strength: float = 3.0, same: bool = False):
        from sklearn.datasets import load_digits

        data = load_digits()
        pixels = (data.images[..., None] / 16).astype(np.float32)  # pyright: ignore[reportAttributeAccessIssue]
        labels = data.target.copy()  # pyright: ignore[reportAttributeAccessIssue]
        generator = np.random.default_rng([seed, 77])
        self._truth, deck = np.full(len(pixels), -1), generator.permutation(10)
        for feature, (down, right) in enumerate(((0, 0), (0, 6), (6, 0), (6, 6))):
            texture = generator.uniform(0.5, 1, (2, 2))
            texture *= strength / np.sqrt(np.square(texture).mean())
            for half in (0, 1):
                chosen = generator.choice(np.flatnonzero(self._truth < 0), 25, replace=False)
                self._truth[chosen] = 2 * feature + half
                labels[chosen] = deck[half if same else 2 * feature + half]
                pixels[chosen, down : down + 2, right : right + 2, 0] = texture
        super().__init__(pixels, labels, tuple("0123456789"), "mlp:width=64", "cross-entropy", 0.0)

    def truth(self) -> np.ndarray:
        """Planted side of every image, (S,): 2 * feature + side, or -1."""
        return self._truth


class Offsets:
    """A regression without labels: along two directions, thirty targets each lie 2 above and 2 below the rest."""

    def __init__(self, seed: int = 0):
        generator = np.random.default_rng([seed, 900])
        x = generator.standard_normal((1000, 20))
        y = np.sin(1.5 * x @ generator.standard_normal(20) / np.sqrt(20)) + 0.3 * generator.standard_normal(1000)
        self._truth = np.full(1000, -1)
        for feature in (0, 1):
            way = generator.standard_normal(20)
            way *= 6 / np.linalg.norm(way)
            for half, sign in enumerate((1, -1)):
                chosen = generator.choice(np.flatnonzero(self._truth < 0), 30, replace=False)
                self._truth[chosen] = 2 * feature + half
                x[chosen] += way
                y[chosen] += 2 * sign
        self.x, self.y = (torch.from_numpy(values.astype(np.float32)) for values in (x, y))

    def model(self) -> nn.Module:
        """Two hidden layers of 64."""
        return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def dataset(self) -> TensorDataset:
        """All points and targets."""
        return TensorDataset(self.x, self.y)

    def losses(self, model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        """Half the squared error of every point, (B,)."""
        return (model(batch[0])[:, 0] - batch[1]).square() / 2

    def truth(self) -> np.ndarray:
        """Planted side of every point, (S,): 2 * direction + side, or -1."""
        return self._truth


HERE = Path(__file__)
WEAK = "same_classes=true,strength=3"
RUNS = {name: (f"planted:{task}".rstrip(":"), training) for name, (task, training) in SCENARIOS.items()} | {
    "weak": (f"planted:{WEAK}", GD),
    "weak 28 x 28": (f"planted:{WEAK},size=28", GD),
    "28 x 28": ("planted:size=28", GD),
    "digits": (f"{HERE}:PlantedDigits:", GD),
    "digits same": (f"{HERE}:PlantedDigits:same=true,strength=2.0", GD),
    "cnn": ("planted:samples=1000,side=20", ("--model", "cnn:width=8", "--learning-rate", "0.1", "--steps", "200")),
    "regression": (f"{HERE}:Offsets:", GD),
}
"""Task and training of every scenario."""


def trained(folder: Path, name: str, seed: int) -> tuple[Path, str]:
    """The run of a scenario, made where it is not there, and its task."""
    task, training = RUNS[name]
    task += ("" if task.endswith(":") else "," if "=" in task else ":") + f"seed={seed}"
    path = folder / f"{name.replace(' ', '-')}-{seed}.h5"
    if not path.exists():
        part = path.with_suffix(".part")
        opsig("train", "--task", task, *training, "--seed", str(seed), "--track", "--replace", "-q", "-o", str(part))
        part.rename(path)
    return path, task


def grouped(path: Path, task: str, by: str) -> tuple[float, float, str]:
    """Adjusted Rand index of the planted sides, processor seconds, and the vectors that were compared."""
    said: list[str] = []
    begin = time.process_time()
    found = door.cluster(path, by=by, truth=True, task=task if ".py" in task else None, note=said.append)
    spent = time.process_time() - begin
    vectors = re.search(r"first (\d+) of", " ".join(said))
    return found[-1]["adjusted_rand_index"], spent, vectors.group(1) if vectors else ""


def by_label(path: Path) -> float:
    """The same index where each label is a group."""
    with open_trajectory(path) as run:
        truth = run.read("samples/truth")
        label = run.read("samples/label") if run.has("samples/label") else np.zeros(len(truth), int)
    return float(adjusted_rand_score(truth[truth >= 0], label[truth >= 0]))


def compare(folder: Path, names: list[str], seeds: int) -> None:
    """A line for each scenario, and the means of all."""
    every = []
    for name in names:
        rows, counts = [], []
        for seed in range(seeds):
            path, task = trained(folder, name, seed)
            slope, slope_time, count = grouped(path, task, "slope")
            gradient, gradient_time, _ = grouped(path, task, "gradient")
            rows.append((slope, gradient, by_label(path), slope_time, gradient_time))
            counts.append(count)
        mean, least = np.mean(rows, 0), np.min(rows, 0)
        every.append(mean)
        print(
            f"{name:14} slope {mean[0]:.2f} ({least[0]:.2f}) with {', '.join(counts)} vectors; gradient {mean[1]:.2f} "
            f"({least[1]:.2f}); label {mean[2]:.2f}; seconds {mean[3]:.1f} against {mean[4]:.1f}",
            flush=True,
        )
    mean = np.mean(every, 0)
    print(f"{'all':14} slope {mean[0]:.3f}, gradient {mean[1]:.3f}, label {mean[2]:.3f}", flush=True)


def name_ends(path: str, count: int) -> None:
    """The leading eigenvectors at the floor, in words, at three checkpoints of the second half of a run."""
    with open_trajectory(path) as run:
        steps = run.steps("checkpoints")
    for step in steps[np.linspace(len(steps) // 2, len(steps) - 2, 3).astype(int)].tolist():
        for record in opsig("sharpness", path, "--name", "-k", str(count), "--steps", str(step), "--tolerance", "1e-2"):
            print(f"step {record['step']}: {record['sentence']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(name for name in RUNS if name != "minibatch SGD"))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--ends", metavar="RUN", help="name the eigenvectors of this run, and nothing else")
    options = parser.parse_args()
    if options.ends:
        sys.exit(name_ends(options.ends, 6))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        compare(folder, options.only.split(","), options.seeds)


if __name__ == "__main__":
    main()
