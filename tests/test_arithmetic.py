"""How torch calculates while something is measured, and that a person's process has its own settings afterwards."""

import subprocess
import sys
import warnings

import pytest
import torch
from opsig_torch import TorchBackend, arithmetic
from tasks.tiny import Tiny

from opsig_cli.backends import Training


def test_deterministic_algorithms_are_as_torchs_own_function_sets_them():
    code = """
import torch
def seen():
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
from opsig_torch import arithmetic
for device in ("cpu", "cuda"):
    torch.use_deterministic_algorithms(device != "cpu", warn_only=device != "cpu")
    arithmetic.prepare(device)
    ours = seen()
    torch.use_deterministic_algorithms(device == "cpu", warn_only=device == "cpu")
    assert ours == seen(), (device, ours, seen())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_float32_products_keep_their_bits_whoever_multiplies():
    generator = torch.Generator().manual_seed(3)
    shapes = (((500, 784), (784, 200)), ((37, 1100), (1100, 41)), ((1, 300), (300, 70)), ((6, 90, 50), (50, 8)))
    for left, right in shapes:
        a, b = (torch.randn(*shape, generator=generator) for shape in (left, right))
        for x in (a, a.transpose(-1, -2).contiguous().transpose(-1, -2)):
            with arithmetic.calculating("cpu", print):
                product = x @ b
            off = (product.double() - x.double() @ b.double()).abs() / (x.double().abs() @ b.double().abs())
            assert off.max() < 1e-6  # bfloat16 is off by 1e-3


WIDE = {"avx512_f": True, "amx_tile": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("able", "exact", "set_to"),
    [
        (WIDE, True, "medium"),
        (WIDE, False, "highest"),
        (WIDE | {"amx_bf16": True}, True, "highest"),  # which shapes it rounds there is not known
        ({"architecture": "aarch64"}, True, "highest"),
    ],
)
def test_products_go_to_the_faster_library_only_where_it_is_exact(monkeypatch, able, exact, set_to):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(arithmetic, "multiplies_exactly", lambda: exact)
    assert arithmetic.width.__wrapped__() == set_to
    assert torch.get_float32_matmul_precision() == before


FILLS = "fill_uninitialized_memory"


def settings():
    return (
        torch.get_deterministic_debug_mode(), getattr(torch.utils.deterministic, FILLS),
        torch.get_float32_matmul_precision(), list(warnings.filters), warnings.showwarning,
    )  # fmt: skip


class Watched(Tiny):
    """Keeps what torch was set to as losses were asked for."""

    def losses(self, model, batch):
        self.seen = settings()
        return super().losses(model, batch)


def test_what_a_person_has_set_in_torch_holds_again_after_every_call():
    task, before = Watched(), settings()
    random = torch.get_rng_state()
    session = TorchBackend().open(task, "cpu")
    state = session.initial(0)
    other = TorchBackend().open(Watched(), "cpu").train(Training("gd", 0.1, 2), state)
    next(other)  # another session in the middle of its training, which ends later
    snapshots = session.train(Training("sgd", 0.1, 2, batch_size=8), state)
    next(snapshots)
    assert task.seen[0] == 1
    other.close()  # pyright: ignore[reportAttributeAccessIssue]
    session.losses([state])
    assert task.seen[:3] == (1, False, arithmetic.width())
    snapshots.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.filterwarnings("default")
def test_an_operation_without_a_deterministic_way_is_told_in_a_line_and_other_warnings_are_shown(recwarn):
    said = []
    message = "max_unpooling2d does not have a deterministic implementation, but you set ..."
    with arithmetic.calculating("cpu", said.append):
        warnings.warn(message, UserWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert len(said) == 1
    assert said[0].startswith("note: max_unpooling2d has no deterministic way")
    assert [str(each.message) for each in recwarn] == ["another"]
    with torch.no_grad(), arithmetic.calculating("cpu", said.append):  # torch warns of it, and does not refuse it
        pooled, places = torch.nn.functional.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
        torch.nn.functional.max_unpool2d(pooled, places, [2, 2])
    assert [str(each.message) for each in recwarn] == ["another"]


def test_products_in_bfloat16_are_not_taken_for_exact(monkeypatch):
    assert arithmetic.multiplies_exactly()
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: a.bfloat16().float().mm(b.bfloat16().float()))
    assert not arithmetic.multiplies_exactly()


def test_attention_over_few_queries_is_not_left_to_the_fused_kernel_and_is_the_same(monkeypatch):
    monkeypatch.setattr(arithmetic, "width", lambda: "medium")
    before = torch.nn.functional.scaled_dot_product_attention
    for tokens, fused in ((50, False), (arithmetic.SHORT, True)):
        query, key, value = torch.randn(3, 2, 4, tokens, 16, generator=torch.Generator().manual_seed(0))
        query.requires_grad_()
        with arithmetic.calculating("cpu", print):
            found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert ("Flash" in found.grad_fn.name()) == fused
        exact = before(query.double(), key.double(), value.double(), is_causal=True)
        assert torch.allclose(found.double(), exact, atol=1e-6)
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_attention_is_torchs_own_where_a_model_allows_the_fused_kernel_alone_or_gives_sequences_of_all_lengths(
    monkeypatch,
):
    monkeypatch.setattr(arithmetic, "width", lambda: "medium")
    attention = torch.nn.functional.scaled_dot_product_attention
    query = torch.randn(2, 4, 50, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    parts = [query.detach()[0, :, :length].transpose(0, 1) for length in (50, 7)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with arithmetic.calculating("cpu", print):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            found = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        several = torch.nn.functional.scaled_dot_product_attention(nested, nested, nested)
        with pytest.raises(RuntimeError):
            torch.nn.functional.scaled_dot_product_attention(query, query[..., :3, :5], query)
        assert torch.backends.cuda.flash_sdp_enabled()
    assert "Flash" in found.grad_fn.name()
    alone = attention(*[query[:1, :, :7]] * 3)
    assert torch.allclose(several.unbind()[1], alone[0], atol=1e-6)


def test_attention_that_a_person_has_put_in_the_place_of_torchs_stays(monkeypatch):
    monkeypatch.setattr(arithmetic, "width", lambda: "medium")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, key, value: 2 * value)
    value = torch.ones(1, 3, 4)
    with arithmetic.calculating("cpu", print):
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(value, value, value), 2 * value)


class Attending(torch.nn.Module):
    def forward(self, value):
        return torch.nn.functional.scaled_dot_product_attention(value, value, value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_with_attention_can_be_scripted_where_torch_calculates(monkeypatch):
    monkeypatch.setattr(arithmetic, "width", lambda: "medium")
    value = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    with arithmetic.calculating("cpu", print):
        scripted = torch.jit.script(Attending())
    assert torch.allclose(scripted(value), Attending()(value), atol=1e-6)
