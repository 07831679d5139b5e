"""The command, python -m p4flows.molecules: simulation, training, samples and a report."""

import argparse
import json
import os
import sys

from openmm import OpenMMException

from p4flows.molecules.generator import BoltzmannGenerator, Settings
from p4flows.molecules.peptide import FORCE_FIELD, capped_peptide, molecule_from_pdb


def main(arguments: list[str] | None = None) -> int:
    """Simulate, train, refine, sample and report, or go on where an earlier call stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m p4flows.molecules",
        description="A Boltzmann generator of one molecule: simulation, training, weighted samples "
        "and a report. The same command again goes on where it stopped.",
    )
    parser.add_argument("pdb", nargs="?", help="a PDB file of the molecule, with all hydrogens")
    parser.add_argument("--sequence", help="instead of a file: SER or ALA-PRO, caps are added")
    parser.add_argument("--output", required=True, help="the folder of all results")
    parser.add_argument("--temperature", type=float, default=300.0, help="of the weights, in K")
    parser.add_argument("--minutes", type=float, default=30.0, help="wall-clock time of all")
    parser.add_argument("--simulated", type=float, default=0.0, help="K; default 600 or hotter")
    parser.add_argument("--force-field", nargs="+", default=list(FORCE_FIELD))
    parser.add_argument("--workers", type=int, default=2, help="cores to use")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    if (chosen.pdb is None) == (chosen.sequence is None):
        parser.error("give either a PDB file or --sequence")
    if not chosen.minutes > 0 or chosen.workers < 1:
        parser.error("--minutes and --workers must be positive")
    try:
        if chosen.pdb is not None:
            molecule = molecule_from_pdb(chosen.pdb, force_field=chosen.force_field)
        else:
            molecule = capped_peptide(chosen.sequence, force_field=chosen.force_field)
        settings = Settings(
            temperature=chosen.temperature, simulated=chosen.simulated, seed=chosen.seed
        )
        generator = BoltzmannGenerator(molecule, chosen.output, settings, workers=chosen.workers)
        print(f"{molecule.name}, {molecule.atoms} atoms; results go to {generator.output}{os.sep}")
        summary = generator.run(chosen.minutes)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except (
        ValueError,
        TypeError,
        ArithmeticError,
        OSError,
        RuntimeError,
        OpenMMException,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    kept = ("ess", "ess_error", "ess_clipped", "forward_ess", "converged", "minutes", "frames")
    print(json.dumps({name: summary[name] for name in kept}, ensure_ascii=False))
    print(f"report: {generator.output / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
