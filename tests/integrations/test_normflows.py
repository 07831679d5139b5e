"""Layers of p4flows inside normflows' models, where they need no adapter."""

import math

import pytest
import torch

pytest.importorskip("normflows", reason="needs the extra `integrations`")

import normflows

from p4flows import MergeHook, P4InvTransform, P4OneByOneConvolution
from p4flows.transforms import AffineCoupling

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


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
