"""P4 layers among normflows' own, and in place of those that it has."""

import copy

import pytest
import torch

from integrations.trained import LIBRARIES_WARN, assert_right
from p4flows import MergeHook, P4InvTransform, swap_linear

normflows = pytest.importorskip("normflows", reason="needs the extra `integrations`")

pytestmark = LIBRARIES_WARN


def test_trains_and_samples(section):
    names = section("normflows")
    model, log_prob = names["model"], names["log_prob"]
    assert names["hook"].stats.merged == 8
    torch.testing.assert_close(model.log_prob(names["samples"]), log_prob, atol=1e-3, rtol=1e-3)
    assert names["loss"].item() == pytest.approx(4 * (1.42 + 0.69), abs=0.6)
    assert_right(model)


def spline_flow():
    """As in normflows' examples."""
    flows = []
    for _ in range(2):
        flows += [normflows.flows.AutoregressiveRationalQuadraticSpline(4, 1, 8)]
        flows += [normflows.flows.LULinearPermute(4, identity_init=False)]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), flows)


def test_lu_linear_permute():
    torch.manual_seed(0)
    model = spline_flow()
    swapped = swap_linear(copy.deepcopy(model))
    assert all(isinstance(layer.linear, P4InvTransform) for layer in swapped.flows[1::2])
    x = torch.randn(10, 4)
    torch.testing.assert_close(swapped.log_prob(x), model.log_prob(x))

    optimizer = torch.optim.Adam(swapped.parameters(), lr=5e-3)
    hook = MergeHook(swapped, optimizer)
    losses = []
    for _ in range(100):
        loss = swapped.forward_kld(1.0 + 2.0 * torch.randn(64, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert hook.stats.merged == 4
    assert sum(losses[-10:]) < sum(losses[:10]) - 5.0
    assert_right(swapped)
    samples, log_prob = swapped.sample(10)
    torch.testing.assert_close(swapped.log_prob(samples), log_prob, atol=1e-3, rtol=1e-3)
