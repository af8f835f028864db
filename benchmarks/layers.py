"""Every per-sample quantity of every architecture and of many single layers, against float64 differences of gradients.

    python benchmarks/layers.py [--only 'NAME;...'] [--samples 8] [--device cuda] [--costs]

A column's number is the largest error over samples, relative to the largest value. What is measured is float32, as
commands measure it; what it is held against is plain autograd's gradient, one sample at a time, in float64, and central
differences of it, which share nothing with opsig's ways. `refused` is one line that says why; the last columns say
which slower way was taken, and how many rows are outside of the bound of 1e-5.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from opsig_torch import TorchBackend, plain
from opsig_torch.apart import require_apart
from opsig_torch.second import tell_of_second_derivative
from opsig_zoo import FashionMnist, Text
from opsig_zoo.chebyshev import Chebyshev
from opsig_zoo.models import image_model
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from opsig_cli.errors import OpsigError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tasks import parts

BOUND = 1e-5
STEP = 1e-6
"""Length of a central difference: short, so that no ReLU has its kink within it; rounding is 1e-16 over it."""
SHARPNESS_TOLERANCE = 1e-4
"""Residual asked of the top eigenvalues of single samples' Hessians; their error is about its square."""
COLUMNS = ("loss", "gradient", "cosines", "slope", "curvature", "sharpness", "product")
ZOO = (
    "mlp:width=8,depth=2", "mlp:width=8,depth=2,activation=tanh", "cnn:width=3", "resnet18:width=2", "resnet20:width=2",
    "resnet56:width=2", "resnet20:width=2,project=true", "vgg11:width=2", "vgg11-bn:width=2", "vit:width=8,depth=1",
)  # fmt: skip


class Images:
    """Few pictures of noise through a model of the zoo."""

    def __init__(self, name: str, samples: int):
        draw = torch.Generator().manual_seed(2)
        self.name, self.size = name, 16 if name.startswith("vgg") else 8
        self.x = torch.randn(samples, 2, self.size, self.size, generator=draw)
        self.y = torch.arange(samples) % 4

    def model(self):
        return image_model(self.name, 2, self.size, 4)

    def dataset(self):
        return TensorDataset(self.x, self.y)

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none")


class Truth:
    """Plain autograd in float64 at given parameters, one sample after the other, and differences of it.

    On the CPU: the gradient of weight norm in float64 on a GPU is off by 1e-8, and its differences by 5e-2.
    """

    def __init__(self, task, state, samples: int):
        torch.manual_seed(0)
        self.task, self.samples = task, samples
        self.model = task.model().double().eval()
        for module in self.model.modules():
            if isinstance(module, parts.Casts):
                module.half = torch.float64
            if isinstance(module, parts.Checkpointed):
                module.reentrant = False
        buffers = iter(np.split(state.buffers, np.cumsum([b.numel() for b in self.model.buffers()])))
        for buffer in self.model.buffers():
            buffer.copy_(torch.from_numpy(next(buffers)).view(buffer.shape))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.at = state.params.astype(np.float64)
        dataset = task.dataset()
        self.items = [[self._double(torch.as_tensor(part)) for part in dataset[i]] for i in range(samples)]

    @staticmethod
    def _double(tensor):
        tensor = tensor[None]
        return tensor.double() if tensor.is_floating_point() else tensor

    def gradient(self, sample: int, at=None):
        """Loss and gradient (P,) of a sample."""
        at = self.at if at is None else at
        with torch.no_grad():
            for p, part in zip(
                self.parameters, np.split(at, np.cumsum([p.numel() for p in self.parameters])[:-1]), strict=True
            ):
                p.copy_(torch.from_numpy(part.copy()).view(p.shape))
        loss = self.task.losses(self.model, self.items[sample]).sum()
        found = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        parts = [g.to_dense() if g.is_sparse else g for g in found]
        return loss.item(), torch.cat([g.reshape(-1) for g in parts]).detach().numpy()

    def padding(self) -> np.ndarray:
        """Places of the rows of embeddings that stand for padding: they have no gradient, and are never moved."""
        places, offset = [], 0
        rows = {m.weight: m.padding_idx for m in self.model.modules() if getattr(m, "padding_idx", None) is not None}
        for p in self.parameters:
            if p in rows:
                places += range(offset + rows[p] * p.shape[1], offset + (rows[p] + 1) * p.shape[1])
            offset += p.numel()
        return np.array(places, int)

    def product(self, sample: int, direction):
        named = {getattr(self.task, "which", None), *getattr(self.task, "names", ())}
        if named & parts.STOPPED.keys():  # where it is autograd's by definition
            loss = self.task.losses(self.model, self.items[sample])[0]
            slopes = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
            flat = torch.cat([slope.reshape(-1) for slope in slopes])
            parts_ = torch.autograd.grad(flat @ torch.from_numpy(direction), self.parameters, materialize_grads=True)
            return torch.cat([part.reshape(-1) for part in parts_]).numpy()
        length = STEP / np.linalg.norm(direction)
        ahead, behind = (self.gradient(sample, self.at + sign * length * direction)[1] for sign in (1, -1))
        return (ahead - behind) / (2 * length)

    def sharpness(self, sample: int) -> float:
        size = len(self.at)
        operator = LinearOperator((size, size), lambda v: self.product(sample, v.ravel()), dtype=np.float64)
        start = self.gradient(sample)[1] + 1e-3
        start[self.padding()] = 0
        return float(eigsh(operator, 1, which="LA", v0=start, tol=1e-5, return_eigenvectors=False)[0])


def relative(found, exact) -> float:
    """The largest error over the largest value; what is missing must be missing in both."""
    found, missing = np.asarray(found), np.isnan(exact)
    if (np.isnan(found) != missing).any():
        return float("nan")
    found, exact = found[~missing], exact[~missing]
    scale = np.abs(exact).max(initial=0)
    return float(np.abs(found - exact).max(initial=0) / (scale if scale > 1e-12 else 1))


def row(task, samples: int, device: str) -> tuple[dict[str, float | str], list[str]]:
    """Errors, or why it was refused, by column; and what was said."""
    said: list[str] = []
    session = TorchBackend().open(task, device, 5, "running")
    session.tell = said.append
    try:
        state = session.initial(0)
    except OpsigError as refused:
        return dict.fromkeys(COLUMNS, str(refused)), said
    truth = Truth(task, state, samples)
    direction = np.random.default_rng(0).standard_normal(len(state.params))
    direction[truth.padding()] = 0
    direction /= np.linalg.norm(direction)
    v = direction.astype(np.float32)
    few = np.arange(0, samples, max(1, samples // 2))
    pairs = [truth.gradient(i) for i in range(samples)]
    losses, gradients = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    norms = np.linalg.norm(gradients, axis=1)
    with np.errstate(invalid="ignore"):
        unit = gradients / norms[:, None]  # a gradient that vanishes has no direction
    products = np.array([truth.product(i, direction) for i in range(samples)])
    everybody = np.arange(samples)
    measured = {
        "loss": (lambda: session.losses([state])[0][0], lambda: losses),
        "gradient": (lambda: session.gradient_norms(state), lambda: norms),
        "cosines": (lambda: session.gradient_cosines(state, everybody), lambda: unit @ unit.T),
        "slope": (lambda: session.curvature_along(state, v)[1], lambda: gradients @ direction),
        "curvature": (lambda: session.curvature_along(state, v)[2], lambda: products @ direction),
        "sharpness": (
            lambda: session.sample_sharpness(state, few, SHARPNESS_TOLERANCE)[0],
            lambda: np.array([truth.sharpness(int(i)) for i in few]),
        ),
        "product": (lambda: session.hessian_vectors(state, v[None])[0], lambda: products.mean(0)),
    }  # fmt: skip
    errors: dict[str, float | str] = {}
    for column, (found, exact) in measured.items():
        try:
            errors[column] = relative(found(), exact())
        except OpsigError as refused:
            assert "\n" not in str(refused)
            errors[column] = str(refused)
    return errors, said


def costs(name: str) -> None:
    """What the checks cost, in passes over 5,000 samples."""
    task = FashionMnist(model=name)
    session = TorchBackend().open(task, "cpu")
    state = session.initial(0)
    v = torch.randn(len(state.params), generator=torch.Generator().manual_seed(0))
    v /= v.norm()

    def anew(check: Callable[..., None]) -> None:
        session.kept.clear()
        check(session)

    def passing() -> None:
        for _, batch in session.batches.in_pieces(session.inference_batch()):
            torch.autograd.grad(task.losses(session.flat.model, batch).sum(), session.flat.parameters)

    with session.at(state):
        whole = seconds(passing, 1)
        print(f"{name}: a forward and backward pass over {session.samples} samples takes {whole:.2f} s of CPU time")
        for what, check in (
            ("two batchings, once a session", lambda: anew(require_apart)),
            ("the second derivative by differences, once a session", lambda: anew(tell_of_second_derivative)),
            ("one gradient, at each use", lambda: plain.gradients(session, plain.sample_loss(session, 7))),
            ("one curvature, at each use", lambda: plain.curvature(session, 7, v)),
        ):
            print(f"  {what}: {seconds(check, 9) / whole:.2%} of that")


def seconds(call: Callable[[], object], times: int) -> float:
    """Median seconds of CPU time of a call."""
    call()
    taken = []
    for _ in range(times):
        begin = time.process_time()
        call()
        taken.append(time.process_time() - begin)
    return float(np.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--costs", action="store_true", help="what the checks cost, and nothing else")
    options = parser.parse_args()
    if options.costs:
        for name in ("mlp", "cnn", "vit"):
            costs(name)
        return
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text("the cat sat on the mat; the dog sat on the log. " * 3)
        text = Text(folder, context=6, samples=options.samples, model="gpt:depth=2,width=8,heads=2")
        tasks = {name: Images(name, options.samples) for name in ZOO} | {"gpt": text}
        tasks["chebyshev"] = Chebyshev(samples=options.samples)
        for name in parts.EVERY:
            tasks[name] = parts.Part(name, options.samples)
        chosen = options.only.split(";") if options.only else list(tasks)
        outside = refused = 0
        print(f"{'':36}" + "".join(f"{column:>11}" for column in COLUMNS) + "  slower ways")
        for name in chosen:
            errors, said = row(tasks[name], options.samples, options.device)
            words = {c: f"{e:.0e}" if isinstance(e, float) else "refused" for c, e in errors.items()}
            slower = "; ".join(text.split(": ")[1].split(", about")[0] for text in said)
            print(f"{name:36}" + "".join(f"{words[c]:>11}" for c in COLUMNS) + f"  {slower}", flush=True)
            refused += any(isinstance(error, str) for error in errors.values())
            outside += any(isinstance(error, float) and not error <= BOUND for error in errors.values())
    print(f"{len(chosen)} rows: {outside} with a number outside of {BOUND:g}, {refused} with a quantity refused")


if __name__ == "__main__":
    main()
