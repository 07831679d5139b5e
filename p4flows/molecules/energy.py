"""OpenMMEnergy: reduced energies of batches of structures, with forces as gradients."""

import math
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor, nn

from p4flows.arguments import check_rows
from p4flows.molecules.system import number


class OpenMMEnergy(nn.Module):
    """Reduced potential energy u(x)/k_BT of an OpenMM system, differentiable by its forces.

    A structure whose energy or forces are not finite, or on which the platform fails, gets an
    infinite energy and no force; the others of its batch are unharmed.

    Args:
        system: the OpenMM system.
        temperature: in K, or a quantity.
        platform: name of the OpenMM platform; for few atoms "Reference" is the fastest.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the temperature is not positive or the platform unknown.

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
        self, system: openmm.System, temperature: float, *, platform: str = "Reference"
    ) -> None:
        super().__init__()
        if not isinstance(system, openmm.System):
            raise TypeError(f"system must be an openmm.System, got {type(system).__name__}")
        temperature = number(temperature, unit.kelvin)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        platforms = range(openmm.Platform.getNumPlatforms())
        known = [openmm.Platform.getPlatform(i).getName() for i in platforms]
        if platform not in known:
            raise ValueError(f"platform must be one of {known}, got {platform!r}")
        self.features = 3 * system.getNumParticles()
        self.temperature, self.platform = temperature, platform
        constant = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
        self._kt = float(constant) * temperature
        self._system = openmm.XmlSerializer.serialize(system)
        self._context: openmm.Context | None = None

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
        return energies

    def evaluate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies and forces, without autograd.

        Args:
            positions: float64, in nm, shape `(N, 3·atoms)`.

        Returns:
            u/k_BT of shape `(N,)` and −∂u/∂x/k_BT of shape `(N, 3·atoms)`.
        """
        energies = np.full(len(positions), math.inf)
        forces = np.zeros(positions.shape)
        for index, flat in enumerate(positions):
            if not np.isfinite(flat).all():
                continue
            if self._context is None:
                self._context = self._new_context()
            try:
                self._context.setPositions(flat.reshape(-1, 3))
                state = self._context.getState(getEnergy=True, getForces=True)
            except openmm.OpenMMException:
                # The failure may have left the context unusable.
                self._context = None
                continue
            energy = state.getPotentialEnergy()._value
            force = state.getForces(asNumpy=True)._value
            if math.isfinite(energy) and np.isfinite(force).all():
                energies[index], forces[index] = energy, force.ravel()
        return energies / self._kt, forces / self._kt

    def _new_context(self) -> openmm.Context:
        system = openmm.XmlSerializer.deserialize(self._system)
        # One thread: few atoms gain nothing from more.
        properties = {"Threads": "1"} if self.platform == "CPU" else {}
        platform = openmm.Platform.getPlatformByName(self.platform)
        return openmm.Context(system, openmm.VerletIntegrator(0.001), platform, properties)

    def __getstate__(self) -> dict[str, Any]:
        # A context cannot be copied; a copy makes its own.
        return {**self.__dict__, "_context": None}


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
