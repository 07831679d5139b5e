"""Frames of alanine dipeptide for all tests of molecules."""

import pytest

from molecules import openmm_frames


@pytest.fixture(scope="session")
def molecule():
    from p4flows.molecules import alanine_dipeptide

    return alanine_dipeptide()


@pytest.fixture(scope="session")
def frames(molecule):
    """400 frames at 600 K, 20 fs apart, float64, shape (400, 66)."""
    return openmm_frames.frames(molecule, 400, spacing=20)


@pytest.fixture
def in_this_process(monkeypatch):
    """Simulations run in a thread: fresh processes take seconds to start."""
    from p4flows.molecules import dynamics

    class Pool(dynamics.concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers, initializer, arguments):
            super().__init__(1, initializer=initializer, initargs=arguments)

    monkeypatch.setattr(dynamics, "start_pool", Pool)
