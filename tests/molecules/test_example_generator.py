"""The examples around the generator, at a toy's length."""

import pytest
import torch

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
import boltzmann_generator_mixing as mixing  # noqa: E402
import replica_exchange  # noqa: E402


def test_what_mixes_is_compared_on_the_same_frames(tmp_path, monkeypatch, in_this_process):
    simulate, settings = molecules.BoltzmannGenerator.simulate, mixing.Settings
    monkeypatch.setattr(
        mixing, "Settings", lambda **s: settings(**s, replicas=2, blocks=1, hidden=(8,))
    )
    monkeypatch.setattr(
        mixing.BoltzmannGenerator,
        "simulate",
        lambda self, frames: simulate(self, frames=frames, chunk=60),
    )
    records = [mixing.train("ALA", swap, 0, 3, 60, tmp_path) for swap in ("p4", "random-halves")]
    assert records[0]["held_out"] != records[1]["held_out"]
    lines = mixing.summary(records).splitlines()
    assert lines[2].startswith(f"| P4Inv | 1 | {records[0]['held_out']:.3f} | ")
    assert lines[3].startswith("| random permutation | 1 | ")


def test_replica_exchange_is_cold_resumed_and_reproducible(tmp_path, monkeypatch):
    monkeypatch.setattr(replica_exchange, "EQUILIBRATION", 20)
    molecule = molecules.alanine_dipeptide()

    def ladders(folder, count):
        return replica_exchange.replica_exchange(
            molecule,
            folder,
            temperature=300.0,
            hottest=600.0,
            ensembles=count,
            frames=40,
            workers=1,
        )

    first = ladders(tmp_path / "a", 1)
    both = ladders(tmp_path / "a", 2)
    again = ladders(tmp_path / "b", 2)
    assert both.shape == (2, 40, 66)
    assert (both[:1] == first).all() and (both == again).all() and (both[0] != both[1]).any()
    # Potential energy per internal coordinate about ½ k_BT above the minimum: less than at 450 K.
    energies = molecules.OpenMMEnergy(molecule.system, 300.0)(
        torch.from_numpy(both.reshape(-1, 66))
    )
    lowest = molecules.OpenMMEnergy(molecule.system, 300.0)(
        torch.from_numpy(molecule.positions).float().reshape(1, -1)
    )
    assert 10.0 < (energies.mean() - lowest).item() < 45.0
