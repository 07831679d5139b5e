"""Molecular systems: an OpenMM system with its topology and start positions."""

import dataclasses
import importlib.util
import numbers
from pathlib import Path
from typing import Literal

import mdtraj
import numpy as np
import openmm
from openmm import app, unit

Solvent = Literal["obc2", "obc1", "vacuum"]
Constraints = Literal["hydrogen_bonds", "all_bonds"]

_SOLVENTS = {"obc2": app.OBC2, "obc1": app.OBC1, "vacuum": None}
_CONSTRAINTS = {None: None, "hydrogen_bonds": app.HBonds, "all_bonds": app.AllBonds}


def number(value: object, of: unit.Unit) -> float:
    """A number from a quantity with units, or from a number.

    Args:
        value: either.
        of: the unit that a number has, and a quantity is taken in.

    Returns:
        The number.

    Raises:
        TypeError: when it is neither, or of another kind of unit.

    Example:
        >>> number(1.0 * unit.nanosecond, unit.picosecond), number(5, unit.kelvin)
        (1000.0, 5.0)
    """
    if unit.is_quantity(value):
        value = value.value_in_unit(of)  # type: ignore[attr-defined]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"a number in {of} or a quantity is needed, got {value!r}")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Molecule:
    """A molecule and the potential that it moves in.

    Attributes:
        name: names files of results, so that it is no path.
        system: the OpenMM system.
        topology: the OpenMM topology.
        positions: start positions in nm, shape `(atoms, 3)`.
    """

    name: str
    system: openmm.System
    topology: app.Topology
    positions: np.ndarray

    def __post_init__(self) -> None:
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name must name a file without a folder, got {self.name!r}")

    @property
    def atoms(self) -> int:
        """Number of atoms."""
        return len(self.positions)

    def trajectory(self, positions: np.ndarray) -> mdtraj.Trajectory:
        """An mdtraj trajectory, to be analysed or saved.

        Args:
            positions: in nm, shape `(frames, 3·atoms)` or `(frames, atoms, 3)`.

        Returns:
            The trajectory, with this molecule's topology.
        """
        frames = np.asarray(positions, dtype=np.float32).reshape(-1, self.atoms, 3)
        return mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(self.topology))


def alanine_dipeptide(
    solvent: Solvent = "obc2", constraints: Constraints | None = None
) -> Molecule:
    """Alanine dipeptide (22 atoms, Amber ff96) of openmmtools' test systems (Section 4.3).

    Args:
        solvent: "obc2" is OpenMM's native `GBSAOBCForce` (0.03 ms an evaluation on the Reference
            platform); "obc1", openmmtools' own default, is a `CustomGBForce` and 25 times slower;
            "vacuum" has no solvent.
        constraints: None leaves all bonds free, so that the density has all 60 internal dimensions;
            "hydrogen_bonds" or "all_bonds" freezes those bond lengths.

    Returns:
        A `Molecule`.

    Raises:
        ValueError: when solvent or constraints is not one of the names.
        ModuleNotFoundError: when openmmtools is not installed.

    Example:
        >>> molecule = alanine_dipeptide()
        >>> molecule.atoms, molecule.system.getNumConstraints()
        (22, 0)
    """
    for argument, value, known in (
        ("solvent", solvent, _SOLVENTS),
        ("constraints", constraints, _CONSTRAINTS),
    ):
        if value not in known:
            raise ValueError(f"{argument} must be one of {list(known)}, got {value!r}")
    folder = _openmmtools_data() / "alanine-dipeptide-gbsa"
    parameters = app.AmberPrmtopFile(str(folder / "alanine-dipeptide.prmtop"))
    coordinates = app.AmberInpcrdFile(str(folder / "alanine-dipeptide.crd"))
    system = parameters.createSystem(
        implicitSolvent=_SOLVENTS[solvent], constraints=_CONSTRAINTS[constraints]
    )
    positions = coordinates.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    name = f"alanine_dipeptide-{solvent}" + (f"-{constraints}" if constraints else "")
    return Molecule(name, system, parameters.topology, np.asarray(positions))


def _openmmtools_data() -> Path:
    """The folder of openmmtools' data files.

    Found without importing openmmtools, which takes a second and prints a banner of pymbar.
    """
    spec = importlib.util.find_spec("openmmtools")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the files of alanine dipeptide come with openmmtools: pip install -e '.[molecules]'"
        )
    return Path(spec.submodule_search_locations[0]) / "data"
