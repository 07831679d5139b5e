"""The page "your own molecule" runs as it stands, at a toy's length."""

import re
from pathlib import Path

import pytest

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
app = pytest.importorskip("openmm.app", reason="needs the extra `molecules`")
unit = pytest.importorskip("openmm.unit", reason="needs the extra `molecules`")

PAGE = Path(__file__).parents[2] / "docs" / "your_own_molecule.md"
SHORT = {"FRAMES = 25_000": "FRAMES = 60", "STEPS = 1_500": "STEPS = 3", "100_000": "100"}


def test_the_blocks_follow_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    molecule = molecules.capped_alanines(1)
    with open("mine.pdb", "w") as file:
        app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S))
    for long, short in SHORT.items():
        assert long in code
        code = code.replace(long, short)
    code = code.replace("spacing=100)", "spacing=10, equilibration=10, chunk=60)")
    # One process: what a test starts anew would import this script.
    code = code.replace("replicas=4", "replicas=2").replace("workers=2", "workers=1")
    namespace = {"__name__": "page"}
    exec(compile(code, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "circular=" in printed and "ESS" in printed and "share of φ > 0" in printed
    assert namespace["batch"](None).shape == (256, 60)
    assert namespace["weights"].sum() == pytest.approx(1.0)
    assert Path("weighted.dcd").exists() and Path("mine.pt").exists()
