"""Whether a model keeps samples apart: a few samples' losses in two batchings. Held once, where a session begins.

Batch norm by a chunk's statistics is the one known coupling; it is put by the running statistics meanwhile.
"""

from __future__ import annotations

import torch

from opsig_cli.errors import OpsigError
from opsig_torch.opened import Opened
from opsig_torch.plain import require_losses

AGREES = 1e-4
"""Relative difference up to which a float32 loss is the same in other company."""


def require_apart(opened: Opened) -> None:
    """Raise OpsigError where a sample's loss depends on the others of its batch; once a session, at a finite state."""
    if "apart" in opened.kept or opened.items == 1:
        return
    layers = opened.batch_norms()
    if opened.couples_samples and any(layer.running_mean is None for layer in layers):
        return  # normalised by the chunk in evaluation, too: nothing to compare
    items = sorted({0, opened.items // 3, opened.items // 2, opened.items - 1})
    half = len(items) // 2
    opened.flat.model.eval()
    try:
        with torch.no_grad():
            try:
                together = _losses(opened, items)
                parts = torch.cat([_losses(opened, items[:half]), _losses(opened, items[half:])])
            except OpsigError:
                raise
            except Exception as error:
                whole = range(min(opened.batch_size, opened.items))
                _losses(opened, list(whole))  # where this fails, too, it is the task's own mistake
                raise OpsigError(
                    f"the model takes {len(whole)} samples together, but not {len(items)} or {half} of them "
                    f"({' '.join(str(error).split())[:160]}): losses that need a batch of one size are not measured. "
                    "Take out of the model or of losses() what mixes samples"
                ) from error
            measured = torch.isfinite(together)
            if not measured.any() or _same(together, parts):
                if measured.all() or opened.positions > 1:
                    opened.kept["apart"] = True
                return
            if not _same(together, _losses(opened, items)):
                return  # random: who differentiates it says so
    finally:
        opened.measuring_mode()
    hint = ""
    if any(layer.running_mean is None for layer in layers):
        hint = " Its batch norm keeps no running statistics: --statistics chunk goes by those of fixed chunks."
    off = (together - parts).abs()
    off[together.isnan() & parts.isnan()] = 0
    place = int(off.nan_to_num(torch.inf).argmax())
    sample = items[place // opened.positions] * opened.positions + place % opened.positions
    raise OpsigError(
        f"the loss of sample {sample} depends on which samples are in its batch ({together[place]:.6g} and "
        f"{parts[place]:.6g}): what it does is not its own, and is not measured.{hint} Take out of the model or of "
        "losses() what mixes samples, such as a mean over the batch"
    )


def _losses(opened: Opened, items: list[int]) -> torch.Tensor:
    losses = opened.batch_losses(opened.batches.take(items))
    return require_losses(losses, len(items) * opened.positions).double()


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    scale = left[torch.isfinite(left)].abs().max() if torch.isfinite(left).any() else left.new_zeros(())
    return torch.allclose(left, right, AGREES, float(AGREES * scale), equal_nan=True)
