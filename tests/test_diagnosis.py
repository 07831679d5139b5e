"""`diagnose`: a row a layer, and verdicts that tell right from wrong."""

import math

import pytest
import torch
from torch import nn

from p4flows import BentStack, P4InvTransform, P4OrthogonalTransform, diagnose


def flow():
    torch.manual_seed(0)
    layers = nn.Sequential(P4InvTransform(3, rank=1), nn.Linear(3, 3), BentStack(3, 2, rank=2))
    layers.append(P4OrthogonalTransform(3, init="reverse", rank=1).double())
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            if name.endswith(".u"):
                parameter.normal_(std=0.2)
    for layer in (layers[0], layers[2], layers[3]):
        assert layer.matrix.merge(force=True).all()
    return layers


def test_a_row_for_each_layer_is_printed(capsys):
    rows = diagnose(flow(), show=True)
    assert [row.name for row in rows] == ["0.matrix", "2.matrix", "3.matrix"]
    assert [row.kind for row in rows] == 2 * ["InvertibleMatrix"] + ["OrthogonalMatrix"]
    assert [(row.size, row.rank, row.matrices) for row in rows] == [(3, 1, 1), (3, 2, 4), (3, 1, 1)]
    assert {row.verdict for row in rows} == {"right"}
    assert all(0 < row.error.ratio < 30 and row.error.condition > 1 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines[1:]}) == 1
    assert f"{rows[1].error.right.item():.1e}" in lines[2]


def test_show_false_prints_nothing(capsys):
    assert len(diagnose(flow())) == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda matrix: matrix.inverse_frozen[1].mul_(1.001),
        lambda matrix: matrix.inverse_frozen[1, 0].fill_(math.nan),
        lambda matrix: matrix.logabsdet_frozen[2].add_(1e-3),
        lambda matrix: matrix.sign[3].neg_(),
    ],
    ids=["inverse", "nan", "logabsdet", "sign"],
)
def test_what_is_off_is_to_be_corrected(spoil):
    layers = flow()
    spoil(layers[2].matrix)
    verdicts = [row.verdict for row in diagnose(layers)]
    assert verdicts == ["right", "correct it", "right"]
    layers[2].matrix.correct()
    assert {row.verdict for row in diagnose(layers)} == {"right"}


@pytest.mark.parametrize(
    ("dtype", "verdict"), [(torch.float32, "ill-conditioned"), (torch.float64, "right")]
)
def test_what_the_dtype_cannot_carry_is_ill_conditioned(dtype, verdict):
    layer = P4InvTransform(2, init=torch.diag(torch.tensor([1.0, 1e-6], dtype=dtype)))
    assert diagnose(layer)[0].verdict == verdict


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got Tensor"):
        diagnose(torch.eye(2))
