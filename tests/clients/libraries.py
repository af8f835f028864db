"""Checkpoints that libraries write themselves, with their current releases."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.case import TASKS, Client, Made, losses_of, step_of
from clients.tasks import Hub, Lora, Mlp, Norm


def quiet() -> None:
    import logging
    import warnings

    warnings.simplefilter("ignore")
    for name in ("transformers", "lightning", "lightning.pytorch", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def trained(folder: Path, task: Any, name: str, model: Any = None, shards: str | None = None, **options: Any) -> Made:
    """Four steps of Hugging Face's Trainer, with a checkpoint every two."""
    import transformers as hf

    quiet()
    hf.utils.logging.disable_progress_bar()
    hf.set_seed(3)
    model = task.model() if model is None else model
    right = Made(name, [folder])
    words = getattr(task, "words", False)
    key = ("input_ids" if words else "pixel_values") if isinstance(task, Hub) else "x"
    items = [{key: task.x[i], "labels": task.x[i] if words else task.y[i]} for i in range(len(task.x))]

    class Look(hf.TrainerCallback):
        def on_save(self, args, state, control, model=None, optimizer=None, **_):
            inner = getattr(optimizer, "optimizer", optimizer)
            right.keep(state.global_step, task, model, inner)
            if shards:
                place = folder / f"checkpoint-{state.global_step}"
                (place / "model.safetensors").unlink()
                model.save_pretrained(place, max_shard_size=shards)

        def on_log(self, args, state, control, logs=None, **_):
            if "grad_norm" in (logs or {}):
                right.scalars.setdefault("scalars/grad_norm", {})[state.global_step - 1] = float(logs["grad_norm"])
                right.scalars.setdefault("scalars/train_loss", {})[state.global_step - 1] = float(logs["loss"])
                before = right.scalars.setdefault("scalars/learning_rate", {})
                before[state.global_step - 1] = float(logs["learning_rate"])

    settings = dict(
        output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=6, learning_rate=0.01,
        logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="steps", weight_decay=0.0,
        lr_scheduler_type="linear", dataloader_pin_memory=False,
    ) | options  # fmt: skip
    trainer = hf.Trainer(model, hf.TrainingArguments(**settings), train_dataset=items, callbacks=[Look()])
    trainer.remove_callback(hf.PrinterCallback)
    trainer.train()
    return right


def trainer(**options: Any):
    return lambda folder: trained(folder, Mlp(), f"{TASKS}:Mlp", **options)


def adafactor(folder: Path) -> Made:
    right = trained(folder, Mlp(), f"{TASKS}:Mlp", optim="adafactor")
    right.thresholds = dict.fromkeys(right.losses, math.nan)
    right.says = ["the optimizer is not one of opsig's"]
    return right


def trainer_sgd(folder: Path) -> Made:
    return trained(folder, Mlp(), f"{TASKS}:Mlp", optim="sgd")


def hub(kind: str, **options: Any):
    return lambda folder: trained(folder, Hub(kind), f"{TASKS}:Hub:kind={kind}", **options)


def trainer_lora(folder: Path) -> Made:
    return trained(folder, Lora(), f"{TASKS}:Lora")


def adapters(folder: Path) -> Made:
    task = Lora()
    model = task.model()
    right = Made(f"{TASKS}:Lora", [folder], says=["left as the model makes them"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(2):
        model.save_pretrained(folder / f"step{step}")
        right.keep(step, task, model)
        step_of(task, model, optimizer)
    return right


def accelerate(folder: Path) -> Made:
    from accelerate import Accelerator

    quiet()
    torch.manual_seed(2)
    task, right = Mlp(), Made(f"{TASKS}:Mlp", [folder])
    worker = Accelerator(cpu=True)
    model = task.model()
    model, optimizer = worker.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.02))
    for step in range(3):
        worker.save_state(str(folder / f"checkpoint_{step}"))
        right.keep(step, task, worker.unwrap_model(model), optimizer.optimizer)
        step_of(task, model, optimizer)
    return right


def lit(folder: Path, *callbacks: Any, task: Any = None, compiled: bool = False, onecycle: bool = False, **more: Any):
    """Six steps of Lightning, a checkpoint every two."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    quiet()
    pl.seed_everything(4, verbose=False)
    task = task or Mlp()
    right = Made(f"{TASKS}:{type(task).__name__}", [folder / "kept"])

    class Module(pl.LightningModule):
        def __init__(self, **settings):
            super().__init__()
            self.save_hyperparameters()
            self.net = task.model()

        def training_step(self, batch, index):
            loss = task.losses(self.net, batch).mean()
            self.log("train_loss", loss)
            right.scalars.setdefault("scalars/train_loss", {})[self.global_step] = float(loss)
            return loss

        def validation_step(self, batch, index):
            loss = task.losses(self.net, batch).mean()
            self.log("val_loss", loss)
            if not self.trainer.sanity_checking:
                right.scalars.setdefault("logged/val_loss", {}).setdefault(self.global_step, 0.0)
                right.scalars["logged/val_loss"][self.global_step] += float(loss) / 3  # batches of one size

        def configure_optimizers(self):
            made = torch.optim.Adam(self.parameters(), lr=0.01)
            if onecycle:
                schedule = torch.optim.lr_scheduler.OneCycleLR(made, 0.05, total_steps=12)
            else:
                schedule = torch.optim.lr_scheduler.StepLR(made, 3, 0.5)
            return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_save_checkpoint(self, checkpoint):
            inner = self.net._orig_mod if compiled else self.net
            right.keep(self.global_step, task, inner, self.trainer.optimizers[0])

    module = Module(**more)
    if compiled:
        module.net = torch.compile(module.net, backend="eager")
    keep = ModelCheckpoint(folder / "kept", every_n_train_steps=2, save_top_k=-1, save_last=True)
    data = torch.utils.data.DataLoader(task.dataset(), batch_size=8)
    logger = CSVLogger(folder, name="logs", version=0)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=logger, callbacks=[keep, LearningRateMonitor(), *callbacks],
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data, data)
    right.options = ["--scalars", folder / "logs/version_0/metrics.csv"]
    right.says = ["last.ckpt is left out"]
    right.rates = {step: rate for step, rate in right.rates.items() if step in right.losses}
    return right


def lightning_averaged(folder: Path) -> Made:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    right = lit(folder, EMAWeightAveraging(decay=0.5))
    del right.scalars["logged/val_loss"]  # Lightning evaluates the average
    right.says = [*right.says, "lie under current_model_state"]
    return right


def lightning_swa(folder: Path) -> Made:
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    right = lit(folder, StochasticWeightAveraging(0.05, swa_epoch_start=1))
    right.scalars = {}
    return right


def lightning_omegaconf(folder: Path) -> Made:
    from omegaconf import OmegaConf

    return lit(folder, config=OmegaConf.create({"lr": 0.01, "deep": {"step": 3, "name": "${lr}"}}))


FSDP = """
import os, sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
sys.path.insert(0, {tests!r})
from clients.tasks import Mlp
from clients.case import losses_of, step_of

def main(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29677", RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, StateDictOptions
    from torch.distributed.fsdp import fully_shard
    torch.manual_seed(5)
    task, kept = Mlp(), {{}}
    model = task.model()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(3):
        weights, state = get_state_dict(model, optimizer)
        dcp.save({{"model": weights, "optimizer": state, "step": step}}, checkpoint_id=f"{{folder}}/dcp/step_{{step}}")
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        torch.save({{"model": model.state_dict(), "step": step}}, f"{{folder}}/rank{{rank}}_step{{step}}.pt")
        if rank == 0:
            torch.save({{"model": full, "step": step}}, f"{{folder}}/full_{{step}}.pt")
            plain = task.model()
            plain.load_state_dict(full)
            kept[step] = losses_of(task, plain)
        step_of(task, model, optimizer)
    if rank == 0:
        torch.save(kept, f"{{folder}}/kept")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(main, ({folder!r},), 2)
"""


def two_processes(folder: Path) -> dict[int, np.ndarray]:
    """FSDP2 on two processes: distributed checkpoints, each process's own file, and full state dicts."""
    script = folder / "train.py"
    script.write_text(FSDP.format(tests=str(TASKS.parent.parent), folder=str(folder)))
    (folder / "dcp").mkdir()
    subprocess.run([sys.executable, "-W", "ignore", script], check=True, capture_output=True, timeout=200)
    return torch.load(folder / "kept", weights_only=False)


def fsdp_distributed(folder: Path) -> Made:
    losses = two_processes(folder)
    rates, thresholds = dict.fromkeys(losses, 0.02), dict.fromkeys(losses, 38 / 0.02)
    return Made(f"{TASKS}:Mlp", [folder / "dcp"], losses=losses, rates=rates, thresholds=thresholds)


def fsdp_full(folder: Path) -> Made:
    losses = two_processes(folder)
    return Made(f"{TASKS}:Mlp", sorted(folder.glob("full_*.pt")), losses=losses)


def fsdp_part(folder: Path) -> Made:
    two_processes(folder)
    return Made(f"{TASKS}:Mlp", [folder / "rank0_step1.pt"], refused=["one process's part", "full_state_dict"])


def jax_npz(folder: Path) -> Made:
    import jax
    import jax.numpy as jnp
    import optax

    task, right = Mlp(), Made(f"{TASKS}:Mlp", [folder])
    model = task.model()
    weights = {name: jnp.array(value.detach().numpy()) for name, value in model.named_parameters()}
    x, y = jnp.array(task.x.numpy()), jnp.array(task.y.numpy())

    def loss(weights):
        hidden = jax.nn.relu(x @ weights["first.weight"].T + weights["first.bias"])
        logits = hidden @ weights["second.weight"].T + weights["second.bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    optimizer = optax.sgd(0.1)
    state = optimizer.init(weights)
    for step in range(3):
        np.savez(
            folder / f"params_{step}.npz", step=step, **{name: np.asarray(value) for name, value in weights.items()}
        )
        model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
        right.losses[step] = losses_of(task, model)
        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        weights = optax.apply_updates(weights, updates)
    return right


def third(module: str, kind: str, **options: Any):
    """An optimizer of another library than torch that is none of opsig's."""

    def make(folder: Path) -> Made:
        from importlib import import_module

        torch.manual_seed(1)
        task, right = Mlp(), Made(f"{TASKS}:Mlp", [folder], says=["the optimizer is not one of opsig's"])
        model = task.model()
        made = getattr(import_module(module), kind)(model.parameters(), lr=0.01, **options)
        if hasattr(made, "train"):
            made.train()
        for step in range(3):
            torch.save({"model": model.state_dict(), "optimizer": made.state_dict(), "step": step},
                       folder / f"c{step}.pt")  # fmt: skip
            right.losses[step] = losses_of(task, model)
            right.thresholds[step] = math.nan
            step_of(task, model, made)
        return right

    return make


HF, PL = ("transformers", "accelerate", "safetensors"), ("lightning",)
CLIENTS = [
    Client("Trainer, AdamW", "transformers", trainer(), HF),
    Client("Trainer, Adafactor", "transformers", adafactor, HF),
    Client("Trainer, SGD", "transformers", trainer_sgd, HF),
    Client("Trainer, bf16", "transformers", trainer(bf16=True), HF),
    Client("Trainer, gradients accumulated", "transformers", trainer(gradient_accumulation_steps=2), HF),
    Client("Trainer, shards", "transformers", hub("gpt2", shards="8KB"), HF),
    Client("Trainer, tied (GPT-2)", "transformers", hub("gpt2"), HF),
    Client("Trainer with peft's LoRA", "peft", trainer_lora, (*HF, "peft")),
    Client("adapters alone", "peft", adapters, ("peft", "safetensors")),
    Client("ViT by Trainer, names converted", "transformers", hub("vit"), HF),
    Client("DeiT by Trainer, names converted", "transformers", hub("deit"), HF),
    Client("Dinov2 by Trainer, names converted", "transformers", hub("dinov2"), HF),
    Client("Swin by Trainer, names converted", "transformers", hub("swin"), HF),
    Client("Mixtral by Trainer, experts merged", "transformers", hub("mixtral"), HF),
    Client("GPT-NeoX by Trainer, names converted", "transformers", hub("neox"), HF),
    Client("Accelerator.save_state", "accelerate", accelerate, ("accelerate", "safetensors")),
    Client("Lightning, with metrics.csv and last.ckpt", "lightning", lit, PL),
    Client("Lightning, EMA", "lightning", lightning_averaged, PL),
    Client("Lightning, SWA", "lightning", lightning_swa, PL),
    Client("Lightning, compiled", "lightning", lambda folder: lit(folder, compiled=True), PL),
    Client("Lightning, batch norm", "lightning", lambda folder: lit(folder, task=Norm()), PL),
    Client("Lightning, OneCycle", "lightning", lambda folder: lit(folder, onecycle=True), PL),
    Client("Lightning, OmegaConf in hyperparameters", "lightning", lightning_omegaconf, (*PL, "omegaconf")),
    Client("FSDP2 over 2 processes, DCP", "torch", fsdp_distributed),
    Client("FSDP2 over 2 processes, full state dict", "torch", fsdp_full),
    Client("FSDP2 over 2 processes, one process's file", "torch", fsdp_part),
    Client("npz from JAX", "jax", jax_npz, ("jax", "optax")),
    Client("ScheduleFree: no threshold", "schedulefree", third("schedulefree", "AdamWScheduleFree"), ("schedulefree",)),
    Client("Prodigy: no threshold", "prodigyopt", third("prodigyopt", "Prodigy"), ("prodigyopt",)),
    Client("Lion: no threshold", "lion-pytorch", third("lion_pytorch", "Lion"), ("lion_pytorch",)),
]
