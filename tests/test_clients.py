"""What each client leaves, imported: losses as plain PyTorch has them, steps, rates and thresholds; or one line."""

import sys

import numpy as np
import pytest
from clients import by_hand, jax_files, libraries
from clients.__main__ import check, command, missing

from opsig_cli.trajectory.file import open_trajectory

PLAIN = [client for client in by_hand.CLIENTS if client.name not in ("plain torch, AdamW", "Adamax: no threshold")]
LIBRARIES = [client for client in libraries.CLIENTS if "2 processes" not in client.name]
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries


@pytest.mark.parametrize("client", PLAIN, ids=lambda client: client.name)
def test_a_layout_is_imported_as_its_library_would_load_it(client, tmp_path):
    check(client, tmp_path)


@pytest.mark.parametrize("client", LIBRARIES, ids=lambda client: client.name)
def test_a_library_s_checkpoints_are_imported_as_it_saved_them(client, tmp_path):
    if absent := missing(client):
        pytest.skip(f"needs {absent}")
    check(client, tmp_path)


@pytest.mark.parametrize("client", jax_files.CLIENTS, ids=lambda client: client.name)
def test_what_jax_s_libraries_save_is_imported(client, tmp_path):
    if absent := missing(client):
        pytest.skip(f"needs {absent}")
    check(client, tmp_path)


@pytest.mark.long
def test_what_two_processes_save_is_imported_whole_or_refused(tmp_path):
    for number, make in enumerate((libraries.fsdp_distributed, libraries.fsdp_full, libraries.fsdp_part)):
        (tmp_path / str(number)).mkdir()
        check(by_hand.Client("FSDP2", "torch", make), tmp_path / str(number))


@pytest.mark.parametrize("make", [by_hand.distributed, by_hand.zero2, by_hand.zero3, by_hand.statistics])
def test_partitions_and_blocks_are_read_by_reference_too(make, tmp_path):
    check(by_hand.Client("by reference", "torch", make), tmp_path, "--reference")


def test_names_of_transformers_take_its_own_conversion(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers")
    from transformers import ViTForImageClassification

    from opsig_cli.studies.importing import conversion

    task = libraries.Hub("vit")
    model = task.model()
    assert isinstance(model, ViTForImageClassification)
    model.save_pretrained(tmp_path / "step3")
    arguments = ("import", tmp_path / "step3", "--task", f"{libraries.TASKS}:Hub:kind=vit", "-o", tmp_path / "run.h5")
    monkeypatch.setattr(conversion, "_models", lambda model: iter(()))
    code, err = command(*arguments)
    assert code == 1
    assert "it lacks" in err
    assert "names are converted where the task's model() is one" in err
    monkeypatch.undo()
    code, err = command(*arguments)
    assert code == 0, err
    with open_trajectory(tmp_path / "run.h5") as run:
        expected = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
        np.testing.assert_array_equal(run.row("checkpoints/params", 3), expected)


def test_without_transformers_the_error_says_what_to_install(tmp_path, monkeypatch):
    import torch

    folder = tmp_path / "step3"
    folder.mkdir()
    torch.save({"vit.layer.0.weight": torch.zeros(3)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "vit", "transformers_version": "5.0.0"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, err = command("import", folder, "--task", f"{libraries.TASKS}:Mlp", "-o", tmp_path / "run.h5", "--quiet")
    assert code == 1
    assert "install it, and let the task's model() be its vit" in err.splitlines()[-1]
    assert "transformers" not in sys.modules or not (tmp_path / "run.h5").exists()
