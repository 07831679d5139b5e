"""OpenMMEnergy: reduced energies of batches of structures, with forces as gradients."""

import concurrent.futures
import math
import warnings
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor, nn

from p4flows.arguments import check_rows
from p4flows.molecules.losses import capped, check_cap
from p4flows.molecules.system import number
from p4flows.molecules.workers import start_pool


class OpenMMEnergy(nn.Module):
    """Reduced potential energy u(x)/k_BT of an OpenMM system, differentiable by its forces.

    A structure whose energy or forces are not finite, or on which the platform fails, gets an
    infinite energy and no force; the others of its batch are unharmed.

    Args:
        system: the OpenMM system.
        temperature: in K.
        platform: name of the OpenMM platform; for few atoms "Reference" is the fastest.
        workers: processes that share a batch; 0 evaluates in this one. `close()` ends them, and so
            does leaving a `with` block or the end of this process. Where one dies, all are started
            anew and the batch is evaluated again, with a warning.
        cap: as in `mixed_loss`, where it belongs: u is capped wherever it is asked for.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the temperature is not positive, workers negative, the platform unknown, or
            the cap not a pair with low < high.

    Example:
        >>> from p4flows.molecules import alanine_dipeptide
        >>> molecule = alanine_dipeptide()
        >>> energy = OpenMMEnergy(molecule.system, 600.0)
        >>> x = torch.tensor(molecule.positions).reshape(1, 66).requires_grad_()
        >>> u = energy(x)
        >>> u.sum().backward()
        >>> u.shape, x.grad.shape
        (torch.Size([1]), torch.Size([1, 66]))
    """

    def __init__(
        self,
        system: openmm.System,
        temperature: float,
        *,
        platform: str = "Reference",
        workers: int = 0,
        cap: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(system, openmm.System):
            raise TypeError(f"system must be an openmm.System, got {type(system).__name__}")
        temperature = number(temperature, unit.kelvin)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if not isinstance(workers, int) or isinstance(workers, bool):
            raise TypeError(f"workers must be an int, got {type(workers).__name__}")
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        known = [openmm.Platform.getPlatform(i).getName() for i in _platforms()]
        if platform not in known:
            raise ValueError(f"platform must be one of {known}, got {platform!r}")
        check_cap(cap)
        self.features = 3 * system.getNumParticles()
        self.temperature = temperature
        self.workers = workers
        self.cap = cap
        self._kt = boltzmann_energy(temperature)
        self._recipe = (openmm.XmlSerializer.serialize(system), platform)
        self._evaluator: _Evaluator | None = None
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def forward(self, positions: Tensor) -> Tensor:
        """Reduced energies.

        Args:
            positions: in nm, shape `(N, 3·atoms)`.

        Returns:
            u/k_BT of shape `(N,)`, in the dtype of the positions; differentiable once.

        Raises:
            TypeError: when the positions are not a floating-point tensor.
            ValueError: when their shape is not `(N, 3·atoms)`.
        """
        check_rows(positions, self.features)
        energies: Tensor = _Energy.apply(positions, self)  # type: ignore[no-untyped-call]
        return capped(energies, self.cap)

    def evaluate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Uncapped energies and forces, without autograd.

        Args:
            positions: float64, in nm, shape `(N, 3·atoms)`.

        Returns:
            u/k_BT of shape `(N,)` and −∂u/∂x/k_BT of shape `(N, 3·atoms)`.

        Raises:
            concurrent.futures.process.BrokenProcessPool: when worker processes die a second time.
        """
        if self.workers == 0:
            if self._evaluator is None:
                self._evaluator = _Evaluator(*self._recipe)
            energies, forces = self._evaluator(positions)
        else:
            chunks = np.array_split(positions, self.workers)
            try:
                results = self._share(chunks)
            except BrokenProcessPool:
                warnings.warn("a worker process died: the batch is evaluated again", stacklevel=2)
                self.close()
                results = self._share(chunks)
            energies, forces = (np.concatenate(parts) for parts in zip(*results, strict=True))
        return energies / self._kt, forces / self._kt

    def _share(self, chunks: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        if self._pool is None:
            self._pool = start_pool(self.workers, _start_worker, self._recipe)
        return list(self._pool.map(_evaluate_in_worker, chunks))

    def close(self) -> None:
        """End the worker processes; the next evaluation would start new ones."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __enter__(self) -> "OpenMMEnergy":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # Contexts and processes cannot be copied; a copy starts its own.
        return {**self.__dict__, "_evaluator": None, "_pool": None}


def boltzmann_energy(temperature: float) -> float:
    """k_BT in kJ/mol.

    Args:
        temperature: in K.

    Returns:
        The molar thermal energy.

    Example:
        >>> round(boltzmann_energy(600.0), 3)
        4.989
    """
    constant = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
    return float(constant * temperature)


class _Energy(torch.autograd.Function):
    """Energies whose gradient is minus the forces, both from one evaluation."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, energy: OpenMMEnergy) -> Tensor:
        values, forces = energy.evaluate(positions.detach().cpu().double().numpy())
        ctx.save_for_backward(torch.from_numpy(forces).to(positions))
        return torch.from_numpy(values).to(positions)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (forces,) = ctx.saved_tensors
        return -gradient.unsqueeze(-1) * forces, None


class _Evaluator:
    """Energies and forces in kJ/mol(/nm), one structure after the other, in this process."""

    def __init__(self, system: str, platform: str) -> None:
        self.system = openmm.XmlSerializer.deserialize(system)
        self.platform = openmm.Platform.getPlatformByName(platform)
        # One thread each: few atoms gain nothing from more, and workers would compete.
        self.properties = {"Threads": "1"} if platform == "CPU" else {}
        self.context = self._new_context()

    def _new_context(self) -> openmm.Context:
        return openmm.Context(
            self.system, openmm.VerletIntegrator(0.001), self.platform, self.properties
        )

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        energies = np.full(len(positions), math.inf)
        forces = np.zeros(positions.shape)
        for index, flat in enumerate(positions):
            if not np.isfinite(flat).all():
                continue
            try:
                self.context.setPositions(flat.reshape(-1, 3))
                state = self.context.getState(getEnergy=True, getForces=True)
            except openmm.OpenMMException:
                # The failure may have left the context unusable.
                self.context = self._new_context()
                continue
            energy = state.getPotentialEnergy()._value
            force = state.getForces(asNumpy=True)._value
            if math.isfinite(energy) and np.isfinite(force).all():
                energies[index], forces[index] = energy, force.ravel()
        return energies, forces


_worker: _Evaluator


def _start_worker(system: str, platform: str) -> None:
    global _worker
    _worker = _Evaluator(system, platform)


def _evaluate_in_worker(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _worker(positions)


def _platforms() -> range:
    return range(openmm.Platform.getNumPlatforms())
