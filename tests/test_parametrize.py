"""Weights of ordinary modules as perturbed matrices."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import p4flows
from p4flows import InvertibleMatrix, MergeHook, OrthogonalMatrix

both = pytest.mark.parametrize(
    ("parametrize_weight", "kind"),
    [(p4flows.orthogonal, OrthogonalMatrix), (p4flows.invertible, InvertibleMatrix)],
    ids=["orthogonal", "invertible"],
)


class Batched(nn.Module):
    """A weight for each of three heads."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        return x @ self.heads.mT


CASES = {
    "linear": (lambda: nn.Linear(5, 5), "weight", (7, 5)),
    "recurrent": (lambda: nn.RNN(3, 6, batch_first=True), "weight_hh_l0", (2, 4, 3)),
    "batch": (Batched, "heads", (3, 7, 4)),
}
each_case = pytest.mark.parametrize("case", CASES)


def outputs(module, x):
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


def trained(case, parametrize_weight, **options):
    """A module after training with several merges and steps beyond the last."""
    torch.manual_seed(0)
    make, name, shape = CASES[case]
    module = make()
    assert parametrize_weight(module, name, **options) is module
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    hook = MergeHook(module, optimizer, every=5)
    x = torch.randn(shape)
    # Of the same lengths as x where the shapes agree, so that a rotation can reach it.
    goal = x.flip(-1) if case != "recurrent" else torch.tensor(0.3)
    losses = []
    for _ in range(33):
        optimizer.zero_grad()
        loss = (outputs(module, x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert hook.stats.merged == 6 * module.parametrizations[name][0].draws.numel()
    assert losses[-1] < 0.9 * losses[0]
    return module, name, x


def deviation(matrix):
    wide = matrix.detach().double()
    return (wide @ wide.mT - torch.eye(wide.shape[-1])).abs().max().item()


@both
@each_case
def test_trains_and_keeps_the_property(case, parametrize_weight, kind):
    module, name, _ = trained(case, parametrize_weight, rank=2)
    weight, matrix = getattr(module, name), module.parametrizations[name][0]
    assert type(matrix) is kind and matrix.rank == 2
    assert (weight - torch.eye(weight.shape[-1])).abs().max() > 0.1
    if kind is OrthogonalMatrix:
        assert deviation(weight) < 1e-5
    torch.testing.assert_close(matrix.inverse(), torch.linalg.inv(weight), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(matrix.slogdet(), torch.linalg.slogdet(weight), rtol=1e-4, atol=1e-4)


@both
def test_no_parameter_of_size_n_squared(parametrize_weight, kind):
    layer = parametrize_weight(nn.Linear(50, 50, bias=False), rank=3)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 2 * 50 * 3


@each_case
def test_the_start_is_the_weight_or_the_orthogonal_matrix_nearest_to_it(case):
    make, name, _ = CASES[case]
    module = make()
    weight = getattr(module, name).detach().clone()
    kept = getattr(p4flows.invertible(copy.deepcopy(module), name), name)
    assert torch.equal(kept, weight)
    left, _, right = torch.linalg.svd(weight.double())
    nearest = getattr(p4flows.orthogonal(module, name), name)
    torch.testing.assert_close(nearest, (left @ right).float())


@both
@each_case
def test_assignment_takes_a_matrix_over(case, parametrize_weight, kind):
    module, name, x = trained(case, parametrize_weight)
    before = outputs(module, x)
    weight = getattr(module, name).detach()
    new = torch.linalg.qr(torch.randn_like(weight)).Q
    setattr(module, name, new)
    torch.testing.assert_close(getattr(module, name), new)
    assert not torch.allclose(outputs(module, x), before, atol=1e-2)
    with pytest.raises(ValueError, match="init must be"):
        setattr(module, name, torch.zeros_like(weight))
    torch.testing.assert_close(getattr(module, name), new)


@both
@each_case
def test_removal_leaves_a_plain_weight(case, parametrize_weight, kind):
    module, name, x = trained(case, parametrize_weight)
    before, weight = outputs(module, x), getattr(module, name).detach().clone()
    parametrize.remove_parametrizations(module, name)
    assert type(module) is type(CASES[case][0]())
    assert isinstance(getattr(module, name), nn.Parameter)
    assert torch.equal(getattr(module, name), weight)
    assert set(dict(module.named_parameters())) == set(dict(CASES[case][0]().named_parameters()))
    torch.testing.assert_close(outputs(module, x), before)


@both
@each_case
def test_state_dict_restores(case, parametrize_weight, kind):
    module, name, x = trained(case, parametrize_weight)
    fresh = parametrize_weight(CASES[case][0](), name)
    assert not torch.allclose(outputs(fresh, x), outputs(module, x), atol=1e-2)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(outputs(fresh, x), outputs(module, x))


@both
def test_deepcopy_and_double(parametrize_weight, kind):
    module, _, x = trained("linear", parametrize_weight)
    twin = copy.deepcopy(module).double()
    torch.testing.assert_close(twin(x.double()).float(), module(x))
    twin.weight = torch.eye(5)
    assert not torch.allclose(module.weight, torch.eye(5), atol=1e-2)


@both
def test_cached_reading_is_differentiable(parametrize_weight, kind):
    module, _, x = trained("linear", parametrize_weight)
    with parametrize.cached():
        assert module.weight is module.weight
        module.zero_grad()
        module(x).square().sum().backward()
    matrix = module.parametrizations.weight[0]
    assert all(f.grad.any() for f in (matrix.u, matrix.v) if f.requires_grad)


@both
def test_refuses(parametrize_weight, kind):
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got Tensor"):
        parametrize_weight(torch.eye(2))
    with pytest.raises(ValueError, match=r"weight must have shape \(\*, n, n\), got \(3, 2\)"):
        parametrize_weight(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"bias must have shape \(\*, n, n\), got \(2,\)"):
        parametrize_weight(nn.Linear(2, 2), "bias")
    with pytest.raises(ValueError, match="name must be that of a weight of Linear, got 'kernel'"):
        parametrize_weight(nn.Linear(2, 2), "kernel")
    layer = parametrize_weight(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight must be a plain weight"):
        parametrize_weight(layer)
    with pytest.raises(ValueError, match="rank must be between 1 and 2"):
        parametrize_weight(nn.Linear(2, 2), rank=3)


def test_invertible_refuses_a_singular_weight():
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.weight)
    with pytest.raises(ValueError, match="init must be invertible"):
        p4flows.invertible(layer)
    assert not parametrize.is_parametrized(layer)


def test_bounds_are_those_of_the_matrix():
    bounds = p4flows.MergeBounds(update=(-1.0, 1.0))
    layer = p4flows.invertible(nn.Linear(3, 3), bounds=bounds)
    assert layer.parametrizations.weight[0].bounds == bounds
