"""Built-in tasks and models."""

from opsig_zoo.chebyshev import Chebyshev
from opsig_zoo.hugging_face import HFCausal
from opsig_zoo.image_folder import ImageFolder
from opsig_zoo.images import Cifar10, Digits, FashionMnist
from opsig_zoo.planted import Planted
from opsig_zoo.text import Text
from opsig_zoo.theory import LinearModel, Valley

__all__ = [
    "Chebyshev",
    "Cifar10",
    "Digits",
    "FashionMnist",
    "HFCausal",
    "ImageFolder",
    "LinearModel",
    "Planted",
    "Text",
    "Valley",
]
