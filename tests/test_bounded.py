"""Measuring within a bound of memory. P parameters, N basis vectors."""

import gc
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import TASKS
from opsig_torch import captured, eigen, hessian, small_basis
from opsig_torch.hessian import Hessian
from opsig_torch.session import TorchSession
from torch import nn

from opsig_cli import backends, open_trajectory
from opsig_cli.backends import Need, State, Training
from opsig_cli.errors import OpsigError
from opsig_cli.studies import curvature, planning, tracking
from opsig_cli.studies.pace import paced
from opsig_cli.tasks import load, parse_spec

GPT2 = f"{TASKS.parent / 'gpt2.py'}:GPT2"


def matrix(size: int, seed: int) -> torch.Tensor:
    """A symmetric one whose top eigenvalues stand out and whose lowest is the largest in size."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    values = torch.cat([torch.tensor([5.0, 4.0, 3.5, -9.0]), torch.linspace(-1, 2, size - 4)]).double()
    return basis @ torch.diag(values) @ basis.T


@pytest.mark.parametrize(("count", "room"), [(1, 5), (2, 7), (3, 9), (3, 12)])
def test_few_vectors_find_what_many_do_at_half_as_many_products_more_at_most(count, room):
    for seed in range(5):
        h = matrix(120, seed)
        start = torch.randn(120, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        few = small_basis.top_eigenpairs(lambda v, h=h: h @ v, start.clone(), count, 1e-6, room)
        many = small_basis.top_eigenpairs(lambda v, h=h: h @ v, start.clone(), count, 1e-6, 44)
        assert few.converged
        assert np.allclose(few.values, [5.0, 4.0, 3.5][:count], rtol=1e-9)
        residual = (h @ few.vectors.T - few.vectors.T * torch.from_numpy(few.values)).norm(dim=0).numpy()
        assert np.allclose(residual / few.values, few.residuals, atol=1e-9)
        assert few.products <= 1.5 * many.products + 1, (few.products, many.products)


def test_a_space_that_is_exhausted_is_no_end_of_the_search():
    diagonal = torch.tensor([2.0, -3.0, 1.0], dtype=torch.float64)
    for start in ([0.0, 1.0, 0.0], [1.0, 1.0, 1.0]):  # from the first of them nothing but -3 is seen
        found = small_basis.top_eigenpairs(lambda v: diagonal * v, torch.tensor(start).double(), 1, 1e-8, 5)
        assert np.allclose(found.values, [2.0])


@pytest.mark.parametrize("size", [40, 70, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_to_one_side_of_zero_keep_the_basis_orthogonal(size, dtype):
    generator = torch.Generator().manual_seed(size)
    values = torch.linspace(-0.1, -1.5, size, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    h = (basis @ torch.diag(values) @ basis.T).to(dtype)
    for count in (1, 5):
        start = torch.randn(size, generator=generator, dtype=dtype)
        room = hessian.basis_room(count, size)
        found = small_basis.top_eigenpairs(lambda v: h @ v, start, count, 1e-3, room)
        assert found.converged
        np.testing.assert_allclose(found.values, values[:count], rtol=2e-3)


def test_a_basis_cut_back_as_often_as_there_are_parameters_has_not_seen_all_of_them():
    values = torch.linspace(1, 2, 100, dtype=torch.float64)
    start = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = small_basis.top_eigenpairs(lambda v: values * v, start, 1, 1e-9, 5)
    assert found.converged
    assert found.products > 100
    assert (found.residuals <= 1e-9).all()


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
def test_equal_eigenvalues_and_units_of_any_size_are_found_with_few_vectors(unit):
    diagonal = torch.cat([torch.full((3,), 5.0), torch.full((2,), -9.0), torch.full((295,), 1.0)]) * unit
    start = torch.randn(300, generator=torch.Generator().manual_seed(1))
    found = small_basis.top_eigenpairs(lambda v: diagonal * v, start, 4, 1e-4, 56)
    assert np.allclose(found.values / unit, [5, 5, 5, 1], rtol=1e-5)
    assert found.converged


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-4])
def test_an_eigenvalue_that_the_start_hardly_contains_is_not_passed_over(share):
    values = torch.cat([torch.tensor([40.0, 30.0, 24.0, 20.0, 16.0, 13.0]), torch.linspace(-1, 1, 994)])
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0)) / 100
    start[:6] = torch.tensor([1.0, 0.8, 0.6, 0.5, share, 0.5])
    solution = small_basis.top_eigenpairs(lambda v: values * v, start, 5, 1e-3, 40)
    np.testing.assert_allclose(solution.values, values[:5], rtol=1e-3)


@pytest.mark.parametrize("share", [1e-2, 1e-3])
def test_the_top_one_is_not_passed_over_either(share):
    values = torch.cat([torch.tensor([20.0, 19.0, 12.0, 9.0, 6.0, 4.0]), torch.linspace(-1, 1, 994)])
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0)) / 100
    start[:6] = torch.tensor([share, 0.8, 0.6, 0.5, 0.3, 0.5])
    solution = small_basis.top_eigenpairs(lambda v: values * v, start, 1, 1e-3, 40)
    np.testing.assert_allclose(solution.values, values[:1], rtol=1e-3)


def test_a_solve_takes_the_memory_it_is_given_and_says_what_it_lacks(tiny_run, tmp_path, opsig, monkeypatch):
    session = TorchSession(load(parse_spec(f"{TASKS}:Tiny"))[0], "cpu")
    state = session.initial(0)
    unbounded = session.top_eigenpairs(state, 1, 1e-4)
    monkeypatch.setattr(hessian, "vectors_that_fit", lambda opened: 8)
    bounded = session.top_eigenpairs(state, 1, 1e-4)
    monkeypatch.undo()
    assert np.allclose(bounded.values, unbounded.values, rtol=1e-6)
    assert bounded.products <= 1.5 * unbounded.products
    assert abs(bounded.vectors[0] @ unbounded.vectors[0]) > 1 - 1e-5
    run = tmp_path / "run.h5"
    run.write_bytes(tiny_run.read_bytes())
    task = ["--task", f"{TASKS}:Tiny"]
    opsig("sharpness", run, *task, "--at", "iterate", "--steps", 0, "--memory", "64MiB", "-q").fails(
        1, "419 parameters", "of 64.0 MiB are left", "Give --memory", "or a smaller -k"
    )
    opsig("sharpness", run, *task, "--memory", "much").fails(2, "--memory 'much' is no size. Write --memory 12GiB")
    plan = opsig("sharpness", run, *task, "--plan", "--memory", "64MiB")
    assert plan.records[0]["fits"] is False
    assert plan.records[0]["memory_bound"] == 64 << 20
    assert "needs at least" in plan.err
    assert opsig("track", run, *task, "--plan").code == 0


MEASURING = {
    "track": [],
    "cluster": ["--test", "none"],
    "sharpness": ["--metrics", "gradient_norm,curvature,sample_sharpness", "--steps", "21"],
    "sharpness ": ["--metrics", "trace,critical_sharpness", "--steps", "21"],
    "sharpness  ": ["--name", "-k", "2"],
    "sharpness   ": ["--slice", "21"],
    "branch": ["--from", "21", "--steps", "3", "--drop", "1,2"],
}


@pytest.mark.parametrize("command", MEASURING)
def test_a_plan_is_made_before_the_work_and_what_does_not_fit_is_refused(command, tiny_run, tmp_path, opsig):
    run, branch = tmp_path / "run.h5", tmp_path / "branch.h5"
    with h5py.File(tiny_run) as source, h5py.File(run, "w") as copy:
        for name in source:
            if not (command == "track" and name == "losses"):
                source.copy(name, copy)
        copy.attrs.update(source.attrs)
        before = list(copy)
    asked = [command.strip(), run, *MEASURING[command], "--task", f"{TASKS}:Tiny", "-q"]
    asked += ["-o", branch] if command == "branch" else []
    plan = opsig(*asked, "--plan")
    assert plan.code == 0, plan.err
    (record,) = plan.records
    assert record["fits"] is True
    assert record["passes"] > 0
    assert 0 < record["memory_least"] <= record["memory_most"]
    refused = opsig(*asked, "--memory", "64MiB")
    refused.fails(1, "Give --memory")
    assert refused.err.count("\n") == 1
    assert opsig(*asked, "--plan", "--memory", "64MiB").records[0]["fits"] is False
    with h5py.File(run) as after:
        assert sorted(after) == sorted(before)  # no losses, slopes or eigenvalues were begun
    assert not branch.exists()


PEAK = """
import sys
from opsig_cli.main import run

sys.argv[0], code = "opsig", 0
try:
    run()
except SystemExit as end:
    code = end.code
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
sys.exit(code)
"""
"""Runs a command and prints the KiB of its peak, not that of the process which started it."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are had from Linux alone")
@pytest.mark.parametrize("command", [("cluster", "--test", "none"), ("sharpness", "--steps", "21", "--at", "iterate")])
def test_a_process_stays_within_the_least_that_its_plan_asks_for(command, tiny_run, tmp_path):
    def run(*options: str) -> list[str]:
        path = tmp_path / "run.h5"
        path.write_bytes(tiny_run.read_bytes())
        asked = [command[0], str(path), *command[1:], "--task", f"{TASKS}:Tiny", "-q", "--format", "json", *options]
        done = subprocess.run([sys.executable, "-c", PEAK, *asked], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    least = json.loads(run("--plan")[0])["memory_least"]
    *records, peak = run("--memory", f"{least + (1 << 20)}B")
    *whole, _ = run()
    assert int(peak) << 10 <= least + (1 << 20)
    assert len(records) == len(whole)


def test_a_refusal_says_how_many_would_fit():
    tracking.MEMORY.set(None)

    class Session:
        device_name = "cpu"

        def needs(self, what, count, state):
            return Need(100 + count**2, 200 + count**2, 1000, 1.0)

    def stages(count: int) -> list[planning.Stage]:
        return [planning.Stage("losses", 3), planning.Stage("gradients", 2, count, host=50)]

    state = State(0, np.zeros(1, np.float32), np.empty(0))
    planning.require(Session(), "cluster", stages(29), state)  # pyright: ignore
    counted = planning.Count("--top", 30, stages)
    with pytest.raises(
        OpsigError, match=r"cluster needs at least 1.0 KiB and 1000 B can be had. Give --top 29, or --mem"
    ):
        planning.require(Session(), "cluster", stages(30), state, counted)  # pyright: ignore
    found = planning.plan("run.h5", Session(), "torch", "cluster", stages(3), state, 5, 7, counted)[0]  # pyright: ignore
    assert (found["passes"], found["memory_least"], found["memory_most"], found["disk"]) == (5.0, 159, 259, 7)


@pytest.mark.parametrize("task", [f"{TASKS}:Tiny", f"{TASKS.parent.parent / 'token_task.py'}:Digits"])
def test_a_batch_is_cut_where_its_graph_does_not_fit(task):
    session = TorchSession(load(parse_spec(task))[0], "cpu")
    state = session.initial(0)
    whole, vector = session.gradient_norms(state), np.ones((1, len(state.params)), np.float32)
    product = session.hessian_vectors(state, vector)
    for order in (1, 2):
        session.kept["item bytes", order] = session.bound() // 40  # five items are an eighth
    assert session.fitting_batch(1) == session.fitting_batch(2) == 4
    assert np.allclose(session.gradient_norms(state), whole, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert np.allclose(session.hessian_vectors(state, vector), product, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("bound", "times"), [(320 << 20, 1), (160 << 10, 2)], ids=["kept", "made anew"])
def test_graphs_of_cut_batches_are_kept_where_they_fit_beside_the_vectors_of_a_solve(bound, times):
    session = TorchSession(load(parse_spec(f"{TASKS}:Tiny"))[0], "cpu")
    session.initial(0)
    session.taken = lambda: 0  # nothing but what is measured
    session.memory, session.kept["item bytes", 2] = bound, bound // 40  # four items a batch
    session.kept["kept derivatives"] = True  # so that they are not held against plain ones first
    session.inference_batch()  # runs a few items
    runs = []
    session.flat.model.register_forward_hook(lambda *_: runs.append(1))
    product = Hessian(session)
    runs.clear()
    for _ in range(2):
        product(torch.ones_like(session.flat.vector))
    assert len(runs) == times * -(-session.items // 4)


class Bends(nn.Module):
    """Functions that keep their own output for the derivative."""

    def forward(self, x):
        return x.tanh().softmax(1).exp()


def test_nothing_of_a_graph_is_left_behind():
    class Bent(load(parse_spec(f"{TASKS}:Tiny"))[0].__class__):
        def model(self):
            return nn.Sequential(nn.Linear(5, 16), Bends(), nn.Linear(16, 3))

    def held() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    session = TorchSession(Bent(), "cpu", 7)
    state = session.initial(0)
    session.top_eigenpairs(state, 1, 1e-2)
    before = held()
    for _ in range(2):
        session.kept.clear()  # a batch's graph is measured anew
        session.top_eigenpairs(state, 1, 1e-2)
    assert held() <= before + 2


def test_transposed_weights_and_a_tied_embedding_are_captured():
    pytest.importorskip("transformers", reason="GPT-2 is of transformers")
    session = TorchSession(load(parse_spec(GPT2))[0], "cpu")
    state = session.initial(0)
    with session.at(state):
        plan = captured.gradient_plan(session)
        assert plan.loose == ["transformer.wpe.weight"]  # entered once for all samples
        exact = []
        for sample in range(session.samples):
            loss = session.batch_losses(session.batches.take([sample]))[0]
            parts = torch.autograd.grad(loss, session.flat.parameters, materialize_grads=True)
            exact.append(torch.cat([part.reshape(-1) for part in parts]))
    rows = torch.stack(exact).double()
    assert np.allclose(session.gradient_norms(state), rows.norm(dim=1), rtol=1e-5)
    unit = rows / rows.norm(dim=1, keepdim=True)
    everybody = np.arange(session.samples)
    assert np.allclose(session.gradient_cosines(state, everybody), unit @ unit.T, atol=1e-5)
    found = session.mean_cosines(state, everybody, [np.arange(3)])
    assert np.allclose(found[:, 0], (unit @ unit[:3].mean(0)).numpy(), atol=1e-5)


def test_random_starts_are_of_length_one_and_the_same_whatever_the_pieces(monkeypatch):
    like = torch.empty(1000)
    whole = eigen.random_start(like, 3)
    monkeypatch.setattr(eigen, "AT_ONCE", 160)
    assert torch.allclose(eigen.random_start(like, 3), whole, atol=1e-7)


def test_a_bar_moves_with_passes_and_ends_where_the_parts_do():
    class Session:
        passes = backends.Passes()

    for together, length, parts in ((1, 4, 3), (1, 20, 3), (3, 3, 6), (2, 12, 4)):
        shown = []
        with paced(Session(), lambda count=1, note="", to=shown: to.append(count), parts, 8, together) as advance:  # pyright: ignore
            for _ in range(0, parts, together):
                for _ in range(length):
                    Session.passes.heard(0.5)
                    Session.passes.heard(0.5)
                    assert sum(shown) < parts
                for _ in range(together):
                    advance(note="step")
        assert sum(shown) == pytest.approx(parts)
        assert min(shown) >= 0
        assert sum(0 < count < 1 for count in shown) > parts  # it moved in between
        assert Session.passes.heard is backends.unheard


def test_every_measurement_says_what_goes_through_the_model():
    session = TorchSession(load(parse_spec(f"{TASKS}:Tiny"))[0], "cpu", 16)
    state, heard = session.initial(0), []
    session.losses([state])  # what a batch may be is found out once
    session.passes.heard = heard.append
    session.losses([state, state])
    assert sum(heard) == pytest.approx(2)
    heard.clear()
    found = session.top_eigenpairs(state, 1, 1e-3)
    assert found.products <= sum(heard) <= found.products + 3
    heard.clear()
    list(session.train(Training("gd", 0.1, 5, wants_losses=lambda step: True), state))
    assert sum(heard) == pytest.approx(6)


def test_losses_are_measured_at_no_more_checkpoints_at_a_time_than_take_a_second(tiny_run, tmp_path, monkeypatch):
    clock, calls = [0.0], []

    class Session:
        loads = False

        def losses(self, states):
            calls.append(len(states))
            clock[0] += 0.3 * len(states)
            return [(np.zeros(run.samples.size, np.float32), None) for _ in states]

    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    for loads, expected in ((False, [1, 2, 4, 4, 4, 4, 2]), (True, [21])):
        copy = tmp_path / f"{loads}.h5"
        copy.write_bytes(tiny_run.read_bytes())
        Session.loads = loads
        calls.clear()
        with open_trajectory(copy, "r+") as run:
            steps = run.steps("checkpoints")
            run.remove("losses")
            list(tracking.fill_losses(run, Session(), steps, allow_changed_data=True))  # pyright: ignore
        assert calls == expected


def test_gradient_norms_of_a_few_tokens_are_measured_of_these_alone(monkeypatch):
    session = TorchSession(load(parse_spec(f"{TASKS.parent.parent / 'token_task.py'}:Digits"))[0], "cpu")
    state, ids, few = session.initial(0), np.arange(session.samples), np.array([2, 7])
    whole, asked = session.gradient_norms(state), []
    measure = session.gradient_norms
    monkeypatch.setattr(
        session, "gradient_norms", lambda state, samples: (asked.append(samples), measure(state, samples))[1]
    )
    found = curvature._gradient_norms(session, state, ids, few)
    assert np.allclose(found[few], whole[few], rtol=1e-5, equal_nan=True)
    assert np.isnan(np.delete(found, few)).all()
    assert [samples.tolist() for samples in asked] == [[2, 7]]
