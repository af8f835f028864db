"""Models of which a part is trained: what is frozen never moves, is in no derivative, and is kept once."""

import shutil

import h5py
import numpy as np
import pytest
import torch
from opsig_torch import TorchBackend
from tasks import partly
from torch import nn
from torch.func import functional_call

from opsig_cli.backends import State, Training
from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.recorder import Recorder
from opsig_cli.trajectory.states import read_state

TASKS = {"Head": partly.Head, "Adapted": partly.Adapted}


def named(task: str) -> tuple[str, str]:
    return "--task", f"{partly.__file__}:{task}"


def opened(task, **options):
    """A session in float64 away from the initial state, where an adapter's second matrix is 0."""
    session = TorchBackend().open(task, "cpu", double=True, **options)
    state = session.initial(0)
    moved = state.params + 0.1 * np.random.default_rng(0).standard_normal(len(state.params))
    return session, State(0, moved, state.buffers, frozen=state.frozen)


def reference(session, state):
    """Losses (S,) as a function of the trained vector (P,), by torch alone and with the model's own tensors."""
    torch.manual_seed(0)
    model = session.task.model().double()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inputs, labels = session.task.x.double(), session.task.y

    def losses(vector):
        parts = vector.split([p.numel() for p in trained.values()])
        new = {name: part.view(p.shape) for (name, p), part in zip(trained.items(), parts, strict=True)}
        logits = functional_call(model, new, (inputs,))
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    return losses, torch.from_numpy(state.params)


@pytest.mark.parametrize("task", TASKS.values())
def test_every_derivative_is_over_what_is_trained(task):
    session, state = opened(task(), batch_size=25)
    losses, at = reference(session, state)
    everybody = np.arange(session.samples)
    gradients = torch.autograd.functional.jacobian(losses, at).numpy()
    dense = torch.autograd.functional.hessian(lambda v: losses(v).mean(), at).numpy()
    np.testing.assert_allclose(session.gradient(state), gradients.mean(0), atol=1e-12)
    norms = np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(session.gradient_norms(state), norms, rtol=1e-9)
    unit = gradients / norms[:, None]
    np.testing.assert_allclose(session.gradient_cosines(state, everybody), unit @ unit.T, atol=1e-9)
    sets = [np.arange(5), np.arange(10, 30)]
    means = np.stack([(unit @ unit[chosen].T).mean(1) for chosen in sets], 1)
    np.testing.assert_allclose(session.mean_cosines(state, everybody, sets), means, atol=1e-9)
    sketch = TorchBackend().open(task(), "cpu").gradient_sketch(state, everybody, 512, 0).astype(float)
    assert np.abs(sketch @ sketch.T - unit @ unit.T).max() < 0.35
    values, vectors = np.linalg.eigh(dense)
    found = session.top_eigenpairs(state, 2, 1e-7)
    np.testing.assert_allclose(found.values, values[::-1][:2], rtol=1e-6)
    assert abs(found.vectors[0] @ vectors[:, -1]) == pytest.approx(1, abs=1e-6)
    direction = vectors[:, -1] + vectors[:, 0]
    loss, slope, curvature = session.curvature_along(state, direction)
    np.testing.assert_allclose(loss, losses(at).numpy(), rtol=1e-9)
    np.testing.assert_allclose(slope, gradients @ direction, atol=1e-10)
    assert curvature.mean() == pytest.approx(direction @ dense @ direction, abs=1e-10)
    for sample in (3, 40):
        own = torch.autograd.functional.hessian(lambda v, i=sample: losses(v)[i], at).numpy()
        value, _ = session.sample_sharpness(state, np.array([sample]), 1e-7)
        assert value[0] == pytest.approx(np.linalg.eigvalsh(own)[-1], rel=1e-6)
        assert curvature[sample] == pytest.approx(direction @ own @ direction, abs=1e-10)


def test_a_heads_sharpness_is_that_of_its_closed_form():
    """Mean of (diag(p) - p p') and the outer product of what enters the head, 1 for its bias."""
    session, state = opened(partly.Head())
    with session.at(state), torch.no_grad():
        base = session.flat.model[:2](session.task.x.double())
        p = session.flat.model(session.task.x.double()).softmax(1)
    entering = torch.cat([base, base.new_ones(len(base), 1)], 1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    matrix = torch.einsum("sab,sf,sg->afbg", blocks, entering, entering).reshape(51, 51) / len(p)
    assert session.top_eigenpairs(state, 1, 1e-8).values[0] == pytest.approx(
        float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-9
    )


def test_a_single_trained_number_has_its_second_derivative():
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(8, 3).requires_grad_(False)
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.scale * self.base(x)

    class Scaled(partly.Head):
        def model(self):
            return Temperature()

    session, state = opened(Scaled())
    losses, at = reference(session, state)
    dense = torch.autograd.functional.hessian(lambda v: losses(v).mean(), at)
    assert session.top_eigenpairs(state, 1, 1e-7).values[0] == pytest.approx(dense.item())


def test_chunks_statistics_and_frozen_norms_go_together():
    session, state = opened(partly.Normed(), batch_size=20)
    everybody = np.arange(session.samples)
    rows = []
    with session.at(state):
        for _, batch in session.batches:
            for loss in session.task.losses(session.flat.model, batch):
                parts = torch.autograd.grad(loss, session.flat.parameters, retain_graph=True)
                rows.append(torch.cat([part.reshape(-1) for part in parts]).numpy())
    unit = np.stack(rows) / np.linalg.norm(rows, axis=1)[:, None]
    assert unit.shape == (60, 16 * 8 + 8 + 8 + 8 + 8 * 3 + 3)
    np.testing.assert_allclose(session.gradient_cosines(state, everybody), unit @ unit.T, atol=1e-9)
    assert np.isfinite(session.gradient_norms(state)).all()


# -- training


OPTIMIZERS = {
    "gd": ({"weight_decay": 0.1}, lambda p: torch.optim.SGD(p, 0.2, weight_decay=0.1)),
    "momentum": ({"weight_decay": 0.1}, lambda p: torch.optim.SGD(p, 0.2, 0.9, weight_decay=0.1)),
    "adam": ({"weight_decay": 0.1}, lambda p: torch.optim.Adam(p, 0.2, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_steps_what_torch_steps_and_nothing_frozen(name):
    options, make = OPTIMIZERS[name]
    session, state = opened(partly.Adapted())
    before = state.frozen.copy()
    training = Training(name, 0.2, 5, wants_state=lambda step: step == 5, **options)
    last = list(session.train(training, state))[-1].state
    torch.manual_seed(0)
    model = session.task.model().double()
    trained = [p for p in model.parameters() if p.requires_grad]
    nn.utils.vector_to_parameters(torch.from_numpy(state.params), trained)
    optimizer = make(model.parameters())  # torch leaves out what has no gradient
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(session.task.x.double()), session.task.y).backward()
        optimizer.step()
    np.testing.assert_allclose(last.params, nn.utils.parameters_to_vector(trained).detach(), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(last.frozen, before)
    frozen = [p.detach().reshape(-1) for p in session.flat.model.parameters() if not p.requires_grad]
    np.testing.assert_array_equal(torch.cat(frozen), before)
    assert all(len(row) == len(state.params) for row in last.optimizer.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_no_loss_depends_on_does_not_decay(name):
    """torch.optim leaves out what has no gradient, of which weight decay is a part."""
    options, make = OPTIMIZERS[name]
    session, state = opened(partly.Unreached())
    last = list(session.train(Training(name, 0.2, 5, wants_state=lambda step: step == 5, **options), state))[-1].state
    torch.manual_seed(0)
    model = session.task.model().double()
    nn.utils.vector_to_parameters(torch.from_numpy(state.params), model.parameters())
    optimizer = make(model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        session.task.losses(model, [session.task.x.double(), session.task.y]).mean().backward()
        optimizer.step()
    expected = nn.utils.parameters_to_vector(model.parameters()).detach()
    np.testing.assert_allclose(last.params, expected, rtol=1e-9, atol=1e-12)


def test_states_with_other_frozen_weights_are_measured_with_their_own():
    session, state = opened(partly.Head())
    other = State(0, state.params, state.buffers, frozen=1.5 * state.frozen)
    direction = np.random.default_rng(1).standard_normal(len(state.params))
    samples = np.arange(10)

    def measured(s, at):
        return s.losses([at])[0][0], s.curvature_along(at, direction)[2], s.gradient_cosines(at, samples)

    first = measured(session, state)
    changed = measured(session, other)
    fresh, _ = opened(partly.Head())
    for got, again, alone, anew in zip(changed, measured(session, state), measured(fresh, other), first, strict=True):
        np.testing.assert_allclose(got, alone, rtol=1e-12)
        np.testing.assert_allclose(again, anew, rtol=1e-12)
        assert np.abs(got - again).max() > 1e-3
    assert session.state(0).frozen is state.frozen


def test_a_model_with_nothing_to_train_is_refused(opsig, tmp_path):
    opsig("train", *named("AllFrozen"), "-o", tmp_path / "r.h5").fails(1, "requires_grad is False for all")
    assert not (tmp_path / "r.h5").exists()


def test_frozen_integers_that_a_float_does_not_hold_are_refused():
    class Coded(partly.Head):
        def model(self):
            model = super().model()
            model.codes = nn.Parameter(torch.tensor([7, code]), requires_grad=False)
            return model

    code = 127
    assert TorchBackend().open(Coded(), "cpu").initial(0).frozen[1] == 127
    code = 2**24 + 1
    with pytest.raises(OpsigError, match="codes holds integers"):
        TorchBackend().open(Coded(), "cpu").initial(0)


# -- the file and the commands


@pytest.fixture(scope="module", params=TASKS)
def run(request, tmp_path_factory):
    """A tracked run with weight decay, made once; tests copy it before they change it."""
    from conftest import start_opsig

    path = tmp_path_factory.mktemp("partly") / "run.h5"
    options = ("--learning-rate", 0.3, "--weight-decay", 0.1, "--steps", 12, "--checkpoint-every", 4, "--track")
    process = start_opsig("train", *named(request.param), *options, "-o", path)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return path, request.param


def test_frozen_weights_are_stored_once_and_checkpoints_hold_what_is_trained(run):
    path, task = run
    torch.manual_seed(0)
    model = TASKS[task]().model()
    with open_trajectory(path) as kept:
        assert kept.attributes["schema_version"] >= "1.1"
        kinds = dict(zip(kept.read("layout/name").tolist(), kept.read("layout/kind").tolist(), strict=True))
        states = [read_state(kept, step) for step in kept.steps("checkpoints")]
        shares = {name: kind for name, kind in kinds.items() if kind == "parameter"}
    assert kinds == {n: "parameter" if p.requires_grad else "frozen" for n, p in model.named_parameters()}
    frozen = torch.cat([p.reshape(-1) for p in model.parameters() if not p.requires_grad])
    trained = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    assert len(shares) == sum(p.requires_grad for p in model.parameters())
    np.testing.assert_array_equal(states[0].frozen, frozen)
    assert all(state.frozen is states[0].frozen for state in states)
    np.testing.assert_array_equal(states[0].params, trained)
    assert np.abs(states[-1].params - states[0].params).max() > 0.01
    with h5py.File(path) as file:
        assert file["checkpoints/params"].shape == (4, len(trained))
        assert file["frozen/params"].dtype == np.float32


def test_every_command_takes_a_model_that_is_trained_in_part(run, opsig, tmp_path):
    path, task = run
    file, own = shutil.copy(path, tmp_path / "run.h5"), named(task)

    def records(*arguments, stdin=""):
        outcome = opsig(*arguments, "--format", "json", stdin=stdin)
        assert outcome.code == 0, outcome.err
        return outcome.records

    (info,) = records("info", file)
    model = TASKS[task]().model()
    assert info["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert info["frozen_parameters"] == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    first = records("sharpness", file, *own, "-k", 2, "--steps", "4:12")[0]
    assert set(first["layer_fraction"]) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(first["layer_fraction"].values()) == pytest.approx(1)
    metrics = "gradient_norm,curvature,sample_sharpness"
    mined = opsig("mine", file, "--top", 3).out
    assert len(records("sharpness", "-", *own, "--metrics", metrics, "--steps", 12, stdin=mined)) == 3
    records("sharpness", file, *own, "--metrics", "trace,critical_sharpness", "--steps", 12)
    records("sharpness", file, *own, "--slice", 12)
    for sketch in ((), ("--sketch", 512)):
        assert {r["kind"] for r in records("cluster", file, *own, *sketch)} & {"member", "pair", "group"}
    records("probe", file, *own, "--input", "color:sky", "--steps", 12)
    records("report", file, *own, "-o", tmp_path / "r.html")
    assert "frozen" in (tmp_path / "r.html").read_text()
    (compared, _) = records("compare", file, path, "--test", own[1])
    assert compared["accuracy"] == compared["test_accuracy"]
    assert all(record["reason"] is None for record in records("verify", file))
    records("repack", file, "-o", tmp_path / "small.h5")
    records("track", tmp_path / "small.h5", *own)
    with open_trajectory(tmp_path / "small.h5") as small, open_trajectory(path) as large:
        np.testing.assert_array_equal(small.frozen, large.frozen)


def test_a_resumed_run_and_one_that_is_like_it_begin_with_its_frozen_weights(opsig, tmp_path):
    whole, part, like = (tmp_path / name for name in ("whole.h5", "part.h5", "like.h5"))
    options = (*named("Adapted"), "--optimizer", "adam", "--learning-rate", 0.05, "--seed", 3)
    opsig("train", *options, "--steps", 8, "--checkpoint-every", 4, "-o", whole)
    opsig("train", *options, "--steps", 4, "--checkpoint-every", 4, "-o", part)
    assert opsig("train", *named("Adapted"), "-o", part, "--resume", "--steps", 8).code == 0
    assert opsig("train", *named("Adapted"), "--like", whole, "--seed", 7, "--steps", 1, "-o", like).code == 0
    with open_trajectory(whole) as a, open_trajectory(part) as b, open_trajectory(like) as c:
        np.testing.assert_array_equal(read_state(a, 8).params, read_state(b, 8).params)
        np.testing.assert_array_equal(a.frozen, b.frozen)
        np.testing.assert_array_equal(a.frozen, c.frozen)
        np.testing.assert_array_equal(read_state(a, 0).params, read_state(c, 0).params)


def test_rounded_checkpoints_leave_frozen_weights_exact(opsig, tmp_path):
    path = tmp_path / "run.h5"
    opsig("train", *named("Head"), "--steps", 2, "--checkpoint-dtype", "bfloat16", "-o", path)
    torch.manual_seed(0)
    base = partly.Head().model()[0]
    with open_trajectory(path) as kept:
        np.testing.assert_array_equal(kept.frozen, torch.cat([base.weight.flatten(), base.bias]))


def test_what_was_trained_cannot_be_measured_as_frozen_nor_the_other_way_round(opsig, tmp_path, run):
    whole = tmp_path / "whole.h5"
    opsig("train", *named("Unfrozen"), "--steps", 1, "-o", whole)
    opsig("sharpness", whole, *named("Head")).fails(1, "0.weight trained", "freezes it")
    opsig("train", *named("Head"), "-o", whole, "--resume", "--steps", 2).fails(1, "0.weight trained", "freezes it")
    path, task = run
    if task == "Head":
        opsig("sharpness", path, *named("Unfrozen")).fails(1, "0.weight frozen", "trains it")


def test_a_recorder_refuses_frozen_weights_that_moved(tmp_path):
    frozen = np.arange(3, dtype=np.float32)
    with Recorder(tmp_path / "r.h5", 2) as recorder:
        for step in (0, 1):
            recorder.record(step, state=State(step, np.zeros(2, np.float32), np.empty(0), frozen=frozen.copy()))
        with pytest.raises(OpsigError, match="What changes is trained"):
            recorder.record(2, state=State(2, np.zeros(2, np.float32), np.empty(0), frozen=frozen + 1))
    with open_trajectory(tmp_path / "r.h5") as kept:
        assert kept.steps("checkpoints").tolist() == [0, 1]
        np.testing.assert_array_equal(read_state(kept, 1).frozen, frozen)


# -- importing


def checkpoints(folder, task=partly.Adapted, save=lambda name, parameter: True, steps=(0, 1, 2), over="all"):
    """Checkpoints of a loop of one's own by Adam; `save` says which tensors are kept."""
    torch.manual_seed(5)
    model = task().model()
    data = task()
    given = model.parameters() if over == "all" else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(given, 0.05)
    parameters = dict(model.named_parameters())
    states = []
    for step in steps:
        weights = {n: v.clone() for n, v in model.state_dict().items() if save(n, parameters.get(n))}
        path = folder / f"step_{step}.pt"
        torch.save({"model": weights, "optimizer": optimizer.state_dict(), "step": step}, path)
        states.append({n: v.clone() for n, v in model.state_dict().items()})
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.x), data.y).backward()
        optimizer.step()
    return sorted(folder.glob("step_*.pt")), states


@pytest.mark.parametrize("over", ["all", "trained"])
def test_checkpoints_are_imported_with_frozen_weights_once(opsig, tmp_path, over):
    paths, states = checkpoints(tmp_path, over=over)
    run = tmp_path / "run.h5"
    outcome = opsig("import", *paths, *named("Adapted"), "--track", "-o", run, "--format", "json")
    assert outcome.code == 0, outcome.err
    assert outcome.records[2]["optimizer_state"] == ["exp_avg", "exp_avg_sq"]
    trained = [n for n, p in partly.Adapted().model().named_parameters() if p.requires_grad]
    with open_trajectory(run) as kept:
        for step, state in enumerate(states):
            found = read_state(kept, step)
            np.testing.assert_array_equal(found.params, torch.cat([state[name].flatten() for name in trained]))
            np.testing.assert_array_equal(
                found.frozen, torch.cat([v.flatten() for n, v in state.items() if n not in trained])
            )
        session = TorchBackend().open(partly.Adapted(), "cpu", None, "running")
        np.testing.assert_allclose(session.losses([found])[0][0], kept.row("losses/loss", 2), rtol=1e-6)
    assert opsig("sharpness", run, *named("Adapted"), "--steps", 2).code == 0


def test_checkpoints_of_what_is_trained_alone_take_the_base_from_the_model(opsig, tmp_path):
    paths, _ = checkpoints(tmp_path, save=lambda name, parameter: parameter.requires_grad)
    run = tmp_path / "run.h5"
    outcome = opsig("import", *paths, *named("Adapted"), "-o", run)
    assert outcome.code == 0, outcome.err
    assert "left as the model makes them: 0.base.weight" in outcome.err
    torch.manual_seed(0)
    with open_trajectory(run) as kept:
        np.testing.assert_array_equal(kept.frozen[:128], partly.Adapted().model()[0].base.weight.detach().flatten())


def test_checkpoints_with_other_frozen_weights_are_refused_before_anything_is_written(opsig, tmp_path):
    paths, states = checkpoints(tmp_path)
    run = tmp_path / "run.h5"
    other = tmp_path / "step_3.pt"
    torch.save({"model": states[2] | {"3.base.bias": states[2]["3.base.bias"] + 1}, "step": 3}, other)
    words = (f"{other} has another 3.base.bias than {paths[0]}", "freezes it")
    opsig("import", *paths, other, *named("Adapted"), "-o", run, "--quiet").fails(1, *words)
    assert not run.exists()
    opsig("import", *paths[:2], *named("Adapted"), "-o", run)
    outcome = opsig("import", other, *named("Adapted"), "-o", run, "--append")
    assert outcome.code == 1
    assert f"has another 3.base.bias than {run}" in outcome.err
    assert opsig("import", paths[2], *named("Adapted"), "-o", run, "--append").code == 0
    outcome = opsig("import", paths[2], *named("Unfrozen"), "-o", run, "--append")
    assert outcome.code == 1
