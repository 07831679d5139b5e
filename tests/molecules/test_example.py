"""The example of Section 4.3 from simulation to figure and table, at a toy's length."""

import math
import sys

import numpy as np
import pytest
import torch

mdtraj = pytest.importorskip("mdtraj")
import alanine_dipeptide as example  # noqa: E402
import alanine_dipeptide_ablation as ablation  # noqa: E402
import alanine_dipeptide_report as report  # noqa: E402
import learning  # noqa: E402
import learning_data  # noqa: E402


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("alanine_dipeptide")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    preset = example.Preset(2, 60, steps=3, mixed_steps=2, decay=True, models=("rnvp",))
    for name in ("quick", "paper"):
        monkeypatch.setitem(example.PRESETS, name, preset)
    monkeypatch.setattr(example, "SAMPLES", 50)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_model_gives_numbers_samples_and_a_trajectory(output, monkeypatch, capsys):
    problem = example.Problem(example.PRESETS["quick"], output, workers=1, progress=False)
    for model in example.MODELS:
        record = example.run(model, "quick", 0, output, workers=1, progress=False)
        for stage in ("likelihood", "mixed"):
            assert math.isfinite(record[stage]["nll"]), (model, stage)
            assert (record[stage]["inverse_error"] is None) == ("p4inv" not in model)
        assert example.run(model, "quick", 0, output, workers=1, progress=False) == record
        stem = output / f"{model}-quick-0"
        trajectory = mdtraj.load(stem.with_suffix(".dcd"), top=stem.with_suffix(".pdb"))
        # The table is about the structures in the file.
        np.testing.assert_allclose(
            np.degrees(example.phi_psi(trajectory)),
            np.load(stem.with_suffix(".npz"))["torsions"],
            atol=0.1,
        )

    # Figure and table of these files, without a molecule. Noise that a short simulation has seen.
    monkeypatch.setattr(example, "NOISE", 1e-4)
    data = output / "data-quick-0.json"
    example.kept(data, lambda: example.data_record(problem, 0, data.with_suffix(".npz")))
    monkeypatch.setattr(example, "Problem", None)
    arguments = ["alanine_dipeptide", "--models", *example.MODELS, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--figures"])
    example.main()
    stem = output / "alanine_dipeptide-quick-0"
    table = stem.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    for described in example.MODELS.values():
        assert f"| {described.title} | mixed |" in table
    drawn = report.plt.gcf()
    assert len(drawn.axes) == 2 + len(example.MODELS) and stem.with_suffix(".png").exists()
    report.plt.close(drawn)


def test_columns_in_random_order_are_the_same_structures(output, monkeypatch, capsys):
    folder = output / "ablation"
    folder.mkdir()
    record = ablation.run("spline", "P4Inv, columns in random order", 2, 0, folder)
    assert record["round_trip_nm"] < 1e-3 and math.isfinite(record["median_shift"])
    arguments = ["alanine_dipeptide_ablation", "--steps", "2", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--figures"])
    ablation.main()
    assert "| P4Inv, columns in random order |" in (folder / "ablation-2-0.md").read_text()
    assert "spline-P4Inv-N-10-2-0.json" in capsys.readouterr().err


def test_benchmark_of_learning_has_the_molecule_as_a_task(output):
    task = learning_data.molecule(output)
    assert task.held_out.shape == (60, task.features)
    generator = torch.Generator().manual_seed(0)
    batch = task.batch(7, generator)
    assert batch.shape == (7, 60)
    record = learning.train(task, "lu", 1e-3, seed=0, steps=2, title="molecule")
    assert record["diverged"] is None and len(record["curve"]) == 3
