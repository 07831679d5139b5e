"""Conditional flows: the couplings see a context, or refuse it."""

import pytest
import torch
from torch.func import jacrev, vmap
from transforms.registry import move

from p4flows import bent_stacked_flow, realnvp_flow, spline_flow
from p4flows.lightning import fit
from p4flows.transforms import AffineCoupling, SplineCoupling

FLOWS = {
    "realnvp": lambda **options: realnvp_flow(2, 2, hidden=(16,), **options),
    "spline": lambda **options: spline_flow(2, 2, hidden=(16,), **options),
}
each_flow = pytest.mark.parametrize("build", FLOWS.values(), ids=FLOWS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@each_flow
def test_a_mean_that_is_the_context_is_learnt(build):
    flow = build(context_features=2)

    def batch(generator):
        context = 2.0 * torch.randn(128, 2, generator=generator)
        return context + 0.3 * torch.randn(128, 2, generator=generator), context

    options = {"learning_rate": 1e-2, "schedule": None, "progress": False}
    flow, result = fit(flow, batch, max_steps=200, **options)
    # Without the context the entropy is that of N(0, 4.09): 4.2 nats; with it, 0.43.
    assert result.train[-20:].mean() < 1.8
    context = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])
    samples = flow.sample(500, context=context)
    assert samples.shape == (2, 500, 2)
    torch.testing.assert_close(samples.mean(1), context, atol=0.5, rtol=0)


@pytest.mark.parametrize(
    "coupling",
    [
        AffineCoupling(3, (5,), context_features=2),
        SplineCoupling(3, [0], circular=[1], hidden=(5,), context_features=2),
    ],
    ids=["affine", "spline"],
)
def test_round_trip_and_log_determinant_at_a_context(coupling):
    coupling = coupling.double()
    for parameter in coupling.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, context = torch.rand(4, 3).double() - 0.5, torch.randn(4, 2).double()
    y, logabsdet = coupling(x, context)
    back, opposite = coupling.inverse(y, context)
    torch.testing.assert_close((back, opposite), (x, -logabsdet))
    jacobians = vmap(jacrev(lambda row, c: coupling(row[None], c[None])[0][0]))(x, context)
    torch.testing.assert_close(torch.linalg.slogdet(jacobians).logabsdet, logabsdet)
    assert not torch.allclose(coupling(x, context + 1.0)[0], y)
    assert "context_features=2" in repr(coupling) or isinstance(coupling, SplineCoupling)


@each_flow
def test_a_context_that_does_not_fit_is_refused(build):
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="build it with context_features=4"):
        build().log_prob(x, context=torch.randn(3, 4))
    conditional = build(context_features=2)
    with pytest.raises(TypeError, match="context must be a floating-point tensor, got NoneType"):
        conditional.log_prob(x)
    with pytest.raises(ValueError, match=r"context must have shape \(3, 2\), got \(3, 4\)"):
        conditional.log_prob(x, context=torch.randn(3, 4))
    with pytest.raises(ValueError, match="context_features must not be negative"):
        build(context_features=-1)


@pytest.mark.parametrize("fused", [True, False])
def test_a_flow_without_nets_refuses_a_context(fused):
    flow = bent_stacked_flow(2, 1, fused=fused)
    x, context = torch.randn(3, 2), torch.randn(3, 4)
    for call in (
        lambda: flow.log_prob(x, context=context),
        lambda: flow.sample(5, context=context),
        lambda: flow.sample_and_log_prob(5, context=context),
        lambda: flow.transform_to_noise(x, context=context),
    ):
        with pytest.raises(ValueError, match="context came to a flow whose layers have no nets"):
            call()
    assert flow.log_prob(x).shape == (3,) and flow.sample(5).shape == (5, 2)


def test_samples_have_the_density_of_their_context():
    flow = spline_flow(3, 1, circular=[1], hidden=(8,), context_features=2).double()
    move(flow)
    context = torch.randn(4, 2).double()
    samples, log_prob = flow.sample_and_log_prob(6, context=context)
    assert samples.shape == (4, 6, 3) and log_prob.shape == (4, 6)
    found = flow.log_prob(samples.flatten(0, 1), context=context.repeat_interleave(6, 0))
    torch.testing.assert_close(found.reshape(4, 6), log_prob)
    other = flow.log_prob(samples.flatten(0, 1), context=context.flip(0).repeat_interleave(6, 0))
    assert not torch.allclose(other, found, atol=0.1)


def test_parameters_without_a_context_are_as_before():
    assert sum(p.numel() for p in bent_stacked_flow(2, 100, paper=True).parameters()) == 1200
    names = set(realnvp_flow(2, 1, context_features=3).state_dict())
    assert names == set(realnvp_flow(2, 1).state_dict())
