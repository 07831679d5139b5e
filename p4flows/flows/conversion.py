"""The way in and the way out: P4 layers in place of other linear layers, and back."""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from nflows.transforms.base import CompositeTransform, Transform
from nflows.transforms.lu import LULinear
from nflows.transforms.orthogonal import HouseholderSequence
from nflows.transforms.permutations import Permutation
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from p4flows.arguments import check_module
from p4flows.matrices import MergeBounds, PerturbedMatrix
from p4flows.transforms import BentStack, P4InvTransform, P4OneByOneConvolution
from p4flows.transforms.linear import PerturbedLinear, weight_of


def plain(module: nn.Module) -> nn.Module:
    """A copy whose P4 layers are ordinary linear layers of the same function.

    For averaging of weights, export, and readers without p4flows. P4InvTransform and
    P4OrthogonalTransform become nflows' `LULinear`, reflections (one for each negative sign, O(nN)
    each) and `Permutation`, a `BentStack` becomes its single layers, and weights parametrized by
    `invertible` or `orthogonal` ordinary ones. Other layers of this package (`BentIdentity`,
    `AffineCoupling`) have nothing to convert and stay.

    Args:
        module: any; it does not change.

    Returns:
        The copy, equal up to the rounding of an LU decomposition.

    Raises:
        TypeError: when it is not an nn.Module, or holds a `P4OneByOneConvolution`.

    Example:
        >>> layer = P4InvTransform(3, init="reverse")
        >>> [type(part).__name__ for part in plain(layer)._transforms]
        ['LULinear', 'Permutation']
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(plain(layer)(x)[0], layer(x)[0])
        True
    """
    check_module(module)
    duplicate = copy.deepcopy(module)
    for child in list(duplicate.modules()):
        for name in list(getattr(child, "parametrizations", ())):
            if is_parametrized(child, name) and any(
                isinstance(each, PerturbedMatrix)
                for each in child.parametrizations[name]  # type: ignore[index]
            ):
                # torch takes the property off the class, which the original has in common.
                kind = type(child)
                child.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
                remove_parametrizations(child, name)
    return _replaced(duplicate, _plain_layer)


def swap_linear(
    module: nn.Module,
    *,
    rank: int | None = None,
    using_cache: bool = False,
    bounds: MergeBounds = MergeBounds(),
    perturbation: Literal["relative", "additive"] = "relative",
) -> nn.Module:
    """Put P4InvTransform layers in place of nflows-type linear layers, keeping their weights.

    They are found by what they have, `weight()`, `weight_inverse()` and `bias`, not by their class:
    LULinear and the others of nflows, and the copies of it in glasflow and normflows; a
    `OneByOneConvolution` becomes a `P4OneByOneConvolution`. Swap before you build the optimizer,
    which would otherwise step the old parameters.

    Args:
        module: is changed, unless it is such a layer itself.
        rank: number of columns of u and v; None is the default of `P4InvTransform`.
        using_cache: in eval mode and without gradients, form Ã once and use one matrix product.
        bounds: when a merge is accepted.
        perturbation: "relative" or "additive"; see `P4InvTransform`.

    Returns:
        The module, or the layer that takes its place.

    Raises:
        TypeError: when it is not an nn.Module, or an option has the wrong type.
        ValueError: when there is no such layer in it, or an option is out of range.

    Example:
        >>> from nflows.transforms import CompositeTransform, LULinear
        >>> composite = CompositeTransform([LULinear(3), LULinear(3)])
        >>> [type(layer).__name__ for layer in swap_linear(composite)._transforms]
        ['P4InvTransform', 'P4InvTransform']
    """
    check_module(module)
    count = 0

    def swapped(layer: nn.Module) -> nn.Module | None:
        nonlocal count
        if isinstance(layer, PerturbedLinear) or not _is_linear(layer):
            return None
        count += 1
        weight, bias = weight_of(layer).detach(), layer.bias
        images = type(layer).__name__ == "OneByOneConvolution"
        kind = P4OneByOneConvolution if images else P4InvTransform
        new = kind(
            len(weight),
            rank=rank,
            init=weight,
            bias=bias is not None,
            using_cache=using_cache,
            bounds=bounds,
            perturbation=perturbation,
        )
        # What is frozen stays frozen.
        if not any(p.requires_grad for p in layer.parameters() if p is not bias):
            new.matrix.requires_grad_(False)
        if isinstance(bias, Tensor) and new.bias is not None:
            with torch.no_grad():
                new.bias.copy_(bias)
            new.bias.requires_grad_(bias.requires_grad)
        return new.train(layer.training)

    result = _replaced(module, swapped)
    if count == 0:
        raise ValueError(
            "module must have a linear layer with weight(), weight_inverse() and bias, as nflows' "
            f"LULinear; there is none in {type(module).__name__}"
        )
    return result


def _is_linear(layer: nn.Module) -> bool:
    methods = (getattr(layer, name, None) for name in ("weight", "weight_inverse", "logabsdet"))
    return all(map(callable, methods)) and hasattr(layer, "bias")


def _replaced(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The module with what `replace` makes of its parts; what occurs twice is made once."""
    made: dict[nn.Module, nn.Module] = {}

    def visit(parent: nn.Module) -> nn.Module:
        if parent not in made:
            new = replace(parent)
            made[parent] = parent if new is None else new
            if new is None:
                for name, child in parent._modules.items():
                    if child is not None:
                        parent._modules[name] = visit(child)
        return made[parent]

    return visit(module)


@torch.no_grad()
def _plain_layer(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, BentStack):
        return _replaced(layer.to_composite().train(layer.training), _plain_layer)
    if not isinstance(layer, PerturbedLinear):
        return None
    if isinstance(layer, P4OneByOneConvolution):
        raise TypeError("P4OneByOneConvolution has no counterpart in nflows that fits every matrix")
    # nflows' `NaiveLinear` has no inverse in today's torch, and its `LULinear` neither pivots nor
    # changes signs: A = P S L U with U of positive diagonal, in float64.
    permutation, lower, upper = torch.linalg.lu(layer.weight().double())
    sign = upper.diagonal().sign()
    lower, upper = sign[:, None] * lower * sign, sign[:, None] * upper
    triangular = LULinear(layer.features, layer.using_cache, eps=0.0).double()
    triangular.lower_entries.copy_(lower[triangular.lower_indices])
    triangular.upper_entries.copy_(upper[triangular.upper_indices])
    diagonal = upper.diagonal()
    # The inverse of softplus.
    triangular.unconstrained_upper_diag.copy_(diagonal + torch.log(-torch.expm1(-diagonal)))
    if layer.bias is not None:
        triangular.bias.copy_(sign * (permutation.mT @ layer.bias.double()))
    else:
        triangular.bias.zero_()
    parts: list[Transform] = [triangular]
    negative = (sign < 0).nonzero().squeeze(1)
    if len(negative) > 0:
        flips = HouseholderSequence(layer.features, len(negative))
        flips.q_vectors.copy_(torch.eye(layer.features)[negative])
        parts.append(flips)
    parts.append(Permutation(permutation.argmax(1)))
    return CompositeTransform(parts).to(layer.weight()).train(layer.training)
