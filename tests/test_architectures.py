"""Architectures have their reference's number of parameters, take any size they can, and leave each sample alone."""

import math
from itertools import pairwise

import pytest
import torch
from opsig_zoo.architectures import ARCHITECTURES
from opsig_zoo.models import image_model
from opsig_zoo.transformers import GPT

from opsig_cli.errors import OpsigError

COUNTS = {  # three channels, ten classes
    "resnet18": 11_173_962,
    "resnet20": 269_722,  # He et al. 2016, table 6: 0.27, 0.85 and 1.7 million
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet56:project=true": 855_770,  # option B, as libraries count it
    "resnet110:project=true": 1_730_714,
    "vgg11": 9_225_610,
    "vgg11-bn": 9_231_114,
    "mlp:width=200,depth=2,activation=tanh": 3 * 32 * 32 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10,
}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_many_as_in_the_reference(name):
    assert count(image_model(name, 3, 32, 10)) == COUNTS[name]


def convolution(inputs, outputs, side=3, bias=True):
    return inputs * outputs * side**2 + bias * outputs


@pytest.mark.parametrize("channels", [1, 3])
def test_parameters_are_as_many_as_the_layers_of_the_papers_have(channels):
    widths = [channels, 64, 128, 256, 256, 512, 512, 512, 512]  # configuration A of Simonyan & Zisserman
    vgg = sum(convolution(a, b) for a, b in pairwise(widths)) + 512 * 7 + 7
    assert count(image_model("vgg11", channels, 32, 7)) == vgg
    assert count(image_model("vgg11-bn", channels, 32, 7)) == vgg + 2 * sum(widths[1:])
    for n in (9, 18):  # 6n + 2 layers: three stages of n blocks of two convolutions, each with batch norm
        total = convolution(channels, 16, bias=False) + 2 * 16 + 64 * 7 + 7
        for first, width in ((16, 16), (16, 32), (32, 64)):
            total += convolution(first, width, bias=False) + (2 * n - 1) * convolution(width, width, bias=False)
            total += 2 * n * 2 * width
        assert count(image_model(f"resnet{6 * n + 2}", channels, 32, 7)) == total


@pytest.mark.parametrize(("channels", "size", "patch", "width", "depth"), [(3, 32, 4, 64, 4), (1, 28, 7, 48, 2)])
def test_a_vit_has_as_many_as_its_formula(channels, size, patch, width, depth):
    model = image_model(f"vit:patch={patch},width={width},depth={depth}", channels, size, 10)
    embedding = convolution(channels, width, patch) + (size // patch) ** 2 * width
    layer = 12 * width**2 + 13 * width  # attention 4 D^2, perceptron 8 D^2, their biases 9 D, two norms 4 D
    assert count(model) == embedding + depth * layer + 2 * width + width * 10 + 10


@pytest.mark.parametrize(
    ("vocabulary", "bias", "total"),
    [(50257, True, 124_439_808), (50304, False, 123_587_328 + 1024 * 768)],  # nanoGPT prints 123.59M without places
)
def test_gpt_has_gpt2s_parameters(vocabulary, bias, total):
    with torch.device("meta"):
        assert count(GPT(vocabulary, 1024, 12, 768, 12, bias)) == total


def test_gpt_starts_as_gpt2_does():
    depth = 8
    torch.manual_seed(0)
    for name, parameter in GPT(5000, 512, depth, 128, 4).named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            residual = "out" in name or "contract" in name
            expected = 0.02 / math.sqrt(2 * depth) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.02 * expected + 1e-4, name


def test_a_token_does_not_see_those_after_it():
    model = GPT(11, 7, 2, 8, 2).double()
    tokens = torch.randint(11, (1, 7))
    changed = tokens.clone()
    changed[0, 4] = (tokens[0, 4] + 1) % 11
    different = (model(tokens) - model(changed)).abs().amax(2)[0] > 1e-12
    assert different.tolist() == [False] * 4 + [True] * 3


@pytest.mark.parametrize("name", ["resnet18:width=8", "resnet20", "vgg11:width=8", "vgg11-bn:width=8", "vit:width=16"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_images_of_any_size_and_channels(name, channels, size):
    model = image_model(name, channels, size, 7).eval()
    x = torch.randn(3, channels, size, size)
    y = model(x)
    assert y.shape == (3, 7)
    torch.testing.assert_close(model(x[1:2]), y[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vgg11", "16 pixels"),
        ("resnet18", "8 pixels"),
        ("vit:patch=5", "patches of 5"),
        ("vit:patch=0", "patch must be at least 1"),
        ("vit:patch=7,heads=0", "heads must be at least 1"),
        ("vit:patch=7,width=10,heads=4", "not divisible"),
        ("vit:patch=7,depth=0", "depth must be at least 1"),
        ("resnet20:width=0", "width must be at least 1"),
        ("resnet56:depth=3", "no option 'depth'. Known: project, width"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(name, words):
    with pytest.raises(OpsigError, match=words) as refused:
        image_model(name, 1, 7, 10)
    assert "\n" not in str(refused.value)


def test_every_architecture_is_reached_by_name(opsig):
    for name in ARCHITECTURES:
        outcome = opsig("train", "--task", "digits", "--model", f"{name}:none=1", "-o", "never.h5")
        outcome.fails(2, f"model {name} has no option 'none'")
