import doctest
import sys

import pytest
import torch
from needs_bgflow import bgflow, needs_bgflow
from transforms.contract import CHECKS, build, check_shapes
from transforms.registry import move

from p4flows import MergeBounds, MergeHook

if bgflow is not None:
    from p4flows.bgflow import (
        BentIdentityFlow,
        BentStackFlow,
        FlowTransform,
        P4InvFlow,
        realnvp_flow,
    )

pytestmark = [
    needs_bgflow,
    # bgflow's SplitFlow indexes by a list.
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]

DIM = 3
# bgflow's own layer is the paper's.
PAPER = {"rank": 1, "perturbation": "additive"}
LAYERS = {
    "P4InvFlow": lambda: P4InvFlow(DIM),
    "BentIdentityFlow": lambda: BentIdentityFlow(),
    "BentStackFlow": lambda: BentStackFlow(DIM, blocks=1),
}
FLOWS = LAYERS | {
    "P4InvFlow-options": lambda: P4InvFlow(DIM, init="reverse", rank=2, bias=False),
    "realnvp_flow-p4": lambda: realnvp_flow(DIM, 2, hidden=(5,)),
    "realnvp_flow-permutation": lambda: realnvp_flow(DIM, 2, hidden=(5,), swap="permutation"),
}
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def rows(*shape):
    return torch.randn(*shape, DIM, dtype=torch.float64)


def moved(flow):
    flow = flow.double()
    move(flow)
    return flow


# bgflow's convention


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    "check", [c for c in CHECKS if c is not check_shapes], ids=lambda check: check.__name__
)
def test_contract_of_transforms(name, direction, check):
    """All of the contract but the refusal of other shapes: a Flow takes any batch shape."""
    check(build(lambda: FlowTransform(LAYERS[name]()), direction))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 5), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_batch_shapes(name, shape):
    torch.manual_seed(0)
    flow = moved(FLOWS[name]())
    x = rows(*shape)
    y, dlogp = flow(x)
    assert y.shape == x.shape and dlogp.shape == (*shape, 1)
    back, dlogp_back = flow(y, inverse=True)
    torch.testing.assert_close((back, dlogp_back), (x, -dlogp), **CLOSE)
    flat = flow(x.reshape(-1, DIM))
    torch.testing.assert_close((y.reshape(-1, DIM), dlogp.reshape(-1, 1)), flat, **CLOSE)


@pytest.mark.parametrize("name", FLOWS)
def test_inverse_flow(name):
    torch.manual_seed(0)
    flow = moved(FLOWS[name]())
    x = rows(5)
    y, dlogp = flow(x)
    inverse = bgflow.InverseFlow(flow)
    torch.testing.assert_close(inverse(y), (x, -dlogp), **CLOSE)
    torch.testing.assert_close(inverse(x, inverse=True), (y, dlogp), **CLOSE)


@pytest.mark.parametrize("name", FLOWS)
def test_keywords_of_others_are_ignored(name):
    """A BoltzmannGenerator hands its temperature to every layer."""
    torch.manual_seed(0)
    flow, x = moved(FLOWS[name]()), rows(5)
    for inverse in (False, True):
        found = flow(x, inverse=inverse, temperature=2.0)
        torch.testing.assert_close(found, flow(x, inverse=inverse), **CLOSE)


def test_in_a_sequence_with_their_layers():
    torch.manual_seed(0)
    flow = bgflow.SequentialFlow(
        [P4InvFlow(DIM), bgflow.AffineFlow(DIM), BentIdentityFlow(), bgflow.BentIdentity()]
    )
    moved(flow)
    x = rows(2, 5)
    y, dlogp = flow(x)
    torch.testing.assert_close(flow(y, inverse=True), (x, -dlogp), **CLOSE)
    jacobian = torch.autograd.functional.jacobian(lambda row: flow(row)[0], x[0, 0])
    torch.testing.assert_close(dlogp[0, 0, 0], torch.linalg.slogdet(jacobian).logabsdet, **CLOSE)


# In place of bgflow's own layers


def their_layer(ours, **options):
    """An InvertiblePPPP with the numbers of a P4InvFlow."""
    matrix, bias = ours.transform.matrix, ours.transform.bias
    theirs = bgflow.InvertiblePPPP(matrix.size, shift=bias is not None, **options).double()
    with torch.no_grad():
        theirs.A.copy_(matrix.frozen)
        theirs.Ainv.copy_(matrix.inverse_frozen)
        theirs.detA.copy_(torch.linalg.det(matrix.frozen))
        theirs.u.copy_(matrix.u.squeeze(-1))
        theirs.v.copy_(matrix.v.squeeze(-1))
        if bias is not None:
            theirs.b.copy_(bias)
    return theirs


@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_their_linear_layer(bias):
    torch.manual_seed(0)
    ours = moved(P4InvFlow(DIM, bias=bias, **PAPER))
    theirs = their_layer(ours)
    x = rows(2, 5)
    for inverse in (False, True):
        torch.testing.assert_close(ours(x, inverse=inverse), theirs(x, inverse=inverse), **CLOSE)
    assert ours.transform.matrix.merge(force=True) and theirs.pppp_merge()
    torch.testing.assert_close(ours.transform.matrix.frozen, theirs.A, **CLOSE)
    torch.testing.assert_close(ours.transform.matrix.inverse_frozen, theirs.Ainv, **CLOSE)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 6, 7, 20])
@pytest.mark.parametrize(("init", "their_init"), [("identity", "eye"), ("reverse", "reverse")])
def test_same_initialization_as_their_linear_layer(init, their_init, dim):
    matrix = P4InvFlow(dim, init=init).transform.matrix
    theirs = bgflow.InvertiblePPPP(dim, init=their_init)
    assert torch.equal(matrix.frozen, theirs.A)
    assert torch.equal(matrix.inverse_frozen, theirs.Ainv)
    assert matrix.sign == theirs.detA and matrix.logabsdet_frozen == 0.0


@pytest.mark.parametrize("determinant", [1.0, 1e-1, 1e7])
@pytest.mark.parametrize("update", [-8.0, -5.9, -2.1, 1.0, 7.0, 16.0])
def test_bounds_of_the_paper_are_their_defaults(update, determinant):
    """MergeBounds.paper() is what the migration table gives for min_logdet and max_logdet."""
    torch.manual_seed(0)
    matrix = torch.linalg.qr(rows(DIM)).Q * determinant ** (1 / DIM)
    ours = P4InvFlow(DIM, init=matrix, bounds=MergeBounds.paper(), **PAPER)
    with torch.no_grad():
        # vᵀA⁻¹u = exp(update) − 1
        v = ours.transform.matrix.v
        ours.transform.matrix.u.copy_(
            matrix @ v * (torch.tensor(update).double().exp() - 1) / v.square().sum()
        )
    theirs = their_layer(ours, penalty_parameter=0.1)
    theirs(rows(1))
    penalty = 0.1 * ours.transform.matrix.penalty()
    torch.testing.assert_close(penalty, theirs.penalty(), rtol=1e-6, atol=1e-9)
    assert ours.transform.matrix.merge().item() == theirs.pppp_merge(force_merge=False)


def test_equal_to_their_bent_identity():
    torch.manual_seed(0)
    x = 3 * rows(2, 5)
    for inverse in (False, True):
        expected = bgflow.BentIdentity()(x, inverse=inverse)
        torch.testing.assert_close(BentIdentityFlow()(x, inverse=inverse), expected, **CLOSE)


@pytest.mark.parametrize("layers", [1, 2])
def test_learns_a_linear_map(layers):
    """From the identity through nearly singular matrices to another determinant sign."""
    torch.manual_seed(0)
    flow = bgflow.SequentialFlow([P4InvFlow(DIM, **PAPER) for _ in range(layers)])
    target = torch.tensor([[0.1, 1.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 0.5]])
    assert torch.linalg.det(target) < 0
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-2)
    hook = MergeHook.paper(flow, optimizer, every=10, force_every=5, correct_every=5)
    for _ in range(1000):
        x = torch.randn(16, DIM)
        loss = (flow(x)[0] - x @ target.mT).square().mean()
        optimizer.zero_grad()
        (loss + hook.penalty(0.1)).backward()
        optimizer.step()
    assert loss < 2e-2
    assert hook.stats.merged + hook.stats.skipped == 100 * layers
    assert hook.stats.merged > 50 * layers


# The module


def test_doctests():
    result = doctest.testmod(sys.modules["p4flows.bgflow"])
    assert result.attempted > 10 and result.failed == 0
