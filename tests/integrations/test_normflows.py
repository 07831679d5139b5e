"""P4 layers among normflows' own, and in place of them; they need no adapter."""

import copy
import math

import pytest
import torch

from integrations.trained import LIBRARIES_WARN, assert_right
from p4flows import MergeHook, P4InvTransform, P4OneByOneConvolution, swap_linear
from p4flows.transforms import AffineCoupling

normflows = pytest.importorskip("normflows", reason="needs the extra `integrations`")

pytestmark = LIBRARIES_WARN


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(model, loss, steps=300):
    """The hook, and the mean loss of the last steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    hook = MergeHook(model, optimizer)
    losses = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return hook, sum(losses[-50:]) / 50


def test_a_conditional_model():
    """The context reaches the couplings, past P4 layers."""
    layers = []
    for _ in range(3):
        layers += [AffineCoupling(2, (16,), context_features=2), P4InvTransform(2, init="reverse")]
    base = normflows.distributions.DiagGaussian(2, trainable=False)
    model = normflows.ConditionalNormalizingFlow(base, layers)

    def loss():
        context = 2.0 * torch.randn(128, 2)
        return model.forward_kld(context + 0.3 * torch.randn(128, 2), context=context)

    hook, found = trained(model, loss)
    assert hook.stats.merged == 3 * 300 // 50
    # With the context the entropy is 0.43 nats; without it, that of N(0, 4.09): 4.25.
    assert found < 1.5
    samples, log_prob = model.sample(2, context=torch.tensor([[3.0, -3.0], [-3.0, 3.0]]))
    assert (samples.sign() == torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).all()
    assert log_prob.shape == (2,)


def test_channels_of_images_in_a_multiscale_model():
    """In place of its own `Invertible1x1Conv`; a mixing of channels is learnt to the entropy."""
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.9, 0.3, 0.0], [0.0, -1.0, 0.5]])
    base = normflows.distributions.DiagGaussian((3, 2, 2), trainable=False)
    flows = [[P4OneByOneConvolution(3)]]
    model = normflows.MultiscaleFlow([base], flows, [], class_cond=False)

    def loss():
        pixels = torch.randn(64, 2, 2, 3) @ mixing.mT
        return model.forward_kld(pixels.movedim(-1, 1))

    hook, found = trained(model, loss)
    entropy = 4 * (1.5 * math.log(2.0 * math.pi * math.e) + mixing.det().abs().log().item())
    assert hook.stats.merged == 6
    assert found == pytest.approx(entropy, abs=0.2)
    assert model.sample(5)[0].shape == (5, 3, 2, 2)


def test_page(section):
    names = section("normflows")
    model, log_prob = names["model"], names["log_prob"]
    assert names["hook"].stats.merged == 8
    torch.testing.assert_close(model.log_prob(names["samples"]), log_prob, atol=1e-3, rtol=1e-3)
    assert names["loss"].item() == pytest.approx(4 * (1.42 + 0.69), abs=0.6)
    assert_right(model)


def test_swapped_into_a_spline_flow():
    """As normflows' examples build them, with the matrix of each `LULinearPermute` swapped."""
    flows = []
    for _ in range(2):
        flows += [normflows.flows.AutoregressiveRationalQuadraticSpline(4, 1, 8)]
        flows += [normflows.flows.LULinearPermute(4, identity_init=False)]
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), flows)
    swapped = swap_linear(copy.deepcopy(model))
    assert all(isinstance(layer.linear, P4InvTransform) for layer in swapped.flows[1::2])
    x = torch.randn(10, 4)
    torch.testing.assert_close(swapped.log_prob(x), model.log_prob(x))

    hook, found = trained(swapped, lambda: swapped.forward_kld(1 + 2 * torch.randn(64, 4)))
    assert hook.stats.merged == 12
    assert found == pytest.approx(4 * (1.42 + 0.69), abs=0.3)
    assert_right(swapped)
    samples, log_prob = swapped.sample(10)
    torch.testing.assert_close(swapped.log_prob(samples), log_prob, atol=1e-3, rtol=1e-3)
