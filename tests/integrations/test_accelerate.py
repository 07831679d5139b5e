"""P4 layers after Accelerate's `prepare`; a run that is resumed from its checkpoint."""

import pytest
import torch

from integrations.trained import LIBRARIES_WARN, assert_equal, assert_right
from p4flows import MergeHook

pytest.importorskip("accelerate", reason="needs the extra `integrations`")

pytestmark = LIBRARIES_WARN


def train(names, steps):
    for _ in range(steps):
        loss = -names["flow"].log_prob(torch.randn(16, 4)).mean()
        names["optimizer"].zero_grad()
        names["accelerator"].backward(loss)
        names["optimizer"].step()


def test_a_resumed_run_is_the_uninterrupted_one(section, tmp_path):
    whole, resumed = section("Accelerate"), section("Accelerate")
    assert whole["hook"].stats.merged == 2
    hooks = [MergeHook(names["flow"], names["optimizer"], every=7) for names in (whole, resumed)]
    train(whole, 10)
    whole["accelerator"].save_state(str(tmp_path / "state"))
    torch.manual_seed(3)
    train(whole, 10)
    train(resumed, 5)
    resumed["accelerator"].load_state(str(tmp_path / "state"))
    torch.manual_seed(3)
    train(resumed, 10)
    assert hooks[0].stats.merged == 2
    assert hooks[1].stats == hooks[0].stats
    assert_equal(resumed["flow"], whole["flow"])
    assert_right(resumed["flow"])
    assert resumed["flow"].sample(3).shape == (3, 4)
