"""The conditions under which a model is run so that its losses can be differentiated: kernels and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from opsig_cli.errors import OpsigError
from opsig_torch.primitives import Precise, TwiceDifferentiable

HALF = (torch.bfloat16, torch.float16)


class Running:
    """What a model needs, read from its layers before they are moved anywhere.

    `kept_half`: it was given in half precision, and is run in full. Raises OpsigError for parameters that no flat
    vector of real numbers can hold, and for embeddings that are no function of their weights.
    """

    def __init__(self, model: nn.Module, device: str, dtype: torch.dtype, tell: Callable[[str], None]):
        for name, parameter in model.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise OpsigError(
                    f"parameter {name} of the task's model has no size yet. Call the model once on a batch in model()"
                )
            if parameter.is_complex():
                raise OpsigError(f"parameter {name} of the task's model is complex. Only real parameters are measured")
        for name, module in model.named_modules():
            kind = f"layer '{name}' ({type(module).__name__})"
            if getattr(module, "max_norm", None) is not None:
                raise OpsigError(f"{kind} changes its weights as it is run (max_norm): losses are no function of them")
            if getattr(module, "scale_grad_by_freq", False):
                raise OpsigError(
                    f"{kind} scales gradients by how often a row is in the batch (scale_grad_by_freq): no sample has a "
                    "gradient of its own"
                )
        self.kept_half = any(tensor.dtype in HALF for tensor in model.parameters())
        self._tell = tell
        self._dtype = dtype
        self._device = device
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._attends = any(
            isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for module in model.modules()
        )
        self._normalises = device == "cpu" and any(isinstance(module, _BatchNorm) for module in model.modules())
        self._casts: bool | None = None  # whether the model goes to half precision on the way, once it has been seen
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                module.sparse = False  # a matter of storage alone
        self._compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
        if self._compiled:
            tell("note: compiled layers are run as they were before compilation")
        if self.kept_half:
            tell(f"note: the model is kept in half precision, and is run in {str(dtype)[6:]}")

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """For losses that training or a person sees."""
        with ExitStack() as conditions:
            if self.kept_half:
                conditions.enter_context(FullPrecision(self._dtype))
            if self._recurrent and self._device == "cuda":  # its kernels have a gradient in training mode alone
                conditions.enter_context(_without("cudnn"))
            if self._normalises:
                conditions.enter_context(Precise())
            yield

    @contextmanager
    def differentiable(self, order: int) -> Iterator[None]:
        """For losses that are differentiated once or twice: in full precision, and by kernels that can be."""
        with ExitStack() as conditions:
            precision = None
            if self._casts is not False or self.kept_half or self._dtype is torch.float64:
                precision = conditions.enter_context(FullPrecision(self._dtype))
            if self._recurrent:
                conditions.enter_context(_without("mkldnn"))
                conditions.enter_context(_without("cudnn"))
            if self._attends:
                conditions.enter_context(_no_fast_path())
            if order > 1:
                conditions.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
                conditions.enter_context(TwiceDifferentiable())
            if self._normalises:
                conditions.enter_context(Precise())
            yield
        if self._casts is None and precision is not None:
            self._casts = precision.met
            if self._casts and not self.kept_half:
                self._tell(
                    "note: the model computes in half precision on the way (autocast); its derivatives are taken in "
                    f"{str(self._dtype)[6:]}"
                )

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Compiled layers hide what enters and leaves their parts, and need a compiler: inside, none is."""
        with torch.compiler.set_stance("force_eager") if self._compiled else nullcontext():
            yield


class FullPrecision(TorchFunctionMode):
    """Inside, autocast does nothing and nothing is cast to a lower precision than `dtype`; `met`: whether something
    would have been to half precision."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.met = False
        self._dtype = dtype
        self._lower = HALF if dtype is torch.float32 else (*HALF, torch.float32)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                torch.set_autocast_enabled(device, False)  # the person's `with` sets it back
                self.met = True
        if function in (torch.Tensor.bfloat16, torch.Tensor.half):
            self.met = True
            return args[0].to(self._dtype)
        if function is torch.Tensor.float and args[0].dtype is torch.float64:
            return args[0].to(self._dtype)
        if any(self._is_lower(value) for value in (*args, *kwargs.values())):
            self.met |= any(isinstance(value, torch.dtype) and value in HALF for value in (*args, *kwargs.values()))
            args = tuple(self._full(value) for value in args)
            kwargs = {name: self._full(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    def _is_lower(self, value: Any) -> bool:
        return isinstance(value, torch.dtype) and value in self._lower

    def _full(self, value: Any) -> Any:
        return self._dtype if self._is_lower(value) else value


@contextmanager
def _without(library: str) -> Iterator[None]:
    """Recurrent layers by torch's own kernels: those of the library have no second derivative."""
    get, switch = getattr(torch._C, f"_get_{library}_enabled"), getattr(torch._C, f"_set_{library}_enabled")
    before = get()
    switch(False)
    try:
        yield
    finally:
        switch(before)


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Attention layers by their plain computation: what they do where no gradient is asked for has no derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
