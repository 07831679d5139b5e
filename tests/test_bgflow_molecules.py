"""Our mixed coordinates and energies against bgflow's, with the parts of the example."""

import functools
import sys

import pytest
import torch
from needs_bgflow import bgflow, needs_bgflow

if bgflow is not None:
    pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
    import alanine_dipeptide
    import alanine_dipeptide_bgflow as example
    import matplotlib.pyplot as plt
    import openmm

    from p4flows import molecules
    from p4flows.bgflow import FlowTransform

pytestmark = [
    needs_bgflow,
    # bgflow's SplitFlow indexes by a list.
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]


@pytest.fixture(scope="module")
def setting():
    """The molecule, both coordinates in float64, and frames that both can take."""
    torch.manual_seed(0)
    molecule = molecules.alanine_dipeptide()
    start = torch.tensor(molecule.positions).flatten()
    data = start + 0.01 * torch.randn(500, len(start), dtype=torch.float64)
    ours = molecules.MixedCoordinateTransform(data, molecule.topology)
    frames = example.superposed(ours, data)
    return molecule, ours, example.bgflow_coordinates(ours, frames), frames


def test_coordinates_agree(setting):
    _, ours, theirs, frames = setting
    found = example.compare(ours, theirs, frames)
    assert found.pop("logabsdet_std") > 1e-2
    assert max(found.values()) < 1e-6


def test_features_and_positions_are_inverse(setting):
    _, ours, theirs, frames = setting
    cuts = ours.cuts / (2.0 * torch.pi) + 0.5
    coordinates = FlowTransform(bgflow.InverseFlow(example.standardised(theirs, frames, cuts)))
    features, logabsdet = coordinates(frames)
    count = 3 * len(ours.z_matrix.rows)
    expected = ours(frames)[0][:, -count:]
    torch.testing.assert_close(features[:, :count], expected, rtol=1e-5, atol=1e-5)
    positions, back = coordinates.inverse(features)
    torch.testing.assert_close(positions, frames, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back, -logabsdet, rtol=1e-5, atol=1e-4)


def test_energies_agree(setting):
    molecule, _, _, frames = setting
    integrator = openmm.LangevinIntegrator(600.0, 1.0, 0.001)
    bridge = bgflow.OpenMMBridge(molecule.system, integrator, "Reference", n_workers=1)
    theirs = bgflow.OpenMMEnergy(bridge=bridge)
    ours = molecules.OpenMMEnergy(molecule.system, 600.0)
    x = frames[:20].float().requires_grad_()
    energies = ours(x)
    torch.testing.assert_close(energies, theirs.energy(x).squeeze(-1), rtol=1e-5, atol=1e-3)
    found, expected = (torch.autograd.grad(e.sum(), x)[0] for e in (energies, theirs.energy(x)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


def test_script_trains_once_and_draws_what_is_kept(tmp_path, monkeypatch, capsys):
    preset = alanine_dipeptide.Preset(2, 60, steps=2, mixed_steps=1, decay=True, models=("p4inv",))
    monkeypatch.setitem(alanine_dipeptide.PRESETS, "quick", preset)
    monkeypatch.setattr(alanine_dipeptide, "SAMPLES", 50)
    shallow = functools.partial(example.realnvp_flow, 60, 1)
    monkeypatch.setattr(example, "realnvp_flow", lambda *sizes, **options: shallow(**options))
    # Noise that a short simulation has seen.
    monkeypatch.setattr(alanine_dipeptide, "NOISE", 1e-4)
    arguments = ["alanine_dipeptide_bgflow", "--workers", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    threads = torch.get_num_threads()
    example.main()
    table = (tmp_path / "alanine_dipeptide_bgflow-quick-0.md").read_text()
    assert "| P4Inv | mixed |" in table and "torsion_turns" in table
    monkeypatch.setattr(example, "BgflowProblem", None)
    monkeypatch.setattr(sys, "argv", [*arguments, "--figures"])
    example.main()
    torch.set_num_threads(threads)
    assert (tmp_path / "alanine_dipeptide_bgflow-quick-0.md").read_text() == table
    assert capsys.readouterr().out.count(table) == 2
    plt.close("all")
