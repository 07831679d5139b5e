"""Statistics of metastable states, φ and ψ."""

import numpy as np
import pytest

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")


def test_populations_errors_and_transitions():
    labels = np.array([[0, 0, -1, 0, 1], [1, 0, 1, -1, 1], [2, 2, 2, 2, 2]])
    statistics = molecules.state_statistics(labels)
    shares = np.array([[0.6, 0.2, 0.0], [0.2, 0.6, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(statistics.populations, shares.mean(0))
    np.testing.assert_allclose(statistics.errors, shares.std(0, ddof=1) / np.sqrt(3))
    assert statistics.transitions == 3


def test_errors_shrink_with_replicas():
    generator = np.random.default_rng(0)
    few = molecules.state_statistics(generator.integers(0, 2, (4, 100)))
    many = molecules.state_statistics(generator.integers(0, 2, (400, 100)))
    assert many.errors.max() < 0.25 * few.errors.max()
    np.testing.assert_allclose(many.populations, 0.5, atol=4 * many.errors.max())


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.zeros((2, 5)), TypeError, "labels must be integers, got float64"),
        (np.zeros((1, 5), dtype=int), ValueError, "2 replicas or more"),
        (np.zeros(5, dtype=int), ValueError, r"got \(5,\)"),
    ],
)
def test_labels_that_have_no_statistics_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        molecules.state_statistics(labels)


def test_phi_psi_of_the_start(molecule):
    torsions = np.degrees(molecules.phi_psi(molecule.trajectory(molecule.positions)))
    assert torsions.shape == (1, 2)
    # openmmtools' file is fully extended.
    np.testing.assert_allclose(np.abs(torsions), 180.0, atol=5.0)
