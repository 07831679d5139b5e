"""P4OneByOneConvolution beside nflows' and torch's convolutions."""

import pytest
import torch
from nflows.transforms import CompositeTransform, OneByOneConvolution
from torch.nn import functional as F

from p4flows import MergeHook, P4InvTransform, P4OneByOneConvolution, plain, swap_linear
from transforms.registry import move


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def moved(channels=3, **options):
    layer = P4OneByOneConvolution(channels, **options).double()
    move(layer)
    return layer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_is_torchs_convolution(layout):
    layer = moved()
    images = torch.randn(4, 3, 5, 2, dtype=torch.float64).to(memory_format=layout)
    outputs, logabsdet = layer(images)
    torch.testing.assert_close(
        outputs, F.conv2d(images, layer.weight()[:, :, None, None], layer.bias)
    )
    torch.testing.assert_close(logabsdet, 10 * layer.logabsdet().expand(4))
    torch.testing.assert_close(layer.inverse(outputs)[0], images)


def test_channels_last_stays_channels_last():
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    outputs, _ = P4OneByOneConvolution(3)(images)
    assert outputs.is_contiguous(memory_format=torch.channels_last)


def test_takes_the_place_of_nflows():
    composite = CompositeTransform([OneByOneConvolution(4, identity_init=False)])
    images = torch.randn(3, 4, 2, 5)
    expected = composite(images)
    swapped = swap_linear(composite)
    assert isinstance(swapped._transforms[0], P4OneByOneConvolution)
    torch.testing.assert_close(swapped(images), expected, atol=1e-5, rtol=1e-5)
    outputs, _ = expected
    torch.testing.assert_close(swapped.inverse(outputs)[0], images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [P4OneByOneConvolution, P4InvTransform])
def test_takes_over_the_map_of_nflows(kind):
    other = OneByOneConvolution(4, identity_init=False)
    torch.nn.init.normal_(other.bias)
    layer = kind(4, init=other)
    images = torch.randn(3, 4, 1, 1)
    expected, logabsdet = other(images)
    inputs = images if kind is P4OneByOneConvolution else images.flatten(1)
    outputs, found = layer(inputs)
    torch.testing.assert_close(outputs.reshape(expected.shape), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, logabsdet, atol=1e-5, rtol=1e-5)


def test_trains_with_a_hook_and_caches_in_eval():
    layer = P4OneByOneConvolution(3, using_cache=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    hook = MergeHook(layer, optimizer, every=5)
    for _ in range(20):
        outputs, logabsdet = layer(2.0 * torch.randn(8, 3, 4, 4))
        loss = (outputs.square().sum((1, 2, 3)) / 2 - logabsdet).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert hook.stats.merged == 4
    images = torch.randn(2, 3, 4, 4)
    expected = layer(images)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(images), expected)


def test_an_empty_batch_has_no_log_determinant():
    outputs, logabsdet = P4OneByOneConvolution(3)(torch.empty(0, 3, 2, 2))
    assert outputs.shape == (0, 3, 2, 2) and logabsdet.shape == (0,)


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 2, 2), (2, 3, 0, 2), (3, 2, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"inputs must have shape \(N, 3, height, width\)"):
        P4OneByOneConvolution(3)(torch.ones(shape))


def test_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="channels must be a positive int, got 0"):
        P4OneByOneConvolution(0)
    with pytest.raises(TypeError, match="no counterpart"):
        plain(CompositeTransform([P4InvTransform(2), P4OneByOneConvolution(2)]))
