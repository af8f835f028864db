"""Layouts of plain scripts, and of libraries that are too large to install for a test: written by hand as these write
them (DeepSpeed 0.19, Megatron-LM core, mmengine 0.10, fvcore's Checkpointer, timm 1.0)."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clients.case import TASKS, Client, Made, step_of
from clients.tasks import Mlp, Norm


def run(folder: Path, save: Any, optimizer: Any = torch.optim.AdamW, steps: int = 3, task: Any = None, **options: Any):
    """Train a few steps, `save(step, model, optimizer)` before each; returns what is right of it."""
    torch.manual_seed(1)
    task = task or Mlp()
    model = task.model()
    made = optimizer(model.parameters(), **({"lr": 0.01} | options))
    right = Made(f"{TASKS}:{type(task).__name__}", [folder])
    for step in range(steps):
        save(step, model, made)
        right.keep(step, task, model, made)
        step_of(task, model, made)
    return right


def plain(folder: Path) -> Made:
    def save(step, model, optimizer):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
                   folder / f"c{step}.pt")  # fmt: skip

    return run(folder, save)


def statistics(folder: Path) -> Made:
    def save(step, model, optimizer):
        torch.save({"net": nn.DataParallel(model).state_dict(), "optim": optimizer.state_dict(), "iteration": step},
                   folder / f"c{step}.pth.tar")  # fmt: skip

    return run(folder, save, torch.optim.SGD, task=Norm(), momentum=0.9)


def whole(folder: Path) -> Made:
    """A module and an optimizer pickled as they are."""

    def save(step, model, optimizer):
        torch.save({"net": model, "opt": optimizer, "step": step}, folder / f"c{step}.pt")

    return run(folder, save)


class Phase(enum.Enum):
    TRAIN = 1


@dataclasses.dataclass
class Config:
    step: int = 900
    phase: Phase = Phase.TRAIN


def objects(folder: Path) -> Made:
    """Classes of the script's own beside the weights."""

    def save(step, model, optimizer):
        recent = collections.deque([1.0, 2.0], maxlen=3)
        beside = {"config": Config(), "phase": Phase.TRAIN, "recent": recent, "args": argparse.Namespace(step=5)}
        torch.save({**beside, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
                   folder / f"c{step}.pt")  # fmt: skip

    return run(folder, save)


def listed(folder: Path) -> Made:
    """A list of checkpoints in one file."""
    kept: list[Any] = []

    def save(step, model, optimizer):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        kept.append({"model": state, "step": step})

    right = run(folder, save)
    torch.save(kept, folder / "all.pt")
    right.rates, right.thresholds = {}, {}
    return right


def cycled(folder: Path) -> Made:
    """OneCycle moves the learning rate and beta1 against each other."""
    torch.manual_seed(1)
    task, right = Mlp(), Made(f"{TASKS}:Mlp", [folder], says=["beta1 goes from"])
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8)
    for step in range(6):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"c{step}.pt")
        right.keep(step, task, model, optimizer)
        step_of(task, model, optimizer)
        schedule.step()
    return right


def cycled_momentum(folder: Path) -> Made:
    torch.manual_seed(1)
    task, right = Mlp(), Made(f"{TASKS}:Mlp", [folder], says=["momentum goes from"])
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8)
    for step in range(6):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
                   folder / f"c{step}.pt")  # fmt: skip
        right.keep(step, task, model, optimizer)
        step_of(task, model, optimizer)
        schedule.step()
    return right


def nanogpt(folder: Path) -> Made:
    def save(step, model, optimizer):
        state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
        torch.save({"model": state, "optimizer": optimizer.state_dict(), "model_args": {"n_layer": 12},
                    "iter_num": 250 * step, "best_val_loss": torch.tensor(3.1), "config": {"max_iters": 600000}},
                   folder / f"ckpt_{250 * step}.pt")  # fmt: skip

    right = run(folder, save)
    for name in ("losses", "rates", "thresholds"):
        setattr(right, name, {250 * step: value for step, value in getattr(right, name).items()})
    right.says = ["the optimizer's own count"]
    return right


def timm(folder: Path) -> Made:
    def save(step, model, optimizer):
        torch.save({"epoch": step, "arch": "mlp", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "version": 2, "args": argparse.Namespace(epochs=300),
                    "state_dict_ema": {name: value + 1 for name, value in model.state_dict().items()},
                    "metric": 71.5}, folder / f"checkpoint-{step}.pth.tar")  # fmt: skip

    right = run(folder, save, torch.optim.SGD, momentum=0.9, nesterov=True)
    right.thresholds = {step: 3.8 / 2.8 / rate for step, rate in right.rates.items()}
    right.says = ["epochs, not optimizer steps"]
    return right


class HistoryBuffer:
    def __init__(self):
        self.__dict__.update(_log_history=[1.0], _count_history=[1], _statistics_methods={})


def mmengine(folder: Path) -> Made:
    def save(step, model, optimizer):
        hub = {"log_scalars": collections.OrderedDict({"train/loss": HistoryBuffer()}), "runtime_info":
               collections.OrderedDict(iter=step, max_iters=90), "resumed_keys": {}}  # fmt: skip
        meta = {"epoch": 0, "iter": step, "cfg": "model = dict(...)", "seed": 1, "dataset_meta": {"classes": ("a",)}}
        schedulers = [{"last_step": step, "_global_step": step + 1}]
        torch.save({"meta": meta, "message_hub": hub, "state_dict": model.state_dict(),
                    "optimizer": optimizer.state_dict(), "param_schedulers": schedulers},
                   folder / f"iter_{step}.pth")  # fmt: skip

    right = run(folder, save, torch.optim.SGD, momentum=0.9)
    (folder / "last_checkpoint").write_text("iter_2.pth")
    return right


def detectron(folder: Path) -> Made:
    def save(step, model, optimizer):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": step,
                    "scheduler": {"last_epoch": step, "milestones": collections.Counter({60000: 1})}},
                   folder / f"model_{step:07d}.pth")  # fmt: skip

    right = run(folder, save, torch.optim.SGD, momentum=0.9)
    torch.save(torch.load(folder / "model_0000002.pth", weights_only=False), folder / "model_final.pth")
    right.says = ["model_final.pth is left out"]
    return right


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([value.detach().reshape(-1).clone() for value in tensors])


def zero2(folder: Path, ranks: int = 2) -> Made:
    """ZeRO-2 with bfloat16 weights: each process has a slice of all parameters laid flat, in float32."""

    def save(step, model, optimizer):
        place = folder / f"global_step{step}"
        place.mkdir()
        named = dict(model.named_parameters())
        module = {name: value.detach().bfloat16() for name, value in model.state_dict().items()}
        shapes = collections.OrderedDict((name, value.shape) for name, value in named.items())
        torch.save({"module": module, "buffer_names": [], "param_shapes": [shapes], "shared_params": {},
                    "frozen_param_shapes": None, "frozen_param_fragments": None, "global_steps": step,
                    "global_samples": 24 * step, "dp_world_size": ranks, "ds_version": "0.19.8", "ds_config": {}},
                   place / "mp_rank_00_model_states.pt")  # fmt: skip
        whole = padded(flat(named.values()), ranks)
        moments = {name: padded(flat(optimizer.state[p][name] for p in named.values()), ranks)
                   for name in ("exp_avg", "exp_avg_sq")} if optimizer.state else {}  # fmt: skip
        for rank, part in enumerate(whole.chunk(ranks)):
            state = {name: moment.chunk(ranks)[rank].clone() for name, moment in moments.items()}
            state |= {"step": torch.tensor(float(step))} if moments else {}
            groups = [{key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
                      | {"params": [0]}]  # fmt: skip
            torch.save({"ds_config": {}, "ds_version": "0.19.8", "optimizer_state_dict": {
                "loss_scaler": None, "overflow": False, "base_optimizer_state": {"state": {0: state} if state else {},
                "param_groups": groups}, "single_partition_of_fp32_groups": [part.clone()], "zero_stage": 2,
                "group_paddings": [0], "partition_count": [ranks]}},
                place / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")  # fmt: skip
        (folder / "latest").write_text(f"global_step{step}")

    return run(folder, save)


def padded(values: torch.Tensor, ranks: int) -> torch.Tensor:
    """DeepSpeed pads a flat group to a multiple of twice the processes."""
    return nn.functional.pad(values, (0, -len(values) % (2 * ranks)))


def zero3(folder: Path, ranks: int = 2) -> Made:
    """ZeRO-3: each process has a part of every parameter."""

    def parts(tensors, rank):
        found = []
        for value in tensors:
            size = math.ceil(value.numel() / ranks)
            values = nn.functional.pad(value.detach().reshape(-1), (0, size * ranks - value.numel()))
            found.append(values[rank * size : (rank + 1) * size])
        return torch.cat(found).clone()

    def save(step, model, optimizer):
        place = folder / f"global_step{step}"
        place.mkdir()
        named = dict(model.named_parameters())
        shapes = collections.OrderedDict((name, value.shape) for name, value in named.items())
        for rank in range(ranks):
            none = {name: torch.empty(0) for name in named}
            torch.save({"module": none, "buffer_names": [], "param_shapes": [shapes], "shared_params": {},
                        "frozen_param_shapes": None, "frozen_param_fragments": None,
                        "global_steps": step, "ds_version": "0.19.8"},
                       place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")  # fmt: skip
            state = {name: parts((optimizer.state[p][name] for p in named.values()), rank)
                     for name in ("exp_avg", "exp_avg_sq")} if optimizer.state else {}  # fmt: skip
            state |= {"step": torch.tensor(float(step))} if state else {}
            groups = [{key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
                      | {"params": [0]}]  # fmt: skip
            torch.save({"optimizer_state_dict": {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups":
                        [parts(named.values(), rank)], "optimizer_state_dict": {"state": {0: state} if state else {},
                        "param_groups": groups}}},
                       place / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")  # fmt: skip

    return run(folder, save)


def megatron(folder: Path) -> Made:
    """bfloat16 weights, whose float32 masters the optimizer keeps: those that decay, and those that do not."""

    def save(step, model, optimizer):
        place = folder / f"iter_{step:07d}" / "mp_rank_00"
        place.mkdir(parents=True)
        named = list(model.named_parameters())
        groups = [[p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim < 2]]
        order = [p for group in groups for p in group]
        states = {i: dict(optimizer.state[p]) for i, p in enumerate(order)} if optimizer.state else {}
        first = optimizer.param_groups[0]
        saved = [{key: value for key, value in first.items() if key != "params"} | {"params": list(numbers)}
                 for numbers in (range(len(groups[0])), range(len(groups[0]), len(order)))]  # fmt: skip
        torch.save({"args": argparse.Namespace(iteration=7), "checkpoint_version": 3.0, "iteration": step,
                    "model": {name: value.bfloat16() for name, value in model.state_dict().items()},
                    "optimizer": {"optimizer": {"state": states, "param_groups": saved},
                                  "fp32_from_fp16_params": [[p.detach().clone() for p in group] for group in groups]},
                    "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 900}, "rng_state": []},
                   place / "model_optim_rng.pt")  # fmt: skip
        (folder / "latest_checkpointed_iteration.txt").write_text(str(step))

    return run(folder, save)


def tied_apart(folder: Path) -> Made:
    """Two names of one tensor that a file holds with different values."""
    (folder / "tied.py").write_text(
        "from torch import nn\nfrom clients.tasks import Mlp\n\n\nclass Tied(Mlp):\n    def model(self):\n"
        "        inner = nn.Linear(8, 8)\n        model = nn.Sequential(inner, nn.ReLU(), nn.Linear(8, 8))\n"
        "        model[2].weight = inner.weight\n        return model\n"
    )
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    torch.save(model.state_dict(), folder / "c1.pt")
    return Made(f"{folder / 'tied.py'}:Tied", [folder / "c1.pt"], refused=["0.weight and 2.weight", "different values"])


def distributed(folder: Path) -> Made:
    import torch.distributed.checkpoint as dcp

    def save(step, model, optimizer):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        dcp.save(state, checkpoint_id=folder / f"step_{step}", no_dist=True)

    return run(folder, save)


def others(kind: str, **options: Any):
    """An optimizer of torch that is none of opsig's."""

    def make(folder: Path) -> Made:
        def save(step, model, optimizer):
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
                       folder / f"c{step}.pt")  # fmt: skip

        right = run(folder, save, getattr(torch.optim, kind), **options)
        right.says = ["the optimizer is not one of opsig's"]
        right.thresholds = dict.fromkeys(right.thresholds, math.nan)
        return right

    return make


ODD = {"RAdam": {}, "NAdam": {}, "Adamax": {}, "RMSprop": {"momentum": 0.9}, "Adagrad": {}, "Adam": {"amsgrad": True}}
CLIENTS = [
    Client("plain torch, AdamW", "torch", plain),
    Client("DataParallel, batch norm, SGD with momentum", "torch", statistics),
    Client("whole module and optimizer pickled", "torch", whole),
    Client("dataclass, enum, deque, Namespace beside the weights", "torch", objects),
    Client("a list of checkpoints in one file", "torch", listed),
    Client("OneCycle with Adam: beta1 for each checkpoint", "torch", cycled),
    Client("OneCycle with SGD: momentum for each checkpoint", "torch", cycled_momentum),
    Client("nanoGPT", "by hand", nanogpt),
    Client("timm, with an EMA beside", "by hand", timm),
    Client("mmengine", "by hand", mmengine),
    Client("detectron2 (fvcore), with model_final.pth", "by hand", detectron),
    Client("DCP", "torch", distributed),
    Client("DeepSpeed ZeRO-2, bf16, 2 processes", "by hand", zero2),
    Client("DeepSpeed ZeRO-3, bf16, 2 processes", "by hand", zero3),
    Client("Megatron-LM, bf16 with float32 masters", "by hand", megatron),
    Client("tied names with different values", "torch", tied_apart),
    *(Client(f"{kind}{' (amsgrad)' if options.get('amsgrad') else ''}: no threshold", "torch", others(kind, **options))
      for kind, options in ODD.items()),
]  # fmt: skip
