"""How a file of checkpoints is read: never run, never twice, one at a time, and damage is one line."""

import argparse
import pickle
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from conftest import TASKS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing import checkpoints, flow, series

sys.path.insert(0, str(TASKS.parent))
from saved_checkpoints import flat, imports, params_of, save, weights
from tiny import Tiny


class Config:
    """A class that only the training script has."""


class Harm:
    def __reduce__(self):
        return print, ("code of a data file ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_file_names_is_stood_in_for_and_not_run(opsig, tmp_path, zipped):
    whole = Tiny().model()
    whole.load_state_dict(weights(0.5))
    for content in (
        {"model": weights(0.5), "x": Config()},
        {"x": Harm(), "model": weights(0.5)},
        whole,
        {"net": whole},
    ):
        file = save(tmp_path, "c1.pt", content, _use_new_zipfile_serialization=zipped)
        run, outcome = imports(opsig, tmp_path, file)
        assert "code of a data file ran" not in outcome.out + outcome.err
        np.testing.assert_array_equal(params_of(run, 1), flat(weights(0.5)))


def test_a_flipped_bit_in_the_weights_is_said(opsig, tmp_path):
    file = save(tmp_path, "c1.pt", weights())
    content = bytearray(file.read_bytes())
    place = content.find(weights()["1.weight"].numpy().tobytes())
    content[place] ^= 1
    file.write_bytes(content)
    _, outcome = imports(opsig, tmp_path, file)
    assert "c1.pt is damaged or was written without checksums" in outcome.err


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """One small file of each format."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("samples")
    model = Tiny().model()
    made = torch.optim.Adam(model.parameters())
    model(Tiny().x).sum().backward()
    made.step()
    content = {
        "model": model.state_dict(),
        "optimizer": made.state_dict(),
        "step": np.int64(3),
        "a": argparse.Namespace(),
    }
    torch.save(content, folder / "zip.pt")
    torch.save(content, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, Tiny().x), folder / "script.pt")
    save_file(weights(), folder / "s.safetensors")
    np.savez(folder / "a.npz", **{name: value.numpy() for name, value in weights().items()})
    np.save(folder / "b.npy", np.ones((4, 60)))
    (folder / "t.pt").write_text("step,loss\n1,2\n" * 9)
    return sorted(folder.iterdir())


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_one_line_or_is_read(samples, tmp_path, target, data):
    file = data.draw(st.sampled_from(samples))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        place = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(len(content) - 1, 600))))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged{file.suffix}"
    path.write_bytes(content)
    try:
        if file.suffix == ".npy":
            series.read_losses(str(path))
            return
        flow.glance(str(path), target, lambda text: None)
        with checkpoints.opened(str(path)) as opened:
            flow.read(opened, target, str(path), 3, lambda text: None)
    except OpsigError as error:
        assert "damaged" in str(error)
        assert len(str(error)) < 500
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def target():
    from opsig_torch import TorchBackend

    return flow.target_of(Tiny(), TorchBackend().open(Tiny(), "cpu"), None)


def test_neither_torch_nor_pickle_is_asked_to_read_a_file(monkeypatch, samples):
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, None)
    for kind in ("zip.pt", "legacy.pt"):
        with checkpoints.opened(str(next(s for s in samples if s.name == kind))) as content:
            assert content.numbers["step"] == 3


def test_one_checkpoint_is_in_memory_at_a_time(opsig, tmp_path, monkeypatch):
    read, seen, alive = flow.read, [], []

    def counted(content, *rest):
        state = read(content, *rest)
        seen.extend(weakref.ref(each) for each in (state.params, *content.tensors.values()))
        alive.append(sum(each() is not None for each in seen))
        return state

    monkeypatch.setattr(flow, "read", counted)
    imports(opsig, tmp_path, *(save(tmp_path, f"c{step}.pt", weights(step)) for step in range(4)))
    assert alive == [1 + len(weights())] * 4


def test_a_file_of_many_checkpoints_is_taken_apart_and_read_through_once(opsig, tmp_path, monkeypatch):
    path = save(tmp_path, "all.pt", [weights(step) for step in range(6)])
    loads, summed = [], []
    load, is_zip = checkpoints.load, checkpoints.zipfile.is_zipfile
    monkeypatch.setattr(checkpoints, "load", lambda *given: (loads.append(given), load(*given))[1])
    monkeypatch.setattr(checkpoints.zipfile, "is_zipfile", lambda name: (summed.append(name), is_zip(name))[1])
    found = checkpoints.find([str(path)])
    assert len(found) == 6
    for number, each in enumerate(found):
        with checkpoints.opened(each) as content:
            for name, value in weights(number).items():
                assert torch.equal(content.tensors[name].read(), value)
        assert checkpoints.source_of(each).bytes == path.stat().st_size
    assert len(loads) == len(summed) == 1
    save(tmp_path, "all.pt", [weights(9), weights(8)])
    assert len(checkpoints.find([str(path)])) == 2  # a file that has changed is another
