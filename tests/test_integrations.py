"""Callbacks for other people's trainers record what these trained on: each batch's losses, and a fixed subset."""

import importlib
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from opsig_cli import OpsigError, mine, open_trajectory
from opsig_cli.integrations.indexed import INDEX, Indexed, index_of, with_index
from opsig_cli.trajectory import sightings
from opsig_cli.trajectory.states import read_state

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
ITEMS, BATCH = 24, 4


def test_items_carry_their_index_whatever_they_are():
    assert Indexed([{"x": 1}, {"x": 2}])[1] == {"x": 2, INDEX: 1}
    assert Indexed([(1, 2), (3, 4)])[1] == (3, 4, 1)
    assert Indexed([5.0, 6.0])[1] == (6.0, 1)
    batch = with_index(lambda items: {"x": torch.tensor([item["x"] for item in items])})([{"x": 1, INDEX: 7}])
    assert index_of(batch).tolist() == [7]
    with pytest.raises(OpsigError, match=r"Indexed\(dataset\)"):
        index_of([torch.zeros(3)])


@pytest.mark.parametrize(("library", "name"), [("transformers", "huggingface"), ("lightning", "lightning")])
def test_without_the_library_the_error_says_what_to_install(library, name, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] in (library, "pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, f"opsig_cli.integrations.{name}", raising=False)
    with pytest.raises(OpsigError, match=r"pip install 'opsig\[(hf|lightning)\]'"):
        importlib.import_module(f"opsig_cli.integrations.{name}")


class Tokens(Dataset):
    """Short sequences of tokens."""

    def __init__(self):
        self.tokens = torch.randint(50, (ITEMS, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return ITEMS

    def __getitem__(self, i):
        labels = self.tokens[i].clone()
        labels[0] = -100  # nothing comes before it; Trainer divides by the labels that count
        return {"input_ids": self.tokens[i], "labels": labels}


def trainer(tmp_path, run, callback=None, **arguments):
    transformers = pytest.importorskip("transformers", reason="the callback for Trainer needs it")
    pytest.importorskip("accelerate", reason="Trainer needs it")
    from opsig_cli.integrations import huggingface

    data = Tokens()
    callback = callback or huggingface.OpsigCallback(str(run), data, every=6, subset=5, most=100)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    given = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=BATCH, num_train_epochs=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, remove_unused_columns=False, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.Trainer(
        model, transformers.TrainingArguments(**given | arguments), train_dataset=Indexed(data),
        data_collator=with_index(transformers.default_data_collator), callbacks=[callback],
    )  # fmt: skip


def test_trainer_s_batches_are_kept_as_sightings(tmp_path):
    path = tmp_path / "run.h5"
    trained = trainer(tmp_path, path)
    trained.train()
    with open_trajectory(path) as run:
        seen = sightings.joined(list(sightings.by_step(run)))
        assert np.bincount(seen.sample).tolist() == [2] * ITEMS
        assert np.unique(seen.step).tolist() == list(range(12))
        logged = dict(zip(run.steps("scalars").tolist(), run.rows("scalars/train_loss", 0, 13), strict=True))
        for step in range(12):
            assert seen.loss[seen.step == step].mean() == pytest.approx(logged[step], rel=1e-3)
        assert run.steps("losses").tolist() == run.steps("checkpoints").tolist() == [0, 6, 12]
        measured = np.isfinite(run.losses())
        assert measured.sum(1).tolist() == [5, 5, 5]
        chosen = np.flatnonzero(measured[0])
        weights = torch.cat([p.detach().reshape(-1) for p in trained.model.parameters()])
        np.testing.assert_allclose(read_state(run, 12).params, weights.numpy(), rtol=1e-6)
        trained.model.eval()
        with torch.no_grad():
            tokens = Tokens().tokens[chosen]
            each = trained.model(input_ids=tokens).logits[:, :-1]
            expected = cross_entropy(each.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
        np.testing.assert_allclose(run.row("losses/loss", 12)[chosen], expected.numpy(), rtol=1e-5)
    assert len(mine(path, step=8)) == BATCH


def test_training_is_the_same_with_the_callback_and_without(tmp_path):
    transformers = pytest.importorskip("transformers")
    with_it = trainer(tmp_path, tmp_path / "run.h5")
    with_it.train()
    without = trainer(tmp_path, tmp_path / "other.h5", transformers.TrainerCallback(), remove_unused_columns=True)
    without.train()
    for one, other in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_accumulated_batches_are_of_one_step_and_training_goes_on_after_a_crash(tmp_path):
    path = tmp_path / "run.h5"
    trainer(
        tmp_path, path, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, max_steps=5
    ).train()  # fmt: skip
    with open_trajectory(path) as run:
        assert [len(batch) for _, batch in sightings.batches(run)][:3] == [2 * BATCH] * 3
        assert sightings.last_step(run) == 4
    trainer(
        tmp_path, path, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, max_steps=6
    ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # fmt: skip
    with open_trajectory(path) as run:
        assert [step for step, _ in sightings.batches(run)] == list(range(6))


def test_what_the_trainer_drops_is_said(tmp_path):
    with pytest.raises(OpsigError, match="remove_unused_columns=False"):
        trainer(tmp_path, tmp_path / "run.h5", remove_unused_columns=True).train()
    from opsig_cli.integrations import huggingface

    made = trainer(tmp_path, tmp_path / "run.h5", huggingface.OpsigCallback(str(tmp_path / "r.h5"), Tokens()))
    made.train_dataset = Tokens()
    with pytest.raises(OpsigError, match=r"Indexed\(dataset\)"):
        made.train()


def fit(run, returns=True, **options):
    lightning = pytest.importorskip("lightning", reason="the callback for Lightning's Trainer needs it")
    from opsig_cli.integrations.lightning import OpsigCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))

        def training_step(self, batch, batch_idx):
            x, y, _ = batch
            losses = cross_entropy(self.net(x), y, reduction="none")
            return {"loss": losses.mean(), "losses": losses} if returns else losses.mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    draw = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(ITEMS, 5, generator=draw), torch.arange(ITEMS) % 3)
    module = Module()
    callback = OpsigCallback(
        str(run), data, losses=lambda module, b: cross_entropy(module.net(b[0]), b[1], reduction="none"), **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[callback], log_every_n_steps=1,
        )  # fmt: skip
        made.fit(module, DataLoader(Indexed(data), batch_size=BATCH, shuffle=True))
    return module, data


@pytest.mark.parametrize("returns", [True, False])
def test_lightning_s_batches_are_kept_as_sightings(tmp_path, returns):
    path = tmp_path / "run.h5"
    module, data = fit(path, returns, every=6, subset=5, most=100)
    with open_trajectory(path) as run:
        seen = sightings.joined(list(sightings.by_step(run)))
        assert np.bincount(seen.sample).tolist() == [2] * ITEMS
        assert np.unique(seen.step).tolist() == list(range(12))
        if returns:
            for step in range(12):
                mean = run.row("scalars/train_loss", step)
                assert seen.loss[seen.step == step].mean() == pytest.approx(mean, rel=1e-5)
        assert run.steps("checkpoints").tolist() == [0, 6, 12]
        chosen = np.flatnonzero(np.isfinite(run.row("losses/loss", 12)))
        module.eval()
        expected = cross_entropy(module.net(data.tensors[0][chosen]), data.tensors[1][chosen], reduction="none")
        np.testing.assert_allclose(run.row("losses/loss", 12)[chosen], expected.detach().numpy(), rtol=1e-5)


def test_measuring_the_subset_keeps_to_its_part_of_the_time(tmp_path, capsys):
    fit(tmp_path / "run.h5", every=1, subset=24, most=1e-6)
    with open_trajectory(tmp_path / "run.h5") as run:
        assert run.steps("checkpoints").tolist() == [0]
    assert "12 measurements of 24 samples were left out" in capsys.readouterr().out
