"""The top eigenvalue of a sample's own Hessian: against a closed form, dense matrices, and what fooled simpler code."""

import json

import numpy as np
import pytest
import torch
from opsig_torch import TorchBackend, outer_products, plain
from opsig_torch.batched_lanczos import ROOM, largest_eigenvalues
from opsig_torch.eigen import random_start
from tasks import parts, sharp, tiny

from opsig_cli.errors import OpsigError

ROUNDING = 1e-6


def solve(spectra, tolerance=1e-3, dtype=torch.float64, size=200, limit=200, seed=0):
    """What is found of operators of these spectra, the rest of each being 0, in directions of chance."""
    generator = np.random.default_rng(seed)
    turns = [np.linalg.qr(generator.standard_normal((size, size)))[0] for _ in spectra]
    padded = [np.pad(spectrum, (0, size - len(spectrum))) for spectrum in spectra]
    matrices = [(turn * values) @ turn.T for turn, values in zip(turns, padded, strict=True)]
    operators = torch.from_numpy(np.stack(matrices)).to(dtype)
    start = random_start(operators[0, 0], seed).expand(len(spectra), -1)
    return largest_eigenvalues(
        lambda vectors, rows: torch.bmm(operators[rows], vectors[..., None])[..., 0], start, tolerance, limit
    )


LOW_RANK = np.array([3.0, 1.0, 0.2])
DEFINITE = -np.linspace(0.5, 2, 200)
SPECTRA = {
    "low rank": LOW_RANK,
    "one": np.array([2.0]),
    "none": np.zeros(1),
    "near-degenerate": np.array([1, 0.99, 0.5, -0.4]),
    "degenerate": np.array([1, 1, 1, 0.9, -2]),
    "negative definite": DEFINITE,
    "negative semidefinite": np.array([-4.0, -1.0]),
    "a larger negative one": np.concatenate([[-100, 1, 0.98], np.linspace(-1, 0.5, 30)]),
    "minute": 1e-20 * LOW_RANK,
    "huge": 1e12 * LOW_RANK,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_spectrum_gives_its_top_eigenvalue_and_never_more(dtype):
    found = solve(SPECTRA.values(), 1e-4, dtype)
    for number, (name, spectrum) in enumerate(SPECTRA.items()):
        size = np.abs(spectrum).max()
        top = spectrum.max() if len(spectrum) == 200 else max(spectrum.max(), 0)
        assert found.values[number] <= top + ROUNDING * size, name
        assert found.values[number] >= top - 1e-4 * size, name
        assert found.residuals[number] <= 1e-4, name


def test_close_eigenvalues_are_told_apart_whatever_the_start():
    """Ten steps gave the lower of two; a start with little of the upper one converges to the lower first."""
    for seed in range(20):
        found = solve([np.array([1, 0.99, 0.5, -0.4, 0.2])] * 5, seed=seed)
        assert found.values.min() > 1 - 1e-6


def test_a_space_that_is_exhausted_ends_the_solve():
    found = solve([LOW_RANK, np.zeros(1), LOW_RANK / 7], 1e-12)
    np.testing.assert_allclose(found.values, [3, 0, 3 / 7], atol=1e-12)
    assert found.products[1] == 1
    assert found.products.max() <= 5  # three eigenvalues, 0, and one that shows that nothing is left
    assert found.residuals.max() < 1e-14


def test_operators_go_on_until_each_meets_the_residual_itself():
    spread = np.linspace(0, 1, 200) ** 0.5
    found = solve([LOW_RANK, spread, 2 * spread, DEFINITE], 1e-3)
    assert found.products[0] < 8
    assert found.products[1:].min() > ROOM  # bases were cut back
    np.testing.assert_allclose(found.values, [3, 1, 2, -0.5], atol=3e-3)
    np.testing.assert_allclose(found.values[2], 2 * found.values[1], rtol=5e-3)


def test_residuals_are_those_of_the_ritz_vector():
    """In two dimensions a vector with the found quotient has one residual: sqrt((a - low) (high - a))."""
    low, high = -1.0, 2.0
    diagonal = torch.tensor([[low, high]], dtype=torch.float64)
    start = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    found = largest_eigenvalues(lambda v, rows: diagonal[rows] * v, start, 1e-12, 1)
    assert found.values[0] == pytest.approx(0.36 * low + 0.64 * high)
    value = found.values[0]
    assert found.residuals[0] == pytest.approx(np.sqrt((value - low) * (high - value)) / abs(value))


def test_a_solve_that_runs_out_of_products_says_so():
    found = solve([np.linspace(0, 1, 200), LOW_RANK], 1e-9, limit=12)
    assert found.residuals[0] > 1e-3
    assert found.products[0] == 12


def test_an_operator_that_is_not_finite_spoils_no_other():
    diagonals = torch.tensor([[1.0, 2, 3], [1, np.nan, 3], [4, 5, np.inf], [7, 8, 9]], dtype=torch.float64)
    found = largest_eigenvalues(lambda v, rows: diagonals[rows] * v, torch.ones(4, 3).double(), 1e-6, 50)
    np.testing.assert_allclose(found.values, [3, np.nan, np.nan, 9])
    np.testing.assert_array_equal(np.isnan(found.residuals), [False, True, True, False])


# -- of models


def dense(session, state, sample):
    """Eigenvalues of one sample's Hessian by autograd's own."""
    flat = session.flat
    with session.at(state), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = session.task.losses(flat.model, session.batches.take([sample]))[0]
        parts = torch.autograd.grad(loss, flat.parameters, create_graph=True, materialize_grads=True)
        gradient = torch.cat([part.reshape(-1) for part in parts])
        rows = []
        for entry in gradient:
            parts = torch.autograd.grad(entry, flat.parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        return np.linalg.eigvalsh(torch.stack(rows).numpy())


def test_softmax_regression_has_its_closed_form(opsig, tmp_path):
    """norm(x)^2 times the top eigenvalue of diag(p) - p p'; a space of four was left and walked on in: 10.168."""
    run, own = tmp_path / "s.h5", ("--task", f"{sharp.__file__}:Softmax")
    opsig("train", *own, "--learning-rate", 0.5, "--steps", 200, "--checkpoint-every", 100, "-o", run)
    records = opsig("sharpness", run, *own, "--metrics", "sample_sharpness", "--steps", 200).records
    session = TorchBackend().open(sharp.Softmax(), "cpu", double=True)
    from opsig_cli.trajectory.file import open_trajectory
    from opsig_cli.trajectory.states import read_state

    with open_trajectory(run) as kept, session.at(read_state(kept, 200)), torch.no_grad():
        inputs = session.batches.take(np.arange(session.samples))[0]
        logits = session.flat.model(inputs)
    for record in records:
        p = logits[record["sample"]].softmax(0).numpy()
        top = np.linalg.eigvalsh(np.diag(p) - np.outer(p, p))[-1]
        exact = float(inputs[record["sample"]].square().sum()) * top
        assert record["sample_sharpness"] == pytest.approx(exact, rel=1e-5)
        assert 0 < record["sample_sharpness_residual"] <= 1e-3
    assert records[3]["sample_sharpness"] == pytest.approx(2.2147, abs=1e-4)


@pytest.mark.parametrize("task", [tiny.Tiny, tiny.Conv, tiny.Attend, sharp.Softmax, sharp.Cosine, sharp.Concave])
def test_a_samples_sharpness_is_its_most_positive_eigenvalue(task):
    session = TorchBackend().open(task(), "cpu", double=True)
    state = session.initial(0)
    chosen = np.array([1, 8, 3])
    values, residuals = session.sample_sharpness(state, chosen, 1e-6)
    for sample, value, residual in zip(chosen, values, residuals, strict=True):
        exact = dense(session, state, sample)
        size = np.abs(exact).max()
        assert value == pytest.approx(exact[-1], abs=1e-6 * size)
        assert value <= exact[-1] + 1e-12 * size
        assert residual <= 1e-6


def test_a_row_of_padding_is_no_direction():
    """Backward it has no derivative; forward it had one, and the operator was not symmetric: 5e-4 too low."""
    session = TorchBackend().open(parts.Part("Embedding padded", 8), "cpu")
    state = session.initial(0)
    values, _ = session.sample_sharpness(state, np.arange(8), 1e-4)
    for sample, value in enumerate(values):
        assert value == pytest.approx(dense(session, state, sample)[-1], rel=1e-5)


def test_a_sample_has_the_same_sharpness_in_any_company(monkeypatch):
    session = TorchBackend().open(tiny.Tiny(), "cpu")
    state = session.initial(0)
    together, _ = session.sample_sharpness(state, np.arange(20), 1e-4)
    monkeypatch.setattr("opsig_torch.spectrum.BLOCK_BYTES", 1)
    alone, _ = session.sample_sharpness(state, np.arange(20), 1e-4)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_a_tolerance_below_the_precision_is_refused():
    session = TorchBackend().open(tiny.Tiny(), "cpu")
    with pytest.raises(OpsigError, match="cannot be met in float32"):
        session.sample_sharpness(session.initial(0), np.arange(2), 1e-7)


def test_what_does_not_reach_the_tolerance_is_said(opsig, tiny_run, monkeypatch):
    monkeypatch.setattr("opsig_torch.spectrum.SAMPLE_LIMIT", 2)
    own = ("--task", f"{tiny.__file__}:Tiny")
    found = opsig("sharpness", tiny_run, *own, "--metrics", "sample_sharpness", "--steps", 60)
    rough = [r for r in map(json.loads, found.out.splitlines()) if r["sample_sharpness_residual"] > 1e-3]
    assert f"{len(rough)} eigenvalues did not reach the tolerance" in found.err


class HalfFrozen(tiny.Tiny):
    """The bias of a layer is not trained, and the first layer not at all."""

    def model(self):
        model = super().model()
        model[1].bias.requires_grad_(False)
        model[0].requires_grad_(False)
        return model


@pytest.mark.parametrize("task", [tiny.Tiny, tiny.Conv, HalfFrozen])
def test_outer_products_hold_a_samples_whole_spectrum_but_zeros(task):
    """The matrix of the operator on its coordinates has the Hessian's eigenvalues, and 0 for what cannot be."""
    session = TorchBackend().open(task(), "cpu", double=True)
    state = session.initial(0)
    exact = dense(session, state, 4)
    with session.at(state):
        shape = outer_products.shape_of(session)
        assert shape.layers
        assert sum(shape.widths) < len(exact)
        found = outer_products.OuterProducts(session, np.array([1, 4]), shape)
        units = torch.eye(sum(shape.widths), dtype=torch.float64)
        matrix = torch.stack([found.products(unit[None], np.array([1]))[0] for unit in units]).numpy()
        plain_gradient = plain.flattened(plain.gradients(session, plain.sample_loss(session, 4)))
        torch.testing.assert_close(found.lifted(found.gradients()[1], 1), plain_gradient)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    own = np.linalg.eigvalsh(matrix)
    for values in (own, exact):
        values[np.abs(values) < 1e-9] = 0
    np.testing.assert_allclose(np.sort(own[own != 0]), np.sort(exact[exact != 0]), atol=1e-9)


def test_outer_products_that_are_wrong_are_seen_and_a_slower_way_is_taken(monkeypatch):
    session = TorchBackend().open(tiny.Tiny(), "cpu")
    said = []
    session.tell = said.append
    state = session.initial(0)
    right, _ = session.sample_sharpness(state, np.arange(6), 1e-4)
    assert said == []
    apart = outer_products._apart
    monkeypatch.setattr(outer_products, "_apart", lambda rows, units: 1.5 * apart(rows, units))
    found, _ = session.sample_sharpness(state, np.arange(6), 1e-4)
    np.testing.assert_allclose(found, right, rtol=1e-4)
    assert "products with samples' Hessians by vmap" in said[0]
