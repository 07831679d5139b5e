"""P4OneByOneConvolution: the channels of images, mixed by a perturbed matrix."""

from typing import Literal

import torch
from nflows.transforms.linear import Linear
from torch import Tensor, nn

from p4flows.arguments import check_floating, check_positive_int
from p4flows.matrices import MergeBounds
from p4flows.transforms.linear import P4InvTransform


class P4OneByOneConvolution(P4InvTransform):
    """Invertible 1 × 1 convolution (Glow, Kingma and Dhariwal 2018) with a free matrix.

    y = Ã x + b at every pixel, a drop-in for nflows' `OneByOneConvolution`, without the fixed
    permutation that an LU decomposition needs. Trained as `P4InvTransform` is, by a `MergeHook`.

    Args:
        channels: n.
        rank: as in `P4InvTransform`.
        init: as in `P4InvTransform`; of nflows' `OneByOneConvolution` the permutation is taken over
            as well.
        bias: as in `P4InvTransform`.
        using_cache: as in `P4InvTransform`.
        bounds: as in `P4InvTransform`.
        perturbation: as in `P4InvTransform`.
        device: as in `P4InvTransform`.
        dtype: as in `P4InvTransform`.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: as for `P4InvTransform`.

    Cost: that of `P4InvTransform`, with every pixel a row. Images in `torch.channels_last` are read
    without a copy, and so are the outputs laid out.

    Example:
        >>> import torch
        >>> layer = P4OneByOneConvolution(3, init="reverse")
        >>> images = torch.arange(12.0).reshape(1, 3, 2, 2)
        >>> outputs, logabsdet = layer(images)
        >>> torch.equal(outputs, images.flip(1)), logabsdet.tolist()
        (True, [0.0])
    """

    def __init__(
        self,
        channels: int,
        *,
        rank: int | None = None,
        init: str | Tensor | Linear | nn.Linear = "identity",
        bias: bool = True,
        using_cache: bool = False,
        bounds: MergeBounds = MergeBounds(),
        perturbation: Literal["relative", "additive"] = "relative",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("channels", channels)
        super().__init__(
            channels,
            rank=rank,
            init=init,
            bias=bias,
            using_cache=using_cache,
            bounds=bounds,
            perturbation=perturbation,
            device=device,
            dtype=dtype,
        )

    @property
    def channels(self) -> int:
        """Number n of channels."""
        return int(self.features)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y = Ã x + b at every pixel.

        Args:
            inputs: shape `(N, channels, height, width)`.
            context: accepted and ignored, as by every nflows linear layer.

        Returns:
            Outputs of the same shape and height·width·ln|det Ã| repeated to shape `(N,)`.

        Raises:
            TypeError: when the inputs are not a floating-point tensor, or of another dtype than the
                layer (any is taken under `torch.autocast`, and computed in the layer's).
            ValueError: when their shape is another one, or they are on another device.
        """
        pixels = self._pixels(inputs)
        outputs, logabsdet = super().forward(pixels.flatten(0, 2))
        return _images(outputs, pixels), _summed(logabsdet, pixels)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x = Ã⁻¹ (y − b) at every pixel; shapes and errors as for `forward`."""
        pixels = self._pixels(inputs)
        outputs, logabsdet = super().inverse(pixels.flatten(0, 2))
        return _images(outputs, pixels), _summed(logabsdet, pixels)

    def _pixels(self, inputs: Tensor) -> Tensor:
        """Channels last, shape (N, height, width, channels)."""
        check_floating(inputs)
        if inputs.dim() != 4 or inputs.shape[1] != self.features or 0 in inputs.shape[2:]:
            raise ValueError(
                f"inputs must have shape (N, {self.features}, height, width), got "
                f"{tuple(inputs.shape)}"
            )
        return inputs.permute(0, 2, 3, 1)


def _images(rows: Tensor, pixels: Tensor) -> Tensor:
    return rows.reshape(pixels.shape).permute(0, 3, 1, 2)


def _summed(logabsdet: Tensor, pixels: Tensor) -> Tensor:
    """Of each image; all its pixels have the same, so that none is added up with rounding."""
    count = pixels.shape[1] * pixels.shape[2]
    return logabsdet.reshape(-1, count)[:, 0] * count
