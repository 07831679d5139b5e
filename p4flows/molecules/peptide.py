"""Molecules from OpenMM's force-field files: of a PDB file, or a capped peptide of alanines."""

import math
import os
import random
from collections.abc import Sequence

import numpy as np
import openmm
from openmm import app, unit

from p4flows.arguments import check_positive_int
from p4flows.molecules.bonds import bonded
from p4flows.molecules.system import Molecule

# Their OBC is the native GBSAOBCForce, several times as fast as that of implicit/obc2.xml.
FORCE_FIELD = ("amber99sbildn.xml", "amber99_obc.xml")


def molecule_from_pdb(
    file: str | os.PathLike[str],
    *,
    force_field: Sequence[str] = FORCE_FIELD,
    name: str | None = None,
) -> Molecule:
    """A molecule as a PDB file has it, with all hydrogens and without solvent.

    Args:
        file: the PDB file.
        force_field: OpenMM's files of force field and implicit solvent; Amber 99SB-ILDN with OBC.
        name: names files of results; by default the file's.

    Returns:
        A `Molecule` without constraints, whose density has all internal dimensions.

    Raises:
        ValueError: when the file holds several molecules, or the force field does not know it.

    Example:
        >>> import tempfile
        >>> from openmm import app
        >>> molecule = capped_alanines(1)
        >>> with tempfile.NamedTemporaryFile("w", suffix=".pdb") as file:
        ...     app.PDBFile.writeFile(molecule.topology, 10.0 * molecule.positions, file)
        ...     file.flush()
        ...     molecule_from_pdb(file.name, name="dipeptide").atoms
        22
    """
    found = app.PDBFile(os.fspath(file))
    positions = found.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    if name is None:
        name = os.path.splitext(os.path.basename(os.fspath(file)))[0]
    return _molecule(name, found.topology, positions, force_field)


def capped_alanines(residues: int, *, force_field: Sequence[str] = FORCE_FIELD) -> Molecule:
    """Acetyl–(alanine)ₙ–methylamide, extended; three alanines make 42 atoms, four make 52.

    Args:
        residues: number n of alanines.
        force_field: OpenMM's files of force field and implicit solvent.

    Returns:
        A `Molecule` without constraints.

    Raises:
        TypeError: when residues is not an int.
        ValueError: when it is not positive.

    Example:
        >>> capped_alanines(4).atoms
        52
    """
    check_positive_int("residues", residues)
    topology = app.Topology()
    chain = topology.addChain()
    placed: list[np.ndarray] = []
    atoms: list[app.Atom] = []

    def add(residue: app.Residue, name: str, element: str, to: int | None, at: np.ndarray) -> int:
        atoms.append(topology.addAtom(name, app.Element.getBySymbol(element), residue))
        if to is not None:
            topology.addBond(atoms[to], atoms[-1])
        placed.append(at)
        return len(atoms) - 1

    def beside(length: float, angle: float, torsion: float, *references: int) -> np.ndarray:
        return _place(length, angle, torsion, *(placed[r] for r in references))

    acetyl = topology.addResidue("ACE", chain)
    methyl = add(acetyl, "CH3", "C", None, np.zeros(3))
    carbonyl = add(acetyl, "C", "C", methyl, np.array([0.152, 0.0, 0.0]))
    add(acetyl, "O", "O", carbonyl, np.array([0.152 + 0.123 * 0.5, -0.123 * 0.866, 0.0]))
    # N in the plane, on the other side of the oxygen.
    nitrogen_at = np.array([0.152 + 0.1335 * 0.45, 0.1335 * 0.893, 0.0])
    before = methyl
    for _ in range(residues):
        residue = topology.addResidue("ALA", chain)
        n = add(residue, "N", "N", carbonyl, nitrogen_at)
        ca = add(residue, "CA", "C", n, beside(0.146, 122.0, 180.0, carbonyl, n, before))
        c = add(residue, "C", "C", ca, beside(0.1525, 111.0, -140.0, n, ca, carbonyl))
        # The L form: −122.5° from the carbonyl carbon, seen along N–Cα.
        add(residue, "CB", "C", ca, beside(0.153, 110.0, -140.0 - 122.5, n, ca, carbonyl))
        add(residue, "O", "O", c, beside(0.123, 120.5, -45.0, ca, c, n))
        nitrogen_at = beside(0.1335, 116.5, 135.0, ca, c, n)
        before, carbonyl = ca, c
    amide = topology.addResidue("NME", chain)
    n = add(amide, "N", "N", carbonyl, nitrogen_at)
    add(amide, "C", "C", n, beside(0.146, 122.0, 180.0, carbonyl, n, before))
    modeller = app.Modeller(topology, np.stack(placed) * unit.nanometer)
    # OpenMM draws where hydrogens start from Python's generator: a simulation is found again by its
    # start positions, which are to be the same in every process.
    state = random.getstate()
    random.seed(0)
    try:
        modeller.addHydrogens(platform=openmm.Platform.getPlatformByName("Reference"))
    finally:
        random.setstate(state)
    positions = np.array(modeller.positions.value_in_unit(unit.nanometer))
    return _molecule(f"ace-ala{residues}-nme", modeller.topology, positions, force_field)


def _molecule(
    name: str, topology: app.Topology, positions: np.ndarray, force_field: Sequence[str]
) -> Molecule:
    _refuse_several(topology)
    try:
        system = app.ForceField(*force_field).createSystem(
            topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False
        )
    except ValueError as error:
        raise ValueError(f"force_field {list(force_field)} does not fit {name}: {error}") from error
    return Molecule(name, system, topology, np.asarray(positions, dtype=np.float64))


def _refuse_several(topology: app.Topology) -> None:
    """An error when not all atoms are connected by bonds."""
    neighbours = bonded(topology)
    reached, queue = {0}, [0]
    for atom in queue:
        fresh = [n for n in neighbours[atom] if n not in reached]
        reached.update(fresh)
        queue += fresh
    if len(reached) != len(neighbours):
        raise ValueError(
            f"the file must hold one molecule, got {len(reached)} of {len(neighbours)} atoms in "
            "its first one: leave out water, ions and other chains"
        )


def _place(
    length: float,
    angle: float,
    torsion: float,
    behind: np.ndarray,
    bond: np.ndarray,
    first: np.ndarray,
) -> np.ndarray:
    """The atom at a distance from `bond`, at an angle to `behind` and a torsion to `first`."""
    theta, phi = math.radians(angle), math.radians(torsion)
    along = (bond - behind) / np.linalg.norm(bond - behind)
    across = np.cross(behind - first, along)
    across /= np.linalg.norm(across)
    aside = np.cross(across, along)
    turned = math.cos(phi) * aside + math.sin(phi) * across
    return bond + length * (-math.cos(theta) * along + math.sin(theta) * turned)
