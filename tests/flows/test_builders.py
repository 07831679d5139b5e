"""The flows of the paper: their sizes, what they compute, and how they compile."""

import copy
import math

import pytest
import torch
from torch.nn import Linear, SiLU
from torch_versions import can_fail_on_recompile, compiles_stacks
from transforms.registry import move, perturb

from p4flows import (
    BentStack,
    InvertibleMatrix,
    MergeHook,
    P4InvTransform,
    bent_stacked_flow,
    realnvp_flow,
)

FLOWS = {
    "bent_stacked": lambda: bent_stacked_flow(3, 2, rank=2),
    "bent_stacked-unfused": lambda: bent_stacked_flow(3, 2, rank=2, fused=False),
    "realnvp-p4": lambda: realnvp_flow(3, 2, hidden=(4,)),
    "realnvp-permutation": lambda: realnvp_flow(3, 2, hidden=(4,), swap="permutation"),
}


def numel(modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def p4_layers(flow):
    return [module for module in flow.modules() if isinstance(module, P4InvTransform)]


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_of_the_bent_stacked_flow(fused):
    assert numel([bent_stacked_flow(2, 100, fused=fused)]) == 1_200
    assert numel([bent_stacked_flow(3, 4, rank=2, fused=fused)]) == 4 * 2 * (2 * 2 + 1) * 3


def test_parameters_of_the_two_dimensional_realnvp():
    assert numel([realnvp_flow(2, 5, hidden=(6, 6), swap="permutation")]) == 1_230


def test_parameters_of_the_boltzmann_generator():
    flow = realnvp_flow(60, 25)
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
    move(flow, merges=1)
    # The mean of p(x)/q(x) over samples x of a wide q is 1 if log_prob is a density.
    wide = torch.distributions.Normal(torch.zeros(3).double(), 1.0)
    samples = flow.sample(2_000)
    center, spread = samples.mean(0), 1.5 * samples.std(0)
    x = center + spread * wide.sample((200_000,))
    with torch.no_grad():
        log_q = torch.distributions.Normal(center, spread).log_prob(x).sum(-1)
        ratios = (flow.log_prob(x) - log_q).exp()
    error = ratios.std().item() / math.sqrt(len(ratios))
    assert error < 0.05
    assert ratios.mean().item() == pytest.approx(1.0, abs=4 * error)


def test_fused_and_unfused_are_the_same_flow():
    torch.manual_seed(0)
    unfused = bent_stacked_flow(2, 3, fused=False).double()
    move(unfused)
    fused = bent_stacked_flow(2, 3).double()
    fused._transform = BentStack.from_composite(unfused._transform)
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(fused.log_prob(x), unfused.log_prob(x))


@pytest.mark.parametrize("kind", ["relative", "additive"])
@pytest.mark.parametrize("fused", [True, False])
def test_fused_and_unfused_load_each_others_state(fused, kind):
    torch.manual_seed(0)
    saved, loaded = (
        bent_stacked_flow(3, 3, rank=2, fused=each, perturbation=kind).double()
        for each in (fused, not fused)
    )
    move(saved)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = saved.log_prob(x)
    state = saved.state_dict()
    names = set(state)
    loaded.load_state_dict(state)
    assert set(state) == names
    torch.testing.assert_close(loaded.log_prob(x), expected)
    # What is not read by log_prob as well: they merge to the same and draw the same.
    for flow in (saved, loaded):
        for module in flow.modules():
            if isinstance(module, InvertibleMatrix):
                module.merge(force=True)
    again = copy.deepcopy(saved)
    again.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(again.state_dict(), saved.state_dict())

    other = "additive" if kind == "relative" else "relative"
    wrong = bent_stacked_flow(3, 3, rank=2, fused=not fused, perturbation=other).double()
    with pytest.raises(RuntimeError, match=f"was saved with perturbation='{kind}' and has"):
        wrong.load_state_dict(saved.state_dict())


def test_states_of_fused_and_unfused_stacks_from_before_they_had_a_version_load():
    torch.manual_seed(0)
    saved, loaded = bent_stacked_flow(2, 2), bent_stacked_flow(2, 2, fused=False)
    move(saved)
    x = torch.randn(5, 2)
    state = saved.state_dict()
    state._metadata["_transform"]["version"] = 1
    for flow in (loaded, bent_stacked_flow(2, 2)):
        flow.load_state_dict(state)
        torch.testing.assert_close(flow.log_prob(x), saved.log_prob(x))


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
    if name == "bent_stacked":
        compiles_stacks()
    flow = FLOWS[name]()
    move(flow)
    torch.compiler.reset()
    explanation = torch._dynamo.explain(flow.log_prob)(torch.randn(4, 3))
    assert explanation.graph_break_count == 0, explanation.break_reasons
    assert explanation.graph_count == 1


@pytest.mark.parametrize("name", ["bent_stacked", "bent_stacked-unfused", "realnvp-p4"])
def test_compiled_once_for_all_merges(name):
    can_fail_on_recompile()
    if name == "bent_stacked":
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
    assert hook.stats.merged > 4 and hook.stats.corrected == 2 * 4
