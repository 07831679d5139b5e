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
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from p4flows.matrices.perturbation import needs_plain_operations

# Up to here Ã is formed for all layers at once and multiplies s and hypot in one product; beyond,
# that product costs more than forming r and going through u and v (benchmarks/stack.py shows the
# crossover).
DENSE_UP_TO = 48
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
    setting = _Setting(frozen, activations)
    offsets = bias.new_tensor(setting.before("offset", 0.0))
    # Ã·1, which the offset of the activation before it multiplies.
    row_sums = frozen.sum(-1) + (u @ v.sum(-2).unsqueeze(-1)).squeeze(-1)
    folded = bias + offsets[:, None] * row_sums + setting.shifts()[:, None]
    if needs_plain_operations(x):
        raw, log_slopes = _plain(x, u, v, folded, setting)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (x, u, v, folded)):
        raw, log_slopes = _Cascade.apply(x, u, v, folded, setting)  # type: ignore[no-untyped-call]
    else:
        raw, log_slopes = _in_chunks(x, u, v, folded, setting)
    log_scales = x.shape[1] * sum(setting.in_turns(*(math.log(a.scale) for a in activations)))
    last = setting.used()[-1]
    return raw * last.scale + last.offset, log_slopes + log_scales


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What a cascade needs besides its differentiable arguments."""

    frozen: Tensor
    activations: tuple[Activation, Activation]

    def __len__(self) -> int:
        return len(self.frozen)

    @property
    def is_dense(self) -> bool:
        return self.frozen.shape[-1] <= DENSE_UP_TO

    def used(self) -> list[Activation]:
        """The activation behind each layer."""
        return self.in_turns(*self.activations)

    def shifts(self) -> Tensor:
        """What each layer adds for the activation behind it."""
        return self.frozen.new_tensor(self.in_turns(*(a.shift for a in self.activations)))

    def before(self, constant: str, first: float) -> list[float]:
        """A constant of the activation in front of each layer; the first layer has none."""
        return [first, *self.in_turns(*(getattr(a, constant) for a in self.activations))][:-1]

    def in_turns(self, even: Any, odd: Any) -> list[Any]:
        """One value for each layer."""
        return ([even, odd] * (len(self) // 2 + 1))[: len(self)]

    def widths(self) -> list[Tensor]:
        """The second argument of hypot for each layer."""
        return self.in_turns(*(self.frozen.new_tensor(a.width) for a in self.activations))

    def perturbed(self, u: Tensor, v: Tensor) -> Tensor:
        """Ã of all layers where forming it is the cheaper way, otherwise A."""
        return self.frozen.baddbmm(u, v.mT) if self.is_dense else self.frozen


# Inside, columns are samples: at n = 2 products from the left are a third cheaper, and bias, state
# and gradient of all layers are contiguous arrays. The state between two layers is the pair (s, q)
# with q = hypot(s, width), of which r = s + slope·q; in front of the first layer it is (x, 0).


def _affine_maps(
    u: Tensor, v: Tensor, setting: _Setting
) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """For each layer a function (pair, out) that adds scale·Ã r to out."""
    scales, slopes = setting.before("scale", 1.0), setting.before("slope", 0.0)
    if setting.is_dense:
        scale, slope = u.new_tensor([scales, slopes])[:, :, None, None].unbind()
        weight = setting.perturbed(u, v) * scale
        joint = torch.cat([weight, weight * slope], dim=-1)

        def dense(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda pair, out: out.addmm_(weight, pair)

        return [dense(weight) for weight in joint.unbind()]

    features = u.shape[1]

    def thin(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        weight, left, right = setting.frozen[layer], u[layer], v[layer].mT
        scale, slope = scales[layer], slopes[layer]

        def add_product(pair: Tensor, out: Tensor) -> Tensor:
            r = torch.add(pair[:features], pair[features:], alpha=slope)
            out.addmm_(weight, r, alpha=scale)
            return out.addmm_(left, right @ r, alpha=scale)

        return add_product

    return [thin(layer) for layer in range(len(setting))]


class _Cascade(torch.autograd.Function):
    """The cascade with a hand-written backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, v: Tensor, bias: Tensor, setting: _Setting
    ) -> tuple[Tensor, Tensor]:
        layers, features = bias.shape
        pairs = x.new_empty(layers + 1, 2, features, len(x))
        pairs[0, 0], pairs[0, 1] = x.mT, 0.0
        s, q = pairs[1:].unbind(1)
        s.copy_(bias.unsqueeze(-1))
        hypot = torch.hypot
        for add_product, width, before, s_row, q_row in zip(
            _affine_maps(u, v, setting),
            setting.widths(),
            pairs[:-1].flatten(1, 2).unbind(),
            s.unbind(),
            q.unbind(),
            strict=True,
        ):
            add_product(before, s_row)
            hypot(s_row, width, out=q_row)
        r = x.new_empty(layers + 1, features, len(x))
        r[0] = x.mT
        for parity, activation in enumerate(setting.activations):
            rows = s[parity::2], q[parity::2]
            torch.add(*rows, alpha=activation.slope, out=r[1 + parity :: 2])
        slopes = _slopes_(s, q, setting)
        log_slopes = _sum_of_logs(slopes)
        ctx.setting = setting
        ctx.save_for_backward(x, u, v, bias, r, slopes, _log_slope_gradients_(q, slopes, setting))
        return r[-1].mT.contiguous(), log_slopes

    @staticmethod
    def backward(ctx: Any, grad_raw: Tensor, grad_log: Tensor) -> tuple[Tensor | None, ...]:
        x, u, v, bias, r, slopes, log_slope_gradients = ctx.saved_tensors
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
        t = log_slope_gradients * grad_log
        g = grad_raw.mT
        t_rows, slope_rows, scales = t.unbind(), slopes.unbind(), setting.before("scale", 1.0)
        scale = t.new_tensor(scales)[:, None, None]
        weights = setting.perturbed(u, v).mT
        # Where Ã is formed it is scaled as a whole; A itself is not copied for that.
        maps = (weights * scale if setting.is_dense else weights).unbind()
        for layer in reversed(range(len(scales))):
            row = t_rows[layer].addcmul_(g, slope_rows[layer])
            if setting.is_dense:
                g = torch.mm(maps[layer], row)
            else:
                thin = v[layer] @ (u[layer].mT @ row)
                g = torch.addmm(thin, maps[layer], row, beta=scales[layer], alpha=scales[layer])
        before = r[:-1]
        if setting.is_dense:
            grad_weight = (t @ before.mT).mul_(scale)
            grad_u, grad_v = grad_weight @ v, grad_weight.mT @ u
        else:
            grad_u = (t @ (before.mT @ v)).mul_(scale)
            grad_v = (before @ (t.mT @ u)).mul_(scale)
        return g.mT, grad_u, grad_v, t.sum(-1), None


def _plain(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, setting: _Setting
) -> tuple[Tensor, Tensor]:
    """The same in differentiable operations, for torch.compile, torch.func, second derivatives."""
    r, log_slopes = x, x.new_zeros(len(x))
    scales = setting.before("scale", 1.0)
    for layer, activation in enumerate(setting.used()):
        scale = scales[layer]
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
    layers = [
        *zip(
            _affine_maps(u, v, setting),
            setting.widths(),
            setting.in_turns(*(a.slope for a in setting.activations)),
            bias.unsqueeze(-1).unbind(),
            strict=True,
        )
    ]
    raw, log_slopes = torch.empty_like(x), x.new_zeros(len(x))
    one, last_slope, features = x.new_ones(()), setting.used()[-1].slope, x.shape[1]
    rows = max(1, _CHUNK_ELEMENTS // features)
    for source, target, total in zip(
        x.split(rows), raw.split(rows), log_slopes.split(rows), strict=True
    ):
        pair, after = x.new_empty(2, 2 * features, len(source)).unbind()
        pair[:features], pair[features:] = source.mT, 0.0
        slope, product = torch.empty_like(pair[:features]), torch.ones_like(pair[:features])
        for layer, (add_product, width, factor, column) in enumerate(layers, start=1):
            s, q = after[:features], after[features:]
            s.copy_(column)
            add_product(pair, s)
            torch.hypot(s, width, out=q)
            product.mul_(torch.addcdiv(one, s, q, value=factor, out=slope))
            if layer % _SLOPES_PER_LOG == 0:
                total.add_(product.log_().sum(0))
                product.fill_(1.0)
            pair, after = after, pair
        total.add_(product.log_().sum(0))
        target.copy_(torch.add(pair[:features], pair[features:], alpha=last_slope).mT)
    return raw, log_slopes


def _slopes_(s: Tensor, q: Tensor, setting: _Setting) -> Tensor:
    """dr/ds = 1 + slope·s/q of all layers, in the place of s."""
    one = s.new_ones(())
    for parity, activation in enumerate(setting.activations):
        rows = s[parity::2]
        torch.addcdiv(one, rows, q[parity::2], value=activation.slope, out=rows)
    return s


def _log_slope_gradients_(q: Tensor, slopes: Tensor, setting: _Setting) -> Tensor:
    """d ln(dr/ds)/ds = slope·width²/(q³·dr/ds) of all layers, in the place of q."""
    q.pow_(3).mul_(slopes).reciprocal_()
    for parity, activation in enumerate(setting.activations):
        q[parity::2].mul_(activation.slope * activation.width**2)
    return q


def _sum_of_logs(slopes: Tensor) -> Tensor:
    """Σ ln(slope) over layers and features, shape (N,)."""
    total = slopes.new_zeros(slopes.shape[-1])
    for group in slopes.split(_SLOPES_PER_LOG):
        total += group.prod(0).log_().sum(0)
    return total
