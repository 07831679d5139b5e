"""Spline flows on R^p × T^q: density, sizes, mixing."""

import math

import pytest
import torch
from nflows.transforms.lu import LULinear

from p4flows import MergeHook, P4InvTransform, spline_flow
from p4flows.transforms import SplineCoupling

FLOWS = {
    "line": lambda: spline_flow(3, 2, hidden=(5,)),
    "mixed": lambda: spline_flow(3, 2, circular=[1], hidden=(5,)),
    "torus": lambda: spline_flow(3, 2, circular=[0, 1, 2], hidden=(5,)),
    "lu": lambda: spline_flow(4, 1, circular=[3], swap="lu", hidden=(5,)),
    "random-halves": lambda: spline_flow(3, 1, circular=[0, 1], swap="random-halves", hidden=(5,)),
}


def layers(flow, kind):
    return [module for module in flow.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", ["line", "mixed", "torus"])
def test_density_is_normalised(name):
    torch.manual_seed(0)
    flow = FLOWS[name]().double()
    with torch.no_grad():
        # Less than `move` does, so that a simple q covers the density.
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for layer in layers(flow, P4InvTransform):
            layer.matrix.merge(force=True)
        samples = flow.sample(4_000)
    circular = layers(flow, SplineCoupling)[0]
    angles = sorted([*circular.turned.tolist(), *circular.seen_turned.tolist()])
    lines = [column for column in range(3) if column not in angles]
    assert (samples[:, angles] >= -math.pi).all() and (samples[:, angles] <= math.pi).all()
    # The mean of p(x)/q(x) over samples x of a wide q is 1 if log_prob is a density.
    x = (2.0 * torch.rand(200_000, 3, dtype=torch.float64) - 1.0) * math.pi
    log_q = torch.full((200_000,), -len(angles) * math.log(2.0 * math.pi)).double()
    for column in lines:
        wide = torch.distributions.StudentT(
            3.0, samples[:, column].median(), 1.2 * samples[:, column].std()
        )
        x[:, column] = wide.sample((200_000,))
        log_q += wide.log_prob(x[:, column])
    with torch.no_grad():
        ratios = (flow.log_prob(x) - log_q).exp()
    error = ratios.std().item() / math.sqrt(len(ratios))
    assert error < 0.05
    assert ratios.mean().item() == pytest.approx(1.0, abs=4 * error)


# That of nflows' LULinear.
@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_log_prob_is_that_of_the_samples(name, dtype):
    torch.manual_seed(0)
    flow = FLOWS[name]().to(dtype)
    with torch.no_grad():
        samples, expected = flow.sample_and_log_prob(50)
        assert samples.dtype == expected.dtype == dtype
        torch.testing.assert_close(flow.log_prob(samples), expected, rtol=1e-3, atol=1e-3)


def test_what_mixes_the_columns():
    def first_halves(flow):
        return [sorted([*c.straight.tolist(), *c.turned.tolist()]) for c in couplings(flow)[::2]]

    def couplings(flow):
        return layers(flow, SplineCoupling)

    torch.manual_seed(0)
    flow = spline_flow(20, 3, circular=[18, 19], rank=2, perturbation="additive")
    assert [layer.matrix.size for layer in layers(flow, P4InvTransform)] == [18] * 3
    for layer in layers(flow, P4InvTransform):
        assert (layer.matrix.rank, layer.matrix.perturbation) == (2, "additive")
    halves = first_halves(flow)
    assert halves[0] != halves[1] != halves[2]
    for swap, kind in (("lu", LULinear), ("random-halves", type(None)), ("halves", type(None))):
        other = spline_flow(20, 3, circular=[18, 19], swap=swap)
        assert not layers(other, P4InvTransform)
        assert len(layers(other, LULinear)) == (3 if kind is LULinear else 0)
        assert (len(set(map(tuple, first_halves(other)))) == 1) == (swap == "halves")
        for first, second in zip(couplings(other)[::2], couplings(other)[1::2], strict=True):
            both = [*first.straight, *first.turned, *second.straight, *second.turned]
            assert sorted(map(int, both)) == list(range(20))


def test_one_circle_and_one_line_make_two_halves():
    flow = spline_flow(2, 1, circular=[0])
    assert [len(c.straight) for c in layers(flow, SplineCoupling)] == [1, 0]
    assert flow.log_prob(torch.zeros(4, 2)).isfinite().all()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_checkpoint_carries_the_columns_that_were_drawn(seed):
    torch.manual_seed(0)
    flow = spline_flow(9, 2, circular=[0, 5, 6])
    torch.manual_seed(seed)
    other = spline_flow(9, 2, circular=[0, 5, 6])
    x = torch.randn(5, 9).clamp(-3.0, 3.0)
    assert not torch.allclose(other.log_prob(x), flow.log_prob(x))
    other.load_state_dict(flow.state_dict())
    torch.testing.assert_close(other.log_prob(x), flow.log_prob(x))


def test_a_ring_is_learnt_across_the_seam():
    """Data around ±π on a circle and on a line at once: NLL near the entropy."""
    torch.manual_seed(0)
    angle = torch.distributions.VonMises(torch.tensor(math.pi), 2.0)
    flow = spline_flow(2, 2, circular=[0], hidden=(16,), bins=6)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    MergeHook(flow, optimizer, every=10)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)

    def draw(n):
        x = torch.stack([angle.sample((n,)), torch.randn(n)], 1)
        return torch.stack([x[:, 0], x[:, 1] * 0.5 + x[:, 0].cos()], 1)

    for _ in range(200):
        optimizer.zero_grad()
        (-flow.log_prob(draw(200)).mean()).backward()
        optimizer.step()
        scheduler.step()
    angles = torch.linspace(-math.pi, math.pi, 10_001).double()
    density = (2.0 * angles.cos()).exp() / (2.0 * math.pi * torch.i0(torch.tensor(2.0)).double())
    entropy = -(density * density.log()).mean().item() * 2.0 * math.pi
    entropy += 0.5 * math.log(2.0 * math.pi * math.e) + math.log(0.5)
    with torch.no_grad():
        found = -flow.log_prob(draw(20_000)).mean().item()
    assert found == pytest.approx(entropy, abs=0.04)


@pytest.mark.parametrize("name", ["line", "mixed", "torus", "random-halves"])
def test_log_prob_compiles_into_one_graph(name):
    flow = FLOWS[name]()
    torch.compiler.reset()
    explanation = torch._dynamo.explain(flow.log_prob)(torch.randn(4, 3))
    assert explanation.graph_break_count == 0, explanation.break_reasons


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": 1}, ValueError, "features must be at least 2 to be split, got 1"),
        ({"features": "4"}, TypeError, "features must be a positive int, got str"),
        ({"blocks": 0}, ValueError, "blocks must be a positive int, got 0"),
        ({"circular": [4]}, ValueError, "circular must hold columns from 0 to 3, got 4"),
        ({"circular": torch.tensor([1])}, TypeError, "circular must be a sequence of columns"),
        ({"swap": "reverse"}, ValueError, "swap must be 'p4', 'lu', 'random-halves' or 'halves'"),
        ({"swap": "lu", "rank": 2}, ValueError, "rank is that of P4Inv layers, got 2"),
        (
            {"swap": "halves", "perturbation": "additive"},
            ValueError,
            "perturbation is that of P4Inv layers, got 'additive' with swap='halves'",
        ),
        ({"perturbation": "none"}, ValueError, "perturbation"),
        ({"rank": 5}, ValueError, "rank must be"),
        ({"bins": 1}, ValueError, "bins must be at least 2"),
        ({"bound": -1.0}, ValueError, "bound must be positive"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        spline_flow(**{"features": 4, "blocks": 1, **arguments})
