"""The base distributions: density and samples."""

import copy
import math

import pytest
import torch

from p4flows.flows.base import BaseNormalUniform


def test_base_is_normal_times_uniform():
    base = BaseNormalUniform(3, [1]).double()
    torch.manual_seed(0)
    samples = base.sample(20_000)
    assert samples.dtype == torch.float64
    assert samples[:, 1].abs().max() <= math.pi
    assert samples[:, 1].std().item() == pytest.approx(math.pi / math.sqrt(3.0), rel=0.02)
    assert samples[:, 0].std().item() == pytest.approx(1.0, rel=0.02)
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = normal.log_prob(samples[:, [0, 2]]).sum(-1) - math.log(2.0 * math.pi)
    torch.testing.assert_close(base.log_prob(samples), expected)
    assert copy.deepcopy(base).sample(2).shape == (2, 3)
