"""How torch calculates here: the same bits every time, float32 in full, and as fast as the processor can."""

from __future__ import annotations

import warnings

import torch


def prepare(device: str) -> None:
    """Make torch calculate so on "cpu" or "cuda", for the whole process."""
    # As torch.use_deterministic_algorithms, which would import torch._inductor: a second of every command.
    torch.set_deterministic_debug_mode("warn" if device == "cpu" else "default")
    warnings.filterwarnings("ignore", message=".* does not have a deterministic implementation")  # such as unpooling
    # Nothing here reads what it has not written, and the filling took a quarter of the time of gradient cosines.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if torch.accelerator.is_available():
        # Ten bits of mantissa are too few for losses that are compared step by step.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        multiply_at_full_width()


def multiply_at_full_width() -> None:
    """Let oneDNN take float32 matrix products on the CPU where it keeps all of their bits; MKL takes them elsewhere.

    MKL leaves half of the vector unit of AMD's processors with AVX-512 idle: oneDNN multiplies there 1.9 to 2.4 times
    as fast. torch hands it products only under a setting that lets it round to bfloat16 where the processor has units
    for that (AMX), for some shapes and not for others: there it is never set, elsewhere it is tried.
    """
    able = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.11
    fast = able.get("avx512_f", False) and not any(able.get(unit, True) for unit in ("amx_tile", "amx_bf16"))
    torch.set_float32_matmul_precision("medium" if fast else "highest")
    if fast and not multiplies_exactly():
        torch.set_float32_matmul_precision("highest")


def multiplies_exactly() -> bool:
    """Whether a product of float32 matrices is what float32 makes of it.

    1 + 2^-12 is 1 in bfloat16 and in TF32, so that sums of its squares tell.
    """
    size = 256
    matrix = torch.full((size, size), 1 + 2**-12)
    exact = size * (1 + 2**-12) ** 2
    return bool((matrix @ matrix - exact).abs().max() < 1e-5 * exact)
