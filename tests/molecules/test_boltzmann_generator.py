"""The example of the circular flow from simulation to table, at a toy's length."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
pytest.importorskip("ot", reason="needs POT, of the extra `molecules`")
import boltzmann_generator as example  # noqa: E402
import boltzmann_generator_mixing as mixing  # noqa: E402
import boltzmann_generator_report as report  # noqa: E402
import replica_exchange  # noqa: E402

TOY = example.Preset(
    replicas=2, frames=80, blocks=1, hidden=(8,), steps=3, batch=8, rounds=2, round_steps=2,
    round_samples=60, samples=70,
)  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("boltzmann_generator")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setitem(example.PRESETS, "quick", TOY)
    cold = dataclasses.replace(TOY, rounds=3, cooling=2, last_temperature=300.0)
    monkeypatch.setitem(example.PRESETS, "cold", cold)
    monkeypatch.setattr(report, "TRANSPORTED", 20)
    yield
    report.plt.close("all")


@pytest.fixture
def draw(output, monkeypatch, capsys):
    """Calls the script with --figures, which has no molecule to simulate; what it printed."""

    def runner(*arguments):
        with monkeypatch.context() as without:
            without.setattr(example, "Problem", None)
            arguments = ["boltzmann_generator", *arguments, "--output", str(output), "--figures"]
            without.setattr(sys, "argv", arguments)
            example.main()
        return capsys.readouterr().out

    return runner


@pytest.mark.parametrize("swap", ["p4", "random-halves"])
def test_a_run_gives_numbers_and_weighted_samples(output, swap, draw):
    record = example.run("quick", swap, 0, output, workers=1, progress=False)
    for name in ("ess", "ess_clipped", "forward_ess", "nll", "nll_training", "torus_w2"):
        assert math.isfinite(record[name]), name
    assert 0 < record["ess"] <= record["ess_clipped"] <= 1
    assert record["samples_seen"] == 7 * 8 and record["energies"] == 120
    assert (record["merges"] is None) == (swap == "random-halves")
    assert [found["temperature"] for found in record["rounds"]] == [600.0, 600.0]
    stem = output / f"quick-{swap}-0"
    assert json.loads(stem.with_suffix(".json").read_text())["ess"] == record["ess"]
    trajectory, weights = molecules.load_weighted(f"{stem}-samples")
    assert trajectory.n_frames == len(weights) == 70
    text = draw("--swap", swap)
    assert stem.with_suffix(".md").read_text() in text
    assert f"| ESS | {record['ess']:.1%} ± {record['ess_error']:.1%} |" in text
    assert stem.with_suffix(".png").exists()
    # A record that is there is read; without it, all segments are, and the flow is the same.
    assert example.run("quick", swap, 0, output, 1, progress=False)["ess"] == record["ess"]
    stem.with_suffix(".json").unlink()
    again = example.run("quick", swap, 0, output, workers=1, progress=False)
    assert again["ess"] == record["ess"] and again["rounds"] == record["rounds"]
    row = mixing.summary([record]).splitlines()[-1]
    assert row.startswith(f"| {mixing.SWAPS[swap]} | 1 | {record['nll']:.3f} | ")


def test_an_interrupted_run_ends_with_the_same_numbers(output, tmp_path, monkeypatch):
    # Frames that another test may have simulated, or may still want.
    (output / "md").mkdir(exist_ok=True)
    (tmp_path / "md").symlink_to(output / "md")
    torch.manual_seed(5)
    problem = example.Problem(TOY, tmp_path, 1, progress=False)

    def states(stem, interrupt):
        torch.manual_seed(0)
        flow = example.build_flow(problem, TOY, "p4", 0)
        training = example.Training(problem, TOY, flow, 0, stem, progress=False)
        training.likelihood()
        training.round(1)
        if interrupt:
            torch.manual_seed(77)
            flow = example.build_flow(problem, TOY, "p4", 0)
            training = example.Training(problem, TOY, flow, 0, stem, progress=False)
            training.likelihood()
            training.round(1)
        training.round(2)
        return flow.state_dict()

    torch.testing.assert_close(
        states(tmp_path / "a", False), states(tmp_path / "b", True), rtol=0, atol=0
    )


def test_correlation_length_of_an_autoregressive_series():
    """(1 + a)/(1 − a) for x ← a x + noise."""
    noise = np.random.default_rng(0).normal(size=40_000)
    series = np.empty_like(noise)
    last = 0.0
    for step, kick in enumerate(noise):
        series[step] = last = 0.8 * last + kick
    assert report.correlation_length(series) == pytest.approx(9.0, rel=0.15)
    assert report.correlation_length(noise) == pytest.approx(1.0, abs=0.1)


def test_rounds_end_at_the_last_temperature(output, draw):
    ladder = example.PRESETS["cold"].ladder
    assert ladder == pytest.approx([600.0 / math.sqrt(2.0), 300.0, 300.0])
    record = example.run("cold", "random-halves", 0, output, workers=1, progress=False)
    assert [found["temperature"] for found in record["rounds"]][-1] == pytest.approx(300.0)
    # There is no simulation at 300 K to compare with.
    assert "nll" not in record
    assert "| forward ESS | – |" in draw("--preset", "cold", "--swap", "random-halves")


def test_a_cold_flow_is_compared_with_replica_exchange(output, monkeypatch, draw):
    monkeypatch.setattr(replica_exchange, "EQUILIBRATION", 2)
    compared = dataclasses.replace(
        example.PRESETS["cold"], ensembles=2, exchanged=30, orders=3, turned=40
    )
    monkeypatch.setitem(example.PRESETS, "cold", compared)
    record = example.run("cold", "p4", 0, output, workers=1, progress=False)
    assert math.isfinite(record["nll"])
    assert record["mean"]["orders"] == 3 and record["mean"]["samples"] == 40
    assert 0 < record["mean"]["ess"] <= 1 and math.isfinite(record["mean"]["forward_ess"])
    # No frame at 300 K has been trained on.
    assert "nll_training" not in record
    assert record["settings"]["ensembles"] == 2
    assert "| forward ESS | – |" not in draw("--preset", "cold")


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
