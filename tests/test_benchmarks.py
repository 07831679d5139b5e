"""A tiny run of each benchmark, so that it cannot rot."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import contestants
import correction
import pytest
import report
import timing
import torch

# nflows' layers call torch.qr and torch.triangular_solve.
pytestmark = pytest.mark.filterwarnings("ignore:torch.*is deprecated:UserWarning")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script with arguments; what it wrote."""
    threads = torch.get_num_threads()

    def runner(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", str(tmp_path)])
        importlib.import_module(name).main()
        return tmp_path

    yield runner
    torch.set_num_threads(threads)


def test_layers(run, monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-9)
    arguments = ["--sizes", "4", "--rounds", "1", "--batch", "5", "--threads", "1"]
    output = run("layers", *arguments, "--no-memory")
    records = json.loads((output / "layers-1-threads.json").read_text())["records"]
    found = {(r["quantity"], r["contestant"], r["n"]) for r in records}
    for name, contestant in contestants.entering(4).items():
        assert ("step, forward", name, 4) in found
        assert (("step, inverse", name, 4) in found) == contestant.invertible
    assert {("merge", contestants.P4INV, 4), ("correction", contestants.P4INV, 4)} <= found
    assert all(0 < r["low"] <= r["seconds"] <= r["high"] for r in records)
    assert "| step, forward |" in (output / "layers-1-threads.md").read_text()
    assert (output / "layers-1-threads.png").stat().st_size > 0


def test_stack(run, monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-9)
    sizes = ["--sizes", "2", "3", "--blocks", "1", "2", "--batches", "3", "--rounds", "1"]
    output = run("stack", *sizes)
    records = json.loads((output / "stack.json").read_text())["records"]
    assert [r["at"] for r in records if r["quantity"] == "blocks"] == [1, 2]
    assert [r["row"][0] for r in records if r["quantity"] == "dense against thin"] == ["2", "3"]
    assert "Fitted exponent" in (output / "stack.md").read_text()


def test_orthogonal(run, monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-9)
    output = run("orthogonal", "--sizes", "8", "9", "--rounds", "1")
    records = json.loads((output / "orthogonal.json").read_text())["records"]
    ours = [r for r in records if r["layer"] == "P4OrthogonalTransform"]
    assert [r["size"] for r in ours] == [8, 9]
    assert all(r["merge"] > 0 and r["correct"] > 0 for r in ours)
    assert "| torch orthogonal, cayley |" in (output / "orthogonal.md").read_text()


def test_correction(monkeypatch, capsys, tmp_path):
    output = tmp_path / "correction.json"
    small = ["--size", "8", "--draws", "1", "--timed-size", "8", "--json", str(output)]
    monkeypatch.setattr(sys, "argv", ["correction", *small])
    threads = torch.get_num_threads()
    correction.main()
    torch.set_num_threads(threads)
    rows = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["LU, float64"]["float32 1e+05"] < rows["order 3, 2 steps"]["float32 1e+05"]
    assert "| LU, float64 |" in capsys.readouterr().out


def test_training(monkeypatch, capsys):
    pytest.importorskip("lightning", reason="needs the extra `train`")
    monkeypatch.setattr(sys, "argv", ["training", "--rounds", "1", "--steps", "3"])
    threads = torch.get_num_threads()
    importlib.import_module("training").main()
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[-2:]] == [
        "| bent_stacked_flow(2",
        "| realnvp_flow(60",
    ]


def test_every_contestant_maps_back():
    x = torch.randn(5, 4)
    for name, contestant in contestants.entering(4).items():
        layer = contestant.build(4)
        outputs, logabsdet = layer(x)
        if contestant.invertible:
            back, negative = layer.inverse(outputs)
            torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3, msg=name)
            torch.testing.assert_close(negative.flatten(), -logabsdet.flatten())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark")
def test_memory():
    def measure(contestant):
        # In a process of its own: whatever ran here before has left memory to be used again.
        arguments = ["--contestant", contestant, "--size", "2048", "--batch", "4"]
        command = [
            sys.executable,
            Path(__file__).parents[1] / "benchmarks" / "memory.py",
            *arguments,
        ]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    dense, ours = measure("nn.Linear"), measure("P4InvTransform as in the paper")
    for _ in range(2):
        # A kernel that takes back idle pages before the peak adds them to it: the least counts.
        if not ours["peak"] < dense["peak"]:
            ours = measure("P4InvTransform as in the paper")
    # Weight, gradient and two moments of 16 MiB each, against A and its inverse.
    assert dense["held"] == pytest.approx(64.0, rel=0.05)
    assert ours["held"] == pytest.approx(32.0, rel=0.05)
    assert 32 < ours["peak"] < dense["peak"] < 128
    # A and its inverse in float64.
    assert ours["peak_of_correction"] > 32 + 64


def test_fitted_exponent():
    assert report.fitted_exponent({2: 4.0, 4: 16.0, 8: 64.0}) == pytest.approx(2.0)
