"""What every installed backend must hold, in float64 where it can, against autograd and dense matrices."""

import numpy as np
import pytest
import torch
from opsig_torch import TorchBackend
from tasks import tiny
from torch.autograd.functional import hessian
from torch.func import functional_call

from opsig_cli.backends import State, Training
from opsig_cli.errors import OpsigError, UsageError


def open_double(task, batch_size=None, statistics=None):
    session = TorchBackend().open(task, "cpu", batch_size, statistics, double=True)
    return session, session.initial(0)


def autograd_gradients(session, state, samples):
    with session.at(state):
        rows = []
        for i in samples:
            loss = session.task.losses(session.flat.model, session.batches.take([i])).sum()
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, session.flat.parameters)]))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("task", [tiny.Tiny(), tiny.Conv(), tiny.Listed()])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_gradient_cosines_are_those_of_autograd_one_sample_at_a_time(task, batch_size):
    session, state = open_double(task, batch_size)
    samples = np.array([5, 3, 28, 0, 11, 17, 2, 9, 29])
    rows = autograd_gradients(session, state, samples)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(session.gradient_cosines(state, samples), rows @ rows.T, atol=1e-12)


@pytest.mark.parametrize("task", [tiny.Tiny(), tiny.Conv(), tiny.Listed()])
def test_mean_cosines_are_means_of_the_cosines(task):
    session, state = open_double(task, 7)
    everybody = np.arange(session.samples)
    cosines = session.gradient_cosines(state, everybody)
    sets = [np.array([3, 1, 20]), np.array([5]), everybody[::2]]
    chosen = np.array([4, 20, 7])
    expected = np.stack([cosines[chosen][:, members].mean(1) for members in sets], 1)
    np.testing.assert_allclose(session.mean_cosines(state, chosen, sets), expected, atol=1e-12)


def test_gradient_cosines_do_not_depend_on_the_memory_they_may_use(monkeypatch):
    session, state = open_double(tiny.Conv())
    samples = np.arange(12)
    whole = session.gradient_cosines(state, samples)
    for bound in ("MEMORY_BYTES", "BLOCK_BYTES", "PIECE_BYTES", "COLUMNS", "TILE"):
        monkeypatch.setattr(f"opsig_torch.layer_gradients.{bound}", 1)
    np.testing.assert_allclose(session.gradient_cosines(state, samples), whole, atol=1e-12)


@pytest.mark.parametrize("task", [tiny.Tiny(), tiny.Conv(), tiny.Listed()])
def test_a_sample_has_the_same_loss_in_any_company(task):
    rows = [open_double(task, batch_size)[0].losses([open_double(task)[1]])[0][0] for batch_size in (1, 7, None)]
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-6)
    np.testing.assert_allclose(rows[2], rows[0], rtol=1e-6)


def test_top_eigenpairs_are_the_most_positive_of_the_dense_hessian():
    session, state = open_double(tiny.Tiny(), batch_size=13)
    model = session.flat.model
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def mean_loss(vector):
        parts = dict(zip(shapes, torch.split(vector, [s.numel() for s in shapes.values()]), strict=True))
        named = {name: parts[name].view(shapes[name]) for name in shapes}
        logits = functional_call(model, named, (session.task.x.double(),))
        return torch.nn.functional.cross_entropy(logits, session.task.y)

    dense = hessian(mean_loss, torch.from_numpy(state.params).double())
    expected = np.linalg.eigvalsh(dense.numpy())[::-1][:3]
    found = session.top_eigenpairs(state, 3, 1e-8)
    assert found.converged
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    assert (found.residuals < 1e-8).all()
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(3), atol=1e-8)


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        ("gd", lambda p: torch.optim.SGD(p, lr=0.3)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.3)),
    ],
)
def test_full_batch_training_is_a_plain_torch_loop(optimizer, reference):
    task = tiny.Tiny()
    session, start = open_double(task, batch_size=13)
    training = Training(optimizer, 0.3, 12, wants_losses=lambda step: True, wants_state=lambda step: True)
    snapshots = list(session.train(training, start))
    torch.manual_seed(0)
    model = task.model().double()
    opt = reference(model.parameters())
    for snapshot in snapshots:
        losses = task.losses(model, [task.x.double(), task.y])
        np.testing.assert_allclose(snapshot.losses, losses.detach().numpy(), rtol=1e-6)
        assert snapshot.train_loss == pytest.approx(losses.mean().item(), rel=1e-12)
        np.testing.assert_array_equal(snapshot.predictions, task.predictions(model, [task.x.double(), task.y]))
        opt.zero_grad()
        losses.mean().backward()
        flat = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        assert snapshot.grad_norm == pytest.approx(flat.norm().item(), rel=1e-10)
        params = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        np.testing.assert_allclose(snapshot.state.params, params.numpy(), rtol=1e-9, atol=1e-12)
        opt.step()
    assert np.isnan(snapshots[-1].update_norm)
    assert snapshots[0].update_norm > 0


def test_losses_and_predictions_share_one_forward_pass():
    class Counting(tiny.Tiny):
        passes = 0

        def model(self):
            model = super().model()
            model.register_forward_hook(lambda *_: setattr(Counting, "passes", Counting.passes + 1))
            return model

    session = TorchBackend().open(Counting(), "cpu")
    training = Training("gd", 0.1, 4, wants_losses=lambda step: True)
    steps = session.train(training, session.initial(0))
    Counting.passes = 0  # those that opening took
    list(steps)
    assert Counting.passes == 5


def test_measuring_elsewhere_leaves_the_training_state_alone():
    session, start = open_double(tiny.Tiny(norm=True))
    before = session.state(0)
    session.losses([State(0, start.params + 1, start.buffers)])
    session.top_eigenpairs(State(0, start.params + 1, start.buffers), 1, 1e-2)
    np.testing.assert_array_equal(session.state(0).params, before.params)
    np.testing.assert_array_equal(session.state(0).buffers, before.buffers)


def test_batch_norm_measures_with_the_chunks_it_trained_on():
    session, start = open_double(tiny.Tiny(norm=True), batch_size=20)
    training = Training("gd", 0.3, 5, wants_losses=lambda step: True, wants_state=lambda step: True)
    last = list(session.train(training, start))[-1]
    np.testing.assert_allclose(session.losses([last.state])[0][0], last.losses, rtol=1e-6)
    with pytest.raises(OpsigError, match="batch norm goes by chunks"):
        session.sample_sharpness(last.state, np.arange(4), 1e-3)


def test_a_dataset_that_changes_its_items_is_refused():
    with pytest.raises(OpsigError, match="returns another item"):
        TorchBackend().open(tiny.Random(), "cpu")


def test_reduced_losses_are_refused():
    session = TorchBackend().open(tiny.Reduced(), "cpu")
    with pytest.raises(OpsigError, match="one unreduced loss a sample"):
        session.losses([session.initial(0)])


def test_a_device_that_is_absent_is_an_error_and_never_another_device():
    with pytest.raises(UsageError, match="no device is called 'tpu'"):
        TorchBackend().open(tiny.Tiny(), "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(OpsigError, match="no CUDA device"):
            TorchBackend().open(tiny.Tiny(), "cuda")


@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_sample_of_weight_zero_is_left_out_of_training_and_no_other_counts_for_more(batch_size):
    """One step of descent goes along the weighted sum of the samples' own gradients over the number of all of them."""
    from opsig_cli.backends import minibatch

    session, state = open_double(tiny.Tiny(), 13)
    trained = np.arange(session.samples) if batch_size is None else minibatch(session.samples, batch_size, 0, 0)
    weights = np.ones(session.samples)
    weights[trained[:3]], weights[trained[3]] = 0, 0.5
    rows = autograd_gradients(session, state, trained)

    def stepped(weights):
        wants = {"wants_state": lambda step: True}
        training = Training("sgd", 0.5, 1, batch_size=batch_size, weights=weights, **wants)
        return list(session.train(training, state))

    before, after = stepped(weights)
    expected = state.params - 0.5 * (weights[trained] @ rows) / len(trained)
    np.testing.assert_allclose(after.state.params, expected, atol=1e-12)
    losses = session.losses([state])[0][0][trained]
    assert before.train_loss == pytest.approx(float(weights[trained] @ losses) / len(trained), rel=1e-6)
    np.testing.assert_array_equal(stepped(np.ones(session.samples))[1].state.params, stepped(None)[1].state.params)
    with pytest.raises(UsageError, match="3 weights are not one for each of the"):
        next(session.train(Training("sgd", 0.5, 1, weights=np.ones(3)), state))
