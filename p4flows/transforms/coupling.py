"""Affine coupling layers of RealNVP (paper, Appendix D), as nflows Transforms."""

import itertools
from collections.abc import Sequence

import torch
from nflows.transforms.base import Transform
from torch import Tensor, nn

from p4flows.arguments import (
    check_context,
    check_count,
    check_positive_int,
    check_positive_ints,
    check_rows,
)


def dense_net(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    """A multilayer perceptron without an activation behind its last layer.

    Args:
        widths: features of the input, of each hidden layer and of the output.
        activation: class of the activation between layers.

    Returns:
        An `nn.Sequential`.

    Example:
        >>> len(dense_net((2, 8, 8, 1), nn.ReLU))
        5
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class AffineCoupling(Transform):
    """Affine coupling: the first features scale and shift the others (Dinh et al. 2016).

    With x = x₁ ⊕ x₂, y₁ = x₁ and y₂ = x₂·exp(s(x₁)) + t(x₁), where s = exp(c)·tanh(net(x₁)) is
    bounded by one trainable factor exp(c).

    Args:
        features: n ≥ 2; x₁ has the first ⌈n/2⌉ of them.
        hidden: widths of the hidden layers of both nets.
        shift_activation: class of the hidden activation of the net t.
        scale_activation: class of the hidden activation of the net behind s.
        context_features: width of a context that both nets see beside x₁; 0 is none.

    Attributes:
        shift_net: t.
        scale_net: the net behind s.
        log_scale_factor: c, shape `(1,)`, −1 at first: scales of at most e^{±0.37}.

    Raises:
        TypeError: when features or a width is not an int.
        ValueError: when there are fewer than two features, or a width is out of range.

    Cost: forward and inverse alike, one pass of both nets.

    Example:
        >>> coupling = AffineCoupling(4, hidden=(8,))
        >>> x = torch.randn(5, 4)
        >>> y, logabsdet = coupling(x)
        >>> torch.allclose(coupling.inverse(y)[0], x, atol=1e-6), logabsdet.shape
        (True, torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (60, 60),
        shift_activation: type[nn.Module] = nn.ReLU,
        scale_activation: type[nn.Module] = nn.Tanh,
        context_features: int = 0,
    ) -> None:
        check_positive_int("features", features)
        if features < 2:
            raise ValueError(f"features must be at least 2 to be split, got {features}")
        check_positive_ints("hidden", hidden)
        check_count("context_features", context_features)
        super().__init__()
        self.features, self.context_features = features, context_features
        self.conditioning = (features + 1) // 2
        widths = (self.conditioning + context_features, *hidden, features - self.conditioning)
        self.shift_net = dense_net(widths, shift_activation)
        self.scale_net = dense_net(widths, scale_activation)
        self.log_scale_factor = nn.Parameter(torch.full((1,), -1.0))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y₂ = x₂·exp(s(x₁)) + t(x₁).

        Args:
            inputs: x, shape `(N, features)`.
            context: shape `(N, context_features)`; None for a coupling without.

        Returns:
            y of shape `(N, features)` and Σ s(x₁) of shape `(N,)`.

        Raises:
            TypeError: when inputs or context are not floating-point tensors.
            ValueError: when their shapes are others, or a context was not expected.
        """
        first, second = self._split(inputs)
        shift, log_scale = self._condition(first, context)
        outputs = torch.cat([first, second * torch.exp(log_scale) + shift], dim=-1)
        return outputs, log_scale.sum(-1)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x₂ = (y₂ − t(y₁))·exp(−s(y₁)); shapes and errors as for `forward`."""
        first, second = self._split(inputs)
        shift, log_scale = self._condition(first, context)
        outputs = torch.cat([first, (second - shift) * torch.exp(-log_scale)], dim=-1)
        return outputs, -log_scale.sum(-1)

    def extra_repr(self) -> str:
        """What the nets do not show already."""
        context = f", context_features={self.context_features}" if self.context_features else ""
        return f"features={self.features}{context}"

    def _condition(self, first: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        check_context(context, first, self.context_features)
        seen = first if context is None else torch.cat([first, context], -1)
        log_scale = torch.exp(self.log_scale_factor) * torch.tanh(self.scale_net(seen))
        return self.shift_net(seen), log_scale

    def _split(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        check_rows(inputs, self.features)
        return inputs[:, : self.conditioning], inputs[:, self.conditioning :]
