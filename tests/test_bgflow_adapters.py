import math

import pytest
import torch
from needs_bgflow import bgflow, needs_bgflow
from nflows.distributions.normal import StandardNormal
from nflows.flows.base import Flow as NflowsFlow
from nflows.transforms import (
    CompositeTransform,
    LULinear,
    MaskedAffineAutoregressiveTransform,
    ReversePermutation,
)
from transforms.registry import move

import p4flows
from p4flows.transforms import SplineCoupling

if bgflow is not None:
    from p4flows.bgflow import (
        BentStackFlow,
        FlowTransform,
        P4InvFlow,
        TransformFlow,
        realnvp_flow,
    )

pytestmark = [
    needs_bgflow,
    # bgflow's SplitFlow indexes by a list.
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]

DIM = 3
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def rows(*shape):
    return torch.randn(*shape, DIM, dtype=torch.float64)


# TransformFlow


def conditional():
    torch.manual_seed(0)
    return MaskedAffineAutoregressiveTransform(DIM, hidden_features=8, context_features=2).double()


def test_transform_flow_is_the_same_object():
    transform = LULinear(DIM)
    assert TransformFlow(transform).transform is transform


@pytest.mark.parametrize("inverse", [False, True])
def test_transform_flow_hands_the_context_on(inverse):
    """Through a sequence as well, past layers that have no use for it."""
    transform = conditional()
    x, context = rows(4, 5), torch.randn(4, 5, 2, dtype=torch.float64)
    identity = P4InvFlow(DIM).double()
    flow = bgflow.SequentialFlow([identity, TransformFlow(transform), bgflow.InverseFlow(identity)])
    y, dlogp = flow(x, inverse=inverse, context=context)
    direction = transform.inverse if inverse else transform
    expected = direction(x.reshape(20, DIM), context.reshape(20, 2))
    torch.testing.assert_close((y.reshape(20, DIM), dlogp.reshape(20)), expected, **CLOSE)
    assert not torch.allclose(flow(x, inverse=inverse, context=context + 1.0)[0], y)


@pytest.mark.parametrize("inverse", [False, True])
def test_transform_flow_takes_circular_splines(inverse):
    """Data with angles, in a Boltzmann generator of bgflow's as in the flow of ours."""
    torch.manual_seed(0)
    ours = p4flows.spline_flow(4, 2, circular=[1, 3], hidden=(8,)).double()
    move(ours)
    with torch.no_grad():
        # A fifth as far: splines so steep lose most digits on the way there and back.
        for coupling in ours.modules():
            if isinstance(coupling, SplineCoupling):
                for parameter in coupling.parameters():
                    parameter.mul_(0.2)
    transform = ours._transform
    flow = bgflow.SequentialFlow([TransformFlow(transform)])
    x = ours.sample(6).detach()
    assert x[:, [1, 3]].abs().max() <= math.pi
    y, dlogp = flow(x, inverse=inverse)
    torch.testing.assert_close(
        (y, dlogp.squeeze(-1)), (transform.inverse if inverse else transform)(x), **CLOSE
    )
    back, minus = flow(y, inverse=not inverse)
    turns = (back - x)[:, [1, 3]] / (2.0 * math.pi)
    torch.testing.assert_close(turns, turns.round(), rtol=0.0, atol=1e-7)
    torch.testing.assert_close(back[:, [0, 2]], x[:, [0, 2]], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(minus, -dlogp, rtol=1e-7, atol=1e-7)


def test_transform_flow_refuses_a_context_of_other_shape():
    with pytest.raises(ValueError, match=r"context must have the batch shape .* \(4, 5\), got"):
        TransformFlow(conditional())(rows(4, 5), context=torch.randn(5, 2))


@pytest.mark.parametrize("inverse", [False, True])
def test_transform_flow_refuses_several_tensors(inverse):
    flow = P4InvFlow(DIM)
    with pytest.raises(TypeError, match="maps a single tensor, got 2: join them with a MergeFlow"):
        flow(torch.randn(5, DIM), torch.randn(5, DIM), inverse=inverse)


@pytest.mark.parametrize("wrong", [torch.ones(5, DIM, dtype=torch.int64), [1.0, 2.0, 3.0]])
def test_transform_flow_refuses_other_types(wrong):
    with pytest.raises(TypeError, match="inputs must be a floating-point tensor, got"):
        P4InvFlow(DIM)(wrong)


def test_transform_flow_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"inputs must have shape \(N, 3\), got \(10, 2\)"):
        P4InvFlow(DIM)(torch.randn(2, 5, 2))
    with pytest.raises(ValueError, match="got a scalar"):
        P4InvFlow(DIM)(torch.tensor(1.0))


def test_adapters_refuse_what_is_neither():
    with pytest.raises(TypeError, match="transform must be an nflows Transform, got Linear"):
        TransformFlow(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="flow must be a bgflow Flow, got LULinear"):
        FlowTransform(LULinear(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_adapters_follow_dtype_and_device(device, dtype):
    flow = TransformFlow(CompositeTransform([ReversePermutation(DIM), LULinear(DIM)]))
    for layer in (flow, P4InvFlow(DIM), BentStackFlow(DIM, 1), realnvp_flow(DIM, 1)):
        adapted = FlowTransform(layer.to(device, dtype))
        x = torch.randn(5, DIM, device=device, dtype=dtype)
        for result in (*layer(x), *adapted(x)):
            assert result.dtype == dtype and result.device.type == device


# FlowTransform


def test_flow_transform_is_the_same_object():
    flow = bgflow.BentIdentity()
    assert FlowTransform(flow).flow is flow


def test_flow_transform_of_their_flow_in_an_nflows_flow():
    torch.manual_seed(0)
    flow = bgflow.SequentialFlow(
        [bgflow.SplitFlow(1, 2), bgflow.MergeFlow(1, 2), bgflow.AffineFlow(DIM), P4InvFlow(DIM)]
    ).double()
    move(flow)
    x, base = rows(5), StandardNormal([DIM])
    noise, dlogp = flow(x)
    expected = base.log_prob(noise) + dlogp[:, 0]
    found = NflowsFlow(FlowTransform(flow), base).log_prob(x)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_flow_transform_sums_over_event_dimensions():
    torch.manual_seed(0)
    flow, x = P4InvFlow(DIM).double(), rows(5, 2)
    move(flow)
    outputs, logabsdet = FlowTransform(flow)(x)
    jacobian = torch.autograd.functional.jacobian(
        lambda event: FlowTransform(flow)(event[None])[0].flatten(), x[0]
    )
    expected = torch.linalg.slogdet(jacobian.reshape(2 * DIM, 2 * DIM)).logabsdet
    assert outputs.shape == x.shape
    torch.testing.assert_close(logabsdet, expected.expand(5), **CLOSE)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_there_and_back_is_the_same_transform(direction):
    transform, x = conditional(), rows(5)
    context = torch.randn(5, 2, dtype=torch.float64)
    again = FlowTransform(TransformFlow(transform))
    found = getattr(again, direction)(x, context)
    torch.testing.assert_close(found, getattr(transform, direction)(x, context), **CLOSE)


def test_flow_transform_refuses_flows_of_several_tensors():
    transform = FlowTransform(bgflow.SplitFlow(1, 2))
    with pytest.raises(ValueError, match="one tensor to one, got 2: end it with a MergeFlow"):
        transform(torch.randn(5, DIM))


# realnvp_flow


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ((60, 25), 735_050 + 9_000),
        ((60, 25, (60, 60), "permutation"), 735_050),
        ((2, 5, (6, 6), "permutation"), 1_230),
    ],
)
def test_parameters_of_the_paper(arguments, parameters):
    flow = realnvp_flow(*arguments, paper=True)
    assert sum(p.numel() for p in flow.parameters()) == parameters


@pytest.mark.parametrize("swap", ["p4", "permutation"])
@pytest.mark.parametrize("dim", [2, 7])
def test_realnvp_has_the_density_of_the_nflows_one(dim, swap):
    options = {"hidden": (5, 4), "swap": swap, "rank": 2, "context_features": 1}
    torch.manual_seed(0)
    theirs = p4flows.realnvp_flow(dim, 2, **options).double()
    torch.manual_seed(0)
    ours = realnvp_flow(dim, 2, **options).double()
    x, context = torch.randn(5, dim).double(), torch.randn(5, 1).double()
    for inverse in (False, True):
        outputs, dlogp = ours(x, inverse=inverse, context=context)
        expected = (theirs._transform.inverse if inverse else theirs._transform)(x, context)
        torch.testing.assert_close((outputs, dlogp[:, 0]), expected, **CLOSE)


def test_realnvp_inverted_is_a_boltzmann_generator():
    torch.manual_seed(0)
    ours = realnvp_flow(DIM, 2, hidden=(5,)).double()
    move(ours)
    generator = bgflow.BoltzmannGenerator(
        bgflow.NormalDistribution(DIM).double(), bgflow.InverseFlow(ours), None
    )
    x = rows(5)
    density = NflowsFlow(ours.transform, StandardNormal([DIM]))
    torch.testing.assert_close(generator.energy(x)[:, 0], -density.log_prob(x), **CLOSE)
