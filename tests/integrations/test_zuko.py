"""P4Transform inside zuko's flows."""

import pytest
import torch

pytest.importorskip("zuko", reason="needs the extra `integrations`")

from zuko.distributions import DiagNormal
from zuko.flows import Flow, UnconditionalDistribution
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.spline import NSF

from p4flows import MergeHook
from p4flows.matrices import PerturbedMatrix
from p4flows.zuko import P4Transform


def flow_of(*transforms):
    base = UnconditionalDistribution(DiagNormal, torch.zeros(3), torch.ones(3), buffer=True)
    return Flow(list(transforms), base)


def moved(**options):
    torch.manual_seed(0)
    transform = P4Transform(3, **options).double()
    for matrix in transform.modules():
        if isinstance(matrix, PerturbedMatrix):
            torch.nn.init.normal_(matrix.u, std=0.3)
            matrix.merge()
            torch.nn.init.normal_(matrix.u, std=0.3)
    torch.nn.init.normal_(transform.layer.bias)
    return transform


def test_is_a_transform_of_torch_distributions():
    transform = moved()()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    y, ladj = transform.call_and_ladj(x)
    assert y.shape == x.shape and ladj.shape == (2, 5)
    torch.testing.assert_close(transform.inv(y), x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), ladj)
    jacobian = torch.autograd.functional.jacobian(transform, x[0, 0])
    torch.testing.assert_close(ladj[0, 0], torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(moved().inv()(y), x)


def test_stands_in_a_conditional_flow():
    """At a batch of contexts, which the couplings around it see and it ignores."""
    torch.manual_seed(0)
    coupling = GeneralCouplingTransform(3, context=2)
    transform = P4Transform(3, init=torch.tensor([[2.0, 0, 0], [1.0, 0.5, 0], [0, 1.0, 3.0]]))
    flow = flow_of(coupling, transform, transform.inv, transform)
    context = torch.randn(5, 2)
    samples, log_prob = flow(context).rsample_and_log_prob((4,))
    assert samples.shape == (4, 5, 3) and log_prob.shape == (4, 5)
    torch.testing.assert_close(flow(context).log_prob(samples), log_prob, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(flow(context + 1.0).log_prob(samples), log_prob)


def test_trains_in_a_flow_with_other_transforms():
    torch.manual_seed(0)
    flow = flow_of(P4Transform(3), *NSF(3, transforms=1, hidden_features=(8,)).transform.transforms)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2)
    hook = MergeHook(flow, optimizer)
    mixing = torch.tensor([[2.0, 0, 0], [1.9, 0.3, 0], [0, -1.0, 0.5]])
    losses = []
    for _ in range(200):
        x = torch.randn(128, 3) @ mixing.T
        loss = -flow().log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert hook.stats.merged == 4
    assert sum(losses[-20:]) / 20 < losses[0] - 0.7
    assert flow().sample((7,)).shape == (7, 3)


def test_page(section):
    assert section("zuko")["loss"].isfinite()
