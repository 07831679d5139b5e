"""Molecules from OpenMM's force-field files: of a PDB file, or a capped peptide by its sequence."""

import importlib.resources
import io
import math
import os
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import networkx
import numpy as np
import openmm
import torch
from openmm import app, unit
from scipy.spatial.transform import Rotation

from p4flows.molecules.internal import place
from p4flows.molecules.system import Molecule
from p4flows.molecules.topology import bond_graph

# Their OBC is the native GBSAOBCForce, several times as fast as that of implicit/obc2.xml.
FORCE_FIELD = ("amber99sbildn.xml", "amber99_obc.xml")

# Names of protonation states and what their residue is called in files.
_VARIANTS = {"HID": "HIS", "HIE": "HIS", "HIP": "HIS", "ASH": "ASP", "GLH": "GLU", "LYN": "LYS"}
_RESIDUES = (
    *("ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE", "LEU", "LYS", "MET"),
    *("PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL", *_VARIANTS),
)
_KNOWN = (*_RESIDUES, "ACE", "NME", "CYX", "HOH", "WAT")


def molecule_from_pdb(
    file: str | os.PathLike[str],
    *,
    force_field: str | Sequence[str] = FORCE_FIELD,
    name: str | None = None,
) -> Molecule:
    """A molecule as a PDB file has it, with all hydrogens and without solvent.

    Args:
        file: the PDB file.
        force_field: one or several of the files that OpenMM ships, or XML files of your own;
            Amber 99SB-ILDN with OBC by default.
        name: names files of results; by default the file's.

    Returns:
        A `Molecule` without constraints, whose density has all internal dimensions.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is no PDB file, holds several molecules, alternate locations or
            coordinates that are not finite, or the force field does not know it.

    Example:
        >>> import tempfile
        >>> from openmm import app
        >>> molecule = capped_peptide("ALA")
        >>> with tempfile.NamedTemporaryFile("w", suffix=".pdb") as file:
        ...     app.PDBFile.writeFile(molecule.topology, 10.0 * molecule.positions, file)
        ...     file.flush()
        ...     molecule_from_pdb(file.name, name="dipeptide").atoms
        22
    """
    path = Path(file)
    text = path.read_text(errors="replace")
    atoms = [line for line in text.splitlines() if line.startswith(("ATOM", "HETATM"))]
    if not atoms:
        raise ValueError(f"{path} must be a PDB file, got no line of an atom in it")
    if any(line[16:17].strip() for line in atoms):
        raise ValueError(
            f"{path} has alternate locations (column 17): keep one of each atom, for example by "
            "pdb_selaltloc of pdb-tools"
        )
    try:
        found = app.PDBFile(io.StringIO(text))
    # OpenMM's reader raises whatever it stumbles over.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a PDB file: {error}") from error
    positions = found.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return _molecule(name or path.stem, found.topology, positions, force_field)


def capped_peptide(
    sequence: str | Iterable[str], *, force_field: str | Sequence[str] = FORCE_FIELD
) -> Molecule:
    """Acetyl–peptide–methylamide of L-amino acids, extended.

    Args:
        sequence: three-letter codes, "SER" or "ALA-PRO" or a list of them. HIS is HID or HIE,
            whichever has the better hydrogen bonds; HID, HIE, HIP, ASH, GLH and LYN name a
            protonation.
        force_field: as in `molecule_from_pdb`.

    Returns:
        A `Molecule` without constraints.

    Raises:
        ValueError: when a residue is unknown or there is none.

    Example:
        >>> capped_peptide("ALA-ALA-ALA-ALA").atoms
        52
    """
    codes = re.split(r"[-\s,]+", sequence.strip()) if isinstance(sequence, str) else list(sequence)
    names = [code.upper() for code in codes]
    unknown = [name for name in names if name not in _RESIDUES]
    if unknown or not names:
        raise ValueError(
            f"sequence must be three-letter codes joined by '-', of {', '.join(_RESIDUES)}; got "
            f"{unknown[0] if unknown else 'none'!r}. The caps ACE and NME come by themselves"
        )
    topology, positions = _heavy_atoms([_VARIANTS.get(name, name) for name in names])
    modeller = app.Modeller(topology, positions * unit.nanometer)
    variants = [None, *(name if name in _VARIANTS else None for name in names), None]
    # OpenMM draws where hydrogens start from Python's generator: a simulation is found again by its
    # start positions, which are to be the same in every process.
    state = random.getstate()
    random.seed(0)
    try:
        modeller.addHydrogens(
            variants=variants, platform=openmm.Platform.getPlatformByName("Reference")
        )
    finally:
        random.setstate(state)
    full = np.array(modeller.positions.value_in_unit(unit.nanometer))
    return _molecule(f"ace-{'-'.join(names).lower()}-nme", modeller.topology, full, force_field)


# Length in nm, angle and torsion in degrees of each backbone atom: φ = −75°, ψ = 150°, ω = 180°.
_BACKBONE = {"CA": (0.146, 122.0, 180.0), "C": (0.152, 111.0, -75.0), "N": (0.134, 117.0, 150.0)}
_CHAIN = {"ACE": ("CH3", "C"), "NME": ("N", "C")}


def _heavy_atoms(names: list[str]) -> tuple[app.Topology, np.ndarray]:
    """An extended backbone on which PDBFixer's residues are superposed."""
    line = [np.array(start) for start in ([0.0, 0.0, 0.0], [0.152, 0.0, 0.0], [0.219, 0.116, 0.0])]
    for kind in ("CA", "C", "N") * len(names) + ("CA",):
        length, *angles = _BACKBONE[kind]
        coordinates = torch.tensor([[[length, *map(math.radians, angles)]]], dtype=torch.float64)
        references = (torch.from_numpy(at).reshape(1, 1, 3) for at in line[:-4:-1])
        line.append(place(coordinates, torch.tensor([False]), *references).flatten().numpy())
    topology = app.Topology()
    chain = topology.addChain()
    positions: list[np.ndarray] = []
    for name in ("ACE", *names, "NME"):
        residue = topology.addResidue(name, chain)
        own = dict(zip(_CHAIN.get(name, ("N", "CA", "C")), line, strict=False))
        line = line[len(own) :]
        if name != "NME":
            # Opposite to the two other neighbours of the carbonyl carbon.
            arms = [own["C"] - own.get("CA", own.get("CH3")), own["C"] - line[0]]
            outward = sum(arm / np.linalg.norm(arm) for arm in arms)
            own["O"] = own["C"] + 0.123 * outward / np.linalg.norm(outward)
        if name in names:
            own = _superposed(name, own) | own
        for atom, at in own.items():
            topology.addAtom(atom, app.Element.getBySymbol(atom[0]), residue)
            positions.append(at)
    topology.createStandardBonds()
    return topology, np.stack(positions)


def _superposed(name: str, backbone: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The heavy atoms of PDBFixer's template of a residue, upon N, Cα and C."""
    file = importlib.resources.files("pdbfixer") / "templates" / f"{name}.pdb"
    with file.open() as lines:
        template = app.PDBFile(lines)
    atoms = [atom.name for atom in template.topology.atoms()]
    found = dict(zip(atoms, template.getPositions(asNumpy=True)._value, strict=True))
    turn, _ = Rotation.align_vectors(
        [backbone[to] - backbone["CA"] for to in ("N", "C")],
        [found[to] - found["CA"] for to in ("N", "C")],
    )
    return {atom: turn.apply(at - found["CA"]) + backbone["CA"] for atom, at in found.items()}


def _molecule(
    name: str, topology: app.Topology, positions: np.ndarray, force_field: str | Sequence[str]
) -> Molecule:
    files = [force_field] if isinstance(force_field, str) else list(force_field)
    _refuse_several(topology)
    if not np.isfinite(positions).all():
        raise ValueError(f"{name} must have finite coordinates, got NaN or infinite ones")
    try:
        system = app.ForceField(*files).createSystem(
            topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False
        )
    except ValueError as error:
        elements = {atom.element for atom in topology.atoms()}
        remedy = (
            ""
            if app.element.hydrogen in elements
            else " There are no hydrogens: add them, by openmm.app.Modeller(...).addHydrogens()."
        )
        raise ValueError(f"force_field {files} does not fit {name}: {error}{remedy}") from error
    return Molecule(name, system, topology, np.asarray(positions, dtype=np.float64))


def _refuse_several(topology: app.Topology) -> None:
    """An error when not all atoms are connected by bonds."""
    graph = bond_graph(topology)
    parts = list(networkx.connected_components(graph))
    if len(parts) < 2:
        return
    names = {residue.index: residue.name for residue in topology.residues()}
    own = [{graph.nodes[atom]["residue"] for atom in part} for part in parts]
    torn = sorted(set.union(*own[1:]) & own[0] or set.intersection(*own))
    apart = [names[min(residues)] for residues in own[1:]]
    unknown = [name for name in apart if name not in _KNOWN and len(name) > 2]
    hint = "leave out water, ions and other chains"
    if torn:
        hint = f"atoms that connect {names[torn[0]]} are missing"
    elif unknown:
        hint = f"residue {unknown[0]} has no bonds that OpenMM knows: add CONECT lines to the file"
    raise ValueError(
        f"the file must hold one molecule, got {len(parts)} that no bond connects, with residues "
        f"{', '.join(sorted(set(apart)))} apart: {hint}"
    )
