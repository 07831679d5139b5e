"""The page "your own molecule" runs as it stands, at a toy's length."""

import re
from pathlib import Path

import pytest

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
app = pytest.importorskip("openmm.app", reason="needs the extra `molecules`")
unit = pytest.importorskip("openmm.unit", reason="needs the extra `molecules`")

PAGE = Path(__file__).parents[2] / "docs" / "your_own_molecule.md"
SHORT = {
    "FRAMES, STEPS, SAMPLES = 30_000, 3_000, 100_000": "FRAMES, STEPS, SAMPLES = 120, 3, 100",
    "Settings(temperature=600.0)": "Settings(temperature=600.0, replicas=2, blocks=1, hidden=(8,))",
    "simulate(frames=FRAMES)": "simulate(frames=FRAMES, chunk=60)",
}


def test_the_blocks_follow_each_other(tmp_path, monkeypatch, capsys, in_this_process):
    monkeypatch.chdir(tmp_path)
    molecule = molecules.capped_peptide("ALA")
    with open("mine.pdb", "w") as file:
        app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S))
    for long, short in SHORT.items():
        assert long in code
        code = code.replace(long, short)
    namespace = {"__name__": "page"}
    exec(compile(code, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "ESS" in printed and "share" in printed and "k_BT" in printed
    assert namespace["found"]["weights"].sum() == pytest.approx(1.0)
    assert Path("mine/report.html").exists() and Path("mine/samples.dcd").exists()
