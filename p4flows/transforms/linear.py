"""Linear layers whose weight is a perturbed matrix, drop-ins for nflows' `LULinear`."""

from typing import Any, Literal

import torch
from nflows.transforms.linear import Linear, LinearCache
from torch import Tensor, nn

from p4flows.arguments import check_positive_int, check_rows
from p4flows.matrices import InvertibleMatrix, MergeBounds, OrthogonalMatrix, PerturbedMatrix
from p4flows.matrices.precision import is_autocast


class _Cache(LinearCache):
    """nflows' cache, which notices that its tensors have changed; copies and pickles are empty."""

    def __init__(self) -> None:
        super().__init__()
        self._key: tuple[Any, ...] = ()
        self._storages: list[torch.UntypedStorage] = []

    def follow(self, matrix: PerturbedMatrix) -> None:
        """Empty the cache when the matrix is another one."""
        matrix._refresh(thorough=False)
        tensors = [*matrix.parameters(), *matrix.buffers()]
        key = (
            # What is cached in inference mode cannot be used outside of it.
            torch.is_inference_mode_enabled(),
            *((t.data_ptr(), t._version) for t in tensors),
        )
        if key != self._key:
            self.invalidate()
            self._key = key
            # Kept alive, so that no later tensor can be found at the same address.
            self._storages = [t.untyped_storage() for t in tensors]

    def invalidate(self) -> None:
        super().invalidate()
        self._key, self._storages = (), []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class PerturbedLinear(Linear):
    """nflows' `Linear` over a `PerturbedMatrix`: y = Ã x + b for rows x.

    Args:
        matrix: the weight; its `batch_shape` is `()`.
        bias: whether to add a trainable b.
        using_cache: nflows' switch: in eval mode and without gradients, form Ã once and use one
            matrix product for a batch. The cache notices merges, optimizer steps, `.to()`,
            `load_state_dict` and every other write but those through `.data`: call
            `cache.invalidate()` after them.
    """

    matrix: PerturbedMatrix
    bias: nn.Parameter | None

    def __init__(self, matrix: PerturbedMatrix, *, bias: bool, using_cache: bool) -> None:
        super().__init__(matrix.size, using_cache)
        self.matrix = matrix
        self.bias = nn.Parameter(matrix.u.new_zeros(matrix.size)) if bias else None
        self.cache = _Cache()

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y = Ã x + b.

        Args:
            inputs: x, shape `(N, features)`.
            context: accepted and ignored, as by every nflows linear layer.

        Returns:
            y of shape `(N, features)` and ln|det Ã| repeated to shape `(N,)`.

        Raises:
            TypeError: when the inputs are not a floating-point tensor, or of another dtype than the
                layer (any is taken under `torch.autocast`, and computed in the layer's).
            ValueError: when their shape is not `(N, features)`, or they are on another device.
        """
        check_rows(inputs, self.features)
        if self._cache_applies(inputs):
            outputs, logabsdet = super().forward(inputs)
            return outputs, logabsdet
        return self.forward_no_cache(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x = Ã⁻¹ (y − b) and −ln|det Ã|; shapes and errors as for `forward`."""
        check_rows(inputs, self.features)
        if self._cache_applies(inputs):
            self._check_inverse_cache()
            outputs = self._without_bias(inputs) @ self.cache.inverse.mT
            return outputs, -self.cache.logabsdet.repeat(len(inputs))
        return self.inverse_no_cache(inputs)

    def forward_no_cache(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, without the cache."""
        return self.matrix.multiply_and_logabsdet(inputs, self.bias)

    def inverse_no_cache(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """As `inverse`, without the cache."""
        return self.matrix.solve_and_logabsdet(inputs, self.bias)

    def weight(self) -> Tensor:
        """Ã, shape `(features, features)`. Cost O(n²k + k³) at rank k."""
        return self.matrix.dense()

    def weight_inverse(self) -> Tensor:
        """Ã⁻¹, shape `(features, features)`. Cost O(n²k + k³) at rank k."""
        return self.matrix.inverse()

    def logabsdet(self) -> Tensor:
        """ln|det Ã|, shape `()`. Cost O(nk² + k³) at rank k."""
        return self.matrix.slogdet()[1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin again, as just constructed, with a fresh seed; an `init` tensor is not kept."""
        self.matrix.reset_parameters()
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        """What `matrix` does not show already."""
        return f"bias={self.bias is not None}, using_cache={self.using_cache}"

    def _without_bias(self, outputs: Tensor) -> Tensor:
        return outputs if self.bias is None else outputs - self.bias

    def _cache_applies(self, inputs: Tensor) -> bool:
        if self.training or not self.using_cache or torch.compiler.is_compiling():
            return False
        frozen = self.matrix.frozen
        if (
            not inputs.dtype == frozen.dtype == self.matrix.u.dtype
            or inputs.device != frozen.device
        ):
            return False
        if is_autocast(frozen.device.type):
            return False
        # What was made in inference mode has no version by which a change could be noticed.
        if any(tensor.is_inference() for tensor in self._cached_tensors()):
            return False
        # A cached weight has no graph, so whoever may ask for gradients goes the direct way.
        return not (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()))

    def _check_forward_cache(self) -> None:
        self.cache.follow(self.matrix)
        with torch.no_grad():
            super()._check_forward_cache()

    def _check_inverse_cache(self) -> None:
        self.cache.follow(self.matrix)
        with torch.no_grad():
            super()._check_inverse_cache()

    def _cached_tensors(self) -> tuple[Tensor, ...]:
        return (*self.matrix.parameters(), *self.matrix.buffers())


def weight_of(layer: nn.Module) -> Tensor:
    """The matrix that a linear layer applies.

    Args:
        layer: an `nn.Linear`, or has `weight()` as nflows' layers, and `permutation` before it
            where it is a `OneByOneConvolution`.

    Returns:
        A of y = A x + b, shape `(features, features)`.

    Example:
        >>> from nflows.transforms import OneByOneConvolution
        >>> layer = OneByOneConvolution(3)
        >>> images = torch.randn(5, 3, 1, 1)
        >>> expected = images.flatten(1) @ weight_of(layer).mT
        >>> torch.allclose(layer(images)[0].flatten(1), expected, atol=1e-6)
        True
    """
    weight: Any = layer.weight
    weight = weight if isinstance(weight, Tensor) else weight()
    permutation = getattr(layer, "permutation", None)
    # Its inverse takes the columns to where the channels came from.
    return weight if permutation is None else permutation.inverse(weight)[0]


class P4InvTransform(PerturbedLinear):
    """Linear layer with a free invertible matrix, trained by P4Inv updates (Section 2.3).

    A drop-in for nflows' `LULinear`. A is frozen, a perturbation of it (n·rank numbers; twice as
    many with perturbation="additive") and the bias are trained; a `MergeHook` on the optimizer
    carries the perturbation into A.

    Args:
        features: n.
        rank: number k of columns of u and v; None is n up to 64 and 8√n beyond, 1 is the paper.
        init: see `PerturbedMatrix`; also an `nn.Linear` or nflows `Linear`, whose matrix and bias
            are taken over.
        bias: whether to add a trainable b.
        using_cache: in eval mode and without gradients, form Ã once and use one matrix product.
        bounds: when a merge is accepted.
        perturbation: "relative", Ã = (I + u vᵀ) A, which gives the best likelihood for a given
            training time, or "additive", Ã = A + u vᵀ, the paper's, which can cross det A = 0; see
            `InvertibleMatrix`.
        device: where; by default that of init, or torch's default device.
        dtype: by default that of init, or torch's default dtype.

    Attributes:
        matrix: the `InvertibleMatrix`.
        bias: parameter of shape `(features,)`, or None.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when features or rank are out of range, or init is of another shape, not finite
            or singular to working precision.

    Cost: a training step O(n²N + n²k + k³) for N rows at rank k, a merge O(n²k + k³).

    Example:
        >>> layer = P4InvTransform(3, init="reverse")
        >>> outputs, logabsdet = layer(torch.tensor([[1.0, 2.0, 3.0]]))
        >>> outputs.tolist(), logabsdet.tolist()
        ([[3.0, 2.0, 1.0]], [0.0])
    """

    matrix: InvertibleMatrix

    def __init__(
        self,
        features: int,
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
        check_positive_int("features", features)
        other = init if isinstance(init, Linear | nn.Linear) else None
        weight: Any = init if other is None else weight_of(other)
        matrix = InvertibleMatrix(
            features,
            rank=rank,
            init=weight,
            bounds=bounds,
            perturbation=perturbation,
            device=device,
            dtype=dtype,
        )
        super().__init__(matrix, bias=bias, using_cache=using_cache)
        if other is not None and other.bias is not None:
            self._take_over_bias(other.bias)

    @torch.no_grad()
    def _take_over_bias(self, bias: Tensor) -> None:
        if self.bias is not None:
            self.bias.copy_(bias)
        elif bool((bias != 0).any()):
            raise ValueError("bias=False cannot take over the non-zero bias of init")


class P4OrthogonalTransform(PerturbedLinear):
    """Linear layer with an orthogonal matrix, trained by Cayley maps around it.

    A is frozen, u (n·rank numbers) and the bias are trained; a `MergeHook` on the optimizer carries
    u into A (Section 2.1). Training reaches the component of O(n) that `init` lies in.

    Args:
        features: n.
        rank: number k of columns of u and v; None is n up to 256, then n/16 or 64.
        init: see `PerturbedMatrix`; orthogonal.
        bias: whether to add a trainable b.
        using_cache: in eval mode and without gradients, form Ã once and use one matrix product.
        device: where; by default that of init, or torch's default device.
        dtype: by default that of init, or torch's default dtype.

    Attributes:
        matrix: the `OrthogonalMatrix`.
        bias: parameter of shape `(features,)`, or None.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when features or rank are out of range, or init is of another shape, not finite
            or not orthogonal.

    Cost: a training step O(n²N + n²k + k³) for N rows at rank k, logabsdet O(1), a merge
    O(n²k + k³).

    Example:
        >>> layer = P4OrthogonalTransform(3)
        >>> x = torch.randn(5, 3)
        >>> outputs, logabsdet = layer(x)
        >>> torch.allclose(layer.inverse(outputs)[0], x, atol=1e-6), logabsdet.tolist()
        (True, [0.0, 0.0, 0.0, 0.0, 0.0])
    """

    matrix: OrthogonalMatrix

    def __init__(
        self,
        features: int,
        *,
        rank: int | None = None,
        init: str | Tensor = "identity",
        bias: bool = True,
        using_cache: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("features", features)
        matrix = OrthogonalMatrix(features, rank=rank, init=init, device=device, dtype=dtype)
        super().__init__(matrix, bias=bias, using_cache=using_cache)
