"""P4 layers in place of glasflow's copy of LULinear."""

import copy

import pytest
import torch

from integrations.trained import LIBRARIES_WARN, assert_equal, assert_right
from p4flows import P4InvTransform, swap_linear

pytest.importorskip("glasflow", reason="needs the extra `integrations`")

from glasflow import CouplingNSF
from glasflow.nflows.transforms.lu import LULinear

pytestmark = LIBRARIES_WARN


def test_trains_and_samples(section):
    names = section("glasflow")
    assert names["hook"].stats.merged == 6
    assert names["flow"].sample(7).shape == (7, 4)
    assert_right(names["flow"])


def test_swapping_changes_no_density():
    torch.manual_seed(0)
    flow = CouplingNSF(4, n_transforms=2, n_neurons=8, linear_transform="lu").double()
    with torch.no_grad():
        for layer in flow.modules():
            if isinstance(layer, LULinear):
                layer.lower_entries.normal_()
                layer.bias.normal_()
    swapped = swap_linear(copy.deepcopy(flow))
    assert sum(isinstance(layer, P4InvTransform) for layer in swapped.modules()) == 2
    x = torch.randn(10, 4, dtype=torch.float64)
    torch.testing.assert_close(swapped.log_prob(x), flow.log_prob(x))


def test_resumes(section, tmp_path):
    names = section("glasflow")
    flow, optimizer = names["flow"], names["optimizer"]
    torch.save((flow.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")

    def train(names, steps):
        flow, optimizer = names["flow"], names["optimizer"]
        torch.manual_seed(3)
        for _ in range(steps):
            optimizer.zero_grad()
            (-flow.log_prob(torch.randn(64, 4)).mean()).backward()
            optimizer.step()

    train(names, 60)
    resumed = section("glasflow")
    saved = torch.load(tmp_path / "saved.pt")
    resumed["flow"].load_state_dict(saved[0])
    resumed["optimizer"].load_state_dict(saved[1])
    train(resumed, 60)
    assert resumed["hook"].stats == names["hook"].stats
    assert_equal(resumed["flow"], flow)
