"""BentStack: all blocks of a Bent-stacked flow as one Transform over one batch of matrices."""

from typing import Literal

import torch
from nflows.transforms.base import CompositeTransform, InverseTransform, Transform
from torch import Tensor, nn

from p4flows.arguments import check_positive_int, check_rows
from p4flows.matrices import InvertibleMatrix, MergeBounds
from p4flows.matrices.merge import read_state, write_state
from p4flows.matrices.precision import dtype_of_outputs, full_precision
from p4flows.transforms.bent import BentIdentity
from p4flows.transforms.bent_cascade import BENT, INVERSE_BENT, bent_cascade
from p4flows.transforms.linear import P4InvTransform


class BentStack(Transform):
    """Blocks of [P4Inv, Bent identity, P4Inv, inverse Bent identity] run as one layer.

    Equal to the `CompositeTransform` of the single layers up to rounding, and about ten times
    faster at n = 2: the layers' matrices are one batched `InvertibleMatrix`, and the constants of
    the activations are folded into the neighbouring affine maps (Section 2.5, Appendix G).

    Args:
        features: n.
        blocks: number of blocks; there are 2·blocks matrices.
        rank: number k of columns of u and v; None is n up to 64 and 8√n beyond, 1 is the paper.
        bounds: when a merge is accepted.
        perturbation: "relative" or "additive" (the paper); see `InvertibleMatrix`.
        device: where; by default torch's default device.
        dtype: by default torch's default dtype.

    Attributes:
        matrix: `InvertibleMatrix` of `batch_shape = (2·blocks,)`, in the order of the forward pass.
        bias: parameter, shape `(2·blocks, features)`.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when one is out of range.

    Under `torch.autocast` all of it is computed in the dtype of the parameters.

    Cost: forward and inverse O(blocks·(n²N + n²k + k³)) at rank k. Without gradients the memory
    does not grow with the number of blocks, nor beyond inputs and outputs with N.

    Example:
        >>> stack = BentStack(2, blocks=100)
        >>> x = torch.randn(5, 2)
        >>> y, logabsdet = stack(x)
        >>> torch.allclose(stack.inverse(y)[0], x, atol=1e-4), logabsdet.shape
        (True, torch.Size([5]))
    """

    matrix: InvertibleMatrix

    def __init__(
        self,
        features: int,
        blocks: int,
        *,
        rank: int | None = None,
        bounds: MergeBounds = MergeBounds(),
        perturbation: Literal["relative", "additive"] = "relative",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("features", features)
        check_positive_int("blocks", blocks)
        super().__init__()
        self.features = features
        self.matrix = InvertibleMatrix(
            features,
            batch_shape=(2 * blocks,),
            rank=rank,
            bounds=bounds,
            perturbation=perturbation,
            device=device,
            dtype=dtype,
        )
        self.bias = nn.Parameter(self.matrix.u.new_zeros(2 * blocks, features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin again, as just constructed, with fresh seeds."""
        self.matrix.reset_parameters()
        self.bias.zero_()

    @property
    def blocks(self) -> int:
        """Number of blocks of two matrices each."""
        return len(self.bias) // 2

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All blocks in order.

        Args:
            inputs: shape `(N, features)`.
            context: accepted and ignored.

        Returns:
            Outputs of shape `(N, features)` and the log absolute determinant of shape `(N,)`.

        Raises:
            TypeError: when the inputs are not a floating-point tensor, or of another dtype than the
                layer (any is taken under `torch.autocast`, and computed in the layer's).
            ValueError: when their shape is not `(N, features)`, or they are on another device.
        """
        check_rows(inputs, self.features)
        matrix = self.matrix
        device = matrix.frozen.device
        dtype = dtype_of_outputs(inputs, self.bias.dtype, device)
        # Hundreds of layers one after the other would round hundreds of times under autocast.
        with full_precision(device):
            frozen, u, right, _, _ = matrix._perturbation()
            bias = self.bias.to(frozen.dtype)
            outputs, log_slopes = bent_cascade(
                inputs.to(frozen.dtype), frozen, u, right.mT, bias, (BENT, INVERSE_BENT)
            )
            return outputs.to(dtype), log_slopes + matrix.slogdet()[1].sum()

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All blocks undone, last first; shapes and errors as for `forward`."""
        check_rows(inputs, self.features)
        device = self.matrix.frozen.device
        dtype = dtype_of_outputs(inputs, self.bias.dtype, device)
        with full_precision(device):
            outputs, logabsdet = self._inverse(inputs.to(self.matrix.frozen.dtype))
            return outputs.to(dtype), logabsdet

    def _inverse(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.matrix
        # Ã⁻¹ = A⁻¹ − W Z is a rank-k perturbation of A⁻¹, so it is the same cascade, but one that
        # begins with an activation and ends with an affine map.
        frozen, w, z = (each.flip(0) for each in matrix._inverse_factors())
        u, v = -w, z.mT
        own_bias = self.bias.to(frozen.dtype)
        bias = -matrix.solve(own_bias.unsqueeze(1)).squeeze(1).flip(0)
        outputs, logabsdet = BentIdentity()(inputs)
        outputs, log_slopes = bent_cascade(
            outputs, frozen[:-1], u[:-1], v[:-1], bias[:-1], (INVERSE_BENT, BENT)
        )
        outputs = torch.addmm(bias[-1], outputs, frozen[-1].mT) + (outputs @ v[-1]) @ u[-1].mT
        return outputs, logabsdet + log_slopes - matrix.slogdet()[1].sum()

    @torch.no_grad()
    def to_composite(self) -> CompositeTransform:
        """The same flow as single layers.

        Returns:
            A `CompositeTransform` of P4InvTransform and BentIdentity layers with copies of
            parameters, inverses, log-determinants, seeds and counters.
        """
        matrix = self.matrix
        matrix._refresh()
        transforms: list[Transform] = []
        layers = []
        for index in range(len(self.bias)):
            layer = P4InvTransform(
                self.features,
                rank=matrix.rank,
                bounds=matrix.bounds,
                perturbation=matrix.perturbation,
            ).to(self.bias)
            assert layer.bias is not None
            layer.bias.copy_(self.bias[index])
            layers.append(layer)
            activation = BentIdentity()
            transforms += [layer, InverseTransform(activation) if index % 2 else activation]
        state = {name: value for name, value in read_state([matrix]).items() if name != "kind"}
        write_state([layer.matrix for layer in layers], state)
        return CompositeTransform(transforms)

    def extra_repr(self) -> str:
        """What `matrix` does not show already."""
        return f"blocks={self.blocks}"
