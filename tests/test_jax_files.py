"""Files of JAX's libraries as data: msgpack and equinox's arrays made by hand and damaged; orbax's folders damaged."""

import io
import json
import random
import struct
import sys
import time

import numpy as np
import pytest
from conftest import TASKS
from hypothesis import given, settings
from hypothesis import strategies as st

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing import checkpoints
from opsig_cli.trajectory.file import open_trajectory

sys.path.insert(0, str(TASKS.parent))
from tiny import Tiny

OWN = ("--task", f"{TASKS}:Tiny")


def packed(value):
    """Flax's msgpack, by its specification."""
    match value:
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int():
            return b"\xd3" + struct.pack(">q", value)
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case str():
            return b"\xd9" + bytes([len(value.encode())]) + value.encode()
        case bytes():
            return b"\xc6" + struct.pack(">I", len(value)) + value
        case list():
            return b"\xdc" + struct.pack(">H", len(value)) + b"".join(map(packed, value))
        case dict():
            pairs = b"".join(packed(key) + packed(inner) for key, inner in value.items())
            return b"\xde" + struct.pack(">H", len(value)) + pairs
        case np.ndarray():
            inside = b"\x93" + packed(list(value.shape)) + packed(value.dtype.name) + packed(value.tobytes())
            return b"\xc9" + struct.pack(">I", len(inside)) + b"\x01" + inside
    raise ValueError(value)


def tree(seed=0):
    """Tiny's parameters nested as flax nests them."""
    random = np.random.default_rng(seed)
    nested = {}
    for name, value in Tiny().model().named_parameters():
        *layers, leaf = name.split(".")
        place = nested
        for layer in layers:
            place = place.setdefault(layer, {})
        place[leaf] = random.normal(size=tuple(value.shape)).astype(np.float32)
    return nested


def flat(nested):
    return np.concatenate([flat(each) if isinstance(each, dict) else each.ravel() for each in nested.values()])


def read_all(path):
    """Everything that an import may read."""
    with checkpoints.opened(str(path)) as content:
        for entry in [*content.tensors.values(), *content.unnamed]:
            entry.read()


def test_moments_of_optax_lie_where_their_parameters_do(opsig, tmp_path):
    mu, nu, trace = tree(1), tree(2), tree(3)
    adam = {"0": {"count": np.array(7, np.int32), "mu": mu, "nu": nu}, "1": {}}
    momentum = {"0": {}, "1": {"0": {"trace": trace}, "1": {"count": np.array(7, np.int32)}}}
    for name, state, slots in (
        ("adam", adam, {"exp_avg": mu, "exp_avg_sq": nu}),
        ("momentum", momentum, {"momentum_buffer": trace}),
    ):
        file, run = tmp_path / f"{name}_7.msgpack", tmp_path / f"{name}.h5"
        file.write_bytes(packed({"step": 7, "params": tree(), "opt_state": state}))
        outcome = opsig("import", file, *OWN, "-o", run, "--optimizer", name, "--learning-rate", 0.1)
        assert outcome.code == 0, outcome.err
        with open_trajectory(run) as kept:
            np.testing.assert_array_equal(kept.row("checkpoints/params", 7), flat(tree()))
            for slot, expected in slots.items():
                np.testing.assert_array_equal(kept.row(f"checkpoints/optimizer/{slot}", 7), flat(expected))


def test_whose_moments_a_file_holds_is_asked_for_and_not_guessed(opsig, tmp_path):
    state = {"0": {"count": np.array(7, np.int32), "mu": tree(1), "nu": tree(2)}}
    (tmp_path / "c_7.msgpack").write_bytes(packed({"params": tree(), "opt_state": state}))
    outcome = opsig("import", tmp_path / "c_7.msgpack", *OWN, "-o", tmp_path / "run.h5", "--learning-rate", 0.1)
    assert outcome.code == 0
    assert "optax's state does not say whose it is" in outcome.err
    assert "thresholds are left out" in outcome.err


def test_a_head_that_is_called_mu_is_no_moment(tmp_path):
    layers = {"mu": {"kernel": np.ones((2, 3), np.float32)}, "nu": {"kernel": np.ones((2, 3), np.float32)}}
    (tmp_path / "c.msgpack").write_bytes(packed({"params": {"encoder": layers}, "count": 3}))
    with checkpoints.opened(str(tmp_path / "c.msgpack")) as content:
        assert sorted(content.tensors) == ["params.encoder.mu.kernel", "params.encoder.nu.kernel"]
        assert not content.optimizers


def test_an_array_in_flat_parts_is_whole(tmp_path):
    values = np.arange(12, dtype=np.float32)
    parts = {"0": values[:5], "1": values[5:10], "2": values[10:]}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 4}, "chunks": parts}
    (tmp_path / "c.msgpack").write_bytes(packed({"w": chunked}))
    with checkpoints.opened(str(tmp_path / "c.msgpack")) as content:
        np.testing.assert_array_equal(content.tensors["w"].read().numpy(), values.reshape(3, 4))


def test_bfloat16_is_read_from_every_format(tmp_path):
    bits = np.array([0x3F80, 0xC000, 0x4049], np.uint16)
    expected = [1.0, -2.0, 3.140625]
    inside = b"\x93" + packed([3]) + packed("bfloat16") + packed(bits.tobytes())
    extension = b"\xc7" + bytes([len(inside)]) + b"\x01" + inside
    (tmp_path / "c.msgpack").write_bytes(b"\x81" + packed("w") + extension)
    np.savez(tmp_path / "c.npz", w=bits.view("V2"))
    with open(tmp_path / "c.eqx", "wb") as file:
        np.save(file, bits.view("V2"))
    for name in ("c.msgpack", "c.npz", "c.eqx"):
        with checkpoints.opened(str(tmp_path / name)) as content:
            (entry,) = content.unnamed or content.tensors.values()
            assert entry.read().float().tolist() == expected, name
            assert [piece.dtype for piece in entry.pieces()] == ["bfloat16"]


def test_msgpack_is_read_by_reference(opsig, tmp_path):
    (tmp_path / "c_7.msgpack").write_bytes(packed({"params": tree()}))
    assert opsig("import", tmp_path / "c_7.msgpack", *OWN, "--reference", "-o", tmp_path / "run.h5").code == 0
    with open_trajectory(tmp_path / "run.h5") as kept:
        np.testing.assert_array_equal(kept.row("checkpoints/params", 7), flat(tree()))


ATTACKS = {
    "empty": b"",
    "lists to any depth": b"\x91" * 100_000,
    "maps to any depth": b"\x81\xa1a" * 100_000,
    "4 billion entries": b"\xdf\xff\xff\xff\xff",
    "4 billion numbers": b"\xdd\xff\xff\xff\xff" + b"\x00" * 1000,
    "a million and one objects": b"\x81\xa1a\xdd" + struct.pack(">I", 2_000_000) + b"\x00" * 2_000_000,
    "text of 4 GiB": b"\x81\xdb\xff\xff\xff\xff",
    "an array of 4 GiB": b"\x81\xa1w\xc9\xff\xff\xff\xff\x01\x93\x91\x01",
    "an array of 1 EiB": b"\x81"
    + packed("w")
    + b"\xc7\x20\x01\x93\x91\xcf"
    + struct.pack(">Q", 1 << 60)
    + b"\xa7float32\xc4\x04"
    + b"\x00" * 13,
    "an array inside an array": b"\x81\xa1w" + (b"\xc9\x00\x00\xff\xff\x01\x93") * 200,
    "an array of a thousand axes": b"\x81\xa1w"
    + b"\xc9\x00\x00\x04\x00\x01\x93\xdc\x03\xe8"
    + b"\x01" * 1000
    + b"\xa7float32"
    + b"\xc4\x04\x00\x00\x00\x00",
    "a shape below 0": b"\x81\xa1w\xc7\x0f\x01\x93\x91\xff\xa7float32\xc4\x00" + b"\x00" * 2,
    "a key that is a list": b"\x81\x91\x01\x01",
    "no such type": b"\x81\xa4step" + b"\xc7\x0d\x01\x93\x90\xa4abcd\xc4\x04" + b"\x00" * 4,
    "no such byte": b"\x81\xa1w\xc1",
    "two files in one": packed({"a": 1}) * 2,
    "a number alone": b"\x07",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_in_msgpack_is_one_line_at_once(opsig, tmp_path, attack):
    (tmp_path / "c1.msgpack").write_bytes(ATTACKS[attack])
    began = time.monotonic()
    opsig("import", tmp_path / "c1.msgpack", *OWN, "-o", tmp_path / "run.h5").fails(1, "c1.msgpack")
    assert time.monotonic() - began < 100  # reading what it says to hold would take hours


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


def damaged(whole, place, byte, cut):
    """The bytes, cut at a place (0 to 1) or with another byte there."""
    at = int(place * (len(whole) - 1))
    return whole[:at] if cut else whole[:at] + bytes([byte]) + whole[at + 1 :]


@settings(max_examples=150, deadline=None)
@given(beside=values, place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_msgpack_is_read_or_refused(beside, place, byte, cut, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.msgpack"
    whole = bytearray(packed({"beside": beside, "params": tree(), "opt_state": {"0": {"count": 3, "mu": tree()}}}))
    path.write_bytes(damaged(whole, place, byte, cut))
    try:
        read_all(path)
    except OpsigError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_leaves_of_equinox_are_read_or_refused(place, byte, cut, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.eqx"
    file = io.BytesIO()
    file.write(b'{"width": 3}\n')
    for shape in ((3, 2), (3,), ()):
        np.save(file, np.ones(shape, np.float32))
    whole = bytearray(file.getvalue())
    path.write_bytes(damaged(whole, place, byte, cut))
    try:
        read_all(path)
    except (OpsigError, ValueError) as error:
        assert "\n" not in str(error)


@pytest.mark.timeout(60)
def test_leaves_of_equinox_of_a_length_below_0_are_refused(tmp_path):
    file = io.BytesIO()
    np.save(file, np.ones(8, np.float32))
    header = file.getvalue()[:-32]
    file = header.replace(b"(8,), }  ", b"(-40,), }")  # behind which the same header would begin again
    assert len(file) == len(header)
    (tmp_path / "c.eqx").write_bytes(file + bytes(32))
    with pytest.raises(OpsigError, match="not whole"):
        read_all(tmp_path / "c.eqx")


def test_parts_without_numbers_of_an_array_of_msgpack_are_refused(tmp_path):
    chunked = {"__msgpack_chunked_array__": True, "shape": {None: 1}, "chunks": {"0": 1}}
    (tmp_path / "c.msgpack").write_bytes(packed({"w": chunked}))
    with pytest.raises(OpsigError, match="not a readable file"):
        read_all(tmp_path / "c.msgpack")


def test_leaves_in_another_order_than_the_model_s_are_refused(opsig, tmp_path):
    leaves = [value.detach().numpy() for value in Tiny().model().parameters()]
    np.savez(tmp_path / "c_1.npz", *leaves)
    assert opsig("import", tmp_path / "c_1.npz", *OWN, "-o", tmp_path / "run.h5").code == 0
    np.savez(tmp_path / "c_1.npz", *leaves[::-1])
    outcome = opsig("import", tmp_path / "c_1.npz", *OWN, "-o", tmp_path / "other.h5")
    outcome.fails(1, "arrays without names, and they are not the model's in its order")


def test_a_damaged_folder_of_orbax_is_one_line(opsig, tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="needs orbax")
    import orbax.checkpoint as ocp

    run = ("import", tmp_path / "step_1", *OWN, "-o", tmp_path / "run.h5", "--replace")
    chooser = random.Random(0)
    for use_ocdbt in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)
            ocp.Checkpointer(handler).save(tmp_path / "step_1", {"params": tree()}, force=True)
        outcome = opsig(*run)
        assert outcome.code == 0, outcome.err
        with open_trajectory(tmp_path / "run.h5") as kept:
            np.testing.assert_array_equal(kept.row("checkpoints/params", 1), flat(tree()))
        files = [path for path in sorted((tmp_path / "step_1").rglob("*")) if path.is_file()]
        for path in [each for each in files if each.name[0] not in "_c" and "process" not in str(each)]:
            whole = path.read_bytes()
            for damaged in (None, b"", whole[: len(whole) // 2], chooser.randbytes(len(whole))):
                path.unlink() if damaged is None else path.write_bytes(damaged)
                outcome = opsig(*run)
                sure = use_ocdbt or damaged is None or path.name == ".zarray"  # not all chunks have a checksum
                assert outcome.code == 1 or not sure, (path, damaged)
                if outcome.code:
                    assert outcome.code == 1
                    assert "Traceback" not in outcome.err
                    assert outcome.err.splitlines()[-1].startswith(f"opsig: {tmp_path / 'step_1'}"), outcome.err
                path.write_bytes(whole)


@pytest.mark.parametrize("metadata", [b"", b"{", b"[1]", b'{"tree_metadata": 3}', b"[" * 100_000])
def test_a_folder_whose_metadata_are_none_is_one_line(opsig, tmp_path, metadata):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "_METADATA").write_bytes(metadata)
    opsig("import", tmp_path / "step_1", *OWN, "-o", tmp_path / "run.h5").fails(1, "step_1")


def test_a_folder_of_orbax_names_no_array_outside_of_it(opsig, tmp_path):
    pytest.importorskip("tensorstore", reason="needs tensorstore")
    (tmp_path / "step_1").mkdir()
    leaf = {"key_metadata": [{"key": "../secret"}], "value_metadata": {"value_type": "np.ndarray"}}
    (tmp_path / "step_1" / "_METADATA").write_text(json.dumps({"tree_metadata": {"a": leaf}}))
    opsig("import", tmp_path / "step_1", *OWN, "-o", tmp_path / "run.h5").fails(1, "names an array outside of it")


def test_without_tensorstore_the_error_says_what_to_install(opsig, tmp_path, monkeypatch):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "_METADATA").write_text('{"tree_metadata": {}}')
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    opsig("import", tmp_path / "step_1", *OWN, "-o", tmp_path / "run.h5").fails(1, "pip install tensorstore")


def test_what_orbax_had_not_finished_is_named_or_left(opsig, tmp_path):
    (tmp_path / "step_1.orbax-checkpoint-tmp").mkdir()
    run = ("import", tmp_path / "step_1.orbax-checkpoint-tmp", *OWN, "-o", tmp_path / "run.h5")
    opsig(*run).fails(1, "had not finished writing")


def test_a_loop_in_jax_records_its_losses_and_parameters(tmp_path):
    jax = pytest.importorskip("jax", reason="needs jax")
    optax = pytest.importorskip("optax", reason="needs optax")
    from opsig_cli import Recorder

    jnp = jax.numpy
    for dtype in (jnp.float32, jnp.bfloat16):
        layers = [{"kernel": jnp.ones((3, 2), dtype), "bias": jnp.zeros(2, dtype)} for _ in range(2)]
        params = {"layers": layers, "count": jnp.arange(3), "name": None}
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
        trained = {"layers": layers}
        _, state = optimizer.update(jax.tree.map(jnp.ones_like, trained), optimizer.init(trained))
        losses = jnp.array([1.5, 2.5, 3.5, jnp.nan], dtype)
        with Recorder(tmp_path / "run.h5", samples=4, replace=True) as recorder:
            recorder.record(jnp.asarray(2), losses=losses, predictions=jnp.arange(4), scalars={"train_loss": losses[0]})
            recorder.record(2, model=params, optimizer=state)
            recorder.observe(3, jnp.array([3, 1]), losses[:2])
        with open_trajectory(tmp_path / "run.h5") as run:
            names = ["layers.0.bias", "layers.0.kernel", "layers.1.bias", "layers.1.kernel"]
            assert run.read("layout/name").tolist() == names
            np.testing.assert_array_equal(run.row("checkpoints/params", 2), [0, 0, 1, 1, 1, 1, 1, 1] * 2)
            mean = np.asarray(jnp.asarray(state[1][0].mu["layers"][0]["bias"], jnp.float32))[0]
            np.testing.assert_array_equal(run.row("checkpoints/optimizer/exp_avg", 2), np.full(16, mean))
            np.testing.assert_array_equal(run.row("losses/loss", 2), [1.5, 2.5, 3.5, np.nan])
            assert run.read("sightings/sample").tolist() == [3, 1]


@pytest.mark.parametrize("given", ["x", {}, {"a": [1, 2]}, [None]])
def test_what_is_no_tree_of_arrays_is_refused(tmp_path, given):
    from opsig_cli import Recorder

    with Recorder(tmp_path / "run.h5", samples=4) as recorder:
        with pytest.raises(OpsigError, match=r"must be a torch\.nn\.Module or a tree of JAX's arrays"):
            recorder.record(0, model=given)
        recorder.record(0, losses=np.ones(4))


def test_a_run_of_flax_and_orbax_is_imported_and_measured_with_the_jax_backend(opsig, tmp_path):
    jax = pytest.importorskip("jax", reason="needs jax")
    optax = pytest.importorskip("optax", reason="needs optax")
    pytest.importorskip("flax", reason="needs flax")
    ocp = pytest.importorskip("orbax.checkpoint", reason="needs orbax")
    from flax.training.train_state import TrainState
    from tasks.tiny_jax import Linen

    task = Linen()
    batch = task.data()
    state = TrainState.create(
        apply_fn=task.model.apply, params=task.init(jax.random.key(3)), tx=optax.sgd(0.3, momentum=0.9)
    )
    gradient = jax.jit(jax.grad(lambda params: task.losses(params, batch).mean()))
    expected, moments = {}, {}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in range(41):
            if step % 20 == 0:
                manager.save(step, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()
                expected[step] = np.asarray(task.losses(state.params, batch))
                moments[step] = np.concatenate([np.ravel(each) for each in jax.tree.leaves(state.opt_state[0].trace)])
            state = state.apply_gradients(grads=gradient(state.params))
    run, own = tmp_path / "run.h5", ("--task", f"{TASKS.parent / 'tiny_jax.py'}:Linen")
    trained = ("--optimizer", "momentum", "--learning-rate", 0.3, "--momentum", 0.9, "--batch-size", "full")
    outcome = opsig("import", tmp_path / "run", "--backend", "jax", *own, *trained, "--track", "-o", run)
    assert outcome.code == 0, outcome.err
    with open_trajectory(run) as kept:
        assert kept.steps("checkpoints").tolist() == [0, 20, 40]
        names = ["layers_0.bias", "layers_0.kernel", "layers_2.bias", "layers_2.kernel"]
        assert kept.read("layout/name").tolist() == names
        for step, losses in expected.items():
            np.testing.assert_allclose(kept.row("losses/loss", step), losses, rtol=1e-6)
            np.testing.assert_array_equal(kept.row("checkpoints/optimizer/momentum_buffer", step), moments[step])
    outcome = opsig("sharpness", run, *own, "--format", "json")
    assert outcome.code == 0, outcome.err
    assert [record["threshold"] for record in outcome.records] == pytest.approx([3.8 / 0.3] * 3)
    outcome = opsig("train", "-o", run, "--resume", "--steps", 60, *own)
    assert outcome.code == 0, outcome.err
