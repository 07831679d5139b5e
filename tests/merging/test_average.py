"""AveragedModel: the average of what layers apply, whole and consistent."""

import copy
import pickle
import warnings

import pytest
import torch
from nflows.transforms import CompositeTransform
from torch import nn
from torch.optim import swa_utils

from p4flows import (
    AveragedModel,
    BentStack,
    MergeHook,
    P4InvTransform,
    P4OrthogonalTransform,
    invertible,
)
from p4flows.matrices import PerturbedMatrix

EMA = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}
EMA_ONE_BY_ONE = {"avg_fn": swa_utils.get_ema_avg_fn(0.9)}
RULES = {
    "swa": ({}, lambda mean, new, n: mean + (new - mean) / (n + 1)),
    "ema": (EMA, lambda mean, new, n: 0.9 * mean + 0.1 * new),
    "ema, one by one": (EMA_ONE_BY_ONE, lambda mean, new, n: 0.9 * mean + 0.1 * new),
}
LAYERS = {
    "relative": lambda: P4InvTransform(4, rank=2),
    "additive": lambda: P4InvTransform(4, rank=1, perturbation="additive"),
    "stack": lambda: BentStack(4, blocks=2),
    "parametrized": lambda: invertible(nn.Linear(4, 4)),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def matrix_of(module):
    return next(each for each in module.modules() if isinstance(each, PerturbedMatrix))


def trained(layer, steps, every=3):
    """Yields after each step of a training that merges."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    hook = MergeHook(layer, optimizer, every=every)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = layer(torch.randn(16, 4))
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        (outputs - 1.0).square().mean().backward()
        optimizer.step()
        yield hook


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_is_the_average_of_the_dense_matrices(build, rule, use_buffers):
    options, step = RULES[rule]
    layer = build()
    averaged = AveragedModel(layer, use_buffers=use_buffers, **options)
    bias_mean = mean = None
    for number, _ in enumerate(trained(layer, 8)):
        averaged.update_parameters(layer)
        new, bias = matrix_of(layer).dense().detach(), layer.bias.detach().clone()
        mean = new if mean is None else step(mean, new, number)
        bias_mean = bias if bias_mean is None else step(bias_mean, bias, number)
    found = matrix_of(averaged.module)
    torch.testing.assert_close(found.dense(), mean)
    torch.testing.assert_close(averaged.module.bias.detach(), bias_mean)
    torch.testing.assert_close(found.slogdet(), torch.linalg.slogdet(mean), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.inverse(), torch.linalg.inv(mean), rtol=1e-4, atol=1e-5)
    assert (mean - new).abs().max() > 1e-4


def test_orthogonal_matrices_stay_orthogonal():
    layer = P4OrthogonalTransform(4)
    averaged = AveragedModel(layer, **EMA)
    mean = None
    for _ in trained(layer, 6):
        averaged.update_parameters(layer)
        new = layer.weight().detach().double()
        mean = new if mean is None else 0.9 * mean + 0.1 * new
        left, _, right = torch.linalg.svd(mean)
        mean = left @ right
    weight = averaged.module.weight().double()
    torch.testing.assert_close(weight, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(weight @ weight.T, torch.eye(4).double(), atol=1e-6, rtol=0)


def test_density_of_the_average_is_normalised():
    layer = P4InvTransform(1, bias=False)
    averaged = AveragedModel(layer, **EMA)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    hook = MergeHook(layer, optimizer, every=2)
    for _ in range(7):
        optimizer.zero_grad()
        outputs, logabsdet = layer(torch.randn(64, 1) / 5)
        (outputs.square().sum(-1) / 2 - logabsdet).mean().backward()
        optimizer.step()
        averaged.update_parameters(layer)
    assert hook.stats.merged == 3
    x = torch.linspace(-12, 12, 20_001).unsqueeze(1)
    z, logabsdet = averaged.module(x)
    density = torch.exp(logabsdet - z[:, 0].square() / 2) / (2 * torch.pi) ** 0.5
    assert torch.trapezoid(density, x[:, 0]).item() == pytest.approx(1.0, abs=1e-4)


def test_a_layer_without_p4_is_averaged_as_by_torch():
    layer = nn.Linear(3, 3)
    ours, torchs = AveragedModel(layer, **EMA), swa_utils.AveragedModel(layer, **EMA)
    for _ in range(3):
        nn.init.normal_(layer.weight)
        for each in (ours, torchs):
            each.update_parameters(layer)
    assert torch.equal(ours.module.weight, torchs.module.weight)


@pytest.mark.parametrize("read", ["state_dict", "copy", "call"])
def test_whoever_reads_finds_inverses_that_belong(read):
    layer = P4InvTransform(4)
    averaged = AveragedModel(layer, **EMA)
    for _ in trained(layer, 5):
        averaged.update_parameters(layer)
    x = torch.randn(3, 4)
    if read == "state_dict":
        other = AveragedModel(P4InvTransform(4), **EMA)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(averaged.state_dict())
        averaged = other
        assert averaged.n_averaged == 5
    elif read == "copy":
        averaged = copy.deepcopy(averaged)
    outputs, logabsdet = averaged(x)
    weight = averaged.module.weight()
    torch.testing.assert_close(outputs, x @ weight.T + averaged.module.bias)
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(weight).logabsdet.expand(3))


def test_a_singular_average_is_refused_when_it_is_read():
    layer = nn.Sequential(P4InvTransform(2))
    averaged = AveragedModel(layer)
    averaged.update_parameters(layer)
    layer[0].matrix.assign(-torch.eye(2))
    averaged.update_parameters(layer)
    with pytest.raises(ValueError, match="written from outside, and its matrix is singular"):
        averaged.module(torch.ones(1, 2))


def test_another_model_is_refused():
    averaged = AveragedModel(CompositeTransform([P4InvTransform(2)]))
    with pytest.raises(ValueError, match="not the P4 layers"):
        averaged.update_parameters(CompositeTransform([P4InvTransform(3)]))


def lerp_of_data(average, model):
    """As libraries do it that write through `.data`, which no version counts."""
    for own, new in zip(
        (*average.parameters(), *average.buffers()),
        (*model.parameters(), *model.buffers()),
        strict=True,
    ):
        if own.is_floating_point():
            own.data.lerp_(new.data, 0.1)
        else:
            own.data.copy_(new.data)


def only_parameters(average, model):
    for own, new in zip(average.parameters(), model.parameters(), strict=True):
        own.data.lerp_(new.data, 0.1)


def state_dicts(average, model):
    state = average.state_dict()
    for name, new in model.state_dict().items():
        state[name] = 0.9 * state[name] + 0.1 * new if new.is_floating_point() else new
    average.load_state_dict(state)


def by_torch(average, model):
    average.update_parameters(model)


OTHER_AVERAGES = {
    "data": (copy.deepcopy, lerp_of_data),
    "parameters": (copy.deepcopy, only_parameters),
    "state_dict": (copy.deepcopy, state_dicts),
    "torch": (lambda layer: swa_utils.AveragedModel(layer, **EMA), by_torch),
    "torch-buffers": (lambda m: swa_utils.AveragedModel(m, use_buffers=True, **EMA), by_torch),
    "torch-frozen": (
        lambda m: swa_utils.AveragedModel(m, use_buffers=True, **EMA).requires_grad_(False),
        by_torch,
    ),
}


@pytest.mark.parametrize("mode", ["train", "eval", "compiled", "copied", "pickled", "cached"])
@pytest.mark.parametrize("kind", ["relative", "additive", "stack", "orthogonal"])
@pytest.mark.parametrize("way", OTHER_AVERAGES)
def test_whoever_averages_the_parts_gets_a_density_of_what_the_layer_applies(way, kind, mode):
    if mode in ("train", "cached") and way in ("data", "parameters"):
        pytest.skip("what is written through .data while it is trained or cached is not noticed")
    make, update = OTHER_AVERAGES[way]
    layer = P4OrthogonalTransform(4) if kind == "orthogonal" else LAYERS[kind]()
    average = make(layer)
    module = average.module if hasattr(average, "module") else average
    module.train(mode == "train")
    if mode == "cached" and kind != "stack":
        module.use_cache()
    compiled = torch.compile(module, backend="aot_eager") if mode == "compiled" else module
    x = torch.randn(5, 4)
    for number, _ in enumerate(trained(layer, 12)):
        update(average, layer)
        if number % 5:
            continue
        if mode == "copied":
            compiled = copy.deepcopy(module)
        if mode == "pickled":
            compiled = pickle.loads(pickle.dumps(module))
        with torch.set_grad_enabled(mode == "train"):
            outputs, logabsdet = compiled(x)

        def function(row):
            return module(row[None])[0][0]

        jacobian = torch.func.vmap(torch.func.jacrev(function))(x.double().float())
        expected = torch.linalg.slogdet(jacobian.double()).logabsdet
        torch.testing.assert_close(logabsdet.double(), expected, atol=2e-5, rtol=1e-5)
        with torch.set_grad_enabled(mode == "train"):
            back, _ = module.inverse(outputs)
        torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)
