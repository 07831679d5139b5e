"""BentStack: all blocks of a Bent-stacked flow as one Transform over one batch of matrices."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from nflows.transforms.base import CompositeTransform, InverseTransform, Transform
from torch import Tensor, nn

from p4flows.arguments import check_like, check_positive_int, check_rows
from p4flows.matrices import InvertibleMatrix, MergeBounds
from p4flows.matrices.precision import is_autocast
from p4flows.transforms.bent import BentIdentity
from p4flows.transforms.bent_cascade import BENT, INVERSE_BENT, bent_cascade
from p4flows.transforms.linear import P4InvTransform

# Tells states of the kinds apart where they change their layout; older ones have version 1.
_VERSIONS = {"relative": 2, "additive": 3}
_LAYERS = "_transforms."


def _check_kind(perturbation: str, local_metadata: dict[str, Any], prefix: str) -> None:
    kinds = {version: kind for kind, version in _VERSIONS.items()}
    saved = kinds.get(local_metadata.get("version", 1), perturbation)
    if saved != perturbation:
        raise RuntimeError(
            f"{prefix.rstrip('.') or 'the stack'} was saved with perturbation={saved!r} and has "
            f"{perturbation!r}: build it with perturbation={saved!r} to load it"
        )


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

    Under `torch.autocast` all of it is computed in the dtype of the parameters. It loads the
    `state_dict` of the single layers as well, and they that of a stack; an optimizer's state is not
    converted.

    Cost: forward and inverse O(blocks·D²N), logabsdet O(blocks·D²). Without gradients the memory
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
        self._version = _VERSIONS[perturbation]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        layers: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for key in [key for key in state_dict if key.startswith(prefix + _LAYERS)]:
            _check_kind(self.matrix.perturbation, local_metadata, prefix)
            index, name = key.removeprefix(prefix + _LAYERS).split(".", 1)
            layers[name][int(index)] = state_dict.pop(key)
        for name, rows in layers.items():
            state_dict[prefix + name] = torch.stack([rows[index] for index in sorted(rows)])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin anew, as just constructed, with fresh seeds."""
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
        with self._full_precision(inputs) as rows:
            matrix = self.matrix
            outputs, logabsdet = bent_cascade(
                rows,
                matrix.frozen,
                matrix.factors()[0],
                matrix.right_factor(),
                self.bias.to(rows.dtype),
                (BENT, INVERSE_BENT),
            )
            return outputs.to(self.bias.dtype), logabsdet + matrix.slogdet()[1].sum()

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All blocks undone, last first; shapes and errors as for `forward`."""
        check_rows(inputs, self.features)
        with self._full_precision(inputs) as rows:
            outputs, logabsdet = self._inverse(rows)
            return outputs.to(self.bias.dtype), logabsdet

    def _inverse(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.matrix
        # Ã⁻¹ = A⁻¹ − w zᵀ is a rank-k perturbation of A⁻¹, so it is the same cascade, but one that
        # begins with an activation and ends with an affine map.
        w, z = matrix.inverse_factors()
        u, v = -w.flip(0), z.flip(0)
        frozen = matrix.inverse_frozen.flip(0)
        bias = -self._solve_bias().flip(0)
        outputs, logabsdet = BentIdentity()(inputs)
        outputs, log_slopes = bent_cascade(
            outputs, frozen[:-1], u[:-1], v[:-1], bias[:-1], (INVERSE_BENT, BENT)
        )
        outputs = torch.addmm(bias[-1], outputs, frozen[-1].mT) + (outputs @ v[-1]) @ u[-1].mT
        return outputs, logabsdet + log_slopes - matrix.slogdet()[1].sum()

    @contextlib.contextmanager
    def _full_precision(self, inputs: Tensor) -> Iterator[Tensor]:
        """No autocast: hundreds of layers one after the other would round hundreds of times."""
        frozen, dtype = self.matrix.frozen, self.bias.dtype
        device = frozen.device.type
        autocast = is_autocast(device)
        check_like("inputs", inputs, None if autocast else (dtype,), frozen.device)
        # In a bfloat16 or float16 module A is float32, and so is all that is computed.
        rows = inputs.to(frozen.dtype)
        if autocast:
            with torch.autocast(device, enabled=False):
                yield rows
        else:
            yield rows

    def _solve_bias(self) -> Tensor:
        """Ã⁻¹ b of all layers, shape (2·blocks, features)."""
        bias = self.bias.to(self.matrix.frozen.dtype)
        return self.matrix.solve(bias.unsqueeze(1)).squeeze(1)

    @torch.no_grad()
    def to_composite(self) -> "BentComposite":
        """The same flow as single layers.

        Returns:
            A `BentComposite` of P4InvTransform and BentIdentity layers with copies of
            parameters, inverses, log-determinants, seeds and counters.
        """
        matrix = self.matrix
        transforms: list[Transform] = []
        layers = []
        for index in range(len(self.bias)):
            layer = P4InvTransform(
                self.features,
                rank=matrix.rank,
                bounds=matrix.bounds,
                perturbation=matrix.perturbation,
            )
            layer = layer.to(self.bias)
            layer.matrix.draw = matrix.draw
            assert layer.bias is not None
            layer.bias.copy_(self.bias[index])
            layers.append(layer)
            activation = BentIdentity()
            transforms += [layer, InverseTransform(activation) if index % 2 else activation]
        matrix.unstack_into([layer.matrix for layer in layers])
        return BentComposite(transforms)

    @classmethod
    @torch.no_grad()
    def from_composite(cls, composite: CompositeTransform) -> "BentStack":
        """The stack that is equal to a `CompositeTransform` of single layers.

        Args:
            composite: blocks of [P4InvTransform, BentIdentity, P4InvTransform,
                InverseTransform(BentIdentity)], as `to_composite` and
                `bent_stacked_flow(fused=False)` build them.

        Returns:
            A `BentStack` with copies of parameters, inverses, log-determinants, seeds and counters.

        Raises:
            TypeError: when it is not a `CompositeTransform`.
            ValueError: when the composite consists of anything else, or of layers without bias.
        """
        if not isinstance(composite, CompositeTransform):
            raise TypeError(
                f"composite must be a CompositeTransform, got {type(composite).__name__}"
            )
        transforms = list(composite._transforms)
        layers = [layer for layer in transforms[0::2] if isinstance(layer, P4InvTransform)]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        matching = (
            len(transforms) % 4 == 0 < len(transforms)
            and 2 * len(biases) == 2 * len(layers) == len(transforms)
            and all(isinstance(t, BentIdentity) for t in transforms[1::4])
            and all(isinstance(t, InverseTransform) for t in transforms[3::4])
            and all(isinstance(t._transform, BentIdentity) for t in transforms[3::4])
        )
        if not matching:
            raise ValueError(
                "composite must consist of blocks [P4InvTransform, BentIdentity, P4InvTransform, "
                f"InverseTransform(BentIdentity)] with bias, got {composite}"
            )
        matrix = InvertibleMatrix.stack([layer.matrix for layer in layers])
        stack = cls(
            matrix.size,
            len(layers) // 2,
            rank=matrix.rank,
            bounds=matrix.bounds,
            perturbation=matrix.perturbation,
        )
        stack.matrix = matrix
        stack.bias = nn.Parameter(torch.stack(biases))
        return stack

    def extra_repr(self) -> str:
        """What `matrix` does not show already."""
        return f"blocks={self.blocks}"


class BentComposite(CompositeTransform):
    """The single layers of a `BentStack`, whose `state_dict` they load as well.

    Args:
        transforms: blocks of them, as `BentStack.to_composite` makes them.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        super().__init__(transforms)
        matrices = (each for each in self.modules() if isinstance(each, InvertibleMatrix))
        self._perturbation = next(matrices).perturbation
        self._version = _VERSIONS[self._perturbation]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if prefix + "bias" in state_dict:
            _check_kind(self._perturbation, local_metadata, prefix)
            for key in [key for key in state_dict if key.startswith(prefix)]:
                name = key.removeprefix(prefix)
                for index, row in enumerate(state_dict.pop(key)):
                    state_dict[f"{prefix}{_LAYERS}{2 * index}.{name}"] = row
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
