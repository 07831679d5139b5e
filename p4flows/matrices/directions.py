"""Reproducible random directions: pure functions of a seed and a counter, on any device.

A generator with hidden state would have to be synchronised between ranks and saved apart from
the module. A counter-based draw (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011) needs neither: whoever holds the same seed and counter draws the same numbers.
"""

import functools
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_SIGNS = 64


def _signed(constant: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit constant."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own shift keeps the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def scramble(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64, a bijection of 64-bit integers without visible structure."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _uniform(bits: Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), in float64."""
    # 52 bits, not 53: the largest number plus a half has to be exact, or it is rounded to one.
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


def standard_normal(seed: Tensor, counter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers that depend on nothing but `seed` and `counter`."""
    size = math.prod(shape)
    stream = scramble(seed + scramble((counter + 1) * _signed(_GOLDEN)))
    index = torch.arange(1, 2 * size + 1, device=seed.device) * _signed(_GOLDEN)
    bits = scramble(stream.unsqueeze(-1) + index)
    radius = torch.sqrt(-2.0 * torch.log(_uniform(bits[..., :size])))
    angle = 2.0 * math.pi * _uniform(bits[..., size:])
    return (radius * torch.cos(angle)).reshape(*seed.shape, *shape)


def random_signs(counter: Tensor, n: int) -> Tensor:
    """Signs that depend on nothing but a counter; each 64 of them are different ones."""
    return _table_of_signs(n, counter.device)[counter % _SIGNS]


@functools.lru_cache(maxsize=64)
def _table_of_signs(n: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        index = torch.arange(1, _SIGNS * n + 1, device=device).reshape(_SIGNS, n)
        return (scramble(index * _signed(_GOLDEN)) >> 63) | 1


def basis_columns(seed: Tensor, counter: Tensor, shape: tuple[int, int]) -> Tensor:
    """Columns of random orthogonal bases, drawn without replacement.

    The columns of all draws in a row, n of them at a time, are a basis: H(a)·D·C with C of the
    discrete cosine transform, random signs D and a random Householder reflection H(a). A column
    costs O(n) and none is stored, where a QR decomposition would take O(n³).
    """
    n, k = shape
    position = counter.unsqueeze(-1) * k + torch.arange(k, device=counter.device)
    # As k ≤ n, a draw sees at most two bases: random numbers of both, then those of each column.
    basis = torch.stack([position[..., 0], position[..., -1]], dim=-1) // n
    random = standard_normal(seed.unsqueeze(-1).expand_as(basis), basis, (2 * n + 1,))
    later = (position // n > basis[..., :1]).unsqueeze(-1)
    random = torch.where(later, random[..., 1:, :], random[..., :1, :])
    signs, a = random[..., :n].sign(), random[..., n : 2 * n]
    # A random one comes first: the squares of a single column are not equally large.
    first = (n * torch.special.ndtr(random[..., -1:])).long()
    frequency = (position.unsqueeze(-1) + first) % n
    index = torch.arange(n, dtype=torch.float64, device=counter.device)
    angle = math.pi / n * (index + 0.5) * frequency
    columns = signs * torch.cos(angle)
    columns *= math.sqrt(n) / torch.linalg.vector_norm(columns, dim=-1, keepdim=True)
    along = (a * columns).sum(-1, keepdim=True) / a.square().sum(-1, keepdim=True)
    return (columns - 2.0 * along * a).mT


def coordinates(seed: Tensor, counter: Tensor, shape: tuple[int, int]) -> Tensor:
    """Columns of the identity, dealt in a random order; each draw has different ones.

    Of n columns, n // k draws are dealt before they are shuffled again. Columns have length √n, as
    those of `basis_columns`; at k = n they stay in order.
    """
    n, k = shape
    if k == n:
        order = torch.arange(n, device=seed.device).expand(*seed.shape, n)
    else:
        in_turn = n // k
        shuffled = standard_normal(seed, counter // in_turn, (n,)).argsort(-1)
        first = (counter % in_turn * k).unsqueeze(-1)
        order = shuffled.gather(-1, first + torch.arange(k, device=seed.device))
    columns = torch.zeros(*seed.shape, n, k, dtype=torch.float64, device=seed.device)
    return columns.scatter_(-2, order.unsqueeze(-2), math.sqrt(n))
