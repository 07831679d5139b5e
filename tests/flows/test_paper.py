"""The flows of the paper: their sizes, what they compute, and how they compile."""

import copy
import math

import pytest
import torch
from torch.nn import Linear, SiLU
from torch_versions import can_fail_on_recompile, compiles_stacks
from transforms.registry import move, perturb

from p4flows import (
    InvertibleMatrix,
    MergeHook,
    P4InvTransform,
    bent_stacked_flow,
    realnvp_flow,
)

FLOWS = {
    "bent_stacked": lambda: bent_stacked_flow(3, 2, rank=2),
    "bent_stacked-paper": lambda: bent_stacked_flow(3, 2, paper=True),
    "bent_stacked-unfused": lambda: bent_stacked_flow(3, 2, rank=2, fused=False),
    "realnvp-p4": lambda: realnvp_flow(3, 2, hidden=(4,)),
    "realnvp-paper": lambda: realnvp_flow(3, 2, hidden=(4,), paper=True),
    "realnvp-permutation": lambda: realnvp_flow(3, 2, hidden=(4,), swap="permutation"),
}


def numel(modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def p4_layers(flow):
    return [module for module in flow.modules() if isinstance(module, P4InvTransform)]


def matrices(flow):
    return [each for each in flow.modules() if isinstance(each, InvertibleMatrix)]


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_of_the_bent_stacked_flow(fused):
    assert numel([bent_stacked_flow(2, 100, paper=True, fused=fused)]) == 1_200
    additive = bent_stacked_flow(3, 4, rank=2, perturbation="additive", fused=fused)
    assert numel([additive]) == 4 * 2 * (2 * 2 + 1) * 3


def test_parameters_of_the_two_dimensional_realnvp():
    assert numel([realnvp_flow(2, 5, hidden=(6, 6), swap="permutation")]) == 1_230


def test_parameters_of_the_boltzmann_generator():
    flow = realnvp_flow(60, 25, paper=True)
    layers = p4_layers(flow)
    assert len(layers) == 50
    # u, v and a bias of 60 numbers each.
    assert numel(layers) == 50 * 3 * 60 == 9_000
    assert numel([flow]) - numel(layers) == 735_050
    assert numel([realnvp_flow(60, 25, swap="permutation")]) == 735_050


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_log_prob_and_sample(name, dtype):
    torch.manual_seed(0)
    flow = FLOWS[name]().to(dtype)
    move(flow)
    samples = flow.sample(7)
    log_prob = flow.log_prob(samples)
    assert samples.shape == (7, 3) and log_prob.shape == (7,)
    assert samples.dtype == log_prob.dtype == dtype
    noise, logabsdet = flow._transform(samples)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    torch.testing.assert_close(log_prob, base + logabsdet)
    assert log_prob.isfinite().all()
    _, alike = flow.sample_and_log_prob(7)
    assert alike.dtype == dtype and alike.isfinite().all()


@pytest.mark.parametrize("name", FLOWS)
def test_density_is_normalised(name):
    torch.manual_seed(0)
    flow = FLOWS[name]().double()
    # Less than `move` does, so that a simple q covers the density.
    for _ in range(2):
        for matrix in matrices(flow):
            matrix.merge(force=True)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    # The mean of p(x)/q(x) over samples x of a wide q is 1 if log_prob is a density.
    wide = torch.distributions.StudentT(torch.full((3,), 3.0).double())
    samples = flow.sample(20_000).detach()
    spread = torch.linalg.cholesky(samples.T.cov())
    t = wide.sample((200_000,))
    with torch.no_grad():
        log_q = wide.log_prob(t).sum(-1) - spread.diagonal().log().sum()
        ratios = (flow.log_prob(samples.mean(0) + t @ spread.T) - log_q).exp()
    error = ratios.std().item() / math.sqrt(len(ratios))
    assert error < 0.05
    assert ratios.mean().item() == pytest.approx(1.0, abs=4 * error)


def test_fused_and_unfused_are_the_same_flow():
    torch.manual_seed(0)
    fused = bent_stacked_flow(2, 3).double()
    move(fused)
    unfused = copy.deepcopy(fused)
    unfused._transform = fused._transform.to_composite()
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(fused.log_prob(x), unfused.log_prob(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda **options: bent_stacked_flow(9, 1, **options),
        lambda **options: bent_stacked_flow(9, 1, fused=False, **options),
        lambda **options: realnvp_flow(9, 1, hidden=(4,), **options),
    ],
    ids=["stack", "unfused", "realnvp"],
)
def test_defaults_are_those_of_the_layers_and_the_paper_is_one_argument(build):
    layer = P4InvTransform(9).matrix
    paper = {"rank": 1, "perturbation": "additive"}
    for options, rank, perturbation in (
        ({}, layer.rank, layer.perturbation),
        ({"rank": 2}, 2, layer.perturbation),
        ({"perturbation": "additive"}, layer.rank, "additive"),
        ({"paper": True}, 1, "additive"),
        ({"paper": True, **paper}, 1, "additive"),
    ):
        found = {(matrix.rank, matrix.perturbation) for matrix in matrices(build(**options))}
        assert found == {(rank, perturbation)}, options
    for conflict in ({"rank": 2}, {"perturbation": "relative"}):
        with pytest.raises(ValueError, match=f"{next(iter(conflict))} must be .* with paper=True"):
            build(paper=True, **conflict)
    with pytest.raises(ValueError, match="perturbation"):
        build(perturbation="none")


@pytest.mark.parametrize("features", [2, 5, 6])
def test_permutation_exchanges_the_channels(features):
    x = torch.randn(3, features)
    flow = realnvp_flow(features, 1, swap="permutation")
    coupling, swap = list(flow._transform._transforms)[:2]
    first, second = x[:, : coupling.conditioning], x[:, coupling.conditioning :]
    assert torch.equal(swap(x)[0], torch.cat([second, first], -1))


# At its start, the reverse permutation of an odd number of features keeps the middle one in place.
@pytest.mark.parametrize(
    ("features", "swap"), [(2, "p4"), (6, "p4"), (2, "permutation"), (5, "permutation")]
)
def test_every_feature_is_transformed(features, swap):
    torch.manual_seed(0)
    # With an odd number of features one block leaves a feature to the next.
    flow = realnvp_flow(features, 2, swap=swap)
    x = torch.randn(1, features)
    jacobian = torch.autograd.functional.jacobian(lambda row: flow._transform(row)[0], x)
    # Each output depends on more than the one input that it would be a copy of.
    assert ((jacobian.reshape(features, features) != 0).sum(-1) > 1).all()


def test_p4_swaps_start_as_the_reverse_permutation():
    flow = realnvp_flow(4, 2, rank=3)
    assert len(p4_layers(flow)) == 4
    for layer in p4_layers(flow):
        assert torch.equal(layer.weight(), torch.eye(4).flip(0))
        assert layer.matrix.rank == 3 and not layer.bias.any()


def test_options_reach_the_nets():
    flow = realnvp_flow(4, 1, hidden=(5, 6, 7), shift_activation=SiLU, scale_activation=SiLU)
    widths = [m.out_features for m in flow.modules() if isinstance(m, Linear)]
    assert widths == 4 * [5, 6, 7, 2]
    assert sum(isinstance(m, SiLU) for m in flow.modules()) == 4 * 3


@pytest.mark.parametrize(
    ("build", "arguments", "error", "message"),
    [
        (bent_stacked_flow, (0, 1), ValueError, "features must be a positive int, got 0"),
        (bent_stacked_flow, (2, 0), ValueError, "blocks must be a positive int, got 0"),
        (bent_stacked_flow, (2, 1.0), TypeError, "blocks must be a positive int, got float"),
        (realnvp_flow, (1, 1), ValueError, "features must be at least 2 to be split, got 1"),
        (realnvp_flow, (4, 0), ValueError, "blocks must be a positive int, got 0"),
        (realnvp_flow, ("4", 1), TypeError, "features must be a positive int, got str"),
    ],
)
def test_bad_sizes_are_refused(build, arguments, error, message):
    with pytest.raises(error, match=message):
        build(*arguments)


def test_bad_options_are_refused():
    for fused in (True, False):
        with pytest.raises(ValueError, match="rank must be between 1 and 2"):
            bent_stacked_flow(2, 1, rank=3, fused=fused)
    with pytest.raises(ValueError, match="swap must be 'p4' or 'permutation', got 'reverse'"):
        realnvp_flow(4, 1, swap="reverse")


@pytest.mark.parametrize("name", FLOWS)
def test_log_prob_compiles_into_one_graph(name):
    if name in ("bent_stacked", "bent_stacked-paper"):
        compiles_stacks()
    flow = FLOWS[name]()
    move(flow)
    torch.compiler.reset()
    explanation = torch._dynamo.explain(flow.log_prob)(torch.randn(4, 3))
    assert explanation.graph_break_count == 0, explanation.break_reasons
    assert explanation.graph_count == 1


@pytest.mark.parametrize("name", [name for name in FLOWS if name != "realnvp-permutation"])
def test_compiled_once_for_all_merges(name):
    can_fail_on_recompile()
    if name in ("bent_stacked", "bent_stacked-paper"):
        compiles_stacks()
    torch.manual_seed(0)
    flow = FLOWS[name]()
    move(flow)
    torch.compiler.reset()
    # Not by inductor, which needs a C++ compiler: dynamo is what would compile again.
    log_prob = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.Adam(flow.parameters())
    hook = MergeHook(flow, optimizer, every=1, correct_every=2)
    x = torch.randn(4, 3)
    log_prob(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(4):
            perturb(flow)
            torch.testing.assert_close(log_prob(x), flow.log_prob(x), rtol=1e-3, atol=1e-3)
            optimizer.zero_grad()
            (-log_prob(x).mean()).backward()
            optimizer.step()
        with pytest.raises(RuntimeError, match="recompile"):
            log_prob(x.double())
    assert hook.stats.merged > 4 and hook.stats.corrected >= 2 * 4
