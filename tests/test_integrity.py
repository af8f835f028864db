"""The file trusts nothing: hostile files are refused, damage is named, and the contract is kept."""

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory import schema
from opsig_cli.trajectory.file import create_trajectory, open_trajectory
from opsig_cli.trajectory.states import read_state

HERE = Path(__file__).parent


@pytest.fixture
def run_path(tmp_path) -> Path:
    path = tmp_path / "run.h5"
    generator = np.random.default_rng(0)
    with create_trajectory(path, np.arange(50), {"task": "t", "settings_json": {"task": "t"}}) as run:
        run.write("samples/label", np.array([f"label {i}" for i in range(50)]))
        for step in range(150):
            run.append("losses", step, loss=generator.random(50, np.float32), prediction=np.arange(50) % 9)
            run.append("scalars", step, train_loss=generator.random(), grad_norm=1.0)
            if step % 50 == 0:
                run.append("checkpoints", step, params=generator.random(3000, np.float32))
    return path


# -- the contract


def test_the_documented_datasets_are_those_of_the_schema():
    assert schema.as_table() in (HERE.parent / "docs" / "trajectory.md").read_text()


def test_a_file_of_schema_1_0_opens_in_every_later_version():
    with open_trajectory(HERE / "data" / "trajectory-1.0.h5") as run:
        assert run.attributes["schema_version"] == "1.0"
        assert run.attributes["settings_json"] == {"task": "kept", "steps": 5}
        assert run.samples.tolist() == [4, 8, 15]
        assert run.read("samples/label").tolist() == ["a", "\u00df", "c"]
        assert run.steps("losses").tolist() == [0, 1, 2, 5]
        np.testing.assert_array_equal(run.row("losses/loss", 5), [5, 5.25, 3])
        np.testing.assert_array_equal(run.row("losses/prediction", 5), [0, 1, 2])
        np.testing.assert_array_equal(run.rows("scalars/train_loss", 0, 4), [1, 1 / 2, 1 / 3, 1 / 6])
        assert np.isnan(run.rows("scalars/grad_norm", 0, 4)).all() if run.has("scalars/grad_norm") else True
        state = read_state(run, 2)
        np.testing.assert_array_equal(state.params, np.arange(6) + 2)
        assert state.buffers.tolist() == [2.5]
        assert run.damaged_steps("losses") == run.damaged_steps("checkpoints") == []


def test_netcdf4_and_xarray_see_named_dimensions(run_path):
    netCDF4 = pytest.importorskip("netCDF4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        import xarray

        with netCDF4.Dataset(run_path) as file:
            assert file["losses/loss"].dimensions == ("step", "sample")
            assert file["checkpoints/params"].dimensions == ("step", "parameter")
            assert file["samples/label"].dimensions == ("sample",)
            assert file["losses/loss"].units == "nat"
        with xarray.open_dataset(run_path, group="losses", engine="netcdf4") as data:
            assert data["loss"].dims == ("step", "sample")
            assert data["loss"].shape == (150, 50)
            assert data["step"].values.tolist() == list(range(150))


def test_nothing_of_variable_length_is_written(run_path):
    def check(owner):
        for name in owner.attrs:
            assert (
                not h5py.check_string_dtype(owner.attrs.get_id(name).dtype)
                or owner.attrs.get_id(name).dtype.kind == "S"
            )

    with h5py.File(run_path) as file:
        check(file)
        file.visititems(lambda _, item: check(item))


def test_rows_in_any_order_are_presented_by_step(tmp_path):
    with create_trajectory(tmp_path / "run.h5", np.arange(3)) as run:
        for step in (5, 1, 3):
            run.append("losses", step, loss=np.full(3, step, np.float32))
    with open_trajectory(tmp_path / "run.h5") as run:
        assert run.steps("losses").tolist() == [1, 3, 5]
        np.testing.assert_array_equal(run.rows("losses/loss", 0, 3)[:, 0], [1, 3, 5])
        np.testing.assert_array_equal(run.series("losses/loss", np.array([2]), 1, 3)[:, 0], [3, 5])
        np.testing.assert_array_equal(run.row("losses/loss", 3), [3, 3, 3])


@pytest.mark.parametrize("samples", [5, 1024, 40_001])
def test_reading_past_hdf5_gives_what_hdf5_gives(tmp_path, samples):
    values = np.random.default_rng(0).random((200, samples), np.float32)
    with create_trajectory(tmp_path / "run.h5", np.arange(samples)) as run:
        for step, losses in enumerate(values):
            run.append("losses", step, loss=losses)
    chosen = np.array([samples - 1, 0, samples // 2, samples // 3, 0, samples // 3 + 1])
    with open_trajectory(tmp_path / "run.h5") as run:
        assert run._chunks_of("losses/loss") is not None
        for start, stop in ((0, 200), (3, 70), (64, 128), (199, 200), (5, 5)):
            np.testing.assert_array_equal(run.rows("losses/loss", start, stop), values[start:stop])
            np.testing.assert_array_equal(run.series("losses/loss", chosen, start, stop), values[start:stop, chosen])
            parts = [block.copy() for _, block in run.blocks("losses/loss", start, stop)]
            np.testing.assert_array_equal(np.concatenate(parts) if parts else values[:0], values[start:stop])
        parts = [(first, rows[-1], len(rows)) for first, rows in run.blocks("losses/loss")]  # a view is kept, too
        for first, last, height in parts:
            np.testing.assert_array_equal(last, values[first + height - 1])


# -- hostile files


def test_a_call_that_reads_less_than_it_was_asked_to_damages_nothing(tmp_path, monkeypatch):
    whole = np.random.default_rng(0).random((6, 3000)).astype(np.float32)
    with create_trajectory(tmp_path / "run.h5", np.arange(3000)) as run:
        for step, losses in enumerate(whole):
            run.append("losses", step, loss=losses)
    asked = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: asked(fd, [memoryview(to[0])[: -(-len(to[0]) // 2)]], at))
    with open_trajectory(tmp_path / "run.h5") as run:
        np.testing.assert_array_equal(run.losses(), whole)
        np.testing.assert_array_equal(run.series("losses/loss", np.array([7, 2999])), whole[:, [7, 2999]])
        np.testing.assert_array_equal(run.row("losses/loss", 3), whole[3])


def hostile_external_link(file, folder):
    file["losses/secret"] = h5py.ExternalLink(str(folder / "victim.h5"), "/x")


def hostile_soft_link(file, folder):
    file["losses/secret"] = h5py.SoftLink("/losses/loss")


def hostile_virtual_dataset(file, folder):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "victim.h5"), "x", (4,))
    file.create_virtual_dataset("secret", layout)


def hostile_external_storage(file, folder):
    file.create_dataset("secret", (4,), "f4", external=[(str(folder / "victim.bin"), 0, 16)])


def hostile_text(file, folder):
    file["secret"] = "variable"


def hostile_attribute(file, folder):
    file["losses/loss"].attrs["note"] = "variable"


def hostile_reference(file, folder):
    file["secret"] = np.array([file["losses"].ref], h5py.ref_dtype)


def hostile_alias(file, folder):
    file["losses/again"] = file["losses/loss"]


def hostile_cycle(file, folder):
    file["losses/again"] = file["losses"]


def hostile_size(file, folder):
    del file["samples/label"]
    file.create_dataset("samples/label", (1 << 40,), "S64", chunks=(1 << 16,))


def hostile_chunk(file, folder):
    file.create_dataset("secret", (1 << 28,), "u1", chunks=(1 << 28,), compression="gzip")


def hostile_filter(file, folder):
    file.create_dataset("secret", data=np.zeros(100), compression="lzf")


def hostile_depth(file, folder):
    file.create_group("/".join("abcdefghijkl"))


def hostile_shape(file, folder):
    del file["losses/loss"]
    file["losses/loss"] = np.zeros((150, 7), np.float32)


def hostile_kind(file, folder):
    del file["losses/loss"]
    file["losses/loss"] = np.zeros((150, 50), np.int64)


@pytest.mark.parametrize(
    "make", [v for k, v in globals().items() if k.startswith("hostile_")], ids=lambda f: f.__name__
)
def test_a_hostile_file_is_refused_and_touches_nothing(tmp_path, run_path, opsig, make):
    with h5py.File(tmp_path / "victim.h5", "w") as victim:
        victim["x"] = np.arange(4, dtype="f4")
    (tmp_path / "victim.bin").write_bytes(bytes(16))
    with h5py.File(run_path, "r+", libver=("v110", "v110")) as file:
        make(file, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for command in (["mine", run_path], ["info", run_path], ["verify", run_path], ["track", run_path]):
        outcome = opsig(*command)
        outcome.fails(1, "run.h5")
        assert "refused" in outcome.err or "must be" in outcome.err or "are expected" in outcome.err
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_unknown_groups_are_left_alone(run_path, opsig):
    with h5py.File(run_path, "r+", libver=("v110", "v110")) as file:
        file["mine/notes"] = np.arange(3)
    assert opsig("info", run_path).code == 0
    assert opsig("repack", run_path).code == 0
    with h5py.File(run_path) as file:
        assert file["mine/notes"][()].tolist() == [0, 1, 2]


# -- damage


def test_verify_names_what_is_damaged(run_path, opsig):
    assert all(not r["damaged"] for r in opsig("verify", run_path).records)
    with h5py.File(run_path, "r+", libver=("v110", "v110")) as file:
        file["losses/loss"][7, 3] += 1e-6
        file["losses/prediction"][9, 0] = 5
        file["samples/label"][2] = b"other"
    outcome = opsig("verify", run_path)
    assert outcome.code == 1
    assert "losses (2 of 150 rows), samples/label" in outcome.err
    found = {r["name"]: r for r in outcome.records}
    assert found["losses"]["damaged"] == [7, 9]
    assert found["losses"]["intact"] == 148
    assert found["scalars"]["damaged"] == []
    with open_trajectory(run_path) as run, pytest.raises(OpsigError, match="losses at step 7 is damaged"):
        run.row("losses/loss", 7)
    opsig("repack", run_path).fails(1, "is damaged in losses")


def test_a_repacked_run_has_the_same_numbers_in_fewer_bytes(run_path, tmp_path, opsig):
    with open_trajectory(run_path) as run:
        before = {name: run.read(name) for name in run.names()}
        attributes = run.attributes
    (record,) = opsig("repack", run_path, "-o", tmp_path / "small.h5").records
    assert record["bytes"] < record["bytes_before"]
    with open_trajectory(tmp_path / "small.h5") as run:
        assert run.attributes == attributes
        assert run.names() == list(before)
        for name, values in before.items():
            np.testing.assert_array_equal(run.read(name), values)
    assert opsig("verify", tmp_path / "small.h5").code == 0
    opsig("repack", run_path, "-o", tmp_path / "small.h5").fails(1, "small.h5 exists")
    with open_trajectory(tmp_path / "small.h5", "r+") as run:  # and can be continued
        run.append("losses", 150, loss=np.zeros(50, np.float32))


CORRUPT = """
import json, random, sys
import numpy as np
from opsig_cli.trajectory import integrity
from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.file import open_trajectory

source, target, first, last, cut = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
data = open(source, "rb").read()
truth = {}
with open_trajectory(source) as run:
    for name in run.names():
        truth[name] = run.read(name)
for seed in range(first, last):
    generator = random.Random(seed)
    damaged = bytearray(data)
    if cut:
        del damaged[generator.randrange(len(data)) :]
    else:
        place = generator.randrange(len(data))
        for i in range(place, min(len(data), place + generator.choice((1, 1, 4, 64, 512)))):
            damaged[i] ^= generator.randrange(1, 256)
    open(target, "wb").write(damaged)
    try:
        with open_trajectory(target) as run:
            found = {r["name"]: r for r in integrity.verify(run)}
            bad = {name for name, r in found.items() if r["damaged"] or r["reason"]}
            silent = []
            for name, values in truth.items():
                group = name.split("/")[0]
                part = found.get(name) or found.get(group)
                if part is None:
                    silent.append(name)
                elif part["name"] in bad:
                    for step in [s for s in part["damaged"][:2] if part["name"] == group and s in run.steps(group)]:
                        try:
                            run.row(name, step)
                        except OpsigError:
                            pass
                else:
                    nan = values.dtype.kind == "f"
                    if run.shape(name) != values.shape or not np.array_equal(run.read(name), values, equal_nan=nan):
                        silent.append(name)
        outcome = "silent: " + ", ".join(silent) if silent else "named" if bad else "unharmed"
    except OpsigError as error:
        outcome = "refused" if "\\n" not in str(error) else "several lines"
    print(json.dumps([seed, outcome]), flush=True)
"""


def corruptions(source: Path, target: Path, first: int, last: int, cut: bool) -> list[str]:
    """What became of random corruptions: refused, named, unharmed, or silent."""
    command = [sys.executable, "-c", CORRUPT, str(source), str(target), str(first), str(last), str(int(cut))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + (last - first))
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    outcomes = [json.loads(line)[1] for line in done.stdout.splitlines()]
    assert len(outcomes) == last - first
    return outcomes


@pytest.mark.parametrize("cut", [False, True])
def test_random_damage_is_never_silent(run_path, tmp_path, cut):
    first = random.randrange(1 << 30)
    outcomes = corruptions(run_path, tmp_path / "damaged.h5", first, first + 60, cut)
    assert {outcome for outcome in outcomes if outcome not in ("refused", "named", "unharmed")} == set(), first


# -- what is read of a row, and how often


@pytest.fixture
def reads(monkeypatch):
    """Names of the columns that are read, in order, each time that it is read."""
    from opsig_cli.trajectory.reading import Reading

    found: list[str] = []
    gather = Reading._gather

    def noted(self, name, places, *room):
        found.append(name)
        return gather(self, name, places)

    monkeypatch.setattr(Reading, "_gather", noted)
    return found


def with_eigenvectors(path: Path) -> Path:
    with create_trajectory(path, np.arange(5)) as run:
        for step in range(4):
            run.append("sharpness", step, eigenvalue=np.ones(2) * step, residual=np.zeros(2), eigenvector=np.ones(300))
    return path


def test_an_eigenvalue_is_read_without_its_eigenvector_and_held_against_its_checksum_all_the_same(tmp_path, reads):
    path = with_eigenvectors(tmp_path / "run.h5")
    with open_trajectory(path) as run:
        assert run.rows("sharpness/eigenvalue", 0, 4)[:, 0].tolist() == [0, 1, 2, 3]
        run.row("sharpness/residual", 2)
        assert "sharpness/eigenvector" not in reads
        run.row("sharpness/eigenvector", 2)
        assert reads.count("sharpness/eigenvalue") == 2  # once more, as a part of the whole row
    for name in ("sharpness/eigenvalue", "sharpness/wide_checksum", "sharpness/eigenvector"):
        with h5py.File(path, "r+") as file:
            kept = file[name][1]
            file[name][1] = 9
        with open_trajectory(path) as run:
            assert run.row("sharpness/eigenvalue", 3)[0] == 3
            if name != "sharpness/eigenvector":
                with pytest.raises(OpsigError, match="sharpness at step 1 is damaged"):
                    run.rows("sharpness/eigenvalue", 0, 4)
            else:
                assert run.rows("sharpness/eigenvalue", 0, 4)[1].tolist() == [1, 1]
            assert run.damaged_steps("sharpness") == [1]
        with h5py.File(path, "r+") as file:
            file[name][1] = kept


def test_a_file_without_wide_checksums_reads_eigenvalues_as_before(tmp_path, reads):
    path = with_eigenvectors(tmp_path / "run.h5")
    with h5py.File(path, "r+") as file:
        del file["sharpness/wide_checksum"]
    with open_trajectory(path, "r+") as run:
        assert run.rows("sharpness/eigenvalue", 0, 4)[3].tolist() == [3, 3]
        assert "sharpness/eigenvector" in reads
        run.append("sharpness", 4, eigenvalue=np.ones(2), residual=np.zeros(2), eigenvector=np.ones(300))
    with open_trajectory(path) as run:
        assert run.rows("sharpness/eigenvalue", 0, 5)[4].tolist() == [1, 1]
        assert run.damaged_steps("sharpness") == []


def test_a_checkpoint_is_read_once_with_what_it_is_held_against(tmp_path, reads):
    with create_trajectory(tmp_path / "run.h5", np.arange(5)) as run:
        slots = {"optimizer__exp_avg": np.ones(30), "optimizer__exp_avg_sq": np.full(30, np.nan)}
        run.append("checkpoints", 0, params=np.arange(30), buffers=np.arange(2), **slots)
    with open_trajectory(tmp_path / "run.h5") as run:
        state = read_state(run, 0)
    assert state.params.tolist() == list(range(30))
    assert (state.buffers.tolist(), list(state.optimizer)) == ([0, 1], ["exp_avg"])
    assert all(reads.count(name) == 1 for name in reads)
