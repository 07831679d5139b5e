"""A hook without an optimizer: whom it follows, who takes over, what copies and pickles say."""

import copy
import gc
import pickle
import time
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import p4flows.merging.attaching
from p4flows import InvertibleMatrix, MergeHook, NotMergedWarning, P4InvTransform


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def sgd(module, lr=0.1, **arguments):
    return torch.optim.SGD(module.parameters(), lr=lr, **arguments)


def train(module, optimizer, steps):
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def test_it_attaches_to_whichever_optimizer_steps():
    layer = P4InvTransform(3)
    hook = MergeHook(layer, every=2)
    train(layer, sgd(layer), 5)
    assert (hook.stats.merged, layer.matrix.draws.item()) == (2, 3)


def test_it_goes_on_counting_with_the_next_optimizer():
    layer = P4InvTransform(3)
    hook = MergeHook(layer, every=3, force_every=None)
    for merged in (1, 3, 5):
        train(layer, torch.optim.Adam(layer.parameters(), lr=0.01), 5)
        assert hook.stats.merged == merged


def test_two_optimizers_that_take_turns_both_count_and_both_restart():
    layer = P4InvTransform(3)
    hook = MergeHook(layer, every=2)
    first, second = (torch.optim.Adam(layer.parameters(), lr=0.01) for _ in range(2))
    train(layer, first, 1)
    train(layer, second, 1)
    assert hook.stats.merged == 1
    for optimizer in (first, second):
        assert not optimizer.state[layer.matrix.v]["exp_avg"].any()
        assert optimizer.state[layer.matrix.u]["exp_avg"].any()


def test_an_optimizer_of_other_parameters_is_not_looked_at(monkeypatch):
    layer, other = P4InvTransform(3), nn.Linear(3, 3)
    hook = MergeHook(layer, every=1)
    optimizer = sgd(other)
    train(other, optimizer, 1)
    # From here on a step costs one look-up, whatever is alive.
    monkeypatch.setattr(p4flows.merging.attaching, "held", None)
    monkeypatch.setattr(p4flows.merging.attaching, "living_matrices", None)
    train(other, optimizer, 3)
    assert (hook.stats.merged, layer.matrix.draws.item()) == (0, 1)


def test_a_step_of_other_parameters_costs_microseconds():
    optimizer = sgd(nn.Linear(3, 3))
    optimizer.step()
    begin = time.perf_counter()
    for _ in range(1000):
        p4flows.merging.attaching._after_any_step(optimizer, (), {})
    assert (time.perf_counter() - begin) / 1000 < 50e-6


def test_layers_that_join_the_optimizer_later():
    module = nn.ModuleList([P4InvTransform(3), P4InvTransform(3)])
    hook = MergeHook(module, every=1)
    module[1].requires_grad_(False)
    optimizer = sgd(module[0])
    train(module[0], optimizer, 2)
    assert [layer.matrix.draws.item() for layer in module] == [3, 1]
    module[1].requires_grad_(True)
    optimizer.add_param_group({"params": list(module[1].parameters())})
    train(module, optimizer, 2)
    assert [layer.matrix.draws.item() for layer in module] == [5, 3]
    assert hook.stats.merged == 6


def test_an_optimizer_of_some_of_the_layers_is_refused_at_its_first_step():
    module = nn.ModuleList([P4InvTransform(3), P4InvTransform(3)])
    MergeHook(module)
    message = r"does not hold the parameters 1\.matrix\.u: .* for the layers of each"
    optimizer = sgd(module[0])
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            train(module[0], optimizer, 1)
    MergeHook(module[0])
    train(module[0], optimizer, 1)


class Wrapper:
    """As those of Accelerate and Lightning."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def test_wrappers_are_unwrapped():
    layer = P4InvTransform(3)
    optimizer = Wrapper(Wrapper(sgd(layer)))
    hook = MergeHook(layer, optimizer, every=1)
    train(layer, optimizer, 2)
    assert hook.stats.merged == 2
    with pytest.raises(TypeError, match="optimizer must be a torch Optimizer, got Wrapper"):
        MergeHook(layer, Wrapper(None))


class Lookahead(torch.optim.Optimizer):
    """An optimizer whose step is that of another one with the same parameters."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base = base

    def step(self, closure=None):
        self.base.step()


def test_an_optimizer_inside_an_optimizer_counts_once():
    layer = P4InvTransform(3)
    hook = MergeHook(layer, every=2)
    train(layer, Lookahead(sgd(layer)), 4)
    assert hook.stats.merged == 2


def test_a_newer_hook_takes_over():
    layer = P4InvTransform(3)
    optimizer = sgd(layer)
    first = MergeHook(layer, optimizer, every=1)
    for bound in (True, False, False, True):
        train(layer, optimizer, 2)
        draws, merged = layer.matrix.draws.item(), first.stats.merged
        second = MergeHook(layer, optimizer if bound else None, every=1)
        assert (first.is_active(), second.is_active()) == (False, True)
        train(layer, optimizer, 3)
        assert layer.matrix.draws == draws + 3
        assert (first.stats.merged, second.stats.merged) == (merged, 3)
        first = second


def test_a_newer_hook_of_some_layers_leaves_the_others_to_the_older():
    module = nn.ModuleList([P4InvTransform(3), P4InvTransform(3)])
    optimizer = sgd(module)
    older = MergeHook(module, optimizer, every=1)
    train(module, optimizer, 1)
    newer = MergeHook(module[0], optimizer, every=2)
    train(module, optimizer, 4)
    assert [layer.matrix.draws.item() for layer in module] == [4, 6]
    assert older.is_active()
    assert (older.stats.merged, newer.stats.merged) == (6, 2)
    MergeHook(module[1])
    assert not older.is_active()


def test_a_bound_hook_ignores_other_optimizers():
    layer = P4InvTransform(3)
    hook = MergeHook(layer, sgd(layer), every=1)
    assert not hook.is_active()  # nobody holds its optimizer
    optimizer = sgd(layer)
    hook = MergeHook(layer, optimizer, every=1)
    train(layer, sgd(layer), 2)
    assert (hook.stats.merged, hook.is_active()) == (0, True)
    train(layer, optimizer, 2)
    assert hook.stats.merged == 2


def test_merge_now():
    layer = P4InvTransform(3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    hook = MergeHook(layer, every=100)
    train(layer, optimizer, 7)
    weight = layer.weight().detach()
    assert layer.matrix.u.any()
    assert hook.merge() is True
    assert not layer.matrix.u.any()
    torch.testing.assert_close(layer.matrix.frozen, weight)
    assert hook.stats.merged == 1
    assert not optimizer.state[layer.matrix.v]["exp_avg"].any()
    train(layer, optimizer, 93)  # which the count of steps does not feel
    assert hook.stats.merged == 2


def test_merge_now_keeps_to_the_bounds_unless_forced():
    layer = P4InvTransform(3)
    hook = MergeHook(layer)
    with torch.no_grad():
        layer.matrix.u.copy_(1e4 * layer.matrix.v)
    assert hook.merge() is False
    assert hook.merge(force=True) is True
    assert (hook.stats.skipped, hook.stats.forced) == (1, 1)


def test_merge_now_of_a_hook_without_matrices():
    layer = P4InvTransform(3)
    removed, taken_over = MergeHook(layer), MergeHook(layer)
    gone = MergeHook(P4InvTransform(3))
    removed.remove()
    MergeHook(layer)
    gc.collect()
    for hook in (removed, taken_over, gone, copy.deepcopy(taken_over)):
        with pytest.raises(RuntimeError, match="this hook drives no matrix: it was removed, a new"):
            hook.merge()
        assert not hook.is_active()


def test_nothing_keeps_module_and_optimizer_alive():
    layer = P4InvTransform(3)
    optimizer = sgd(layer)
    hook = MergeHook(layer, every=2)
    train(layer, optimizer, 3)
    objects = [weakref.ref(each) for each in (layer.matrix, optimizer, hook)]
    del layer, hook
    gc.collect()
    assert objects[0]() is None
    del optimizer
    gc.collect()
    assert [each() for each in objects] == [None, None, None]


def test_a_hook_nobody_holds_lives_as_long_as_its_layers():
    layer = P4InvTransform(3)
    MergeHook(layer, every=1)
    gc.collect()
    train(layer, sgd(layer), 3)
    assert layer.matrix.draws == 4


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_without_its_module_is_inactive_and_changes_nothing(duplicate):
    layer = P4InvTransform(3)
    optimizer = sgd(layer)
    hook = MergeHook(layer, optimizer, every=2)
    train(layer, optimizer, 3)
    twin = duplicate(hook)
    gc.collect()
    assert (twin.is_active(), hook.is_active()) == (False, True)
    assert twin.stats == hook.stats
    assert repr(twin) == repr(hook).replace("1 matrices", "0 matrices")
    train(layer, optimizer, 2)
    assert (hook.stats.merged, twin.stats.merged) == (2, 1)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("bound", [True, False])
def test_a_copy_together_with_its_module_drives_the_copy(duplicate, bound):
    layer = P4InvTransform(3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    hook = MergeHook(layer, optimizer if bound else None, every=2)
    train(layer, optimizer, 3)
    twin_layer, twin_optimizer, twin = duplicate((layer, optimizer, hook))
    gc.collect()
    assert twin.is_active()
    train(twin_layer, twin_optimizer, 1)
    assert (hook.stats.merged, twin.stats.merged) == (1, 2)
    assert (layer.matrix.draws, twin_layer.matrix.draws) == (2, 3)
    train(layer, optimizer, 1)
    assert (hook.stats.merged, twin.stats.merged) == (2, 2)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_of_an_inactive_hook_is_inactive(duplicate):
    layer = P4InvTransform(3)
    older, newer = MergeHook(layer), MergeHook(layer)
    _, older, newer = kept = duplicate((layer, older, newer))
    assert kept
    assert (older.is_active(), newer.is_active()) == (False, True)


def test_a_shallow_copy_is_inactive():
    layer = P4InvTransform(3)
    hook = MergeHook(layer)
    assert not copy.copy(hook).is_active()
    assert hook.is_active()


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(p4flows.merging.attaching, "_FORGOTTEN_AFTER", 10)


def heard(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    assert all(each.category is NotMergedWarning for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.usefixtures("soon")
def test_layers_that_nothing_merges_are_reported_once():
    module = nn.ModuleList([P4InvTransform(3, rank=1), P4InvTransform(3, rank=2)])
    optimizer = sgd(module)
    assert heard(lambda: train(module, optimizer, 9)) == []
    messages = heard(lambda: train(module, optimizer, 91))
    assert messages == [
        "SGD has stepped u and v of 2 P4 layers for 10 steps and nothing merges them (they have no "
        "MergeHook): they stay within rank 2 of where they were. MergeHook(module), without an "
        "optimizer, follows whichever one steps them"
    ]


@pytest.mark.usefixtures("soon")
def test_the_warning_points_to_the_step():
    layer = P4InvTransform(3)
    optimizer = sgd(layer)
    with pytest.warns(NotMergedWarning) as caught:
        for _ in range(10):
            optimizer.step()
    assert caught[0].filename == __file__


def replaced(layer):
    hook = MergeHook(layer, optimizer := sgd(layer))
    train(layer, optimizer, 1)
    return hook, sgd(layer)


def taken_off(layer):
    hook = MergeHook(layer, every=1)
    hook.remove()
    return hook, sgd(layer)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("setup", "why"),
    [
        (replaced, "their MergeHook is bound to another optimizer"),
        (taken_off, "they have no MergeHook"),
    ],
)
def test_hooks_that_went_missing_are_reported(setup, why):
    layer = P4InvTransform(3)
    hook, optimizer = setup(layer)
    (message,) = heard(lambda: train(layer, optimizer, 10))
    assert why in message
    assert hook.stats.merged == 0


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copied_optimizer_is_reported(duplicate):
    layer = P4InvTransform(3)
    optimizer = sgd(layer)
    MergeHook(layer, optimizer, every=1)
    layer, optimizer = duplicate((layer, optimizer))
    (message,) = heard(lambda: train(layer, optimizer, 10))
    assert "of 1 P4 layer for 10 steps" in message


@pytest.mark.usefixtures("soon")
def test_a_layer_added_later_is_reported():
    layers = [P4InvTransform(3), P4InvTransform(3)]
    optimizer = sgd(layers[0])
    MergeHook(layers[0], optimizer, every=1)
    train(layers[0], optimizer, 20)
    optimizer.add_param_group({"params": list(layers[1].parameters())})
    (message,) = heard(lambda: train(nn.ModuleList(layers), optimizer, 10))
    assert "of 1 P4 layer for 10 steps" in message


@pytest.mark.usefixtures("soon")
def test_what_is_merged_or_frozen_is_not_reported():
    merged_by_hand, hooked, frozen = P4InvTransform(3), P4InvTransform(3), P4InvTransform(3)
    MergeHook(hooked, every=100)
    frozen.requires_grad_(False)
    module = nn.ModuleList([merged_by_hand, hooked, frozen])
    optimizer = sgd(module)
    for _ in range(6):
        train(merged_by_hand, optimizer, 5)
        merged_by_hand.matrix.merge()


@pytest.mark.usefixtures("soon")
def test_another_optimizer_that_merges_is_enough():
    layer = P4InvTransform(3)
    merging, other = sgd(layer), sgd(layer)
    MergeHook(layer, merging, every=5)
    for _ in range(40):
        train(layer, merging, 1)
        train(layer, other, 1)


def test_a_hook_may_be_made_and_removed_inside_a_step():
    layer = P4InvTransform(3)
    optimizer = sgd(layer)
    hooks = []

    def replace(stepping, *_):
        if hooks:
            hooks[-1].remove()
        hooks.append(MergeHook(layer, every=1))

    handle = register_optimizer_step_pre_hook(replace)
    train(layer, optimizer, 3)
    handle.remove()
    assert [hook.stats.merged for hook in hooks] == [1, 1, 1]


def test_matrices_of_a_parametrized_module_are_followed():
    layer = p4flows.invertible(nn.Linear(3, 3))
    hook = MergeHook(layer, every=1)
    train(layer, sgd(layer), 2)
    assert hook.stats.merged == 2
    assert isinstance(layer.parametrizations.weight[0], InvertibleMatrix)
