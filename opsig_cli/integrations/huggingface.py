"""A callback that records a run of Hugging Face's Trainer.

    dataset = Indexed(dataset)
    callback = OpsigCallback("run.h5", dataset, every=100)
    Trainer(model, arguments, train_dataset=dataset, data_collator=with_index(collator), callbacks=[callback]).train()

with `remove_unused_columns=False` among the arguments. Losses of a batch are taken from the logits that the forward
pass made anyway; they cost one cross-entropy and one copy to the CPU. B items, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.integrations.indexed import INDEX, Indexed, with_index
from opsig_cli.integrations.recording import Options, Recording, at_rest

try:
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
except ImportError:
    raise OpsigError("the callback for Trainer needs transformers. Install it: pip install 'opsig[hf]'") from None

__all__ = ["Indexed", "OpsigCallback", "losses_of", "with_index"]
CHUNK = 32
"""Items of the subset that are measured at a time."""
IGNORED = -100
"""The label of tokens that do not count."""


class OpsigCallback(TrainerCallback):
    """Records every batch's losses (`batches`), and every `every` steps those of a fixed subset with a checkpoint.

    `dataset`: the training data; `losses(model, outputs, labels)` gives (B,) losses in nats where `losses_of` does not
    fit; `collate`: as the trainer's; the rest is as in `recording.Options`. Of several processes the first records, its
    own share of each batch. Raises OpsigError where the trainer drops what the callback needs.
    """

    def __init__(
        self, path: str, dataset: Any, *, losses: Callable[[Any, Any, Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None, **options: Any,
    ):  # fmt: skip
        self.recording = Recording(Options(path, len(dataset), **options))
        self._dataset = dataset
        self._losses = losses or losses_of
        self._collate = collate
        self._hooks: list[Any] = []
        self._index: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Begin the file, and look at what goes into the model and comes out of it."""
        asked = self.recording.options
        if asked.batches and args.remove_unused_columns:
            raise OpsigError(
                "Trainer drops the indices of samples on their way to the model. Give TrainingArguments "
                "remove_unused_columns=False, or the callback batches=False"
            )
        if loader := others.get("train_dataloader"):
            self._collate = self._collate or loader.collate_fn
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(lambda *given: self._after(state, *given), with_kwargs=True),
        ]
        if state.is_world_process_zero:
            self.recording.begin(state.global_step)
            self._measure(state, model, others.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Measure the subset where it is due."""
        if state.is_world_process_zero:
            self._measure(state, model, others.get("optimizer"))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Keep the numbers that the trainer logs. Its loss is the mean since the last time; where it logs every step,
        that is the loss of the step just taken, and so is the norm of the gradient."""
        if not state.is_world_process_zero or self.recording.recorder is None or "train_runtime" in (logs or {}):
            return
        numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if args.logging_steps == 1 and state.global_step and "loss" in numbers:
            before = {"train_loss": numbers.pop("loss")}
            before |= {"grad_norm": numbers.pop("grad_norm")} if "grad_norm" in numbers else {}
            self.recording.scalars(state.global_step - 1, before)
        self.recording.scalars(state.global_step, numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Close the file."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.recording.end()

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self._index = kwargs.get(INDEX)
        return args, {key: value for key, value in kwargs.items() if key != INDEX}

    def _after(self, state: Any, model: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        if not model.training or not state.is_world_process_zero or not self.recording.options.batches:
            return
        if self._index is None:
            raise OpsigError(
                "the batch has no indices of its samples. Give the trainer Indexed(dataset) and "
                "with_index(collator), or the callback batches=False"
            )
        if kwargs.get("labels") is None and self._losses is losses_of:
            raise OpsigError(
                "the trainer keeps labels from the model (label smoothing, or a loss function of its own). Give the "
                "callback losses=, or batches=False"
            )
        import torch

        with torch.no_grad():
            self.recording.observe(state.global_step, self._index, self._losses(model, outputs, kwargs.get("labels")))

    def _measure(self, state: Any, model: Any, optimizer: Any) -> None:
        if not self.recording.due(state.global_step):
            return
        device, collate = next(model.parameters()).device, self._collate
        if collate is None:
            raise OpsigError("the trainer tells no collator. Give the callback collate=")

        def losses(chosen: Sequence[int]) -> tuple[Any, None]:
            import torch

            found = []
            with at_rest(model):
                for first in range(0, len(chosen), CHUNK):
                    items = [self._dataset[index] for index in chosen[first : first + CHUNK]]
                    batch = {key: value.to(device) for key, value in collate(items).items()}
                    found.append(self._losses(model, model(**batch), batch.get("labels")).float().cpu())
            return torch.cat(found), None

        self.recording.measure(state.global_step, losses, model, optimizer)


def losses_of(model: Any, outputs: Any, labels: Any) -> Any:
    """The loss of every item (B,), in nats, from what a model of transformers returns: cross-entropy of a class; the
    mean over its tokens where items are sequences, each token predicted from those before it in causal models; the mean
    squared error where labels are real numbers. Raises OpsigError for other models."""
    from torch.nn.functional import cross_entropy

    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1 if len(outputs) > 1 else 0]
    logits = logits.float()
    if labels.is_floating_point():
        return (logits.reshape(len(labels), -1) - labels.reshape(len(labels), -1)).square().mean(1)
    if logits.ndim == labels.ndim:
        raise OpsigError("the model's labels are neither classes nor tokens. Give the callback losses=")
    if labels.ndim == 1:
        return cross_entropy(logits, labels, reduction="none")
    if _is_causal(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return each.sum(1) / (labels != IGNORED).sum(1)


def _is_causal(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return any(word in type(inner).__name__ for word in ("CausalLM", "LMHead"))
