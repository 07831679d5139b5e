"""MergeHook: when it merges, forces and corrects, what it counts, and what it refuses."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import p4flows.merging.hook
from p4flows import (
    InvertibleMatrix,
    MergeBounds,
    MergeHook,
    P4InvTransform,
    P4OrthogonalTransform,
)
from p4flows.merging.schedule import MergeStats

NEVER = MergeBounds(update=(20.0, 21.0))  # refuses whatever training does


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def train(module, optimizer, steps, seed=0):
    """Steps with random gradients for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in filter(lambda p: p.requires_grad, module.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def hooked(module, lr=0.1, **arguments):
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    return optimizer, MergeHook(module, optimizer, **arguments)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_merges_every_n_steps():
    layer = P4InvTransform(3)
    optimizer, hook = hooked(layer, every=4)
    for step in range(1, 13):
        weight = layer.weight().detach()
        train(layer, optimizer, 1, seed=step)
        assert hook.stats.merged == step // 4
        # Counted from the start: the first v and one more after each merge.
        assert layer.matrix.draws == 1 + step // 4
        assert torch.equal(layer.matrix.frozen, layer.weight()) == (step % 4 == 0)
        assert not torch.equal(layer.weight(), weight)
    assert dict(hook.stats) == {
        **dict.fromkeys(("skipped", "forced", "reset", "corrected", "rescued"), 0),
        "merged": 3,
    }


def test_force_every_counts_merges():
    layer = P4InvTransform(3, bounds=NEVER)
    optimizer, hook = hooked(layer, every=3, force_every=3, correct_every=None)
    forced = []
    for step in range(1, 20):
        train(layer, optimizer, 1, seed=step)
        forced.append(hook.stats.forced)
    assert forced == [step // 9 for step in range(1, 20)]
    assert (hook.stats.merged, hook.stats.skipped) == (2, 4)
    assert layer.matrix.draws == 3


def test_a_merge_inside_its_bounds_is_not_counted_as_forced():
    layer = P4InvTransform(3)
    optimizer, hook = hooked(layer, every=1, force_every=1)
    train(layer, optimizer, 5)
    assert (hook.stats.merged, hook.stats.forced) == (5, 0)


def test_correct_every_counts_merges():
    layer = P4InvTransform(3)
    optimizer, hook = hooked(layer, every=2, correct_every=3, lr=0.01)
    corrected, off = [], []
    for step in range(1, 13):
        layer.matrix.logabsdet_frozen.add_(0.1)  # which no probe of the inverse can see
        train(layer, optimizer, 1, seed=step)
        corrected.append(hook.stats.corrected)
        off.append(layer.matrix.error().logabsdet > 0.05)
    assert corrected == [step // 6 for step in range(1, 13)]
    assert off == [step % 6 != 0 for step in range(1, 13)]
    assert hook.stats.rescued == 0


def test_an_inverse_that_is_off_is_corrected_at_the_next_merge():
    layer = P4InvTransform(3)
    optimizer, hook = hooked(layer, every=2, correct_every=None, lr=0.01)
    rescued = []
    for factor in (1.0, 1.01, 1.0, 3.0, 1.0, torch.nan):
        layer.matrix.inverse_frozen.mul_(factor)
        train(layer, optimizer, 2)
        assert layer.matrix.error().ratio <= 30
        rescued.append((hook.stats.corrected, hook.stats.rescued))
    assert rescued == [(0, 0), (1, 0), (1, 0), (2, 1), (2, 1), (3, 2)]


def test_the_user_is_told_once_what_the_dtype_cannot_carry():
    ill = torch.diag(torch.tensor([1.0, 1.0, 3e-7]))
    layers = torch.nn.Sequential(P4InvTransform(3), P4InvTransform(3, init=ill))
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
    hook = MergeHook(layers, optimizer)
    with pytest.warns(UserWarning, match=r"^1\.matrix: condition numbers up to 3e\+06, of which"):
        hook.merge()
    # Warnings are errors here: it is not said again, nor of a wider dtype.
    hook.merge()
    hook.remove()
    layers.double()
    MergeHook(layers, torch.optim.SGD(layers.parameters(), lr=1e-3)).merge()


def test_none_is_never():
    layer = P4InvTransform(3, bounds=NEVER)
    optimizer, hook = hooked(layer, every=1, force_every=None, correct_every=None)
    train(layer, optimizer, 110)
    assert (hook.stats.merged, hook.stats.skipped, hook.stats.corrected) == (0, 110, 0)
    assert torch.equal(layer.matrix.frozen, torch.eye(3))


def test_defaults():
    layer = P4InvTransform(3)
    _, hook = hooked(layer)
    assert repr(hook) == ("MergeHook(1 matrices, every=50, force_every=10, correct_every=50)")


def test_a_perturbation_that_is_not_finite_is_reset():
    layer = P4InvTransform(3)
    optimizer, hook = hooked(layer, every=2)
    train(layer, optimizer, 1)
    with torch.no_grad():
        layer.matrix.u[0] = torch.nan
    with pytest.warns(UserWarning, match="matrix was not finite .* and was reset. One reset is"):
        train(layer, optimizer, 1)
    with torch.no_grad():
        layer.matrix.u[0] = torch.nan
    train(layer, optimizer, 2)  # once is enough
    assert hook.stats.reset == 2
    assert (hook.stats.merged, hook.stats.skipped) == (0, 0)
    assert torch.equal(layer.weight(), torch.eye(3))


def mixed():
    """Layers of three shapes, two dtypes and a batch; two of them large."""
    large = p4flows.merging.hook._STACK_UP_TO + 2
    return nn.ModuleList(
        [
            *(P4InvTransform(3, init="reverse") for _ in range(3)),
            *(P4InvTransform(3, bounds=NEVER) for _ in range(2)),
            *(P4InvTransform(3, rank=2) for _ in range(2)),
            *(InvertibleMatrix(3, batch_shape=(2,)) for _ in range(2)),
            P4InvTransform(3).double(),
            *(P4InvTransform(large) for _ in range(2)),
        ]
    )


STACKED = [(3,), (2,), (2,), (2, 2), (), (), ()]
ALONE = [*7 * [()], *2 * [(2,)], *3 * [()]]


def test_matrices_of_one_shape_merge_together_as_they_would_alone(monkeypatch):
    attempted = []
    merged = InvertibleMatrix._merged

    def counted(matrix, state, *arguments):
        attempted.append(tuple(state["draws"].shape))
        return merged(matrix, state, *arguments)

    monkeypatch.setattr(InvertibleMatrix, "_merged", counted)
    together = mixed()
    alone = copy.deepcopy(together)
    stats = []
    for module, batches in ((together, STACKED), (alone, ALONE)):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        hook = MergeHook(module, optimizer, every=2, force_every=3, correct_every=2)
        train(module, optimizer, 4)
        with torch.no_grad():
            module[1].matrix.u.fill_(torch.nan)
        with pytest.warns(UserWarning, match="was reset"):
            train(module, optimizer, 8)
        assert attempted == 6 * batches
        attempted.clear()
        stats.append(hook.stats)
        monkeypatch.setattr(p4flows.merging.hook, "_STACK_UP_TO", 0)
    assert stats[0] == stats[1]
    assert (stats[0].reset, stats[0].forced, stats[0].skipped) == (1, 4, 8)
    assert stats[0].merged == 6 * 14 - 1 - 8
    assert stats[0].corrected == 3 * 14
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value)


def test_state_of_each_stacked_matrix_restarts_for_itself():
    paper = {"rank": 1, "perturbation": "additive"}
    module = nn.ModuleList([P4InvTransform(3, **paper), P4InvTransform(3, **paper)])
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    MergeHook.paper(module, optimizer, every=3)
    train(module, optimizer, 2)
    with torch.no_grad():
        module[1].matrix.u.fill_(1e30)  # cannot be merged
    train(module, optimizer, 1)
    states = [optimizer.state[layer.matrix.v] for layer in module]
    assert [state["step"].item() for state in states] == [0, 3]
    assert [bool(state["exp_avg"].any()) for state in states] == [False, True]


def test_any_loop_that_steps_the_optimizer_merges():
    """A closure, a scheduler, gradients that are accumulated: what counts is `step`."""
    layer = P4InvTransform(2)
    optimizer, hook = hooked(layer, every=2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(4):
        for _ in range(3):
            layer(torch.ones(1, 2))[0].sum().backward()
        optimizer.step(lambda: 0.0)
        scheduler.step()
    assert hook.stats.merged == 2


def test_penalty_is_that_of_all_matrices():
    bounds = MergeBounds(penalty_update=(0.5, 0.6))
    module = nn.ModuleList(
        [P4InvTransform(3, bounds=bounds), InvertibleMatrix(2, batch_shape=(2,), bounds=bounds)]
    )
    optimizer, hook = hooked(module)
    train(module, optimizer, 2)
    expected = 0.1 * (module[0].matrix.penalty() + module[1].penalty().sum())
    penalty = hook.penalty(0.1)
    assert penalty.shape == ()
    torch.testing.assert_close(penalty, expected)
    assert penalty > 0.01
    optimizer.zero_grad()
    penalty.backward()
    for matrix in (module[0].matrix, module[1]):
        assert matrix.u.grad.abs().flatten(-2).amax(-1).min() > 0


def test_training_on_the_penalty_leads_back_inside():
    layer = P4InvTransform(3, bounds=MergeBounds(penalty_update=(1.0, 2.0)))
    optimizer, hook = hooked(layer, lr=0.05, every=10_000)
    penalties = []
    for _ in range(200):
        optimizer.zero_grad()
        penalty = hook.penalty(1.0)
        penalty.backward()
        optimizer.step()
        penalties.append(penalty.item())
    assert penalties[0] == pytest.approx(1.0)
    assert penalties[-1] < 1e-4


LINEAR = {
    "relative": P4InvTransform,
    "additive": lambda size, rank: P4InvTransform(size, rank=rank, perturbation="additive"),
    "orthogonal": P4OrthogonalTransform,
}


@pytest.mark.parametrize("rank", [1, 2, 6])
@pytest.mark.parametrize("kind", LINEAR)
def test_the_first_n_directions_are_a_whole_basis_and_every_n_after_them(kind, rank):
    size = 6
    stacked, alone = (
        nn.ModuleList([LINEAR[kind](size, rank=rank) for _ in range(count)]) for count in (2, 1)
    )
    for layers in (stacked, alone):
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)
        hook = MergeHook(layers, optimizer, every=1)
        drawn = []
        for _ in range(2 * size // rank):
            drawn.append(torch.stack([layer.matrix.v.detach().clone() for layer in layers]))
            loss = sum((layer(torch.ones(1, size))[0] - 2).square().sum() for layer in layers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert hook.stats.skipped == 0
        for basis in (drawn[: size // rank], drawn[size // rank :]):
            basis = torch.cat(basis, dim=-1)
            torch.testing.assert_close(
                basis @ basis.mT, size / rank * torch.eye(size).expand(len(layers), -1, -1)
            )


@pytest.mark.parametrize("kind", LINEAR)
def test_a_checkpoint_goes_on_with_the_same_directions(kind):
    layer, again = (LINEAR[kind](5, rank=2) for _ in range(2))
    optimizer, _ = hooked(layer, every=2)
    train(layer, optimizer, 3)
    again.load_state_dict(layer.state_dict())  # before the hook, which leaves what was trained
    optimizer_again, _ = hooked(again, every=2)
    optimizer_again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module, each in ((layer, optimizer), (again, optimizer_again)):
        train(module, each, 8, seed=1)
    assert layer.matrix.draws == 6
    for name, value in layer.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_counts_continue_from_a_state_dict():
    layer = P4InvTransform(3, bounds=NEVER)
    optimizer, hook = hooked(layer, every=2, force_every=3)
    twin = copy.deepcopy(layer)
    train(layer, optimizer, 5)  # in the middle of an interval, and of one between forced merges
    twin.load_state_dict(layer.state_dict())
    twin_optimizer, twin_hook = hooked(twin, every=2, force_every=3)
    twin_hook.load_state_dict(hook.state_dict())
    assert twin_hook.stats == hook.stats
    for module, each in ((layer, optimizer), (twin, twin_optimizer)):
        train(module, each, 9, seed=1)
    assert twin_hook.stats == hook.stats
    assert hook.stats.forced == 2
    for name, value in layer.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_a_state_dict_does_not_change_afterwards():
    layer = P4InvTransform(3)
    optimizer, hook = hooked(layer, every=1)
    saved = hook.state_dict()
    train(layer, optimizer, 2)
    assert (saved["steps"], saved["stats"]["merged"]) == (0, 0)


def test_remove():
    layer = P4InvTransform(3)
    optimizer, hook = hooked(layer, every=1)
    train(layer, optimizer, 2)
    hook.remove()
    state = state_of(layer.matrix)
    train(layer, optimizer, 2)
    assert hook.stats.merged == 2
    assert torch.equal(layer.matrix.frozen, state["frozen"])
    assert not torch.equal(layer.matrix.u, state["u"])
    hook.remove()
    second = MergeHook(layer, optimizer, every=1)
    hook.remove()  # which is no longer its own
    assert second.is_active()
    train(layer, optimizer, 1)
    assert second.stats.merged == 1


def test_a_refused_hook_leaves_nothing_behind():
    first, second = P4InvTransform(3), P4InvTransform(3)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    hook = MergeHook(first, optimizer, every=1)
    with pytest.raises(ValueError, match=r"does not hold the parameters 1\.matrix\.u"):
        MergeHook(nn.ModuleList([first, second]), optimizer)
    assert hook.is_active()
    train(first, optimizer, 2)
    assert hook.stats.merged == 2


def test_two_hooks_on_two_layers_of_one_optimizer():
    layers = nn.ModuleList([P4InvTransform(3), P4InvTransform(3)])
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    often, rarely = (
        MergeHook(layers[0], optimizer, every=1),
        MergeHook(layers[1], optimizer, every=3),
    )
    train(layers, optimizer, 6)
    assert (often.stats.merged, rarely.stats.merged) == (6, 2)


def test_a_layer_is_free_again_when_its_optimizer_is_gone():
    layer = P4InvTransform(3)
    optimizer, hook = hooked(layer)
    forgotten = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert forgotten() is None
    assert not hook.is_active()
    MergeHook(layer, torch.optim.SGD(layer.parameters(), lr=0.1))


def test_nothing_keeps_module_and_optimizer_alive():
    layer = P4InvTransform(3)
    optimizer, hook = hooked(layer, every=1)
    train(layer, optimizer, 2)
    objects = [weakref.ref(each) for each in (layer.matrix, optimizer, hook)]
    del layer, optimizer, hook
    gc.collect()
    assert [each() for each in objects] == [None, None, None]


def test_a_hook_lives_as_long_as_its_optimizer():
    layer = P4InvTransform(3)
    optimizer, _ = hooked(layer, every=1)
    gc.collect()
    train(layer, optimizer, 3)
    assert layer.matrix.draws == 4


def test_a_frozen_layer_is_left_alone():
    module = nn.ModuleList([P4InvTransform(3), P4InvTransform(3)])
    module[0].requires_grad_(False)
    optimizer = torch.optim.SGD(module[1].parameters(), lr=0.1)
    hook = MergeHook(module, optimizer, every=1)
    state = state_of(module[0])
    train(module[1], optimizer, 3)
    assert hook.stats.merged == 3
    for name, value in module[0].state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_shared_layer_merges_once():
    layer = P4InvTransform(3)
    optimizer, hook = hooked(nn.ModuleList([layer, layer]), every=1)
    train(layer, optimizer, 2)
    assert hook.stats.merged == 2


@pytest.mark.parametrize(
    "module", [nn.Linear(2, 2), nn.Sequential(), P4InvTransform(2).requires_grad_(False)], ids=str
)
def test_a_module_without_p4_layers(module):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="module has no P4 layer to train: there is nothing to"):
        MergeHook(module, optimizer)


def test_an_optimizer_that_lacks_parameters_is_told_which():
    module = nn.Sequential(*(P4InvTransform(2, perturbation="additive") for _ in range(2)))
    held = [module[0].matrix.u, module[0].matrix.v, module[1].matrix.u]
    message = r"does not hold the parameters 1\.matrix\.v: build it from module\.parameters\(\)"
    with pytest.raises(ValueError, match=message):
        MergeHook(module, torch.optim.SGD(held, lr=0.1))
    before = copy.deepcopy(module)  # as when a module is replaced after its optimizer was built
    with pytest.raises(ValueError, match=r"0\.matrix\.u, 0\.matrix\.v, 1\.matrix\.u, 1\.matrix\.v"):
        MergeHook(module, torch.optim.SGD(before.parameters(), lr=0.1))
    groups = [{"params": held}, {"params": [module[1].matrix.v], "lr": 0.0}]
    MergeHook(module, torch.optim.SGD(groups, lr=0.1))
    relative = P4InvTransform(2)  # whose v is not trained
    MergeHook(relative, torch.optim.SGD([relative.matrix.u], lr=0.1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": "flow"}, TypeError, "module must be an nn.Module, got str"),
        ({"optimizer": "Adam"}, TypeError, "optimizer must be a torch Optimizer, got str"),
        ({"every": 0}, ValueError, "every must be a positive int, got 0"),
        ({"every": 1.5}, TypeError, "every must be a positive int, got float"),
        ({"every": None}, TypeError, "every must be a positive int, got NoneType"),
        ({"force_every": -1}, ValueError, "force_every must be a positive int, got -1"),
        ({"force_every": "10"}, TypeError, "force_every must be a positive int, got str"),
        ({"correct_every": 0}, ValueError, "correct_every must be a positive int, got 0"),
        ({"correct_every": True}, TypeError, "correct_every must be a positive int, got bool"),
    ],
)
def test_bad_arguments(arguments, error, message):
    layer = P4InvTransform(2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        MergeHook(**{"module": layer, "optimizer": optimizer, **arguments})
    MergeHook(layer, optimizer)


def test_stats_are_readable_by_key_and_attribute():
    stats = MergeStats(merged=3, rescued=1)
    assert stats["merged"] == stats.merged == 3
    assert list(dict(stats)) == ["merged", "skipped", "forced", "reset", "corrected", "rescued"]
    assert MergeStats(**stats) == stats
