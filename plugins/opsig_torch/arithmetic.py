"""How torch calculates here: the same bits every time, float32 in full, and as fast as the processor can.

All of it is set for a whole process, which may be a person's notebook: it holds inside `calculating` alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch.nn import functional as F

UNDETERMINED = "does not have a deterministic implementation"
"""Of torch's warning of an operation whose bits may differ from run to run, such as unpooling."""
SHORT = 192
"""Queries below which torch's fused attention takes them 32 at a time, in products too small for oneDNN: with 50 it
takes ten times as long as by plain products of matrices."""
_inside = 0
_restore: Callable[[], None] | None = None


@contextmanager
def calculating(device: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, torch calculates so on "cpu" or "cuda"; what the process had comes back as the last to enter has left.

    `tell` takes a line where an operation has no deterministic way.
    """
    global _inside, _restore
    if not _inside:
        _restore = _settings()
        prepare(device)
        _listen(tell)
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if not _inside and _restore is not None:
            _restore()


def prepare(device: str) -> None:
    """Make torch calculate so from now on."""
    # As torch.use_deterministic_algorithms, which would import torch._inductor: a second of every command.
    torch.set_deterministic_debug_mode("warn" if device == "cpu" else "default")
    # Nothing here reads what it has not written, and the filling took a quarter of the time of gradient cosines.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if torch.accelerator.is_available():
        # Ten bits of mantissa are too few for losses that are compared step by step.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        torch.set_float32_matmul_precision(width())
        if width() != "highest" and F.scaled_dot_product_attention is _fused:  # and not a person's own
            F.scaled_dot_product_attention = _attention


_fused = F.scaled_dot_product_attention


@wraps(_fused)
def _attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Attention, without the fused kernel where queries are few and there is a choice."""
    few = not query.is_nested and query.shape[-2] < SHORT
    kinds = torch.backends.cuda  # the CPU's, too, despite the name
    if not (few and kinds.flash_sdp_enabled() and kinds.math_sdp_enabled()):
        return _fused(query, *args, **kwargs)
    kinds.enable_flash_sdp(False)
    try:
        return _fused(query, *args, **kwargs)
    finally:
        kinds.enable_flash_sdp(True)


try:  # for a model that is scripted; torch has no public name for it
    from torch.jit._builtins import _register_builtin
except ImportError:  # a torch that keeps it elsewhere: such a model is scripted outside of `calculating`
    pass
else:
    _register_builtin(_attention, "aten::scaled_dot_product_attention")


@cache
def width() -> str:
    """The setting by which oneDNN takes float32 matrix products on the CPU where it keeps all of their bits.

    MKL leaves half of the vector unit of AMD's processors with AVX-512 idle: oneDNN multiplies there 1.9 to 2.4 times
    as fast. torch hands it products only under a setting that lets it round to bfloat16 where the processor has units
    for that (AMX), for some shapes and not for others: there it is never set, elsewhere it is tried.
    """
    able = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    if not able.get("avx512_f", False) or any(able.get(unit, True) for unit in ("amx_tile", "amx_bf16")):
        return "highest"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return "medium" if multiplies_exactly() else "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def narrow() -> Iterator[None]:
    """Inside, float32 products of matrices are MKL's: of few rows or columns they are up to five times as fast so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def multiplies_exactly() -> bool:
    """Whether a product of float32 matrices is what float32 makes of it.

    1 + 2^-12 is 1 in bfloat16 and in TF32, so that sums of its squares tell.
    """
    size = 256
    matrix = torch.full((size, size), 1 + 2**-12)
    exact = size * (1 + 2**-12) ** 2
    return bool((matrix @ matrix - exact).abs().max() < 1e-5 * exact)


def _settings() -> Callable[[], None]:
    """Puts the process's settings of now back."""
    mode, shown = torch.get_deterministic_debug_mode(), warnings.showwarning
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    on_device = torch.accelerator.is_available()
    if on_device:
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    else:
        precision, attention = torch.get_float32_matmul_precision(), F.scaled_dot_product_attention

    def restore() -> None:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fills
        warnings.showwarning = shown
        if on_device:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        else:
            torch.set_float32_matmul_precision(precision)
            F.scaled_dot_product_attention = attention

    return restore


def _listen(tell: Callable[[str], None]) -> None:
    """Have one line told of an operation without a deterministic way, in the place of torch's warning; Python gives a
    warning once a line of code. Other warnings are shown as before."""
    shown = warnings.showwarning

    def show(message: Warning | str, *where: Any, **kwargs: Any) -> None:
        words = str(message)
        if UNDETERMINED not in words:
            shown(message, *where, **kwargs)
            return
        tell(
            f"note: {words.split()[0]} has no deterministic way in torch: where what it takes overlaps, numbers differ "
            "in their last bits from run to run"
        )

    warnings.showwarning = show
