"""P4 layers in nessai: its flow model alone, and a sampler that is interrupted and resumed."""

import numpy
import pytest
import torch

from integrations.trained import LIBRARIES_WARN, assert_right, matrices
from p4flows import P4InvTransform

pytest.importorskip("nessai", reason="needs the extra `integrations`")

from nessai.flowmodel import FlowModel
from nessai.flowsampler import FlowSampler
from nessai.model import Model

pytestmark = LIBRARIES_WARN


def test_flow_model(section, tmp_path):
    names = section("nessai")
    options = {key: names[key] for key in ("flow_config", "training_config")}
    model = FlowModel(**options, output=str(tmp_path))
    model.initialise()
    assert any(isinstance(layer, P4InvTransform) for layer in model.model.modules())
    data = torch.randn(600, 4).numpy()
    model.train(data, max_epochs=40, patience=40, plot=False)
    hook = model.model.hook
    first = hook.stats.merged
    assert first > 0
    model.reset_model(weights=True)
    for matrix in matrices(model.model):
        assert torch.equal(matrix.frozen, torch.eye(4)) and not matrix.u.any()
    model.train(data, max_epochs=40, patience=40, plot=False)
    assert hook is model.model.hook and hook.stats.merged > first
    assert_right(model.model)

    # All anew: a flow of its own with a hook of its own.
    model.reset_model(weights=True, permutations=True)
    assert model.model.hook is not hook
    model.train(data, max_epochs=40, patience=40, plot=False)
    assert model.model.hook.stats.merged > 0

    model.save_weights(str(tmp_path / "weights.pt"))
    x, log_prob = model.sample_and_log_prob(N=5)
    again = FlowModel(**options, output=str(tmp_path))
    again.load_weights(str(tmp_path / "weights.pt"))
    assert abs(again.forward_and_log_prob(x)[1] - log_prob).max() < 1e-3


class Interrupted(Exception):
    pass


class Gaussian(Model):
    """p(b|a) p(a) of widths 0.3 and 0.5 in a square of side 10."""

    names = ["a", "b"]  # noqa: RUF012
    bounds = {"a": [-5.0, 5.0], "b": [-5.0, 5.0]}  # noqa: RUF012

    def __init__(self, evaluations=float("inf")):
        self.evaluations = evaluations

    def log_prior(self, x):
        return numpy.log(self.in_bounds(x), dtype=float) - 2 * numpy.log(10.0)

    def log_likelihood(self, x):
        if self.likelihood_evaluations > self.evaluations:
            raise Interrupted
        return -((x["a"] / 0.5) ** 2 + ((x["b"] - x["a"]) / 0.3) ** 2) / 2


def test_sampler_that_is_interrupted(section, tmp_path):
    names = section("nessai")
    options = {
        "nlive": 100,
        "output": str(tmp_path / "run"),
        "flow_config": {**names["flow_config"], "n_inputs": None},
        "training_config": names["training_config"] | {"max_epochs": 50},
        "maximum_uninformed": 50,
        "training_frequency": 100,
        "poolsize": 200,
        "reset_weights": 2,
        "checkpoint_interval": 50,
        "checkpoint_on_iteration": True,
        "seed": 1,
        "plot": False,
        "signal_handling": False,
    }
    first = FlowSampler(Gaussian(evaluations=900), **options)
    with pytest.raises(Interrupted):
        first.run(plot=False, save=False)
    assert first.ns.proposal.flow.model.hook.stats.merged > 0

    resumed = FlowSampler(Gaussian(), resume=True, **options)
    assert resumed.ns.iteration >= 50
    resumed.run(plot=False, save=False)
    model = resumed.ns.proposal.flow.model
    assert model.hook.stats.merged > 0
    assert_right(model)
    # Four of its standard deviations, √(H / nlive) with the information H = 3.5 nats.
    assert resumed.ns.log_evidence == pytest.approx(numpy.log(2 * numpy.pi * 0.15 / 100), abs=0.75)
    assert resumed.posterior_samples["a"].std() == pytest.approx(0.5, abs=0.15)
