"""Makes a traced computation of nested derivatives cheap: no copies of the same thing, no arithmetic on zeros.

Forward derivatives of second order compute the first order twice and carry tangents that are zero. Both go here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

_SAME = {aten.alias.default, aten.detach.default}
_SAME_IF_ALIKE = {
    aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.reshape.default, aten._to_copy.default,
}  # fmt: skip
_MADE_ZERO = {
    aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
    aten._new_zeros_with_same_feature_meta.default,
}  # fmt: skip
_ZERO_OF_FIRST = {  # zero where the first argument is
    aten.expand.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default,
    aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor,
    aten.select.int, aten._to_copy.default, aten.clone.default, aten.neg.default, aten.sum.dim_IntList,
    aten.mean.dim, aten.threshold_backward.default, aten.div.Tensor, aten.avg_pool2d.default,
    aten.constant_pad_nd.default, aten.gelu_backward.default, aten.tanh_backward.default,
}  # fmt: skip
_ZERO_OF_EITHER = {aten.mm.default, aten.bmm.default, aten.mul.Tensor, aten.matmul.default}


def traced(function: Callable[..., Any], inputs: list[Any]) -> Callable[..., Any]:
    """The function as a graph of primitive operations for inputs of these shapes, without its redundant part."""
    from torch._functorch.compile_utils import fx_graph_cse
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    # in-place operations go first: removing common subexpressions among them would change results
    module: Any = make_fx(functionalize(function))(*inputs)
    for _ in range(3):
        _simplify(module.graph)
        module.graph = fx_graph_cse(module.graph)
        module.graph.eliminate_dead_code()
    _fuse(module.graph)
    module.recompile()
    return module


def _simplify(graph: Any) -> None:
    zero: set[Any] = set()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        stand_in = _stand_in(node, zero)
        if stand_in is not None:
            if stand_in in zero:
                zero.add(node)
            node.replace_all_uses_with(stand_in)
        elif _is_zero(node, zero):
            zero.add(node)


def _fuse(graph: Any) -> None:
    """Add products, and doubles, to what they are added to in one pass over memory."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
            continue
        left, right = node.args
        if left is right:  # what is erased would be of use still
            continue
        pairs = [(left, right)] if node.target is aten.sub.Tensor else [(left, right), (right, left)]
        sign = -1 if node.target is aten.sub.Tensor else 1
        for other, term in pairs:
            if _is_single(term, aten.mul.Tensor) and _fits(node, other, *term.args):
                node.target, node.args = aten.addcmul.default, (other, *term.args)
                node.kwargs = {} if sign > 0 else {"value": sign}
            elif _is_single(term, aten.add.Tensor) and term.args[0] is term.args[1] and _fits(node, other, *term.args):
                node.target, node.args, node.kwargs = aten.add.Tensor, (other, term.args[0]), {"alpha": 2 * sign}
            else:
                continue
            graph.erase_node(term)
            break


def _is_single(node: Any, target: Any) -> bool:
    return isinstance(node, torch.fx.Node) and node.target is target and len(node.users) == 1 and not node.kwargs


def _fits(node: Any, *operands: Any) -> bool:
    """Whether operands are of the result's type, and all but one of its shape: torch is slow where two are spread."""
    values = [_value(operand) if isinstance(operand, torch.fx.Node) else None for operand in operands]
    result = _value(node)
    if result is None:
        return False
    spread = [None if value is None or value.dtype != result.dtype else value.shape != result.shape for value in values]
    return None not in spread and sum(map(bool, spread)) <= 1


def _stand_in(node: Any, zero: set[Any]) -> Any:
    """An earlier node of the same value, or None."""
    target, arguments = node.target, node.args
    if target in _SAME or (target in _SAME_IF_ALIKE and _alike(node, arguments[0])):
        return arguments[0]
    if target is aten.copy.default and _alike(node, arguments[1]):
        return arguments[1]
    if target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        left, right = arguments[:2]
        if right in zero and _alike(node, left):
            return left
        if target is aten.add.Tensor and left in zero and _alike(node, right):
            return right
    return None


def _is_zero(node: Any, zero: set[Any]) -> bool:
    target, arguments = node.target, node.args
    if target in _MADE_ZERO:
        return True
    if target in _ZERO_OF_FIRST:
        return arguments[0] in zero
    if target in _ZERO_OF_EITHER:
        return arguments[0] in zero or arguments[1] in zero
    if target is aten.convolution.default:
        image, weight, bias = arguments[:3]
        return (image in zero or weight in zero) and (bias is None or bias in zero)
    return False


def _alike(node: Any, other: Any) -> bool:
    """Whether a node has the shape and type of another, so that it can stand for it."""
    if not isinstance(other, torch.fx.Node):
        return False
    mine, its = _value(node), _value(other)
    return mine is not None and its is not None and mine.shape == its.shape and mine.dtype == its.dtype


def _value(node: Any) -> Any:
    return node.meta.get("val", node.meta.get("tensor_meta"))
