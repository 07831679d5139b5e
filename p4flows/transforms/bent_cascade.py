"""The differentiable core of `BentStack`: affine maps with (inverse) Bent identities in between.

Up to affine constants, the Bent identity and its inverse are one function (Section 2.5):

    B(h)   = r − 1/2,  r = s + hypot(s, 1)/2,     s = h
    B⁻¹(h) = 4/3·r,    r = s − hypot(s, √3/2)/2,  s = h + 1/2

The constants fold into the neighbouring affine maps, and where n is small so does r, linear in
s and hypot: a layer is then two kernels forward (addmm, hypot) and two backward, and what is
left, log-derivatives and the gradients of all layers' parameters, a handful of batched calls. At
n = 2 dispatch is nearly all the cost of a layer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p4flows.matrices.perturbed import is_transformed

# Up to here Ã is formed for all layers at once and multiplies s and hypot in one product; beyond,
# that product costs more than forming r and going through u and v (benchmarks/stack.py shows the
# crossover).
DENSE_UP_TO = 48
# Slopes lie in (1/2, 3/2): a product of this many cannot overflow, and saves as many logarithms.
_SLOPES_PER_LOG = 32
# Rows at a time without gradients, so that the working set of a layer stays in the cache; of few
# rows, more layers are kept for the batched calls.
_CHUNK_ELEMENTS = 1 << 15


@dataclasses.dataclass(frozen=True)
class Activation:
    """scale·(s + slope·hypot(s, width) + lift) with s = h + shift, one of the two functions."""

    slope: float
    width: float
    shift: float
    scale: float
    lift: float


BENT = Activation(slope=0.5, width=1.0, shift=0.0, scale=1.0, lift=-0.5)
INVERSE_BENT = Activation(slope=-0.5, width=math.sqrt(0.75), shift=0.5, scale=4 / 3, lift=0.0)
# In front of the first layer there is none.
_IDENTITY = Activation(slope=0.0, width=0.0, shift=0.0, scale=1.0, lift=0.0)


def bent_cascade(
    x: Tensor,
    frozen: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor,
    activations: tuple[Activation, Activation],
) -> tuple[Tensor, Tensor]:
    """x ← activation(Ã x + b) for one layer after another, with Ã = A + u vᵀ.

    Args:
        x: shape `(N, n)`.
        frozen: A of the L layers in the order in which they are applied, shape `(L, n, n)`; no
            gradient flows into it.
        u: shape `(L, n, k)`.
        v: shape `(L, n, k)`.
        bias: b, shape `(L, n)`.
        activations: those of the even and of the odd layers.

    Returns:
        Outputs of shape `(N, n)` and the sum of the activations' log-derivatives, shape `(N,)`;
        the determinants of Ã are not in it.
    """
    is_plain = is_transformed()
    # Tracing, torch.func and fake tensors make constants of their kind, which are not to be kept.
    make = _constants.__wrapped__ if is_plain or type(x) is not Tensor else _constants
    constants = make(len(frozen), activations, x.dtype, x.device)
    if is_plain:
        raw, log_slopes = _plain(x, u, v, bias, frozen, constants)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (x, u, v, bias)):
        raw, log_slopes = _Cascade.apply(x, u, v, bias, frozen, constants)  # type: ignore[no-untyped-call]
    else:
        raw, log_slopes = _in_chunks(x, u, v, bias, frozen, constants)
    behind, last = constants.behind, constants.behind[-1]
    log_scales = x.shape[1] * sum([math.log(activation.scale) for activation in behind])
    return last.scale * (raw + last.lift), log_slopes + log_scales


class _Constants(NamedTuple):
    """The activations behind and in front of each layer, and what of them has to be tensors."""

    turns: tuple[Activation, Activation]
    behind: list[Activation]
    before: list[Activation]
    widths: list[Tensor]
    slopes: Tensor
    shifts: Tensor
    # Of the activation in front, which its layer multiplies.
    scales: Tensor
    slopes_before: Tensor
    lifts: Tensor


@functools.lru_cache(maxsize=64)
def _constants(
    layers: int, turns: tuple[Activation, Activation], dtype: torch.dtype, device: torch.device
) -> _Constants:
    """Made once: at each step they would be copied to the device each time."""
    behind = [turns[layer % 2] for layer in range(layers)]
    before = [_IDENTITY, *behind[:-1]]
    # Not as tensors of inference mode, which a later gradient could not go through.
    with torch.inference_mode(False):
        widths = torch.tensor([each.width for each in turns], dtype=dtype, device=device).unbind()
        rows = [
            (after.slope, after.shift, front.scale, front.slope, front.lift)
            for after, front in zip(behind, before, strict=True)
        ]
        columns = torch.tensor(rows, dtype=dtype, device=device).mT[..., None, None].unbind()
    return _Constants(turns, behind, before, [widths[i % 2] for i in range(layers)], *columns)


def is_dense(features: int) -> bool:
    """Whether Ã is formed."""
    return features <= DENSE_UP_TO


# Inside, columns are samples: at n = 2 products from the left are a third cheaper, and bias, state
# and gradient of all layers are contiguous arrays. The state between two layers is the pair (s, q)
# with q = hypot(s, width) and r = s + slope·q, of which the next takes scale·(r + lift); in front
# of the first layer it is (x, 0).
_Map = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _start(x: Tensor) -> Tensor:
    return torch.stack([x.mT, torch.zeros_like(x.mT)])


def _layers(
    u: Tensor, v: Tensor, bias: Tensor, frozen: Tensor, constants: _Constants
) -> tuple[Tensor, Tensor, list[_Map]]:
    """scale·Ã of each layer, or A where it is not formed; offsets; maps.

    An offset holds all constants, shape `(L, n, 1)`; a map is a function (offset, pair, out) to
    offset + scale·Ã r, where A is not formed with the lift in r.
    """
    features, offsets = u.shape[1], bias.unsqueeze(-1) + constants.shifts
    if is_dense(features):
        weights = torch.baddbmm(frozen, u, v.mT) * constants.scales
        joint = torch.cat([weights, weights * constants.slopes_before], dim=-1)

        def dense(weight: Tensor) -> _Map:
            return lambda offset, pair, out: torch.addmm(offset, weight, pair, out=out)

        offsets = torch.addcmul(offsets, constants.lifts, weights.sum(-1, keepdim=True))
        return weights, offsets, [dense(weight) for weight in joint.unbind()]

    def thin(weight: Tensor, left: Tensor, right: Tensor, before: Activation) -> _Map:
        def product(offset: Tensor, pair: Tensor, out: Tensor | None) -> Tensor:
            r = torch.add(pair[:features], pair[features:], alpha=before.slope)
            r = r.add_(before.lift) if before.lift else r
            s = torch.addmm(offset, weight, r, alpha=before.scale, out=out)
            return torch.addmm(s, left, right @ r, alpha=before.scale, out=out)

        return product

    parts = zip(frozen.unbind(), u.unbind(), v.mT.unbind(), constants.before, strict=True)
    return frozen, offsets, [thin(*each) for each in parts]


def _states(
    pair: Tensor, maps: list[_Map], offsets: Tensor, widths: list[Tensor], out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s = offset + scale·Ã r and q = hypot(s, width) of one layer after another, (L, n, N) each.

    From a pair of shape `(2n, N)`; written into `out` of shape `(L, 2, n, N)`, which may not
    require gradients, or new and differentiable.
    """
    rows: Any = [(offset, None, None, None) for offset in offsets.unbind()]
    if out is not None:
        s, q = out.unbind(1)
        # One copy of all, and the products are added in place.
        s.copy_(offsets)
        rows = zip(s.unbind(), s.unbind(), q.unbind(), out.flatten(1, 2).unbind(), strict=True)
    made = []
    for affine, width, (offset, s_out, q_out, both) in zip(maps, widths, rows, strict=True):
        s = affine(offset, pair, s_out)
        q = torch.hypot(s, width, out=q_out)
        pair = torch.cat([s, q]) if both is None else both
        made.append((s, q))
    s, q = (torch.stack(each) for each in zip(*made, strict=True)) if out is None else out.unbind(1)
    return s, q


class _Cascade(torch.autograd.Function):
    """The cascade with a hand-written backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        v: Tensor,
        bias: Tensor,
        frozen: Tensor,
        constants: _Constants,
    ) -> tuple[Tensor, Tensor]:
        count, features = bias.shape
        weights, offsets, maps = _layers(u, v, bias, frozen, constants)
        out = x.new_empty(count, 2, features, len(x))
        s, q = _states(_start(x).flatten(0, 1), maps, offsets, constants.widths, out)
        r = x.new_empty(count + 1, features, len(x))
        r[0] = x.mT
        for parity, activation in enumerate(constants.turns):
            rows = r[1 + parity :: 2]
            torch.add(s[parity::2], q[parity::2], alpha=activation.slope, out=rows)
        slopes = _slopes_(s, q, constants)
        log_slopes = _sum_of_logs(slopes)
        # d ln(dr/ds)/ds = slope·width²/(q³·dr/ds) of all layers, in the place of q.
        q.pow_(3).mul_(slopes).reciprocal_()
        for parity, activation in enumerate(constants.turns):
            q[parity::2].mul_(activation.slope * activation.width**2)
        ctx.constants = constants
        ctx.save_for_backward(x, u, v, bias, frozen, weights, r, slopes, q)
        return r[-1].mT.contiguous(), log_slopes

    @staticmethod
    def backward(ctx: Any, grad_raw: Tensor, grad_log: Tensor) -> tuple[Tensor | None, ...]:
        x, u, v, bias, frozen, weights, r, slopes, log_slope_gradients = ctx.saved_tensors
        constants: _Constants = ctx.constants
        if torch.is_grad_enabled():
            # Only with create_graph=True: differentiate the plain formulation a second time.
            own = (x, u, v, bias)
            with torch.enable_grad():
                outputs = _plain(*own, frozen, constants)
            wanted = [t for t in own if t.requires_grad]
            grads = iter(
                torch.autograd.grad(outputs, wanted, (grad_raw, grad_log), create_graph=True)
            )
            return (*(next(grads) if t.requires_grad else None for t in own), None, None)

        # t becomes the gradient with respect to s; it starts as the log-derivative's share.
        t = log_slope_gradients * grad_log
        g, formed = grad_raw.mT, is_dense(u.shape[1])
        rows = zip(t.unbind(), slopes.unbind(), weights.mT.unbind(), strict=True)
        for layer, (row, slope, weight) in reversed([*enumerate(rows)]):
            row.addcmul_(g, slope)
            if formed:
                g = torch.mm(weight, row)
            else:
                # Where Ã is formed it is scaled as a whole; A itself is not copied for that.
                thin, scale = v[layer] @ (u[layer].mT @ row), constants.before[layer].scale
                g = torch.addmm(thin, weight, row, beta=scale, alpha=scale)
        r, t_sum = r[:-1], t.sum(-1, keepdim=True)
        # What the constant in Ã (r + lift) adds.
        lifted = constants.lifts * t_sum
        if formed:
            grad_weight = (t @ r.mT).add_(lifted).mul_(constants.scales)
            grad_u, grad_v = grad_weight @ v, grad_weight.mT @ u
        else:
            grad_u = (t @ (r.mT @ v)).add_(lifted * v.sum(1, keepdim=True)).mul_(constants.scales)
            grad_v = (r @ (t.mT @ u)).add_(lifted.mT @ u).mul_(constants.scales)
        return g.mT, grad_u, grad_v, t_sum.squeeze(-1), None, None


def _plain(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, frozen: Tensor, constants: _Constants
) -> tuple[Tensor, Tensor]:
    """In differentiable operations, for torch.compile, torch.func and second derivatives."""
    _, offsets, maps = _layers(u, v, bias, frozen, constants)
    s, q = _states(_start(x).flatten(0, 1), maps, offsets, constants.widths)
    raw = s[-1] + constants.behind[-1].slope * q[-1]
    return raw.mT, torch.log1p(constants.slopes * s / q).sum((0, 1))


def _in_chunks(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, frozen: Tensor, constants: _Constants
) -> tuple[Tensor, Tensor]:
    """Without gradients nothing is stored: memory is bounded whatever the number of rows."""
    _, offsets, maps = _layers(u, v, bias, frozen, constants)
    count, features = bias.shape
    rows = max(1, min(_CHUNK_ELEMENTS // features, len(x)))
    fitting = max(2, 16 * _CHUNK_ELEMENTS // (features * rows))
    # An even number, so that each part begins with the same activation.
    at_once = min(_SLOPES_PER_LOG, fitting // 2 * 2)
    parts = [slice(first, first + at_once) for first in range(0, count, at_once)]
    raw, log_slopes = torch.empty_like(x), x.new_zeros(len(x))
    # Allocated once: fresh memory takes the longer the larger it is.
    buffer = x.new_empty(min(at_once, count), 2, features, rows)
    for source, target, total in zip(
        x.split(rows), raw.split(rows), log_slopes.split(rows), strict=True
    ):
        state = _start(source)
        for part in parts:
            out = buffer[: len(maps[part]), ..., : len(source)]
            widths = constants.widths[part]
            s, q = _states(state.flatten(0, 1), maps[part], offsets[part], widths, out)
            state = out[-1].clone()
            total += _sum_of_logs(_slopes_(s, q, constants))
        target.copy_(torch.add(*state, alpha=constants.behind[-1].slope).mT)
    return raw, log_slopes


def _slopes_(s: Tensor, q: Tensor, constants: _Constants) -> Tensor:
    """dr/ds = 1 + slope·s/q of all layers, in the place of s."""
    one = s.new_ones(())
    for parity, activation in enumerate(constants.turns):
        rows = s[parity::2]
        torch.addcdiv(one, rows, q[parity::2], value=activation.slope, out=rows)
    return s


def _sum_of_logs(slopes: Tensor) -> Tensor:
    """Σ ln(slope) over layers and features, shape (N,)."""
    total = slopes.new_zeros(slopes.shape[-1])
    for group in slopes.split(_SLOPES_PER_LOG):
        total += group.prod(0).log_().sum(0)
    return total
