"""A tiny run of each benchmark, so that it cannot rot."""

import json
import sys

import pytest
import torch

# nflows' layers call torch.qr and torch.triangular_solve.
pytestmark = pytest.mark.filterwarnings("ignore:torch.*is deprecated:UserWarning")


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Runs a script with arguments; what it wrote."""
    threads = torch.get_num_threads()

    def runner(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", str(tmp_path)])
        script(name).main()
        return tmp_path

    yield runner
    torch.set_num_threads(threads)


def test_layers(run, script, monkeypatch):
    monkeypatch.setattr(script("timing"), "ROUND_SECONDS", 1e-9)
    arguments = ["--sizes", "4", "--rounds", "1", "--batch", "5", "--threads", "1"]
    output = run("layers", *arguments, "--no-memory")
    records = json.loads((output / "layers-1-threads.json").read_text())["records"]
    found = {(r["quantity"], r["contestant"], r["n"]) for r in records}
    contestants = script("contestants")
    for name, contestant in contestants.entering(4).items():
        assert ("step, forward", name, 4) in found
        assert (("step, inverse", name, 4) in found) == contestant.invertible
    assert {("merge", contestants.P4INV, 4), ("correction", contestants.P4INV, 4)} <= found
    assert all(0 < r["low"] <= r["seconds"] <= r["high"] for r in records)
    assert "| step, forward |" in (output / "layers-1-threads.md").read_text()
    assert (output / "layers-1-threads.png").stat().st_size > 0


def test_stack(run, script, monkeypatch):
    monkeypatch.setattr(script("timing"), "ROUND_SECONDS", 1e-9)
    sizes = ["--sizes", "2", "3", "--blocks", "1", "2", "--batches", "3", "--rounds", "1"]
    output = run("stack", *sizes)
    records = json.loads((output / "stack.json").read_text())["records"]
    assert [r["at"] for r in records if r["quantity"] == "blocks"] == [1, 2]
    assert [r["row"][0] for r in records if r["quantity"] == "dense against thin"] == ["2", "3"]
    assert "Fitted exponent" in (output / "stack.md").read_text()


def test_orthogonal(run, script, monkeypatch):
    monkeypatch.setattr(script("timing"), "ROUND_SECONDS", 1e-9)
    output = run("orthogonal", "--sizes", "8", "9", "--rounds", "1")
    records = json.loads((output / "orthogonal.json").read_text())["records"]
    ours = [r for r in records if r["layer"] == "P4OrthogonalTransform"]
    assert [r["size"] for r in ours] == [8, 9]
    assert all(r["merge"] > 0 and r["correct"] > 0 for r in ours)
    assert "| torch orthogonal, cayley |" in (output / "orthogonal.md").read_text()


def test_every_contestant_maps_back(script):
    contestants = script("contestants")
    x = torch.randn(5, 4)
    for name, contestant in contestants.entering(4).items():
        layer = contestant.build(4)
        outputs, logabsdet = layer(x)
        if contestant.invertible:
            back, negative = layer.inverse(outputs)
            torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3, msg=name)
            torch.testing.assert_close(negative.flatten(), -logabsdet.flatten())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark")
def test_memory(script):
    memory = script("memory")
    dense = memory.measure("nn.Linear", 512, batch=4)
    ours = memory.measure("P4InvTransform as in the paper", 512, batch=4)
    # Weight, gradient and two moments of one MiB each, against A and its inverse.
    assert dense["held"] == pytest.approx(4.0, rel=0.05)
    assert ours["held"] == pytest.approx(2.0, rel=0.05)
    assert ours["peak_of_correction"] > 0


def test_fitted_exponent(script):
    assert script("report").fitted_exponent({2: 4.0, 4: 16.0, 8: 64.0}) == pytest.approx(2.0)
