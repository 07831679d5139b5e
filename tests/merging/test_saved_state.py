"""The hook's counts travel in the optimizer's state: resumes are exact without a line for it."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from p4flows import MergeHook, P4InvTransform

ARGUMENTS = {"every": 3, "force_every": 2, "correct_every": 2}


def built(seed=0):
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Linear(3, 3), P4InvTransform(3), P4InvTransform(3))
    return layer, torch.optim.Adam(layer.parameters(), lr=0.05)


def train(module, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in filter(lambda p: p.requires_grad, module.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def saved(value):
    """Through a file that loads without running code."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def hooked(module, optimizer, order):
    return MergeHook(module, None if order == "unbound" else optimizer, **ARGUMENTS)


@pytest.mark.parametrize("order", ["before", "after", "unbound"])
def test_a_checkpoint_of_module_and_optimizer_resumes_exactly(order):
    module, optimizer = built()
    hook = hooked(module, optimizer, order)
    train(module, optimizer, 7)  # in the middle of an interval, and of one between forced merges
    checkpoint = saved([module.state_dict(), optimizer.state_dict()])
    train(module, optimizer, 8, seed=1)

    resumed, resumed_optimizer = built(seed=1)
    twin = hooked(resumed, resumed_optimizer, order) if order != "after" else None
    resumed.load_state_dict(checkpoint[0])
    resumed_optimizer.load_state_dict(checkpoint[1])
    if twin is None:
        twin = hooked(resumed, resumed_optimizer, order)
    train(resumed, resumed_optimizer, 8, seed=1)
    assert hook.state_dict() == twin.state_dict()
    assert hook.stats.merged == 10
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_state_dict_does_not_change_afterwards():
    module, optimizer = built()
    MergeHook(module, optimizer, **ARGUMENTS)
    train(module, optimizer, 2)
    kept = optimizer.state_dict()["param_groups"]
    before = copy.deepcopy(kept)
    train(module, optimizer, 5)
    assert kept == before
    assert optimizer.state_dict()["param_groups"] != before


def test_a_checkpoint_without_the_entry_loads():
    module, optimizer = built()
    hook = MergeHook(module, optimizer, **ARGUMENTS)
    train(module, optimizer, 4)
    state = saved(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["p4flows"]
    optimizer.load_state_dict(state)
    train(module, optimizer, 2)
    assert hook.stats.merged == 4  # on its own count


def test_the_state_of_the_hook_itself_wins():
    module, optimizer = built()
    hook = MergeHook(module, optimizer, **ARGUMENTS)
    train(module, optimizer, 4)
    checkpoint = saved([optimizer.state_dict(), hook.state_dict()])
    checkpoint[1]["steps"] = 5
    for bound in (True, False):
        twin_module, twin_optimizer = built()
        twin = MergeHook(twin_module, twin_optimizer if bound else None, **ARGUMENTS)
        twin_optimizer.load_state_dict(checkpoint[0])
        twin.load_state_dict(checkpoint[1])
        train(twin_module, twin_optimizer, 1)
        assert twin.state_dict()["steps"] == 6


def test_hooks_of_one_optimizer_have_an_entry_each():
    module, optimizer = built()
    hooks = [MergeHook(module[1], every=1), MergeHook(module[2], every=2)]
    train(module, optimizer, 5)
    state = saved(optimizer.state_dict())
    train(module, optimizer, 3)
    optimizer.load_state_dict(state)
    train(module, optimizer, 1)
    assert [hook.state_dict()["steps"] for hook in hooks] == [6, 6]
    assert [hook.stats.merged for hook in hooks] == [6, 3]


def test_a_newer_hook_starts_at_zero_and_a_removed_one_leaves_nothing():
    module, optimizer = built()
    MergeHook(module, optimizer, **ARGUMENTS)
    train(module, optimizer, 4)
    newer = MergeHook(module, **ARGUMENTS)
    train(module, optimizer, 1)
    assert newer.state_dict()["steps"] == 1
    newer.remove()
    assert all("p4flows" not in group for group in optimizer.param_groups)


def test_a_printed_optimizer_says_nothing_of_it():
    module, optimizer = built()
    hook = MergeHook(module, optimizer, **ARGUMENTS)
    train(module, optimizer, 4)
    optimizer.load_state_dict(optimizer.state_dict())
    assert "p4flows" not in repr(optimizer)
    assert hook.state_dict()["steps"] == 4


@pytest.mark.parametrize("bound", [True, False])
def test_looking_at_the_state_of_a_fresh_optimizer_counts_no_step(bound):
    module, optimizer = built()
    hook = MergeHook(module, optimizer if bound else None, every=1)
    get_optimizer_state_dict(module, optimizer)
    assert hook.state_dict()["steps"] == 0
    train(module, optimizer, 1)
    assert hook.state_dict()["steps"] == 1


def test_steps_that_a_scaler_skipped_inside_a_fused_step_do_not_count():
    """As `GradScaler` does it: the overflow is told to the optimizer, which skips by itself."""
    module, _ = built()
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    hook = MergeHook(module, optimizer, every=3)
    merged = []
    for overflow in (0, 1, 0, 1, 1, 0, 0, 0, 0, 0):
        optimizer.grad_scale = torch.tensor(1.0)
        optimizer.found_inf = torch.tensor(float(overflow))
        train(module, optimizer, 1)
        merged.append(hook.stats.merged // 2)
    assert merged == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert hook.state_dict()["steps"] == 7
