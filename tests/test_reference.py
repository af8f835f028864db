"""A run that refers to its checkpoints measures as one that holds them, and never takes a changed file for the same."""

import hashlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import TASKS

from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.states import read_state

sys.path.insert(0, str(TASKS.parent))
from tiny import Tiny

OWN = ("--task", f"{TASKS}:Tiny:norm=true")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Four checkpoints of a run with batch norm, the first before any step."""
    folder = tmp_path_factory.mktemp("saved") / "ckpts"
    folder.mkdir()
    torch.manual_seed(0)
    task = Tiny(norm=True)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(4):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"c{step}.pt")
        optimizer.zero_grad()
        task.losses(model, (task.x, task.y)).mean().backward()
        optimizer.step()
    return folder


@pytest.fixture
def runs(opsig, saved, tmp_path, monkeypatch):
    """The folder of a run that holds its checkpoints, of one that refers to them, and of these; paths are relative."""
    shutil.copytree(saved, tmp_path / "ckpts")
    monkeypatch.chdir(tmp_path)
    for name, more in (("held.h5", ()), ("refers.h5", ("--reference",))):
        outcome = opsig("import", "ckpts", *OWN, "-o", name, "--batch-size", "full", "--track", *more)
        assert outcome.code == 0, outcome.err
        assert [r["step"] for r in outcome.records] == [0, 1, 2, 3]  # the one without state is from before the first
        assert outcome.records[1]["optimizer_state"] == ["exp_avg", "exp_avg_sq"]
    return tmp_path


def test_a_state_is_the_same_to_the_bit_and_costs_no_second_copy(opsig, runs):
    with open_trajectory("held.h5") as held, open_trajectory("refers.h5") as refers:
        assert "checkpoints/params" not in refers.names()
        for step in range(4):
            ours, theirs = read_state(refers, step), read_state(held, step)
            np.testing.assert_array_equal(ours.params, theirs.params)
            np.testing.assert_array_equal(ours.buffers, theirs.buffers)
            assert ours.optimizer.keys() == theirs.optimizer.keys()
            for name, row in theirs.optimizer.items():
                np.testing.assert_array_equal(ours.optimizer[name], row)
            np.testing.assert_array_equal(refers.row("losses/loss", step), held.row("losses/loss", step))
    (record,) = opsig("info", "refers.h5").records
    sizes = [path.stat().st_size for path in (runs / "ckpts").iterdir()]
    assert (record["referenced_files"], record["referenced_bytes"]) == (4, sum(sizes))
    assert record["parameters"] == opsig("info", "held.h5").records[0]["parameters"]


@pytest.mark.parametrize(
    "command", [("sharpness", "-k", 2), ("sharpness", "--metrics", "gradient_norm,critical_sharpness"), ("cluster",)]
)
def test_every_command_gives_what_it_gives_of_a_run_that_holds_its_checkpoints(opsig, runs, command):
    more = ("--name", 0) if "gradient_norm" in str(command) else ()
    found = [opsig(command[0], run, *command[1:], *OWN, *more) for run in ("held.h5", "refers.h5")]
    assert [each.code for each in found] == [found[0].code] * 2, found[1].err
    held, refers = ([record | {"trajectory": 0} for record in each.records] for each in found)
    assert held == refers


def test_a_file_that_has_changed_or_is_gone_is_refused_in_one_line(opsig, runs):
    file = runs / "ckpts" / "c2.pt"
    before = file.read_bytes()
    with open_trajectory("refers.h5") as run:
        offset = int(run.row("checkpoints/external/extent", 2)[4, 0])
    measure = ("sharpness", "refers.h5", *OWN, "--steps", 2, "--quiet")
    changed = bytearray(before)
    changed[offset] ^= 1
    for content, words in ((bytes(changed), "has changed"), (before + b"x", "has changed"), (None, "cannot be read")):
        file.unlink() if content is None else file.write_bytes(content)
        opsig(*measure).fails(1, "c2.pt", words, "import the run again")
        verified = opsig("verify", "refers.h5")
        verified.fails(1, "checkpoints/external (1 of 4 rows)")
        (record,) = [r for r in verified.records if r["name"] == "checkpoints/external"]
        assert record["damaged"] == [2]
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))  # no weight: found by its SHA-256 alone
    opsig("verify", "refers.h5").fails(1, "checkpoints/external")
    file.write_bytes(before)
    assert opsig(*measure).code == 0
    assert opsig("verify", "refers.h5").code == 0


def test_paths_begin_at_the_run_wherever_it_goes(opsig, runs, monkeypatch):
    (runs / "far" / "away").mkdir(parents=True)
    assert opsig("repack", "refers.h5").code == 0
    assert opsig("repack", "refers.h5", "-o", "far/away/packed.h5").code == 0
    monkeypatch.chdir(runs / "far")
    assert opsig("verify", "away/packed.h5").code == 0
    assert opsig("track", "away/packed.h5", *OWN).code == 0
    shutil.copytree(runs / "ckpts", runs / "far" / "ckpts")
    os.rename(runs / "refers.h5", runs / "far" / "refers.h5")
    shutil.rmtree(runs / "ckpts")
    assert opsig("verify", "refers.h5").code == 0  # the run and its checkpoints moved together
    opsig("verify", "away/packed.h5").fails(1, "checkpoints/external")


def test_a_run_that_refers_takes_no_state_into_itself(opsig, runs):
    opsig("train", "-o", "refers.h5", "--resume", "--steps", 5, *OWN, "--quiet").fails(1, "without --reference")
    os.remove("refers.h5")
    base = ("import", *OWN, "-o", "refers.h5", "--quiet")
    assert opsig(*base, "ckpts/c1.pt", "ckpts/c2.pt", "--reference").code == 0
    assert opsig(*base, "ckpts/c3.pt", "--reference", "--append").code == 0
    opsig(*base, "ckpts/c0.pt", "--append", "--steps", "0").fails(2, "add --reference")
    opsig("import", *OWN, "-o", "held.h5", "ckpts/c3.pt", "--append", "--reference", "--quiet").fails(
        2, "leave --reference"
    )
    with open_trajectory("refers.h5") as run:
        assert run.steps("checkpoints").tolist() == [1, 2, 3]
    branched = opsig(
        "branch", "held.h5", *OWN, "--from", 2, "--steps", 2, "--learning-rate", 0.02, "-o", "b", "--quiet"
    )
    assert branched.code == 0, branched.err


def test_what_does_not_lie_in_a_file_as_it_is_is_refused_before_anything_is_written(opsig, tmp_path):
    model = Tiny(norm=True).model()
    state = model.state_dict()
    np.savez_compressed(tmp_path / "c1.npz", **{name: value.numpy() for name, value in state.items()})
    turned = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in state.items()}
    torch.save(turned, tmp_path / "c1.pt")
    for name in ("c1.npz", "c1.pt"):
        opsig("import", tmp_path / name, *OWN, "-o", tmp_path / "x.h5", "--reference", "--quiet").fails(
            1, "holds 0.weight compressed, in another order", "Leave --reference out"
        )
        assert not (tmp_path / "x.h5").exists()
        assert opsig("import", tmp_path / name, *OWN, "-o", tmp_path / f"{name}.h5", "--quiet").code == 0


@pytest.mark.parametrize("kind", ["safetensors", "npz", "half", "double", "bfloat16", "legacy"])
def test_every_format_whose_numbers_lie_in_it_is_referred_to(opsig, tmp_path, kind):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    state = Tiny(norm=True).model().state_dict()
    path = tmp_path / {"safetensors": "c1.safetensors", "npz": "c1.npz"}.get(kind, "c1.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    else:
        dtype = {"half": torch.float16, "double": torch.float64, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
        content = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    for name, more in (("held.h5", ()), ("refers.h5", ("--reference",))):
        outcome = opsig("import", path, *OWN, "-o", tmp_path / name, *more)
        assert outcome.code == 0, outcome.err
    with open_trajectory(tmp_path / "held.h5") as held, open_trajectory(tmp_path / "refers.h5") as refers:
        np.testing.assert_array_equal(read_state(refers, 1).params, read_state(held, 1).params)


def test_shards_are_summed_up_in_one_reading(opsig, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from opsig_cli.studies.importing import checkpoints, referring
    from opsig_cli.trajectory import external

    weights = Tiny(norm=True).model().state_dict()
    names = list(weights)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    folder = tmp_path / "c1"
    folder.mkdir()
    for file, inside in parts.items():
        save_file({name: weights[name].contiguous() for name in inside}, folder / file)
    listed = {name: file for file, inside in parts.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    own = {str(folder / file): external.sha256_of(str(folder / file)) for file in parts}
    whole = hashlib.sha256(b"".join((folder / file).read_bytes() for file in parts)).hexdigest()
    monkeypatch.setattr(external, "sha256_of", None)
    source = checkpoints.source_of(str(folder), each=True)
    assert source.sha256 == whole
    extents = [external.Extent("checkpoints/params", 0, 1, path, 0, "float32") for path in own]
    assert referring.hashes_of(extents, source) == own
