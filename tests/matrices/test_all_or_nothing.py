"""A merge, a correction or a loaded state happens as a whole, or not at all."""

import copy

import pytest
import torch
from torch import nn

from matrices.perturbing import KINDS, perturb
from p4flows.matrices import InvertibleMatrix, OrthogonalMatrix
from p4flows.matrices.merge import merge_together, read_state

SIZE = 5
MATRICES = {
    **{kind: lambda kind=kind: InvertibleMatrix(SIZE, rank=2, perturbation=kind) for kind in KINDS},
    "orthogonal": lambda: OrthogonalMatrix(SIZE, rank=2),
}
each_kind = pytest.mark.parametrize("kind", MATRICES)


@pytest.fixture(autouse=True)
def gradients_again():
    """An interrupt on the way out of `torch.no_grad` leaves gradients off."""
    yield
    torch.set_grad_enabled(True)


def group(kind, count):
    generator = torch.Generator().manual_seed(0)
    matrices = [MATRICES[kind]() for _ in range(count)]
    for _ in range(2):
        for matrix in matrices:
            perturb(matrix, generator)
        merge_together(matrices, force=False)
    for matrix in matrices:
        perturb(matrix, generator)
    return matrices


def states(matrices):
    return [{name: t.clone() for name, t in m.state_dict().items()} for m in matrices]


def same(one, other):
    return all(
        torch.equal(t, b[name]) for a, b in zip(one, other, strict=True) for name, t in a.items()
    )


class Interrupted(BaseException):
    pass


class InterruptsAt(torch.overrides.TorchFunctionMode):
    """Raises before the n-th operation of torch."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@each_kind
def test_a_merge_that_is_interrupted_anywhere_changes_nothing(kind, count, correct):
    matrices = group(kind, count)
    before = states(matrices)
    whole = copy.deepcopy(matrices)
    merge_together(whole, False, correct)
    after = states(whole)
    assert not same(before, after)
    operations = 0
    while True:
        try:
            with InterruptsAt(operations):
                merge_together(matrices, False, correct)
        except Interrupted:
            # The write is one operation: what comes after it finds all of it done.
            if same(states(matrices), after):
                break
            assert same(states(matrices), before), operations
            operations += 1
        else:
            pytest.fail("no operation after the write was interrupted")
    assert operations > 40


@each_kind
def test_a_correction_or_a_reset_that_is_interrupted_changes_nothing(kind):
    for act in ("correct", "reset"):
        (matrix,) = group(kind, 1)
        if act == "correct" and kind != "orthogonal":
            matrix.inverse_frozen.mul_(1.0 + 1e-4)
        before, whole = states([matrix]), copy.deepcopy(matrix)
        getattr(whole, act)()
        after = states([whole])
        assert not same(before, after)
        operations = 0
        while True:
            try:
                with InterruptsAt(operations):
                    getattr(matrix, act)()
            except Interrupted:
                if same(states([matrix]), after):
                    break
                assert same(states([matrix]), before), (act, operations)
                operations += 1
            else:
                pytest.fail("no operation after the write was interrupted")
        assert operations > 5


@pytest.mark.parametrize(
    ("spoil", "mended"),
    [
        (lambda s: s["0.inverse_frozen"].mul_(1.01), True),
        (lambda s: s["0.logabsdet_frozen"].add_(0.01), True),
        (lambda s: s["0.sign"].neg_(), True),
        (lambda s: s["0.frozen"].add_(0.1 * torch.randn(SIZE, SIZE)), True),
        (lambda s: s["0.inverse_frozen"].fill_(torch.nan), True),
        (lambda s: s["0.frozen"].fill_(1.0), False),
        (lambda s: s["0.frozen"].fill_(torch.nan), False),
    ],
    ids=["inverse", "logabsdet", "sign", "frozen", "nan", "singular", "nan-frozen"],
)
def test_a_state_whose_parts_do_not_belong_together(spoil, mended):
    source, target = (nn.Sequential(*group("relative", 2)) for _ in range(2))
    before = states(target)
    state = copy.deepcopy(source.state_dict())
    spoil(state)
    if not mended:
        with pytest.raises(RuntimeError, match=r"0 was not loaded, all else was: its matrix is"):
            target.load_state_dict(state)
        assert same(states([target[0]]), before[:1])
        assert same(states([target[1]]), states([source[1]]))
        return
    target.load_state_dict(state)
    assert torch.equal(target[0].frozen, state["0.frozen"])
    assert target[0].error().ratio <= 1 and not target[0].error().wrong_sign
    assert target[0].error().logabsdet < 1e-6
    assert same(states([target[1]]), states([source[1]]))


def test_an_orthogonal_state_that_is_not_orthogonal_is_mended():
    (source,), (target,) = group("orthogonal", 1), group("orthogonal", 1)
    state = copy.deepcopy(source.state_dict())
    state["frozen"].mul_(1.001)
    target.load_state_dict(state)
    torch.testing.assert_close(target.frozen, source.frozen)


@each_kind
def test_a_state_that_belongs_together_is_loaded_to_the_last_bit(kind):
    (source,), (target,) = group(kind, 1), group(kind, 1)
    for _ in range(300):
        perturb(source, torch.Generator().manual_seed(0), scale=0.05)
        source.merge(force=True)
    target.load_state_dict(source.state_dict())
    assert same(states([source]), states([target]))


def test_a_state_without_inverse_gets_its_own():
    (source,), (target,) = group("additive", 1), group("additive", 1)
    state = {"frozen": source.frozen + 0.01}
    missing, _ = target.load_state_dict(state, strict=False)
    assert "inverse_frozen" in missing
    assert torch.equal(target.frozen, state["frozen"])
    assert target.error().ratio <= 1 and target.error().logabsdet < 1e-6


def test_reading_a_state_copies_nothing_of_a_single_matrix():
    (matrix,) = group("relative", 1)
    assert read_state([matrix])["frozen"].data_ptr() == matrix.frozen.data_ptr()


def test_a_state_without_its_matrix_does_not_spoil_the_one_that_is_there():
    (source,), (target,) = group("relative", 1), group("relative", 1)
    target.assign(torch.diag(torch.arange(1.0, SIZE + 1)))
    state = {name: value for name, value in source.state_dict().items() if name != "frozen"}
    target.load_state_dict(state, strict=False)
    assert torch.equal(target.frozen, torch.diag(torch.arange(1.0, SIZE + 1)))
    assert target.error().ratio <= 1 and target.error().logabsdet < 1e-6


@each_kind
def test_a_state_is_assigned_to_a_module_without_memory(kind):
    (source,) = group(kind, 1)
    state = copy.deepcopy(source.state_dict())
    if kind != "orthogonal":
        state["inverse_frozen"] = torch.eye(SIZE)
    with torch.device("meta"):
        target = MATRICES[kind]()
    target.load_state_dict(state, assign=True)
    torch.testing.assert_close(target.dense(), source.dense())
    torch.testing.assert_close(target.inverse(), source.inverse())
    assert target.error().ratio <= 1
