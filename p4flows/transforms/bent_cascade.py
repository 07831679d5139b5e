"""The differentiable core of `BentStack`: affine maps with (inverse) Bent identities in between.

Up to affine constants, the Bent identity and its inverse are one function (Section 2.5):

    B(h)   = r − 1/2,  r = s + hypot(s, 1)/2,     s = h
    B⁻¹(h) = 4/3·r,    r = s − hypot(s, √3/2)/2,  s = h + 1/2

The constants fold into the neighbouring affine maps, so that a layer is three kernels forward
(addmm, hypot, add) and two backward; log-derivatives and the gradients of all layers' parameters
are then a handful of batched calls. At n = 2 dispatch is nearly all the cost of a layer.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Up to here Ã is formed for all layers at once, one product a layer; beyond, forming it costs more
# than the two thin products that go through u and v (benchmarks/stack.py shows the crossover).
DENSE_UP_TO = 64
# Slopes lie in (1/2, 3/2): a product of this many cannot overflow, and saves as many logarithms.
_SLOPES_PER_LOG = 32
# Rows at a time without gradients, so that the working set of a chunk stays in the cache.
_CHUNK_ELEMENTS = 1 << 15


@dataclasses.dataclass(frozen=True)
class Activation:
    """One of the two functions r = s + slope·hypot(s, width) with the constants around it.

    Attributes:
        slope: ±1/2.
        width: second argument of hypot.
        shift: s = h + shift for the argument h of the activation.
        scale: the activation is scale·r + offset.
        offset: see scale.
    """

    slope: float
    width: float
    shift: float
    scale: float
    offset: float


BENT = Activation(slope=0.5, width=1.0, shift=0.0, scale=1.0, offset=-0.5)
INVERSE_BENT = Activation(slope=-0.5, width=math.sqrt(0.75), shift=0.5, scale=4 / 3, offset=0.0)


def bent_cascade(
    x: Tensor,
    frozen: Sequence[Tensor],
    u: Tensor,
    v: Tensor,
    bias: Tensor,
    activations: tuple[Activation, Activation],
) -> tuple[Tensor, Tensor]:
    """x ← activation(Ã x + b) for one layer after another, with Ã = A + u vᵀ.

    Args:
        x: shape `(N, n)`.
        frozen: A of each of the L layers, in the order in which they are applied; no gradient.
        u: shape `(L, n, k)`, in the same order.
        v: shape `(L, n, k)`.
        bias: b, shape `(L, n)`.
        activations: those of the even and of the odd layers.

    Returns:
        Outputs of shape `(N, n)` and the sum of the activations' log-derivatives, shape `(N,)`;
        the determinants of Ã are not in it.
    """
    used = [activations[layer % 2] for layer in range(len(bias))]
    scales = [1.0] + [activation.scale for activation in used[:-1]]
    offsets = bias.new_tensor([0.0] + [activation.offset for activation in used[:-1]])
    shifts = bias.new_tensor([activation.shift for activation in used])
    # Ã·1, which the offset of the activation before it multiplies.
    row_sums = torch.stack([matrix.sum(-1) for matrix in frozen])
    row_sums = row_sums + (u @ v.sum(-2).unsqueeze(-1)).squeeze(-1)
    folded = bias + offsets[:, None] * row_sums + shifts[:, None]
    setting = _Setting(tuple(frozen), used, scales)
    if torch.compiler.is_compiling():
        raw, log_slopes = _plain(x, u, v, folded, setting)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (x, u, v, folded)):
        raw, log_slopes = _Cascade.apply(x, u, v, folded, setting)  # type: ignore[no-untyped-call]
    else:
        raw, log_slopes = _in_chunks(x, u, v, folded, setting)
    last = used[-1]
    log_scales = x.shape[1] * sum(math.log(activation.scale) for activation in used)
    return raw * last.scale + last.offset, log_slopes + log_scales


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What a cascade needs besides its differentiable arguments."""

    frozen: tuple[Tensor, ...]
    used: list[Activation]
    scales: list[float]


def _affine_maps(
    u: Tensor, v: Tensor, bias: Tensor, setting: _Setting
) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """For each layer a function (r, out) that writes scale·Ã r + bias into out."""
    frozen, scales, biases = setting.frozen, setting.scales, bias.unbind()
    addmm = torch.addmm
    if u.shape[-2] <= DENSE_UP_TO:
        weights = torch.stack(frozen).baddbmm_(u, v.mT).mT.unbind()

        def dense(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
            weight, scale, b = weights[layer], scales[layer], biases[layer]
            return lambda r, out: addmm(b, r, weight, alpha=scale, out=out)

        return [dense(layer) for layer in range(len(frozen))]

    def thin(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        weight, scale, b = frozen[layer].mT, scales[layer], biases[layer]
        right, left = v[layer], u[layer].mT

        def apply(r: Tensor, out: Tensor) -> Tensor:
            addmm(b, r, weight, alpha=scale, out=out)
            return out.addmm_(r @ right, left, alpha=scale)

        return apply

    return [thin(layer) for layer in range(len(frozen))]


class _Cascade(torch.autograd.Function):
    """The cascade with a hand-written backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, v: Tensor, bias: Tensor, setting: _Setting
    ) -> tuple[Tensor, Tensor]:
        layers = len(setting.used)
        r = x.new_empty(layers + 1, *x.shape)
        s = x.new_empty(layers, *x.shape)
        q = torch.empty_like(s)
        r[0] = x
        rows = r.unbind()
        widths = {a.width: x.new_tensor(a.width) for a in setting.used[:2]}
        maps = _affine_maps(u, v, bias, setting)
        hypot, add = torch.hypot, torch.add
        for affine, activation, before, after, s_row, q_row in zip(
            maps, setting.used, rows[:-1], rows[1:], s.unbind(), q.unbind(), strict=True
        ):
            affine(before, s_row)
            hypot(s_row, widths[activation.width], out=q_row)
            add(s_row, q_row, alpha=activation.slope, out=after)
        slopes = _slopes(s, q, setting)
        ctx.setting = setting
        ctx.save_for_backward(x, u, v, bias, r, q, slopes)
        return rows[-1].clone(), _sum_of_logs(slopes)

    @staticmethod
    def backward(ctx: Any, grad_raw: Tensor, grad_log: Tensor) -> tuple[Tensor | None, ...]:
        x, u, v, bias, r, q, slopes = ctx.saved_tensors
        setting: _Setting = ctx.setting
        if torch.is_grad_enabled():
            # Only with create_graph=True: differentiate the plain formulation a second time.
            with torch.enable_grad():
                outputs = _plain(x, u, v, bias, setting)
            wanted = [t for t in (x, u, v, bias) if t.requires_grad]
            grads = iter(
                torch.autograd.grad(outputs, wanted, (grad_raw, grad_log), create_graph=True)
            )
            return (*(next(grads) if t.requires_grad else None for t in (x, u, v, bias)), None)

        # t becomes the gradient with respect to s; it starts as the log-derivative's share.
        t = _log_slope_gradients(q, slopes, setting).mul_(grad_log[:, None])
        g = grad_raw
        layers = range(len(setting.used))
        thin = u.shape[-2] > DENSE_UP_TO
        weights = setting.frozen
        if not thin:
            weights = torch.stack(setting.frozen).baddbmm_(u, v.mT).unbind()
        addmm, buffer = torch.addmm, torch.empty_like(grad_raw)
        t_rows, slope_rows = t.unbind(), slopes.unbind()
        for layer in reversed(layers):
            scale, row = setting.scales[layer], t_rows[layer]
            row.addcmul_(g, slope_rows[layer])
            g = addmm(buffer, row, weights[layer], beta=0, alpha=scale, out=buffer)
            if thin:
                g.addmm_(row @ u[layer], v[layer].mT, alpha=scale)
        scaled = t * t.new_tensor(setting.scales)[:, None, None]
        grad_u = scaled.mT @ (r[:-1] @ v)
        grad_v = r[:-1].mT @ (scaled @ u)
        return g.clone(), grad_u, grad_v, t.sum(1), None


def _plain(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, setting: _Setting
) -> tuple[Tensor, Tensor]:
    """The same function in differentiable operations, for torch.compile and second derivatives."""
    r, log_slopes = x, x.new_zeros(len(x))
    for layer, activation in enumerate(setting.used):
        scale = setting.scales[layer]
        s = torch.addmm(bias[layer], r, setting.frozen[layer].mT, alpha=scale)
        s = s + (r @ v[layer]) @ u[layer].mT * scale
        q = torch.hypot(s, s.new_tensor(activation.width))
        r = s + activation.slope * q
        log_slopes = log_slopes + torch.log1p(activation.slope * s / q).sum(-1)
    return r, log_slopes


def _in_chunks(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, setting: _Setting
) -> tuple[Tensor, Tensor]:
    """Without gradients nothing is stored: memory is bounded whatever the number of rows."""
    maps = _affine_maps(u, v, bias, setting)
    raw, log_slopes = torch.empty_like(x), x.new_zeros(len(x))
    widths = {a.width: x.new_tensor(a.width) for a in setting.used[:2]}
    one = x.new_ones(())
    rows = max(1, _CHUNK_ELEMENTS // x.shape[1])
    for source, target, total in zip(
        x.split(rows), raw.split(rows), log_slopes.split(rows), strict=True
    ):
        r, s, q = source.clone(), torch.empty_like(source), torch.empty_like(source)
        product = torch.ones_like(source)
        slope = torch.empty_like(source)
        for layer, (affine, activation) in enumerate(zip(maps, setting.used, strict=True)):
            affine(r, s)
            torch.hypot(s, widths[activation.width], out=q)
            torch.addcdiv(one, s, q, value=activation.slope, out=slope)
            product.mul_(slope)
            torch.add(s, q, alpha=activation.slope, out=r)
            if (layer + 1) % _SLOPES_PER_LOG == 0:
                total.add_(product.log_().sum(-1))
                product.fill_(1.0)
        total.add_(product.log_().sum(-1))
        target.copy_(r)
    return raw, log_slopes


def _slopes(s: Tensor, q: Tensor, setting: _Setting) -> Tensor:
    """dr/ds = 1 + slope·s/q of all layers; s is overwritten."""
    one = s.new_ones(())
    for parity, activation in enumerate(setting.used[:2]):
        rows = s[parity::2]
        torch.addcdiv(one, rows, q[parity::2], value=activation.slope, out=rows)
    return s


def _log_slope_gradients(q: Tensor, slopes: Tensor, setting: _Setting) -> Tensor:
    """d ln(dr/ds)/ds = slope·width²/(q³·dr/ds) of all layers."""
    gradients = (q * q).mul_(q).mul_(slopes).reciprocal_()
    for parity, activation in enumerate(setting.used[:2]):
        gradients[parity::2].mul_(activation.slope * activation.width**2)
    return gradients


def _sum_of_logs(slopes: Tensor) -> Tensor:
    """Σ ln(slope) over layers and features, shape (N,)."""
    total = slopes.new_zeros(slopes.shape[1])
    for group in slopes.split(_SLOPES_PER_LOG):
        total += group.prod(0).log_().sum(-1)
    return total
