"""A Boltzmann generator of alanine dipeptide (Amber ff96, OBC2): ten minutes at 600 K.

    python examples/boltzmann_generator.py
    python examples/boltzmann_generator.py --temperature 300 --minutes 60

Another molecule is one line: `capped_peptide("SER")` or `molecule_from_pdb("mine.pdb")`, which
`python -m p4flows.molecules` does without a script. The folder takes the report and the samples;
the same command goes on where it stopped.
"""

import argparse
from pathlib import Path

from p4flows.molecules import BoltzmannGenerator, Settings, alanine_dipeptide


def main() -> None:
    """Run all steps."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--temperature", type=float, default=600.0, help="K")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    name = f"alanine_dipeptide-{arguments.temperature:g}K-{arguments.seed}"
    output = arguments.output or Path("results/boltzmann_generator") / name
    settings = Settings(temperature=arguments.temperature, seed=arguments.seed)
    molecule = alanine_dipeptide()
    generator = BoltzmannGenerator(molecule, output, settings, workers=arguments.workers)
    summary = generator.run(arguments.minutes)
    print(f"ESS {summary['ess']:.1%} ± {summary['ess_error']:.1%}; {output / 'report.html'}")


# The simulation starts processes, which import this file.
if __name__ == "__main__":
    main()
