"""A callback that records a run of Lightning's Trainer.

    callback = OpsigCallback("run.h5", dataset, losses=losses, every=100)
    Trainer(callbacks=[callback]).fit(module, DataLoader(Indexed(dataset), batch_size=64, shuffle=True))

`losses(module, batch)` gives (B,) losses in nats. Where `training_step` returns them, under `losses` beside `loss`,
those of a batch cost nothing but one copy to the CPU. B items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.integrations.indexed import INDEX, Indexed, index_of, with_index
from opsig_cli.integrations.recording import Options, Recording, at_rest

try:
    from lightning.pytorch.callbacks import Callback  # pyright: ignore[reportMissingImports]
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback  # pyright: ignore[reportMissingImports]
    except ImportError:
        words = "the callback for Lightning's Trainer needs lightning. Install it: pip install 'opsig[lightning]'"
        raise OpsigError(words) from None

__all__ = ["INDEX", "Indexed", "OpsigCallback", "with_index"]
CHUNK = 32
"""Items of the subset that are measured at a time."""


class OpsigCallback(Callback):
    """Records every batch's losses (`batches`), and every `every` steps those of a fixed subset with a checkpoint.

    `dataset`: the training data; `losses(module, batch)`, needed where `training_step` does not return them, or for the
    subset; `collate`: as the data loader's; the rest is as in `recording.Options`. Checkpoints are of `module`. Of
    several processes the first records, its own share of each batch.
    """

    def __init__(
        self, path: str, dataset: Any, *, losses: Callable[[Any, Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None, **options: Any,
    ):  # fmt: skip
        asked = Options(path, len(dataset), **options)
        if asked.every and losses is None:
            raise OpsigError("the subset is measured by losses(module, batch). Give it, or every=0")
        self.recording = Recording(asked)
        self._dataset = dataset
        self._losses = losses
        self._collate = collate
        self._step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the file."""
        if trainer.is_global_zero:
            self.recording.begin(trainer.global_step)
            self._measure(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note how many steps were taken before this batch."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the batch's losses, and measure the subset where it is due."""
        if not trainer.is_global_zero:
            return
        if self.recording.options.batches:
            self.recording.observe(self._step, index_of(batch), self._of_batch(pl_module, outputs, batch))
        if trainer.global_step != self._step:
            if self._step % max(1, trainer.log_every_n_steps) == 0:
                rate = trainer.optimizers[0].param_groups[0]["lr"]
                loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
                numbers = {"learning_rate": float(rate)}
                if loss is not None and trainer.accumulate_grad_batches == 1:
                    numbers["train_loss"] = float(loss)
                self.recording.scalars(self._step, numbers)
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the file."""
        self.recording.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep what was recorded before an exception."""
        self.recording.end()

    def _of_batch(self, module: Any, outputs: Any, batch: Any) -> Any:
        if isinstance(outputs, Mapping) and outputs.get("losses") is not None:
            return outputs["losses"]
        if self._losses is None:
            raise OpsigError(
                "nothing says the loss of each sample. Return it from training_step, {'loss': losses.mean(), 'losses': "
                "losses}, or give the callback losses=, or batches=False"
            )
        import torch

        with torch.no_grad():
            return self._losses(module, batch)

    def _measure(self, trainer: Any, module: Any) -> None:
        if not self.recording.due(trainer.global_step):
            return
        import torch
        from torch.utils.data import default_collate

        collate, of = self._collate or default_collate, self._losses
        assert of is not None

        def losses(chosen: Sequence[int]) -> tuple[Any, None]:
            found = []
            with at_rest(module):
                for first in range(0, len(chosen), CHUNK):
                    items = [self._dataset[index] for index in chosen[first : first + CHUNK]]
                    batch = module.transfer_batch_to_device(collate(items), module.device, 0)
                    found.append(of(module, batch).float().cpu())
            return torch.cat(found), None

        self.recording.measure(trainer.global_step, losses, module, trainer.optimizers[0])
