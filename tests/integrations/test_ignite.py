"""Ignite's engine and its average."""

import pytest
import torch

from integrations.trained import LIBRARIES_WARN, assert_right, assert_serves_its_own_map

pytest.importorskip("ignite", reason="needs the extra `integrations`")

from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch.optim.swa_utils import get_ema_multi_avg_fn

from p4flows import AveragedModel, MergeHook, P4InvTransform

pytestmark = LIBRARIES_WARN


def test_page(section):
    names = section("Ignite")
    assert names["hook"].stats.merged == 4
    assert names["log_prob"].isfinite().all()
    assert_right(names["flow"])
    assert_serves_its_own_map(names["average"].ema_model)


@pytest.mark.parametrize("buffers", ["copy", "update", "ema_train"])
def test_average_of_a_long_run(buffers):
    torch.manual_seed(0)
    mixing = torch.randn(16, 16)
    flow = Flow(P4InvTransform(16), StandardNormal([16]))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    hook = MergeHook(flow, optimizer)
    exact = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.98))

    def step(engine, batch):
        optimizer.zero_grad()
        (-flow.log_prob(torch.randn(64, 16) @ mixing.T).mean()).backward()
        optimizer.step()
        exact.update_parameters(flow)

    engine = Engine(step)
    average = EMAHandler(flow, momentum=0.02, handle_buffers=buffers)
    average.attach(engine, event=Events.ITERATION_COMPLETED)
    engine.run(range(500), max_epochs=1)
    assert hook.stats.merged == 10
    assert_serves_its_own_map(average.ema_model)
    if buffers == "update":
        x = torch.randn(2_000, 16) @ mixing.T
        with torch.no_grad():
            found, expected = (-f.log_prob(x).mean() for f in (average.ema_model, exact.module))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
