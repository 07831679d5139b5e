"""Patches of the photographs that come with scikit-image, as BSDS300's recipe makes them.

Grey values with uniform noise (so that they have a density), their mean subtracted, the last pixel
dropped (the others determine it): n = size² − 1 features, each divided by its standard deviation.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NAMES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
# Each photograph is cut into bands of so many rows; the third of every five is held out. A patch
# lies in bands of one kind, so that no pixel is in both.
BAND, PERIOD, HELD_OUT = 64, 5, 2
# Patches from which the standard deviations are taken.
SCALE_PATCHES = 20_000


def folder() -> Path:
    """Where scikit-image keeps its photographs; nothing of it is imported, nothing downloaded."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("the photographs come with scikit-image: pip install 'p4flows[examples]'")
    return Path(found.submodule_search_locations[0]) / "data"


class Photographs:
    """Random square patches of a set of photographs.

    Args:
        size: pixels on a side, at most `BAND`.
        files: photographs; those of scikit-image by default.

    Attributes:
        features: size² − 1.
        scale: standard deviation of each feature, shape (features,).
    """

    def __init__(self, size: int, files: list[Path] | None = None) -> None:
        if not 2 <= size <= BAND:
            raise ValueError(f"size must be between 2 and {BAND}, got {size}")
        self.size = size
        self.features = size**2 - 1
        files = [folder() / name for name in NAMES] if files is None else files
        images = [torch.from_numpy(np.array(Image.open(file).convert("L"))) for file in files]
        # One row of pixels of all photographs; a patch is an offset into it and a stride.
        self._pixels = torch.cat([image.flatten() for image in images])
        self._widths = torch.tensor([image.shape[1] for image in images])
        self._starts = torch.tensor([0, *(image.numel() for image in images[:-1])]).cumsum(0)
        self._rows = {
            held_out: [torch.tensor(rows(image.shape[0], size, held_out)) for image in images]
            for held_out in (False, True)
        }
        self.scale = torch.ones(self.features)
        self.scale = self.draw(SCALE_PATCHES, torch.Generator().manual_seed(0)).std(0)

    def draw(self, number: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
        """Patches from random places of random photographs, shape (number, features)."""
        which = torch.randint(len(self._widths), (number,), generator=generator)
        place = torch.rand(2, number, generator=generator, dtype=torch.float64)
        across = torch.arange(self.size)
        corners = torch.empty(number, dtype=torch.long)
        for index, top_rows in enumerate(self._rows[held_out]):
            mine = which == index
            width = int(self._widths[index])
            y = top_rows[(place[0, mine] * len(top_rows)).long()]
            x = (place[1, mine] * (width - self.size + 1)).long()
            corners[mine] = self._starts[index] + y * width + x
        down = across * self._widths[which, None]
        where = corners[:, None, None] + down[:, :, None] + across
        grey = self._pixels[where.flatten(1)].float()
        grey = (grey + torch.rand(grey.shape, generator=generator)) / 256
        return (grey - grey.mean(1, keepdim=True))[:, :-1] / self.scale

    def pictures(self, features: Tensor) -> Tensor:
        """Features as pixels, their mean zero, shape (N, size, size)."""
        pixels = features * self.scale
        pixels = torch.cat([pixels, -pixels.sum(1, keepdim=True)], dim=1)
        return pixels.unflatten(1, (self.size, self.size))

    def filters(self, weights: Tensor) -> Tensor:
        """Weights of features as weights of pixels, shape (N, size, size).

        The sum over the pixels of filter × patch is the weights' product with its features.
        """
        pixels = torch.nn.functional.pad(weights / self.scale, (0, 1))
        pixels = pixels - pixels.mean(1, keepdim=True)
        return pixels.unflatten(1, (self.size, self.size))


def rows(height: int, size: int, held_out: bool) -> list[int]:
    """The top rows of patches that lie in bands of one kind."""

    def kind(row: int) -> bool:
        return row // BAND % PERIOD == HELD_OUT

    return [
        top for top in range(height - size + 1) if kind(top) == kind(top + size - 1) == held_out
    ]
