"""A hook without an optimizer: whom it follows, who takes over, what copies and pickles say."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    register_optimizer_step_pre_hook,
)

from p4flows import InvertibleMatrix, MergeHook, P4InvTransform, invertible


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def sgd(module, lr=0.1, **arguments):
    return torch.optim.SGD(module.parameters(), lr=lr, **arguments)


def train(module, optimizer, steps):
    for _ in range(steps):
        for parameter in filter(lambda p: p.requires_grad, module.parameters()):
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
    layer = P4InvTransform(3, perturbation="additive")
    hook = MergeHook(layer, every=2)
    first, second = (torch.optim.Adam(layer.parameters(), lr=0.01) for _ in range(2))
    train(layer, first, 1)
    train(layer, second, 1)
    assert hook.stats.merged == 1
    for optimizer in (first, second):
        assert not optimizer.state[layer.matrix.v]["exp_avg"].any()
        assert optimizer.state[layer.matrix.u]["exp_avg"].any()


def test_the_global_hook_is_there_only_while_somebody_listens():
    gc.collect()
    before = dict(_global_optimizer_post_hooks)
    layer = P4InvTransform(3)
    optimizer = sgd(layer)
    bound = MergeHook(layer, optimizer)
    assert _global_optimizer_post_hooks == before
    hooks = [MergeHook(layer), MergeHook(P4InvTransform(3))]
    assert len(_global_optimizer_post_hooks) == len(before) + 1
    hooks[0].remove()
    gc.collect()
    assert _global_optimizer_post_hooks == before
    assert not bound.is_active()


def test_a_constructor_that_raised_harms_nobody():
    kept = []
    for arguments in ({"perturbation": "none"}, {"init": torch.zeros(2, 2)}):
        with pytest.raises(ValueError) as raised:
            P4InvTransform(2, **arguments)
        kept.append(raised)  # with its traceback, as a notebook keeps it
    layer, plain = P4InvTransform(2), nn.Linear(2, 2)
    MergeHook(layer, every=1)
    train(plain, sgd(plain), 2)
    train(layer, sgd(layer), 2)
    assert layer.matrix.draws == 3


def test_two_threads_train_at_the_same_time():
    errors = []

    def study():
        try:
            for index in range(30):
                layers = nn.ModuleList([P4InvTransform(2) for _ in range(3)])
                optimizer = sgd(layers)
                hook = MergeHook(layers, None if index % 2 else optimizer, every=2)
                train(layers, optimizer, 4)
                assert hook.stats.merged == 6
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=study) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


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
    layer = P4InvTransform(3, perturbation="additive")
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
    layer = invertible(nn.Linear(3, 3))
    hook = MergeHook(layer, every=1)
    train(layer, sgd(layer), 2)
    assert hook.stats.merged == 2
    assert isinstance(layer.parametrizations.weight[0], InvertibleMatrix)
