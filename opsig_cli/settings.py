"""What a run was asked to do: stored in its file, and merged with the command line when it is resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from opsig_cli.errors import OpsigError, UsageError

SGD_BATCH_SIZE = 128
DTYPES = ("float32", "bfloat16")
"""What checkpoints can be kept in."""
OTHER = "other"
"""The optimizer of an imported run that is none of opsig's: it has no threshold here."""
LARGEST = (1 << 63) - 1
"""No number of a run is larger."""
LEAST = dict.fromkeys(("steps", "learning_rate", "batch_size", "track_every", "sharpness_every", "epsilon"), 0) | {
    "chunk_size": 1,
    "checkpoint_every": 0,
    "track_samples": 0,
}
"""The least that a setting can be."""
UNKNOWN_BATCH = 0
"""The batch size of an imported run that does not tell it."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers. `batch_size` None is full batch; `track_every` 0 records no losses, and
    `track_samples` 0 those of all samples.

    Of an imported run, `learning_rate` is NaN (null in the file), `batch_size` UNKNOWN_BATCH and `optimizer` OTHER
    where it does not tell them; `nesterov` is of momentum, and for thresholds alone. Of a branch, `began` is the step
    at which a changed optimizer began to count.
    """

    task: str
    model: str | None = None
    optimizer: str = "gd"
    learning_rate: float = 0.1
    steps: int = 1000
    batch_size: int | None = None
    momentum: float = 0.9
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    sign_learning_rate: float = 1e-3
    dampening: float = 0.9
    radius: float | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = None
    label_smoothing: float | None = None
    began: int = 0
    seed: int = 0
    chunk_size: int | None = None
    statistics: str | None = None
    backend: str = "torch"
    track_every: int = 0
    track_samples: int = 0
    checkpoint_every: int = 0
    checkpoint_pairs: bool = False
    checkpoint_window: tuple[int, int] | None = None
    checkpoint_dtype: str = "float32"
    sharpness_every: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Settings from the options a person gave, None meaning not given; UsageError where they contradict."""
        options = {key: value for key, value in given.items() if value is not None}
        if not options.get("task"):
            raise UsageError("--task is missing. Write --task NAME, as in --task fashion-mnist, or --task file.py:Name")
        settings = cls(**options)
        if settings.optimizer == "gd" and settings.batch_size is not None:
            raise UsageError("gd is full batch. Use --optimizer sgd with --batch-size, or --chunk-size to bound memory")
        if settings.optimizer == "sgd" and settings.batch_size is None:
            settings = replace(settings, batch_size=SGD_BATCH_SIZE)
        if settings.checkpoint_dtype not in DTYPES:
            raise UsageError(f"--checkpoint-dtype is one of {', '.join(DTYPES)}, not '{settings.checkpoint_dtype}'")
        if settings.checkpoint_every == 0:
            settings = replace(settings, checkpoint_every=max(1, settings.steps // 20))
        if settings.statistics is None:
            settings = replace(settings, statistics="chunk" if settings.batch_size is None else "running")
        return settings

    @classmethod
    def stored(cls, attributes: Mapping[str, Any], path: str) -> Self:
        """The settings in a file. Raises OpsigError where the file was not made by `opsig train`."""
        kept = attributes.get("settings_json")
        if not isinstance(kept, dict) or "task" not in kept:
            raise OpsigError(f"{path} does not say how it was trained. Give --task")
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in kept.items() if key in known}
        if isinstance(values.get("checkpoint_window"), list):
            values["checkpoint_window"] = tuple(values["checkpoint_window"])  # JSON has no tuples
        if values.get("learning_rate", 0.0) is None:
            values["learning_rate"] = math.nan
        for name, kind in get_type_hints(cls).items():
            if name in values and not (_is_a(values[name], kind) and LEAST.get(name, -LARGEST) <= _size(values[name])):
                raise OpsigError(f"{path}: {name} in settings_json is {values[name]!r:.40}, which opsig never writes")
        return cls(**values)

    def varied(self, given: Mapping[str, Any]) -> Self:
        """These settings with the options that a person gave in their place; UsageError where they contradict.

        A batch size belongs to the optimizer: it is kept where the new one takes it.
        """
        kept = self.stored_form()
        changed = {key: value for key, value in given.items() if value is not None}
        if changed.get("optimizer") == "gd":
            kept["batch_size"] = changed["batch_size"] = None
        for option, why in self.untold().items():
            if option not in changed:
                raise UsageError(f"the run was imported and {why}. Give --{option.replace('_', '-')}")
        kept["nesterov"] = False
        if "optimizer" in changed and changed["optimizer"] != self.optimizer:
            kept["statistics"] = None
        if "steps" in changed and "checkpoint_every" not in changed:
            kept["checkpoint_every"] = 0
        return self.of(kept | changed)

    def resumed(self, given: Mapping[str, Any], path: str) -> Self:
        """These settings with more steps where asked. Raises UsageError where another option contradicts them, and
        OpsigError where the run cannot be continued from its checkpoints."""
        if self.checkpoint_dtype == "bfloat16":
            raise OpsigError(
                f"{path} keeps its checkpoints rounded to bfloat16, from which a run cannot be continued as it was. "
                "Begin again with --replace"
            )
        for option, why in self.untold().items():
            raise OpsigError(
                f"{path} was imported and {why}, so it cannot be continued. Import it again with "
                f"--{option.replace('_', '-')}"
            )
        for key, value in given.items():
            if value is not None and key not in ("steps", "task") and value != getattr(self, key):
                option = key.replace("_", "-")
                raise UsageError(
                    f"{path} was trained with --{option} {getattr(self, key)}, not {value}. "
                    "Leave it out to resume, or start a new run"
                )
        return self if given.get("steps") is None else replace(self, steps=given["steps"])

    def scheduled(self, steps: int, track_every: int, checkpoint_every: int) -> Self:
        """These settings with another end and schedule of what is recorded."""
        return replace(
            self, steps=steps, track_every=track_every, track_samples=0, checkpoint_every=checkpoint_every,
            checkpoint_pairs=False, checkpoint_window=None, checkpoint_dtype="float32", sharpness_every=0,
        )  # fmt: skip

    def budgeted(self, share: float, samples: int) -> Self:
        """These settings with losses recorded as often as takes this share of the training's time, of so many samples.

        A sample's forward pass counts a third of its part in a training step; where every sample trains, losses come
        with the step.
        """
        if self.batch_size is None:
            return replace(self, track_every=1)
        tracked = min(self.track_samples or samples, samples)
        return replace(self, track_every=max(1, math.ceil(tracked / (3 * self.batch_size * share))))

    def untold(self) -> dict[str, str]:
        """Settings without which an imported run cannot be trained further, and why."""
        found = {}
        if math.isnan(self.learning_rate):
            found["learning_rate"] = "does not tell its learning rate"
        if self.batch_size == UNKNOWN_BATCH:
            found["batch_size"] = "does not tell its batch size"
        if self.optimizer == OTHER or self.nesterov:
            found["optimizer"] = f"has {'nesterov momentum' if self.nesterov else 'an optimizer'} that opsig lacks"
        return found

    def stored_form(self) -> dict[str, Any]:
        """For the file's `settings_json`."""
        return asdict(self) | ({"learning_rate": None} if math.isnan(self.learning_rate) else {})

    def checkpoint_at(self, step: int) -> bool:
        """Whether a checkpoint is due at this step: on the schedule, the step after with `checkpoint_pairs`, or inside
        of `checkpoint_window`."""
        if self.checkpoint_window is not None and self.checkpoint_window[0] <= step <= self.checkpoint_window[1]:
            return True
        due = step % max(1, self.checkpoint_every) == 0 or step == self.steps
        return due or (self.checkpoint_pairs and step % max(1, self.checkpoint_every) == 1)

    def losses_at(self, step: int) -> bool:
        """Whether the schedule records every sample's loss at this step."""
        return self.track_every > 0 and (step % self.track_every == 0 or step == self.steps)

    def sharpness_at(self, step: int) -> bool:
        """Whether the schedule measures sharpness at this step."""
        return self.sharpness_every > 0 and step % self.sharpness_every == 0

    @property
    def batches(self) -> str:
        """The batch size in words."""
        if self.batch_size is None:
            return "full batch"
        return "batch size not known" if self.batch_size == UNKNOWN_BATCH else f"batches of {self.batch_size:,}"

    @property
    def preconditioned(self) -> bool:
        """Whether stability is decided by the Hessian between two inverse roots of a preconditioner, as for Adam."""
        return self.optimizer == "adam"

    @property
    def threshold(self) -> float:
        """The (preconditioned) sharpness at which full-batch training loses stability.

        2/eta for gradient descent, (2 + 2 beta)/eta for heavy ball, that over 1 + 2 beta for nesterov's momentum,
        (2 + 2 beta1)/((1 - beta1) eta) for Adam; infinite for gradient flow, and NaN for steps by the sign, which no
        Hessian decides, and for optimizers that are not known.
        """
        if self.optimizer == "flow" or (self.learning_rate == 0 and self.optimizer != OTHER):
            return float("inf")
        match self.optimizer:
            case "splitsgd" | "signsgd" | "other":
                return float("nan")
            case "momentum":
                ahead = 1 + 2 * self.momentum if self.nesterov else 1
                return (2 + 2 * self.momentum) / ahead / self.learning_rate
            case "adam":
                return (2 + 2 * self.beta1) / ((1 - self.beta1) * self.learning_rate) if self.beta1 != 1 else math.inf
        return 2 / self.learning_rate


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of an annotated type, and of a size that a run can have."""
    if get_origin(kind) in (UnionType, Union):
        return any(_is_a(value, each) for each in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > LARGEST
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_a, value, parts))
    return isinstance(value, kind)


def _size(value: Any) -> float:
    """A number to be held against the least; infinity for what is not one."""
    return value if isinstance(value, int | float) and value == value else math.inf
