"""Checkpoints are data: what they name is never run, costs no memory beyond the file, and takes no forever."""

import os
import pickle
import struct
import sys
import time
import zipfile

import pytest
import torch
from conftest import TASKS

from opsig_cli.studies.importing.pickles import MAKERS

sys.path.insert(0, str(TASKS.parent))
from tiny import Tiny

OWN = ("--task", f"{TASKS}:Tiny")


class Shell:
    def __reduce__(self):
        return os.system, ("touch ran",)


class Chained:
    def __reduce__(self):
        return getattr, (Shell(), "ran")


class Evaluated:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


class Rebuilt:
    def __reduce__(self):
        return Rebuilt, (), {"__class__": Shell()}, iter([Shell()]), iter([(1, Evaluated())])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [Shell, Chained, Evaluated, Rebuilt])
def test_the_weights_beside_an_attack_are_read_and_it_is_not_run(opsig, tmp_path, monkeypatch, kind, protocol):
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        content = {"a": kind(), "model": Tiny().model().state_dict(), "b": [kind()], kind: {1: kind()}}
        torch.save(content, "c1.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        outcome = opsig("import", "c1.pt", *OWN, "-o", "run.h5", "--replace")
        assert outcome.code == 0, outcome.err
        assert not os.path.exists("ran")


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module, name):
    return text(module) + text(name) + b"\x93"


def tensor(first, shape, strides, count=1, key="0"):
    """A tensor over a storage of `count` float32."""
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text(key) + text("cpu")
    numbers = b"".join(pickle.dumps(each, 2)[2:-1] for each in (first, shape, strides))
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + pickle.dumps(count, 2)[2:-1] + b"tQ" + (
        numbers + b"\x89}tR"
    )  # fmt: skip


TOWER = b"N\x94" + b"".join(b"h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"\x86\x94" for i in range(60))
"""A tuple of two of a tuple of two ...: its hash takes 2^60 steps."""
REBUILD = named("torch._utils", "_rebuild_tensor_v2")
ATTACKS = {
    "a function's defaults": REBUILD + b"N}(" + text("__defaults__") + b")u\x86b",
    "a maker's function": REBUILD + b"}(" + text("make") + named("os", "system") + b"ub",
    "a class's method": named("a", "B") + b"}(" + text("__call__") + named("os", "system") + b"ub",
    "an object by its class": b"(" + named("os", "system") + text("touch ran") + b"o",
    "new with keywords": named("os", "system") + text("touch ran") + b"\x85}\x92",
    "getattr of a module": named("builtins", "getattr")
    + named("os", "x")
    + text("system")
    + b"\x86R"
    + text("touch ran")
    + b"\x85R",
    "a reconstructor": named("copyreg", "_reconstructor")
    + b"("
    + named("os", "system")
    + named("builtins", "object")
    + b"NtR",
    "an extension": b"\x82\x01",
    "a memo of 32 GiB": b"}r" + struct.pack("<I", 0xFFFFFFF0),
    "a bytearray of 1 TiB": b"\x96" + struct.pack("<Q", 1 << 40),
    "bytes of 1 TiB": b"\x8e" + struct.pack("<Q", 1 << 40),
    "a frame of 1 EiB": b"\x95" + struct.pack("<Q", 1 << 60) + b"}",
    "a key that hashes forever": TOWER + b"}h\x3cNs",
    "a set that hashes forever": TOWER + b"\x8f(h\x3c\x90",
    "a frozen set that hashes forever": TOWER + b"(h\x3c\x91",
    "a dictionary that branches forever": b"}" + text("a") + TOWER + b"h\x3cs",
    "lists to any depth": b"]" * 20000 + b"a" * 19999,
    "20,000 classes": b"(" + b"".join(b"ca\nb%d\n" % i for i in range(20000)) + b"l",
    "a tensor before its storage": b"}" + text("w") + tensor(-1, (1,), (1,)) + b"s",
    "a tensor past its storage": b"}" + text("w") + tensor(0, (5,), (1,)) + b"s",
    "a tensor of 1 EiB": b"}" + text("w") + tensor(0, (1 << 58,), (1,)) + b"s",
    "a tensor of negative strides": b"}" + text("w") + tensor(0, (2,), (-1,)) + b"s",
    "a tensor of one number 2^60 times": b"}" + text("w") + tensor(0, (1 << 30, 1 << 30), (0, 0)) + b"s",
    "a storage of 4 PiB": b"}" + text("w") + tensor(0, (1,), (1,), 1 << 50) + b"s",
    "a storage that is not there": b"}" + text("w") + tensor(0, (1,), (1,), key="9") + b"s",
    "an assignment to a tensor": tensor(0, (1,), (1,)) + b"K\x00K\x01s",
    "an addition to a tensor": tensor(0, (1,), (1,)) + b"(K\x00\x90",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_the_reader_is_one_line_at_once(opsig, tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    data = b"\x80\x04" + ATTACKS[attack] + b"."
    with zipfile.ZipFile("c1.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", struct.pack("<f", 1.0))
    (tmp_path / "c2.pt").write_bytes(data)
    functions, began = dict(MAKERS), time.monotonic()
    for name in ("c1.pt", "c2.pt"):
        opsig("import", name, *OWN, "-o", "run.h5").fails(1, name)
    assert time.monotonic() - began < 20
    assert functions == MAKERS
    assert MAKERS["torch._utils._rebuild_tensor_v2"].__defaults__ is None
    assert not os.path.exists("ran")


def test_the_metadata_of_a_distributed_checkpoint_runs_nothing(opsig, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("dcp")
    for content in (Shell(), {"state_dict_metadata": Shell()}, Rebuilt(), None):
        with open("dcp/.metadata", "wb") as file:
            pickle.dump(content, file)
        opsig("import", "dcp", *OWN, "-o", "run.h5").fails(1, "dcp/.metadata")
    opsig("import", "dcp/.metadata", *OWN, "-o", "run.h5").fails(1, "dcp/.metadata")
    assert not os.path.exists("ran")


def test_a_distributed_checkpoint_names_no_file_outside_its_folder(opsig, tmp_path):
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        dcp.save({"model": Tiny().model().state_dict()}, checkpoint_id=tmp_path / "step_1", no_dist=True)
    (file,) = (tmp_path / "step_1").glob("*.distcp")
    file.rename(tmp_path / file.name)
    run = ("import", tmp_path / "step_1", *OWN, "-o", tmp_path / "run.h5")
    opsig(*run).fails(1, "lacks __0_0.distcp, which its .metadata names")
    metadata = tmp_path / "step_1" / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"__0_0.distcp", b"../0_0.distc"))
    opsig(*run).fails(1, "names a file outside of it")
