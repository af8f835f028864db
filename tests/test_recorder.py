"""The recorder is a contract: what does not fit is refused at once, and nothing that was recorded is dropped."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

import h5py
import numpy as np
import pytest
import torch
from conftest import TASKS
from hypothesis import given, settings
from hypothesis import strategies as st

from opsig_cli import OpsigError, Recorder, State, Tensor, open_trajectory
from opsig_cli.trajectory.states import read_layout, read_state

S = 12
ONES = np.ones(S)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.h5"


class Holder(torch.nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


REFUSED = {
    "too few losses": (dict(losses=np.ones(8)), r"losses must be 12 numbers.*not float64 of shape \(8,\)"),
    "a column of losses": (dict(losses=np.ones((S, 1))), r"losses must be 12 numbers.*shape \(12, 1\)"),
    "text for losses": (dict(losses=["a"] * S), "losses must be 12 numbers"),
    "ragged losses": (dict(losses=[[1], [1, 2]]), "losses is not an array of numbers"),
    "complex losses": (dict(losses=ONES * 1j), "losses must be 12 numbers"),
    "half predictions": (dict(losses=ONES, predictions=ONES / 2), "predictions must be 12 integers"),
    "an unknown class": (dict(losses=ONES, predictions=np.full(S, 3)), "predictions holds 3, .* classes has 3"),
    "a negative class": (dict(predictions=np.full(S, -2)), "predictions holds -2"),
    "an unknown sample": (dict(losses=[1.0], samples=[12]), "samples names 12, which is none of the run's 12"),
    "a sample twice": (dict(losses=[1.0, 2.0], samples=[3, 3]), "samples names a sample twice"),
    "samples of nothing": (dict(samples=[3]), "samples says which samples"),
    "nothing": (dict(), "there is nothing to record at step 4"),
    "many numbers": (dict(scalars={"loss": [1, 2]}), r"scalars\['loss'\] must be one number"),
    "text": (dict(scalars={"loss": "low"}), r"scalars\['loss'\] must be one number"),
    "no name": (dict(scalars={"": 1.0}), "scalars: a name must be text"),
    "a list of scalars": (dict(scalars=[1.0]), "scalars must be numbers by name"),
    "no model": (dict(model="resnet"), "model must be a torch.nn.Module or a tree of JAX's arrays, not str"),
    "no optimizer": (dict(model=torch.nn.Linear(2, 1), optimizer=3), "optimizer must be a torch.optim.Optimizer"),
    "an optimizer alone": (dict(optimizer=3), "optimizer goes with model"),
    "another step": (dict(state=State(3, np.ones(3), np.empty(0))), "state is of step 3, and is recorded at step 4"),
    "a square state": (dict(state=State(4, np.ones((3, 3)), np.empty(0))), "state.params must be numbers in one row"),
    "short moments": (
        dict(state=State(4, np.ones(3), np.empty(0), {"exp_avg": np.ones(2)})), "exp_avg of shape .2,., and not .3,.",
    ),
    "losses without numbers": (dict(losses=torch.ones(S, device="meta")), "losses is not an array of numbers"),
    "a mask over integers": (dict(losses=np.ma.masked_equal(range(S), 3)), "losses has a mask"),
    "a name that is not Unicode": (dict(scalars={"a\udc80": 1.0}), "scalars: 'a.udc80' is not valid Unicode"),
    "a name with a NUL": (dict(scalars={"a\0": 1.0}), "scalars: 'a.x00' holds a NUL character"),
    "a complex model": (dict(model=Holder(torch.ones(2, dtype=torch.complex64))), "model has complex numbers"),
    "a model without numbers": (dict(model=torch.nn.Linear(2, 1, device="meta")), "model is on the device meta"),
    "a model that waits": (dict(model=torch.nn.LazyLinear(3)), "model has 'weight', whose shape is not known before"),
    "a model that trains nothing": (dict(model=torch.nn.ReLU()), "the model trains nothing"),
    "weights for a state": (dict(state=torch.nn.Linear(2, 1).state_dict()), "state must be a State, not OrderedDict"),
    "unknown moments": (
        dict(state=State(4, np.ones(3), np.empty(0), {"third": np.ones(3)})), "state.optimizer.'third'. has no place",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_of_it_is_written(case, path):
    arguments, words = REFUSED[case]
    with Recorder(path, samples=S, classes=["a", "b", "c"]) as recorder:
        recorder.record(3, losses=ONES, scalars={"train_loss": 1.0})
        with pytest.raises(OpsigError, match=words) as refusal:
            recorder.record(4, **{"scalars": {"train_loss": 0.5}} | arguments if arguments else {})
        assert "\n" not in str(refusal.value)
        assert "--" not in str(refusal.value)
    with open_trajectory(path) as run:
        assert {group: run.steps(group).tolist() for group in ("losses", "scalars", "checkpoints", "logged")} == {
            "losses": [3], "scalars": [3], "checkpoints": [], "logged": [],
        }  # fmt: skip


@pytest.mark.parametrize("step", [0.5, -1, "3", None, True, float("nan"), float("inf"), 1 << 70, np.array([1, 2])])
def test_a_step_is_a_whole_number_from_0_on(step, path):
    with Recorder(path, samples=S) as recorder, pytest.raises(OpsigError, match=r"step is .* must be a whole number"):
        recorder.record(step, losses=ONES)


@pytest.mark.parametrize("step", [4, 4.0, np.int32(4), np.float64(4), torch.tensor(4)])
def test_a_step_may_be_of_any_type_of_number(step, path):
    with Recorder(path, samples=S) as recorder:
        recorder.record(step, losses=ONES)
        assert recorder.last_step == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(samples=0), "samples is 0"),
        (dict(samples=[1, 1]), "samples names a sample twice"),
        (dict(samples=2.5), "samples must be dataset indices"),
        (dict(samples=S, labels=["a"] * 5), "labels has 5 entries, and there are 12 samples"),
        (dict(samples=S, labels="abc"), "labels must be a list of text"),
        (dict(samples=S, classes=[]), "classes is empty"),
        (dict(samples=S, labels=["\udc80"] * S), "labels: '.udc80' is not valid Unicode"),
        (dict(samples=S, commit_every=0), "commit_every is 0, and must be a number of calls"),
        (dict(samples=S, attributes=[1]), "attributes must be values by name, not list"),
        (dict(samples=S, attributes={"x": {"y": 1}}), "attributes.'x'. must be text or numbers, not dict"),
        (dict(samples=S, attributes={"settings_json": {"f": open}}), "attributes.'settings_json'. is not a JSON value"),
        (dict(samples=S, resume=True), "does not exist. Leave resume=True out"),
        (dict(samples=S, resume=True, replace=True), "Give one of them"),
    ],
)
def test_a_recorder_that_cannot_be_is_refused_and_leaves_no_file(arguments, words, path):
    with pytest.raises(OpsigError, match=words):
        Recorder(path, **arguments)
    assert not list(path.parent.iterdir())


USES = {
    "record": lambda recorder: recorder.record(1, losses=ONES),
    "observe": lambda recorder: recorder.observe(1, [0], [1.0]),
    "rewind": lambda recorder: recorder.rewind(0),
    "commit": lambda recorder: recorder.commit(),
    "last_step": lambda recorder: recorder.last_step,
}


@pytest.mark.parametrize("use", USES)
def test_a_closed_recorder_says_so_and_how_to_go_on(use, path):
    with Recorder(path, samples=S) as recorder:
        recorder.record(0, losses=ONES)
    assert repr(recorder) == f"Recorder({path}: closed)"
    with pytest.raises(OpsigError, match=r"run.h5 is closed. Go on with it by Recorder\(.*, resume=True\)"):
        USES[use](recorder)


def test_a_forked_child_neither_writes_nor_closes_its_parents_file(path):
    with Recorder(path, samples=S) as recorder:
        recorder.record(0, losses=ONES)
        if not (child := os.fork()):
            refused = 0
            for use in USES.values():
                try:
                    use(recorder)
                except OpsigError as error:
                    refused += "from which this one was forked" in str(error)
            recorder.close()
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(USES)
        recorder.record(1, losses=ONES)
    with open_trajectory(path) as run:
        assert run.steps("losses").tolist() == [0, 1]


def test_what_is_masked_is_not_known(path):
    with Recorder(path, samples=S) as recorder:
        recorder.record(0, losses=np.ma.masked_equal(np.arange(S, dtype=float), 3))
    with open_trajectory(path) as run:
        assert np.flatnonzero(np.isnan(run.row("losses/loss", 0))).tolist() == [3]


def test_a_file_opens_from_the_first_line_on(path):
    recorder = Recorder(path, samples=np.int64(S), labels=range(S))
    with open_trajectory(path) as run:
        assert run.read("samples/label").tolist() == [str(i) for i in range(S)]
    with pytest.raises(OpsigError, match=r"exists. Go on with it by resume=True, or overwrite it by replace=True"):
        Recorder(path, samples=S)
    recorder.close()
    recorder.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_taken_as_they_come(dtype, path):
    losses = (torch.arange(S) / 4).to(dtype).requires_grad_()
    with Recorder(path, samples=S) as recorder:
        recorder.record(0, losses=losses, predictions=torch.arange(S), scalars={"train_loss": losses.mean()})
    with open_trajectory(path) as run:
        np.testing.assert_array_equal(run.row("losses/loss", 0), np.arange(S) / 4)
        assert run.row("scalars/train_loss", 0) == 1.375


def test_a_step_may_be_recorded_in_parts(path):
    with Recorder(path, samples=list(range(100, 100 + S))) as recorder:
        for step in range(5):
            for part in np.split(np.random.default_rng(step).permutation(S), 3):
                recorder.record(step, losses=part + step, predictions=part % 3, samples=100 + part)
            recorder.record(step, scalars={"train_loss": 1.0})
            recorder.record(step, scalars={"grad_norm": 2.0, "val/acc": 0.5})
            recorder.record(step, scalars={"val/loss": 0.25})
    with open_trajectory(path) as run:
        np.testing.assert_array_equal(run.losses(), np.arange(S) + np.arange(5)[:, None])
        np.testing.assert_array_equal(run.row("losses/prediction", 3), np.arange(S) % 3)
        assert run.row("scalars/grad_norm", 4) == 2
        assert run.row("logged/val%2Floss", 4) == 0.25
        assert all(run.damaged_steps(group) == [] for group in ("losses", "scalars", "logged"))


def test_what_was_given_is_not_given_again(path):
    with Recorder(path, samples=S) as recorder:
        recorder.record(0, losses=np.zeros(S), scalars={"loss": 1.0, "train_loss": 1.0}, state=_state(0, 1.0))
        for again, what in (
            (dict(losses=ONES), "a loss of sample 0"), (dict(losses=[1.0], samples=[7]), "a loss of sample 7"),
            (dict(scalars={"loss": 2.0}), "loss"), (dict(scalars={"train_loss": 1.0}), "train_loss"),
            (dict(state=_state(0, 1.0)), "a checkpoint"),
        ):  # fmt: skip
            with pytest.raises(OpsigError, match=rf"run.h5 has {what} at step 0 already.*: rewind\(0\)"):
                recorder.record(0, **again)
    with open_trajectory(path) as run:
        assert run.losses().tolist() == [[0] * S]


def _state(step: int, value: float) -> State:
    return State(step, np.full(3, value), np.full(1, value), {"momentum_buffer": np.full(3, value)})


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=30).filter(lambda n: "\0" not in n and len(n.encode(errors="replace")) < 200),
        st.floats(width=32),
        min_size=1,
        max_size=4,
    )
)
def test_a_scalar_of_any_name_is_kept(tmp_path_factory, scalars):
    path = tmp_path_factory.mktemp("names") / "run.h5"
    with Recorder(path, samples=1) as recorder:
        recorder.record(0, scalars=scalars)
    with open_trajectory(path) as run:
        assert not run.has("scalars/checksum") or run.damaged_steps("scalars") == []
        kept = {}
        for name in run.names():
            if name.startswith(("scalars/", "logged/")) and not name.endswith(("/step", "/checksum")):
                kept[h5py_name(path, name)] = float(run.row(name, 0))
    np.testing.assert_equal(kept, scalars)


def h5py_name(path: Path, name: str) -> str:
    """The name that a scalar was given."""
    if name.startswith("scalars/"):
        return name.removeprefix("scalars/")
    whole = unquote(name.removeprefix("logged/"))
    with h5py.File(path) as file:
        assert file[name].attrs["long_name"].decode() == whole.rstrip("\0")  # with which text ends in HDF5
    return whole


def test_an_exception_in_the_loop_commits_what_was_recorded_before_it(path):
    with pytest.raises(RuntimeError, match="out of memory"), Recorder(path, samples=S) as recorder:  # noqa: PT012
        for step in range(40):
            recorder.record(step, losses=ONES * step)
            if step == 27:
                raise RuntimeError("out of memory")
    with open_trajectory(path) as run:
        assert run.steps("losses").tolist() == list(range(28))
        assert run.damaged_steps("losses") == []


@pytest.mark.parametrize("merge", [False, True])
def test_an_interruption_in_the_middle_of_a_row_leaves_it_out(merge, path, monkeypatch):
    from opsig_cli.trajectory import writing

    written = 0

    def interrupted(*arguments):
        nonlocal written
        written += 1
        if written == 2:
            raise KeyboardInterrupt
        real(*arguments)

    with pytest.raises(KeyboardInterrupt), Recorder(path, samples=S, commit_every=10) as recorder:  # noqa: PT012
        recorder.record(0, losses=ONES[:6], samples=range(6), predictions=np.arange(6))
        real = writing.write_row
        monkeypatch.setattr(writing, "write_row", interrupted)
        recorder.record(*((0,) if merge else (1,)), losses=ONES[6:], samples=range(6, S))
    with open_trajectory(path) as run:
        assert run.steps("losses").tolist() == [0]
        np.testing.assert_array_equal(run.row("losses/loss", 0), [1] * 6 + [np.nan] * 6)
        assert run.damaged_steps("losses") == []


@pytest.mark.parametrize("column", [1, 2, 3])
def test_an_interruption_while_held_rows_are_written_loses_none(column, path, monkeypatch):
    from opsig_cli.trajectory import writing

    written = 0

    def interrupted(dataset):
        nonlocal written
        written += 1
        if written == column:
            raise KeyboardInterrupt
        return real(dataset)

    real = writing.fill_row
    with pytest.raises(KeyboardInterrupt), Recorder(path, samples=S) as recorder:  # noqa: PT012
        recorder.commit()
        for step in range(5):
            recorder.record(step, losses=ONES * step)
        monkeypatch.setattr(writing, "fill_row", interrupted)
        recorder.commit()
    with open_trajectory(path) as run:
        assert run.steps("losses").tolist() == list(range(5))
        np.testing.assert_array_equal(run.losses()[:, 3], np.arange(5))
        assert run.damaged_steps("losses") == []


def test_what_is_held_is_there_for_who_looks(path):
    with Recorder(path, samples=S) as recorder:
        for step in (3, 1, 2):
            recorder.record(step, losses=ONES[:6], samples=range(6), scalars={"train_loss": 1.0, "mine": step})
        recorder.record(1, losses=ONES[6:], samples=range(6, S))
        assert recorder.last_step == 3
        assert recorder.run.steps("losses").tolist() == [1, 2, 3]
        assert np.isfinite(recorder.run.row("losses/loss", 1)).all()
        with pytest.raises(OpsigError, match="has a loss of sample 0 at step 2 already"):
            recorder.record(2, losses=ONES)
    with open_trajectory(path) as run:
        assert run.rows("logged/mine", 0, 3).tolist() == [1, 2, 3]
        assert run.damaged_steps("losses") == run.damaged_steps("scalars") == run.damaged_steps("logged") == []


@pytest.mark.parametrize("first", [5, 6])
def test_going_back_drops_what_came_later(first, path):
    """A crash at step 9, and a second run of the loop from the checkpoint at step 5, which it records again or not."""
    with Recorder(path, samples=S, commit_every=3) as recorder:
        for step in (0, 9, *range(1, 9)):  # also where rows are not in order
            recorder.record(step, losses=ONES, scalars={"loss": 1.0}, state=_state(step, 1.0))
    with Recorder(path, samples=S, resume=True) as recorder:
        assert recorder.last_step == 9
        assert "losses at 10 steps, 0 to 9" in repr(recorder)
        recorder.rewind(5)
        assert recorder.last_step == 5
        for step in range(first, 15):
            recorder.record(step, losses=2 * ONES, scalars={"loss": 2.0}, state=_state(step, 2.0))
        with pytest.raises(OpsigError, match="already"):
            recorder.record(first, losses=ONES)
    with open_trajectory(path) as run:
        expected = np.where(np.arange(15) < first, 1.0, 2.0)
        np.testing.assert_array_equal(run.losses()[:, 3], expected)
        np.testing.assert_array_equal(run.rows("logged/loss", 0, 15), expected)
        assert [read_state(run, step).optimizer["momentum_buffer"][0] for step in range(15)] == expected.tolist()
        assert all(run.damaged_steps(group) == [] for group in ("losses", "logged", "checkpoints"))


def test_a_resumed_recorder_is_of_the_same_run(path):
    layout = [Tensor("w", "parameter", (3,), 0, 3), Tensor("n", "buffer", (), 0, 1)]
    Recorder(path, samples=S, labels=["a"] * S, layout=layout).close()
    for arguments, words in (
        (dict(samples=8), "was recorded over 12 samples, and 8 are given"),
        (dict(samples=list(range(1, 13))), "samples are not those"),
        (dict(samples=S, labels=["b"] * S), "labels are not those"),
        (dict(samples=S, layout=layout[:1]), "layout has other parameters or buffers"),
    ):
        with pytest.raises(OpsigError, match=words):
            Recorder(path, resume=True, **arguments)
    with Recorder(path, samples=S, labels=["a"] * S, layout=layout, classes=["x"], resume=True) as recorder:
        recorder.record(0, losses=ONES, predictions=np.zeros(S, int))
    with open_trajectory(path) as run:
        assert run.read("class_name").tolist() == ["x"]


def test_a_model_becomes_a_checkpoint(path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2, bias=False))
    model[2].weight = torch.nn.Parameter(model[2].weight.detach().bfloat16())
    optimizer = torch.optim.Adam([*model[0].parameters(), *model[1].parameters()], lr=0.1)
    with Recorder(path, samples=S) as recorder:
        for step in range(3):
            recorder.record(step, model=torch.nn.DataParallel(model) if step else model, optimizer=optimizer)
            model[1](model[0](torch.ones(4, 3))).square().sum().backward()
            optimizer.step()
        with pytest.raises(OpsigError, match="model has other parameters or buffers than"):
            recorder.record(3, model=model[0])
    with open_trajectory(path) as run:
        assert [t.name for t in read_layout(run)] == [n for n, _ in [*model.named_parameters(), *model.named_buffers()]]
        state = read_state(run, 2)
        moments = optimizer.state[model[0].weight]
        assert read_state(run, 0).optimizer == {}
        assert set(state.optimizer) == {"exp_avg", "exp_avg_sq"}
        assert state.params.size == 3 * 2 + 2 + 4 + 4
        assert state.buffers[-1] == 2
        np.testing.assert_array_equal(state.params[-4:], model[2].weight.detach().float().ravel())
        assert moments["exp_avg"].shape == (2, 3)
        assert (state.optimizer["exp_avg"][-4:] == 0).all()


def test_what_a_model_does_not_train_is_kept_once(path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)
    with Recorder(path, samples=S) as recorder:
        for step in range(3):
            recorder.record(step, model=model, optimizer=optimizer)
            model(torch.ones(4, 3)).sum().backward()
            optimizer.step()
        with torch.no_grad():
            model[0].weight += 1
        with pytest.raises(OpsigError, match="holds frozen parameters that are not those of this state"):
            recorder.record(3, model=model, optimizer=optimizer)
    with open_trajectory(path) as run:
        assert [(t.name, t.kind, t.offset) for t in read_layout(run)] == [
            ("0.weight", "frozen", 0), ("0.bias", "frozen", 6),
            ("1.weight", "parameter", 0), ("1.bias", "parameter", 2),
        ]  # fmt: skip
        assert (run.steps("checkpoints").tolist(), run.frozen.size) == ([0, 1, 2], 8)
        state = read_state(run, 2)
        assert (state.params.size, state.optimizer["momentum_buffer"].size) == (3, 3)


def test_the_loop_in_the_readme_runs_and_is_measured(tmp_path, monkeypatch, opsig):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "Recorder" in b]
    (tmp_path / "mytask.py").write_text(TASKS.read_text() + "\n\nMyTask = Tiny\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert opsig("verify", "run.h5").code == 0
    kinds = {r["kind"] for r in opsig("cluster", "run.h5", "--task", "mytask.py:MyTask").records}
    assert {"pair", "group", "member"} <= kinds
    (record,) = opsig("sharpness", "run.h5", "--task", "mytask.py:MyTask", "--steps", "50").records
    assert record["converged"]
    assert record["eigenvalue"] > 0


def test_sharpness_of_a_recorded_loop_has_a_threshold_once_the_loop_says_how_it_trains(tmp_path, opsig):
    path = tmp_path / "run.h5"
    task = f"{TASKS}:Tiny"
    opsig("train", "--task", task, "--steps", "1", "-o", tmp_path / "shape.h5")
    with open_trajectory(tmp_path / "shape.h5") as run:
        state, layout, samples = read_state(run, 0), read_layout(run), len(run.samples)
    with Recorder(path, samples=samples, layout=layout) as recorder:
        recorder.record(0, state=state)
    untold = opsig("sharpness", path, "--task", task)
    assert untold.records[0]["threshold"] is None
    assert "no stability threshold" in untold.err
    how = {"task": task, "optimizer": "momentum", "learning_rate": 0.2, "momentum": 0.9}
    with Recorder(path, samples=samples, resume=True, attributes={"settings_json": how}):
        pass
    told = opsig("sharpness", path, "--task", task, "--replace")
    assert told.records[0]["threshold"] == pytest.approx((2 + 2 * 0.9) / 0.2)
    assert "no stability threshold" not in told.err
