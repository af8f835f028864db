"""Checkpoints of another program become a trajectory, on which every other command works as on the original."""

import argparse
import collections
import datetime
import json
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import TASKS, start_opsig, train_tiny
from torch import nn

from opsig_cli.studies.importing.names import fit
from opsig_cli.studies.importing.optimizers import merge_order
from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.states import read_state

sys.path.insert(0, str(TASKS.parent))
from saved_checkpoints import OWN, flat, imports, params_of, save, weights
from tiny import Tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Runs of `opsig train` by the name of their optimizer, with checkpoints every ten steps."""
    folder = tmp_path_factory.mktemp("original")
    for name, task, more in (
        ("adam", "Tiny", ("--learning-rate", 0.02, "--beta1", 0.8, "--weight-decay", 0.01)),
        ("momentum", "Tiny:norm=true", ("--learning-rate", 0.05, "--momentum", 0.7)),
    ):
        every = ("--checkpoint-every", 10, "--track-every", 10)
        arguments = train_tiny(folder / f"{name}.h5", "--optimizer", name, *every, task=task, steps=40)
        process = start_opsig(*arguments, *more)
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
    return folder


def export(run, folder, name, task):
    """Write each checkpoint as a plain script saves it: a model under DataParallel, with torch.optim's own state."""
    with open_trajectory(run) as kept:
        stored = kept.attributes["settings_json"]
        for step in kept.steps("checkpoints").tolist():
            state = read_state(kept, step)
            model = task.model()
            vectors = {"params": torch.from_numpy(state.params)}
            nn.utils.vector_to_parameters(vectors["params"], model.parameters())
            place = 0
            for buffer in model.buffers():
                values = torch.from_numpy(state.buffers[place : place + buffer.numel()].copy())
                buffer.copy_(values.view(buffer.shape))
                place += buffer.numel()
            if name == "adam":
                betas = (stored["beta1"], stored["beta2"])
                made = torch.optim.Adam(model.parameters(), stored["learning_rate"], betas, weight_decay=0.01)
            else:
                made = torch.optim.SGD(model.parameters(), stored["learning_rate"], stored["momentum"])
            place = 0
            for parameter in model.parameters():
                for slot, row in state.optimizer.items():
                    part = torch.from_numpy(row[place : place + parameter.numel()].copy())
                    made.state[parameter][slot] = part.view(parameter.shape)
                    if name == "adam":
                        made.state[parameter]["step"] = torch.tensor(float(step))
                place += parameter.numel()
            torch.save(
                {
                    "model": nn.DataParallel(model).state_dict(), "optimizer": made.state_dict(), "epoch": step // 25,
                    "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "when": datetime.datetime.now(),
                    "rng": np.random.default_rng(0).random(3), "out": pathlib.Path("x"),
                    "meters": collections.defaultdict(list, loss=[1.0]),
                },
                folder / f"ckpt_{step}.pt",
            )  # fmt: skip


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_an_imported_run_is_the_original_to_the_bit_and_measures_the_same(opsig, original, tmp_path, name):
    spec = f"{TASKS}:Tiny" + (":norm=true" if name == "momentum" else "")
    export(original / f"{name}.h5", tmp_path, name, Tiny(norm=name == "momentum"))
    run, same = tmp_path / "run.h5", shutil.copy(original / f"{name}.h5", tmp_path / "original.h5")
    files = sorted(map(str, tmp_path.glob("*.pt")))  # ckpt_10 before ckpt_9, as a shell has them
    found = opsig("import", *files, "--task", spec, "--statistics", "chunk", "--track", "-o", run)
    assert found.code == 0, found.err
    assert [r["step"] for r in found.records] == [0, 10, 20, 30, 40]
    with open_trajectory(run) as imported, open_trajectory(same) as kept:
        for step in kept.steps("checkpoints").tolist():
            ours, theirs = read_state(imported, step), read_state(kept, step)
            np.testing.assert_array_equal(ours.params, theirs.params)
            np.testing.assert_array_equal(ours.buffers, theirs.buffers)
            assert ours.optimizer.keys() == theirs.optimizer.keys()
            for slot, row in theirs.optimizer.items():
                np.testing.assert_array_equal(ours.optimizer[slot], row)
            np.testing.assert_array_equal(imported.row("losses/loss", step), kept.row("losses/loss", step))
        held = {key: imported.attributes["settings_json"][key] for key in kept.attributes["settings_json"]}
        for key in ("optimizer", "learning_rate", "momentum", "beta1", "beta2", "epsilon", "weight_decay"):
            if key != "momentum" or name == "momentum":
                assert held[key] == kept.attributes["settings_json"][key], key
    for command in (
        ("sharpness", "-k", 2),
        ("cluster", "--test", "held-out"),
        ("sharpness", "--metrics", "critical_sharpness"),
    ):
        ours, theirs = (opsig(command[0], path, *command[1:], "--task", spec) for path in (run, same))
        assert ours.code == theirs.code == 0, ours.err
        assert theirs.records
        assert [r | {"trajectory": 0} for r in ours.records] == [r | {"trajectory": 0} for r in theirs.records]
    assert opsig("verify", run).code == 0
    assert all(not r["damaged"] for r in opsig("verify", run).records)


def test_the_example_in_the_help_runs_as_it_stands(opsig, tmp_path, monkeypatch):
    example = re.search(r"Example: opsig (.*run\.h5)", " ".join(opsig("import", "--help").out.split()))
    assert example
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "mytask.py").write_text(
        TASKS.read_text().replace("class Tiny:", "class MyTask:").split("class Conv")[0]
    )
    for step in (9, 10):
        save(tmp_path, f"checkpoints/c{step}.pt", weights())
    monkeypatch.chdir(tmp_path)
    files = " ".join(sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("checkpoints/*.pt")))
    outcome = opsig(*example.group(1).replace("checkpoints/*.pt", files).split())
    assert outcome.code == 0, outcome.err
    assert [(r["step"], r["source"]) for r in outcome.records] == [(9, "checkpoints/c9.pt"), (10, "checkpoints/c10.pt")]
    assert all(r["loss"] > 0 for r in outcome.records)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "rng": torch.get_rng_state()},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"net": {f"module.0.{k}".replace("0.2.", "0._orig_mod.2."): v for k, v in s.items()}},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "global_step": 7, "epoch": 1},
        lambda s: {k: v.numpy() for k, v in s.items()},
        lambda s: {k: v.double() for k, v in s.items()},
        lambda s: {"ema": {k: v + 1 for k, v in s.items()}, "model": s},
    ],
)
def test_weights_are_found_wherever_they_lie(opsig, tmp_path, wrap):
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        run, _ = imports(opsig, tmp_path, save(tmp_path, "step7.pt", wrap(weights(0.5)), **options))
        np.testing.assert_array_equal(params_of(run, 7), flat(weights(0.5)))


def test_a_prefix_chooses_among_copies_and_says_that_there_are_others(opsig, tmp_path):
    file = save(tmp_path, "step7.pt", {"ema": weights(1), "model": weights(2), "ema_old": weights(3)})
    run, outcome = imports(opsig, tmp_path, file)
    assert "under model." in outcome.err
    assert "they also lie under ema., ema_old., which --prefix chooses" in outcome.err
    np.testing.assert_array_equal(params_of(run, 7), flat(weights(2)))
    run, outcome = imports(opsig, tmp_path, file, "--prefix", "ema.")
    np.testing.assert_array_equal(params_of(run, 7), flat(weights(1)))
    opsig("import", file, *OWN, "-o", tmp_path / "x.h5", "--prefix", "none.").fails(
        1, "none of the model's tensors under none."
    )


def test_a_model_whose_names_all_begin_alike_takes_files_without_that_beginning():
    from opsig_cli.backends import Tensor

    layout = [Tensor("net.a.weight", "parameter", (2,), 0, 2), Tensor("net.b.weight", "parameter", (3,), 2, 3)]
    aliases = {tensor.name: [tensor.name] for tensor in layout}
    found = fit({"x.a.weight": (2,), "x.b.weight": (3,)}, layout, aliases, None, "f")
    assert found.keys == {"net.a.weight": "x.a.weight", "net.b.weight": "x.b.weight"}


def test_tied_weights_are_found_under_either_name_and_not_called_unused(opsig, tmp_path):
    from tiny import Attend

    torch.manual_seed(0)
    state = Attend().model().state_dict()
    for left_out in ("out.weight", "embed.weight", None):
        kept = {name: value for name, value in state.items() if name != left_out}
        run, outcome = imports(opsig, tmp_path, save(tmp_path, "s3.pt", kept), task=("--task", f"{TASKS}:Attend"))
        assert "not used" not in outcome.err
        expected = {name: value for name, value in state.items() if name != "out.weight"}
        np.testing.assert_array_equal(params_of(run, 3), flat(expected))


def test_what_the_model_lacks_is_said_once_and_what_it_needs_is_an_error(opsig, tmp_path):
    for step in (1, 2):
        save(
            tmp_path, f"c{step}.pt", {"model": weights() | {"head.weight": torch.zeros(3)}, "step": torch.tensor(step)}
        )
    _, outcome = imports(opsig, tmp_path, tmp_path / "c1.pt", tmp_path / "c2.pt")
    assert outcome.err.count("not used, as the model has no such tensors: model.head.weight\n") == 1
    bad = weights() | {"1.weight": torch.zeros(16, 9)}
    del bad["0.bias"]
    start = ("import", save(tmp_path, "c3.pt", bad), *OWN, "-o", tmp_path / "new.h5")
    opsig(*start).fails(1, "c3.pt does not fit", "it lacks 0.bias", "1.weight is 16x9 there and 16x16 in the model")
    assert not (tmp_path / "new.h5").exists()
    opsig("import", save(tmp_path, "c4.pt", {"fc": torch.zeros(1)}), *OWN, "-o", tmp_path / "new.h5").fails(
        1, "none of the model's tensors: the model has 0.weight, 0.bias, 1.weight and 3 more, and the file fc"
    )


def test_running_statistics_are_needed_and_counts_of_batches_are_not(opsig, tmp_path):
    state = Tiny(norm=True).model().state_dict()
    task = ("--task", f"{TASKS}:Tiny:norm=true")
    del state["1.num_batches_tracked"]
    _, outcome = imports(opsig, tmp_path, save(tmp_path, "c1.pt", state), task=task)
    assert "left as the model makes them: 1.num_batches_tracked" in outcome.err
    assert "batch norm goes by its running statistics" in outcome.err
    del state["1.running_var"]
    file = save(tmp_path, "c1.pt", state)
    opsig("import", file, *task, "-o", tmp_path / "x.h5", "--quiet").fails(1, "lacks 1.running_var")


def test_safetensors_npz_and_hugging_face_folders(opsig, tmp_path):
    from safetensors.torch import save_file

    save_file(weights(1), tmp_path / "plain-1.safetensors")
    np.savez(tmp_path / "arrays-2.npz", step=2, **{name: value.numpy() for name, value in weights(2).items()})
    hub = tmp_path / "out"
    for step, shift in ((500, 3.0), (1000, 4.0)):
        folder = hub / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        state = {f"backbone.{name}": value.bfloat16() for name, value in weights(shift).items()}
        first = dict(list(state.items())[:2])
        save_file(first, folder / "model-1-of-2.safetensors")
        save_file({name: state[name] for name in state if name not in first}, folder / "model-2-of-2.safetensors")
        files = {name: f"model-{1 if name in first else 2}-of-2.safetensors" for name in state}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.5}))
        model = Tiny().model()
        made = torch.optim.AdamW(model.parameters(), lr=1 / step, weight_decay=0.1)
        model(Tiny().x).sum().backward()
        made.step()
        torch.save(made.state_dict(), folder / "optimizer.pt")
    save_file(weights(9), hub / "model.safetensors")  # the final model lies beside the checkpoints
    for path, step, shift in (("plain-1.safetensors", 1, 1.0), ("arrays-2.npz", 2, 2.0)):
        run, _ = imports(opsig, tmp_path, tmp_path / path)
        np.testing.assert_array_equal(params_of(run, step), flat(weights(shift)))
    run, outcome = imports(opsig, tmp_path, hub)
    assert [r["step"] for r in outcome.records] == [500, 1000]
    assert all(r["optimizer_state"] == ["exp_avg", "exp_avg_sq"] for r in outcome.records)
    assert "AdamW's weight decay of 0.1" in outcome.err
    assert "learning rates go from 0.001 to 0.002" in outcome.err
    expected = {name: value.bfloat16().float() for name, value in weights(3).items()}
    np.testing.assert_array_equal(params_of(run, 500), flat(expected))
    measured = opsig("sharpness", run, *OWN).records
    assert [r["threshold"] for r in measured] == pytest.approx([38 * 500, 38 * 1000])  # by each step's own rate
    (hub / "checkpoint-500" / "model-2-of-2.safetensors").unlink()
    opsig("import", hub, *OWN, "-o", tmp_path / "x.h5").fails(1, "checkpoint-500 lacks model-2-of-2.safetensors")
    index = hub / "checkpoint-500" / "model.safetensors.index.json"
    for text in (json.dumps({"weight_map": {"a": "../../plain-1.safetensors"}}), "{}", "[]", "{"):
        index.write_text(text)
        opsig("import", hub / "checkpoint-500", *OWN, "-o", tmp_path / "x.h5").fails(1, "model.safetensors.index.json")


def test_several_parameter_groups_are_told_apart_by_shapes_or_left_out(opsig, tmp_path):
    model = Tiny().model()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    made = torch.optim.Adam(groups, lr=0.01)
    model(Tiny().x).square().sum().backward()
    made.step()
    file = save(tmp_path, "c1.pt", {"model": model.state_dict(), "optimizer": made.state_dict()})
    run, _ = imports(opsig, tmp_path, file)
    expected = torch.cat([made.state[p]["exp_avg"].reshape(-1) for p in model.parameters()])
    with open_trajectory(run) as kept:
        np.testing.assert_array_equal(read_state(kept, 1).optimizer["exp_avg"], expected.numpy())
    assert merge_order([(2,), (3,), (2,)], [[(2,), (2,)], [(3,)]]) == [0, 1, 0]
    assert merge_order([(2,), (2,), (3,)], [[(2,)], [(2,), (3,)]]) is None  # two ways
    assert merge_order([(2,), (3,)], [[(2,)], [(4,)]]) is None
    made.param_groups[0]["params"].append(made.param_groups[1]["params"].pop(0))
    saved = made.state_dict()
    saved["param_groups"][1]["params"] = saved["param_groups"][1]["params"][1:]
    _, outcome = imports(opsig, tmp_path, save(tmp_path, "c1.pt", {"model": weights(), "optimizer": saved}))
    assert "optimizer state is left out" in outcome.err
    assert outcome.records[0]["optimizer_state"] == []


def test_options_come_before_what_checkpoints_say_and_nothing_is_made_up(opsig, tmp_path):
    model = Tiny().model()
    made = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    told = save(tmp_path, "c1.pt", {"model": model.state_dict(), "optimizer": made.state_dict()})
    untold = save(tmp_path, "d1.pt", model.state_dict())

    def threshold(*arguments):
        run, outcome = imports(opsig, tmp_path, *arguments)
        (record,) = opsig("sharpness", run, *OWN).records
        return record["threshold"], outcome.err

    assert threshold(told)[0] == pytest.approx(3 / 0.25)
    assert threshold(told, "--learning-rate", 0.1)[0] == pytest.approx(3 / 0.1)
    assert threshold(told, "--momentum", 0)[0] == pytest.approx(2 / 0.25)
    assert threshold(told, "--optimizer", "gd")[0] == pytest.approx(2 / 0.25)
    assert threshold(untold, "--learning-rate", 0.1)[0] == pytest.approx(2 / 0.1)
    value, err = threshold(untold)
    assert value is None
    assert "do not say the learning rate: thresholds are left out" in err
    run = tmp_path / "run.h5"
    assert "learning_rate" not in {k: v for k, v in opsig("info", run).records[0].items() if v is not None}
    assert opsig("sharpness", run, *OWN, "--metrics", "critical_sharpness").records[0]["threshold"] is None
    opsig("train", "-o", run, "--resume", *OWN).fails(1, "does not tell its learning rate")
    opsig("train", "-o", tmp_path / "y.h5", "--like", run, *OWN).fails(2, "Give --learning-rate")
    opsig("import", untold, *OWN, "-o", run, "--replace", "--optimizer", "lion").fails(
        2, "no optimizer is called 'lion'"
    )


def test_mistakes_in_options(opsig, tmp_path):
    file = save(tmp_path, "c5.pt", weights())
    opsig("import", "-o", tmp_path / "x.h5").fails(2, "nothing to import")
    opsig("import", file, "-o", tmp_path / "x.h5").fails(2, "--task is missing")
    opsig("import", tmp_path / "gone.pt", *OWN, "-o", tmp_path / "x.h5").fails(1, "gone.pt does not exist")
    (tmp_path / "empty").mkdir()
    opsig("import", tmp_path / "empty", *OWN, "-o", tmp_path / "x.h5").fails(1, "holds no checkpoint")
    np.save(tmp_path / "l.npy", np.ones((6, 61), np.float32))
    opsig("import", "--losses", tmp_path / "l.npy", "--track", "-o", tmp_path / "x.h5").fails(2, "about checkpoints")


def test_where_a_checkpoint_is_from_can_be_read_by_xarray(opsig, tmp_path):
    import xarray

    run, outcome = imports(opsig, tmp_path, save(tmp_path, "c1.pt", weights()), save(tmp_path, "c2.pt", weights()))
    with xarray.open_dataset(run, group="checkpoints/source", engine="netcdf4") as read:
        assert read["bytes"].values.tolist() == [r["bytes"] for r in outcome.records]
        assert read["sha256"].dims == ("step",)
    assert opsig("repack", run).code == 0
    assert all(not r["damaged"] and not r["reason"] for r in opsig("verify", run).records)
    with open_trajectory(run) as kept:
        assert kept.row("checkpoints/source/sha256", 2).decode() == outcome.records[1]["sha256"]


def test_of_two_models_in_a_file_the_one_whose_shapes_fit_is_taken(opsig, tmp_path):
    other = {name: torch.zeros(*value.shape, 2) for name, value in weights().items()}
    run, outcome = imports(opsig, tmp_path, save(tmp_path, "c1.pt", {"a": other, "net": weights(1)}))
    assert "under net." in outcome.err
    np.testing.assert_array_equal(params_of(run, 1), flat(weights(1)))


def test_a_buffer_that_checkpoints_leave_out_stays_as_the_model_makes_it(opsig, tmp_path):
    (tmp_path / "own.py").write_text(
        TASKS.read_text()
        + "\n\nclass Masked(Tiny):\n    def model(self):\n        model = super().model()\n"
        + "        model.register_buffer('mask', torch.arange(3.0), persistent=False)\n        return model\n"
    )
    run, outcome = imports(
        opsig, tmp_path, save(tmp_path, "c1.pt", weights()), task=("--task", f"{tmp_path}/own.py:Masked")
    )
    assert "left as the model makes them: mask" in outcome.err
    with open_trajectory(run) as kept:
        assert read_state(kept, 1).buffers.tolist() == [0, 1, 2]


def test_an_imported_run_goes_on_as_the_original_would(opsig, original, tmp_path):
    export(original / "adam.h5", tmp_path, "adam", Tiny())
    files = [tmp_path / f"ckpt_{step}.pt" for step in (0, 10, 20)]
    run, _ = imports(opsig, tmp_path, *files, "--batch-size", "full")
    assert opsig("train", "-o", run, "--resume", "--steps", 40, *OWN).code == 0
    with open_trajectory(run) as ours, open_trajectory(original / "adam.h5") as theirs:
        assert ours.steps("checkpoints").tolist() == [0, 10, 20, 30, 40]
        np.testing.assert_array_equal(read_state(ours, 40).params, read_state(theirs, 40).params)
