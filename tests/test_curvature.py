"""Curvature against dense Hessians and autograd in float64; the ways in which simpler code is wrong, planted."""

import itertools

import numpy as np
import pytest
import torch
from opsig_linalg.eigen import Memory
from opsig_torch import TorchBackend, primitives
from opsig_torch.eigen import TorchSpace, random_start, top_eigenpairs
from opsig_torch.hessian import Hessian
from tasks import tiny

from opsig_cli.backends import State, Training
from opsig_cli.errors import OpsigError
from opsig_cli.settings import Settings
from opsig_cli.studies.critical import critical_sharpness, update_direction
from opsig_cli.studies.curvature import scale_of

TASKS = {
    "mlp": tiny.Tiny,
    "conv": tiny.Conv,
    "attention": tiny.Attend,
    "batch norm": lambda: tiny.Tiny(norm=True),
}


def open_double(name, batch_size=None):
    session = TorchBackend().open(TASKS[name](), "cpu", batch_size, double=True)
    return session, session.initial(0)


def dense(session, state, weights=None):
    """The Hessian of the weighted sum of losses, (P, P), and its gradient, (P,), by reverse over reverse."""
    with session.at(state), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        losses = torch.cat([session.task.losses(session.flat.model, batch) for _, batch in session.batches])
        weights = torch.full_like(losses, 1 / len(losses)) if weights is None else weights
        parameters = session.flat.parameters
        gradients = torch.autograd.grad((losses * weights).sum(), parameters, create_graph=True)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        unit = torch.eye(len(flat), dtype=flat.dtype)
        if any(isinstance(module, torch.nn.Conv2d) for module in session.flat.model.modules()):
            rows = [torch.autograd.grad(flat, parameters, u, retain_graph=True, materialize_grads=True) for u in unit]
            parts = [torch.stack(part) for part in zip(*rows, strict=True)]
        else:  # convolutions cannot be batched here
            parts = torch.autograd.grad(flat, parameters, unit, materialize_grads=True, is_grads_batched=True)
        return torch.cat([part.flatten(1) for part in parts], 1), flat.detach()


# -- the solver


def solve_diagonal(values, start=None, count=1, tolerance=1e-8):
    diagonal = torch.as_tensor(values, dtype=torch.float64)
    start = random_start(diagonal, 0) if start is None else start
    return top_eigenpairs(lambda v: diagonal * v, start, count, tolerance)


def test_a_negative_eigenvalue_of_larger_size_is_not_the_sharpness():
    found = solve_diagonal([-50.0, -40, *np.linspace(-1, 5, 300)], count=2)
    np.testing.assert_allclose(found.values, [5, np.linspace(-1, 5, 300)[-2]], rtol=1e-6)
    assert found.converged


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
def test_a_small_residual_in_float32_is_the_true_one_whatever_the_unit(unit):
    """Squares of such images leave float32's range, and differences of squares its digits."""
    generator = np.random.default_rng(3)
    diagonal = torch.from_numpy(np.concatenate([[9.0, 7.0], generator.uniform(-2, 2, 40_000)]) * unit).float()
    for tolerance in (3e-4, 1e-5):
        found = top_eigenpairs(lambda v: diagonal * v, random_start(diagonal, 0), 1, tolerance)
        vector = found.vectors[0].double()
        true = (diagonal.double() / unit * vector - found.values[0] / unit * vector).norm() / (found.values[0] / unit)
        assert found.converged
        assert found.residuals[0] == pytest.approx(float(true), rel=0.02, abs=3e-7)
        assert found.values[0] == pytest.approx(9 * unit, rel=1e-6)


def test_equal_eigenvalues_of_a_linear_model_for_several_outputs_are_all_found():
    """H of half the squared errors is I kron X'X / S: each eigenvalue once for every output."""
    x = np.random.default_rng(0).standard_normal((30, 5))
    matrix = torch.from_numpy(np.kron(np.eye(3), x.T @ x / 30))
    start = random_start(matrix[0], 0)
    found = top_eigenpairs(lambda v: matrix @ v, start, 4, 1e-8)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(matrix)[::-1][:4], rtol=1e-9)
    assert found.converged


def test_two_eigenvalues_that_cross_are_followed():
    """The second one becomes the first while the first one stays an exact eigenvector."""
    generator = np.random.default_rng(0)
    values = generator.uniform(-1, 1, 3000)
    memory = None
    for step, (first, second) in enumerate([(12, 10), (11.5, 10.7), (11, 11.4), (10, 12), (9, 13)]):
        values[[7, 9]] = first, second
        diagonal = torch.from_numpy(values)
        noise = random_start(diagonal, step)
        start = noise if memory is None else memory.start(TorchSpace(diagonal), 1) + 0.1 * noise
        found = top_eigenpairs(lambda v, d=diagonal: d * v, start, 1, 1e-3, memory=memory)
        memory = found.memory
        assert found.values[0] == pytest.approx(max(first, second), rel=1e-5)
        assert found.converged


@pytest.mark.parametrize("count", [1, 3])
def test_a_memory_saves_products_and_changes_no_result(count):
    generator = np.random.default_rng(0)
    size = 400
    matrix = np.diag(np.concatenate([[-40, 9, 8, 7, 6.5], generator.uniform(-1, 5, size - 5)]))
    memory, cold, warm = None, [], []
    for step in range(6):
        turn = np.linalg.qr(np.eye(size) + 0.003 * generator.standard_normal((size, size)))[0]
        matrix = turn @ matrix @ turn.T
        true = np.linalg.eigvalsh(matrix)[::-1][:count]
        operator = torch.from_numpy(matrix)
        noise = random_start(operator[0], step)
        anew = top_eigenpairs(lambda v, m=operator: m @ v, noise, count, 1e-3)
        start = noise if memory is None else memory.start(TorchSpace(noise), count) + 0.1 * noise
        found = top_eigenpairs(lambda v, m=operator: m @ v, start, count, 1e-3, memory=memory)
        memory = found.memory
        for solution in (anew, found):
            np.testing.assert_allclose(solution.values, true, rtol=1e-5)
        cold.append(anew.products)
        warm.append(found.products)
    assert np.mean(warm[1:]) < 0.9 * np.mean(cold[1:])


def test_a_wrong_memory_misleads_nobody():
    generator = np.random.default_rng(1)
    diagonal = torch.from_numpy(np.concatenate([[9.0, 7.0], generator.uniform(-1, 1, 500)]))
    elsewhere = torch.linalg.qr(torch.from_numpy(generator.standard_normal((502, 4))))[0].T
    found = top_eigenpairs(
        lambda v: diagonal * v, random_start(diagonal, 0), 2, 1e-6, memory=Memory(elsewhere, np.full(4, 50.0))
    )
    np.testing.assert_allclose(found.values, [9, 7], rtol=1e-8)


def test_a_basis_that_is_cut_back_still_finds_them():
    generator = np.random.default_rng(2)
    diagonal = torch.from_numpy(np.sort(generator.uniform(0, 1, 2000)))
    found = top_eigenpairs(lambda v: diagonal * v, random_start(diagonal, 0), 2, 1e-4, limit=400)
    assert found.converged
    assert found.products > 48  # more than there is room for
    np.testing.assert_allclose(found.values, diagonal.numpy()[::-1][:2], rtol=1e-4)


def test_a_solve_that_runs_out_of_products_says_so():
    diagonal = torch.linspace(0, 1, 1000, dtype=torch.float64)
    found = top_eigenpairs(lambda v: diagonal * v, random_start(diagonal, 0), 3, 1e-10, limit=20)
    assert not found.converged
    assert found.products == 20
    assert found.residuals.max() > 1e-10


def test_a_tolerance_below_the_precision_is_refused():
    with pytest.raises(ValueError, match="cannot be met in float32"):
        top_eigenpairs(lambda v: v, torch.ones(3), 1, 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_run_that_diverged_is_said_and_hangs_nothing(value):
    session, state = open_double("mlp")
    state.params[3] = value
    with pytest.raises(OpsigError, match="the run has diverged"):
        session.top_eigenpairs(state, 1, 1e-3)


def test_products_that_are_not_finite_end_the_solve():
    with pytest.raises(ValueError, match="the Hessian is not finite"):
        top_eigenpairs(lambda v: v * torch.nan, torch.ones(5, dtype=torch.float64), 1, 1e-3)


def test_a_space_that_is_exhausted_ends_the_solve():
    found = solve_diagonal([2.0, 2.0, 2.0], count=2)
    np.testing.assert_allclose(found.values, [2, 2])
    assert found.products == 3
    assert found.converged


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("batch_size", [None, 7])
def test_eigenpairs_are_those_of_the_dense_hessian(name, batch_size):
    session, state = open_double(name, batch_size)
    matrix, _ = dense(session, state)
    values, vectors = torch.linalg.eigh(matrix)
    found = session.top_eigenpairs(state, 3, 1e-6)
    np.testing.assert_allclose(found.values, values.flip(0)[:3], rtol=1e-5)
    assert abs(found.vectors[0] @ vectors[:, -1].numpy()) == pytest.approx(1, abs=1e-5)
    true = [np.linalg.norm(matrix.numpy() @ v - a * v) / a for a, v in zip(found.values, found.vectors, strict=True)]
    np.testing.assert_allclose(found.residuals, true, atol=1e-7)
    assert (found.residuals <= 1e-6).all()


def test_products_are_the_same_with_and_without_a_kept_graph(monkeypatch):
    session, state = open_double("conv", 7)
    vector = np.random.default_rng(0).standard_normal((2, len(state.params)))
    kept = session.hessian_vectors(state, vector)
    monkeypatch.setattr("opsig_torch.hessian.GRAPH_BYTES", 0)
    np.testing.assert_allclose(session.hessian_vectors(state, vector), kept, rtol=1e-12)
    matrix, _ = dense(session, state)
    np.testing.assert_allclose(kept, vector @ matrix.numpy(), atol=1e-12)


def test_nothing_goes_through_grad_and_nothing_is_left_changed():
    session, state = open_double("batch norm")
    before = session.state(0)
    session.flat.gradient.fill_(7)
    session.top_eigenpairs(state, 1, 1e-3)
    assert (session.flat.gradient == 7).all()
    after = session.state(0)
    np.testing.assert_array_equal(before.params, after.params)
    np.testing.assert_array_equal(before.buffers, after.buffers)


def test_a_random_loss_is_refused_with_the_reason():
    session = TorchBackend().open(tiny.Dropping())
    with pytest.raises(OpsigError, match="turn dropout and random augmentation off"):
        session.top_eigenpairs(session.initial(0), 1, 1e-2)


def test_adams_preconditioned_hessian_is_scaled_on_both_sides():
    session, state = open_double("mlp")
    matrix, gradient = dense(session, state)
    second = gradient.numpy() ** 2 * 0.1
    state = type(state)(10, state.params, state.buffers, {"exp_avg_sq": second})
    settings = Settings("t", optimizer="adam", beta2=0.99, epsilon=1e-3)
    scale = scale_of(settings, state)
    corrected = np.sqrt(second / (1 - 0.99**10)) + 1e-3
    expected = np.diag(((1 - 0.9**10) * corrected) ** -0.5)
    values = np.linalg.eigvalsh(expected @ matrix.numpy() @ expected)
    found = session.top_eigenpairs(state, 2, 1e-6, scale=scale)
    np.testing.assert_allclose(found.values, values[::-1][:2], rtol=1e-5)
    assert scale_of(settings, type(state)(0, state.params, state.buffers, {})) is None
    assert scale_of(Settings("t"), state) is None


# -- every sample's


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("batch_size", [None, 7])
def test_curvature_of_every_sample_is_that_of_autograd(name, batch_size):
    session, state = open_double(name, batch_size)
    direction = np.random.default_rng(1).standard_normal(len(state.params))
    losses, slopes, curvatures = session.curvature_along(state, direction)
    for i in (0, 5, session.samples - 1):
        one = torch.zeros(session.samples, dtype=torch.float64)
        one[i] = 1
        matrix, gradient = dense(session, state, one)
        assert slopes[i] == pytest.approx(float(gradient.numpy() @ direction), rel=1e-9, abs=1e-12)
        assert curvatures[i] == pytest.approx(float(direction @ matrix.numpy() @ direction), rel=1e-8, abs=1e-10)
    (rows,) = session.losses([state])
    np.testing.assert_allclose(losses, rows[0], rtol=1e-6)
    (product,) = session.hessian_vectors(state, direction[None])
    assert curvatures.mean() == pytest.approx(float(direction @ product), rel=1e-9)


@pytest.mark.parametrize("name", ["attention", "batch norm"])
def test_a_nested_derivative_that_is_wrong_is_found_out_and_replaced(monkeypatch, name):
    """Without `Primitives` torch is silently wrong there, or fails; another way gives the same numbers, and says so."""
    session, state = open_double(name)
    direction = np.random.default_rng(1).standard_normal(len(state.params))
    right = session.curvature_along(state, direction)[2]
    session.kept.clear()
    said = []
    session.tell = said.append
    monkeypatch.setattr(primitives, "_NO_FORWARD_TWICE", {})
    np.testing.assert_allclose(session.curvature_along(state, direction)[2], right, rtol=1e-9)
    session.curvature_along(state, direction)
    assert len(said) == 1
    assert "curvature of samples by reverse derivatives" in said[0]


def test_one_trace_serves_all_checkpoints():
    session, state = open_double("batch norm")
    direction = np.random.default_rng(1).standard_normal(len(state.params))
    session.curvature_along(state, direction)
    traces = list(session.kept.values())
    moved = type(state)(1, state.params + 0.1, state.buffers + 0.5, {})
    values = session.curvature_along(moved, 2 * direction)
    assert list(session.kept.values()) == traces
    session.kept.clear()
    np.testing.assert_allclose(session.curvature_along(moved, 2 * direction), values, rtol=1e-12)


def test_running_statistics_are_inputs_of_the_trace():
    session = TorchBackend().open(tiny.Tiny(norm=True), "cpu", None, "running", double=True)
    state = session.initial(0)
    direction = np.random.default_rng(1).standard_normal(len(state.params))
    session.curvature_along(state, direction)
    moved = type(state)(1, state.params, state.buffers + 0.5, {})
    values = session.curvature_along(moved, direction)
    session.kept.clear()
    np.testing.assert_allclose(session.curvature_along(moved, direction), values, rtol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_gradient_norms_are_those_of_autograd(name, batch_size):
    session, state = open_double(name, batch_size)
    norms = session.gradient_norms(state)
    for i in range(0, session.samples, 5):
        with session.at(state):
            loss = session.task.losses(session.flat.model, session.batches.take([i])).sum()
            gradients = torch.autograd.grad(loss, session.flat.parameters)
        assert norms[i] == pytest.approx(float(torch.cat([g.reshape(-1) for g in gradients]).norm()), rel=1e-10)


def test_float32_curvature_is_near_float64():
    direction = np.random.default_rng(1).standard_normal(5 * 16 + 16 + 16 * 16 + 16 + 16 * 3 + 3)
    exact = open_double("mlp")
    single = TorchBackend().open(TASKS["mlp"](), "cpu")
    fine = exact[0].curvature_along(exact[1], direction)[2]
    coarse = single.curvature_along(single.initial(0), direction.astype(np.float32))[2]
    np.testing.assert_allclose(coarse, fine, atol=1e-5 * np.abs(fine).max())


def test_the_hessian_counts_its_products():
    session, state = open_double("mlp")
    with session.at(state):
        hessian = Hessian(session)
        hessian(session.flat.vector.detach())
        assert hessian.products == 1


def test_the_spectral_density_gives_the_trace():
    session, state = open_double("mlp")
    matrix, _ = dense(session, state)
    nodes, weights, error = session.spectral_density(state)
    assert weights.sum() == pytest.approx(len(matrix))
    assert abs(float((nodes * weights).sum()) - float(matrix.trace())) < 4 * error + 1e-9
    assert nodes.max() == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-6)


# -- along the update


OPTIMIZERS = {
    "gd": {},
    "decayed": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.8, "weight_decay": 0.1},
    "adam": {"beta1": 0.7, "beta2": 0.95, "epsilon": 1e-4, "weight_decay": 0.1},
    "splitsgd": {"momentum": 0.8, "dampening": 0.6, "sign_learning_rate": 0.01},
    "split by radius": {"momentum": 0.0, "dampening": 0.0, "radius": 0.02},
}


def trained(task, name, steps=4):
    """A run's session, its settings and its states, in float64."""
    optimizer = {"decayed": "gd", "split by radius": "splitsgd"}.get(name, name)
    settings = Settings("t", optimizer=optimizer, learning_rate=0.05, **OPTIMIZERS[name])
    session = TorchBackend().open(task, "cpu", 25, double=True)
    training = Training(
        optimizer, 0.05, steps, momentum=settings.momentum, betas=(settings.beta1, settings.beta2),
        epsilon=settings.epsilon, sign_learning_rate=settings.sign_learning_rate, dampening=settings.dampening,
        radius=settings.radius, weight_decay=settings.weight_decay, wants_state=lambda step: True,
    )  # fmt: skip
    return session, settings, [snapshot.state for snapshot in session.train(training, session.initial(0))]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_direction_is_what_torch_adds_to_the_parameters(name):
    session, settings, states = trained(tiny.Tiny(), name)
    for before, after in itertools.pairwise(states):
        found = update_direction(settings, before, session.gradient(before))
        np.testing.assert_allclose(found, (after.params - before.params) / 0.05, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["momentum", "adam", "splitsgd"])
def test_an_update_is_not_known_without_the_optimizers_state(name):
    session, settings, states = trained(tiny.Tiny(), name, 1)
    bare = [State(state.step, state.params, state.buffers) for state in states]
    gradient = session.gradient(states[0])
    assert update_direction(settings, bare[0], gradient) is not None
    assert update_direction(settings, bare[1], gradient) is None
    assert update_direction(None, states[1], gradient) is None
    assert not critical_sharpness(session, bare[1], settings)[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_critical_sharpness_of_a_quadratic_is_its_curvature_along_the_update(name):
    session, settings, states = trained(tiny.Quadratic(), name)
    matrix, exact = dense(session, session.initial(0))
    np.testing.assert_allclose(session.gradient(session.initial(0)), exact.numpy(), rtol=1e-9, atol=1e-12)
    for state in states[1:]:
        gradient = session.gradient(state)
        u = update_direction(settings, state, gradient)
        expected = u @ matrix.numpy() @ u / -(u @ gradient) if u @ gradient < 0 else np.inf
        assert critical_sharpness(session, state, settings) == (pytest.approx(expected, rel=0.02), True)
        along = gradient @ matrix.numpy() @ gradient / (gradient @ gradient)
        assert critical_sharpness(session, state, None) == (pytest.approx(along, rel=0.02), False)
