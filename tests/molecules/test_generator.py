"""The generator from simulation to report, at a toy's length."""

import json
import math
import re

import numpy as np
import pytest
import torch

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
mdtraj = pytest.importorskip("mdtraj", reason="needs the extra `molecules`")
command = pytest.importorskip("p4flows.molecules.__main__", reason="needs the extra `molecules`")

TOY = molecules.Settings(
    temperature=600.0, replicas=2, friction=10.0, blocks=1, hidden=(8,), batch=32
)
COLD = molecules.Settings(replicas=2, blocks=1, hidden=(8,), batch=32)


@pytest.fixture(scope="module")
def serine():
    return molecules.capped_peptide("SER")


def make(molecule, folder, settings=TOY):
    return molecules.BoltzmannGenerator(molecule, folder, settings, workers=1, progress=False)


def run(generator, steps=12):
    generator.simulate(frames=120, chunk=60)
    generator.train(steps=steps)
    generator.refine(rounds=2, steps=3, samples=60)
    generator.sample(80)
    return generator.report()


@pytest.fixture(scope="module")
def done(serine, tmp_path_factory):
    generator = make(serine, tmp_path_factory.mktemp("serine"))
    torch.manual_seed(0)
    return generator, run(generator)


@pytest.fixture(autouse=True)
def without_processes(in_this_process):
    """A test needs no other process."""


def test_summary_has_what_a_script_asks(done):
    generator, summary = done
    written = json.loads((generator.output / "summary.json").read_text())
    assert 0 < written["ess"] <= written["ess_clipped"] <= 1
    assert written["ess_error"] >= 0 and written["forward_ess"] >= 0
    assert written["frames"] == 240 and written["minutes"] > 0 and written["samples"] == 80
    assert written["converged"] is False and "changed its state" in (
        " ".join(written["not_converged_because"])
    )
    for entry in written["free_energy"]:
        assert set(entry) == {"states", "value", "error", "simulation", "simulation_error"}
        assert len(entry["states"]) == 2 and math.isfinite(entry["value"])
    assert summary["ess"] == written["ess"]


def test_report_is_one_file_with_its_figures(done):
    generator, summary = done
    page = (generator.output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[0].startswith("Are the weights") and "converged" in headings[1]
    text = (generator.output / "report.md").read_text()
    assert f"{summary['ess']:.1%} ± {summary['ess_error']:.1%}" in page and "| torch | " in text
    for figure in re.findall(r"\]\((.*?)\)", text):
        assert (generator.output / figure).exists()


def test_equal_weight_samples_are_drawn_by_their_weights(done):
    generator, _ = done
    with np.load(generator.output / "samples.npz") as found:
        arrays = dict(found)
    assert arrays["weights"].sum() == pytest.approx(1.0)
    np.testing.assert_allclose(
        arrays["weights"], torch.softmax(generator.samples.log_weights.double(), 0)
    )
    trajectory = mdtraj.load(
        str(generator.output / "samples.dcd"), top=str(generator.output / "samples.pdb")
    )
    flat = trajectory.xyz.reshape(len(trajectory), -1)
    apart = np.abs(flat[:, None] - arrays["positions"][None]).max(-1)
    assert (apart.min(1) < 1e-5).all()
    counts = np.bincount(apart.argmin(1), minlength=80)
    assert (np.abs(counts - 80 * arrays["weights"]) < 1.0 + 1e-6).all()


def test_a_file_gives_the_generator_back(done, tmp_path):
    generator, _ = done
    generator.save(tmp_path / "mine.pt")
    loaded = molecules.BoltzmannGenerator.load(tmp_path / "mine.pt", tmp_path / "again")
    kept = generator.samples
    expected = generator.sample(30)
    generator.samples = kept  # of which other tests ask
    found = loaded.sample(30)
    torch.testing.assert_close(found.positions, expected.positions)
    torch.testing.assert_close(found.log_weights, expected.log_weights)
    assert (tmp_path / "again" / "samples.dcd").exists()
    for content, error in ((None, FileNotFoundError), (b"garbled", ValueError)):
        file = tmp_path / "other.pt"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(error, match="other"):
            molecules.BoltzmannGenerator.load(file)


def test_an_interrupted_training_ends_with_the_same_numbers(serine, tmp_path, monkeypatch):
    from p4flows.molecules import training

    def trained(folder, interrupt):
        generator = make(serine, folder)
        generator.simulate(frames=120, chunk=60)
        if interrupt:
            step = training.Training._step

            def stopping(loop, place):
                if loop.step == 7:
                    raise KeyboardInterrupt
                step(loop, place)

            with monkeypatch.context() as patch:
                patch.setattr(training.Training, "_step", stopping)
                with pytest.raises(KeyboardInterrupt):
                    generator.train(steps=12)
            assert "training" in generator.history["seconds"]
            generator = make(serine, folder)
            generator.simulate(frames=120, chunk=60)
        generator.train(steps=12)
        return generator.flow.state_dict()

    expected = trained(tmp_path / "a", interrupt=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "md").symlink_to(tmp_path / "a" / "md")
    torch.testing.assert_close(trained(tmp_path / "b", interrupt=True), expected, rtol=0, atol=0)


def test_rounds_that_are_done_are_not_done_again(serine, done, tmp_path):
    finished, _ = done
    (tmp_path / "md").symlink_to(finished.output / "md")
    generator = make(serine, tmp_path, COLD)
    generator.simulate(frames=120, chunk=60)
    generator.train(steps=3)
    generator.refine(rounds=4, steps=2, samples=60)
    temperatures = [found[0] for found in generator.history["rounds"]]
    assert temperatures == pytest.approx([600.0 / math.sqrt(2.0), 300.0, 300.0, 300.0])
    flow = {name: value.clone() for name, value in generator.flow.state_dict().items()}
    generator.refine(rounds=4, steps=2, samples=60)
    torch.testing.assert_close(generator.flow.state_dict(), flow, rtol=0, atol=0)
    generator.sample(60)
    summary = generator.report()
    # There is no simulation at 300 K to compare with.
    assert summary["forward_ess"] is None
    assert all(entry["simulation"] is None for entry in summary["free_energy"])


def test_a_folder_of_another_run_is_refused(serine, done):
    generator, _ = done
    with pytest.raises(ValueError, match=r"temperature 600.0 and not 300.0: take another folder"):
        make(serine, generator.output, COLD)
    with pytest.raises(ValueError, match=r"molecule ace-ser-nme and not ace-ala-nme"):
        make(molecules.capped_peptide("ALA"), generator.output)


def test_garbled_files_are_named(serine, tmp_path):
    make(serine, tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json is garbled"):
        make(serine, tmp_path)


def test_a_full_disk_loses_nothing(done, monkeypatch, tmp_path):
    from p4flows.molecules.storage import load_checkpoint, save_checkpoint

    file = tmp_path / "kept.pt"
    save_checkpoint(file, {"number": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(file, {"number": 2})
    assert load_checkpoint(file) == {"number": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_the_minutes_end_a_simulation(serine, tmp_path):
    generator = make(serine, tmp_path)
    assert generator.simulate(minutes=0.0, frames=3_000, chunk=20).shape == (2, 20, 69)
    assert generator.simulate(frames=40, chunk=20).shape == (2, 40, 69)


def test_steps_out_of_order_are_refused(serine, tmp_path):
    with pytest.raises(RuntimeError, match="simulate"):
        make(serine, tmp_path).train(steps=1)
    with pytest.raises(RuntimeError, match="nothing to report"):
        make(serine, tmp_path).report()


def test_a_simulation_that_explodes_is_told_in_a_sentence(tmp_path, capsys, monkeypatch):
    molecule = molecules.capped_peptide("ALA")
    broken = molecules.Molecule(
        "broken", molecule.system, molecule.topology, np.full_like(molecule.positions, np.nan)
    )
    monkeypatch.setattr(command, "capped_peptide", lambda *_, **__: broken)
    line = ["--sequence", "ALA", "--workers", "1", "--output", str(tmp_path / "out")]
    assert command.main(line) == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("error: ") and "NaN" in printed


def test_rounds_begin_again_when_training_has_gone_on(serine, done, tmp_path):
    finished, _ = done
    (tmp_path / "md").symlink_to(finished.output / "md")
    generator = make(serine, tmp_path)
    generator.simulate(frames=120, chunk=60)
    generator.train(steps=3)
    generator.refine(rounds=1, steps=2, samples=60)
    spent = [generator.spent("refinement")]
    for steps in (3, 6):
        generator.train(steps=steps)
        generator.refine(rounds=1, steps=2, samples=60)
        spent.append(generator.spent("refinement"))
    assert spent[0] == spent[1] < spent[2]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": 700.0, "simulated": 600.0}, ValueError, "no higher than that of the sim"),
        ({"temperature": -1.0}, ValueError, "must be positive"),
        ({"temperature": "hot"}, TypeError, "a quantity is needed"),
        ({"replicas": 1}, ValueError, "replicas must be at least 2"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        molecules.Settings(**settings)


def test_settings_take_quantities():
    unit = pytest.importorskip("openmm.unit")
    settings = molecules.Settings(300 * unit.kelvin, friction=0.01 / unit.femtosecond)
    assert settings.temperature == 300.0 and settings.simulated == 600.0
    assert settings.friction == pytest.approx(10.0)


def test_the_command_answers_bad_input_in_a_sentence(tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    for arguments, words in (
        (["--sequence", "FOO"], "three-letter codes"),
        ([str(tmp_path / "none.pdb")], "No such file"),
        (["--sequence", "ALA", "--force-field", "none.xml"], "none.xml"),
    ):
        assert command.main([*arguments, *output]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and words in printed.err, printed.err
        assert printed.err.count("\n") == 1
    for arguments in ([], ["a.pdb", "--sequence", "ALA"], ["a.pdb", "--minutes", "-1"]):
        with pytest.raises(SystemExit):
            command.main([*arguments, *output])
        capsys.readouterr()


def test_the_command_runs_and_goes_on(tmp_path, capsys, monkeypatch):
    from p4flows.molecules import generator as module

    tiny = {"replicas": 2, "blocks": 1, "hidden": (8,), "batch": 32}
    monkeypatch.setattr(command, "Settings", lambda **s: module.Settings(**s, **tiny))
    simulate = module.BoltzmannGenerator.simulate
    short = {"frames": 120, "chunk": 60}
    monkeypatch.setattr(
        module.BoltzmannGenerator, "simulate", lambda self, **s: simulate(self, **{**s, **short})
    )
    line = ["--sequence", "SER", "--temperature", "600", "--minutes", "0.05", "--workers", "1"]
    line += ["--output", str(tmp_path / "ser")]
    assert command.main(line) == 0
    assert "report: " in capsys.readouterr().out
    assert (tmp_path / "ser" / "report.html").exists()

    def stop(self, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.BoltzmannGenerator, "train", stop)
    assert command.main(line) == 130
    assert "goes on from here" in capsys.readouterr().err
