"""AveragedModel: running averages (EMA, SWA) of what P4 layers apply, not of its parts."""

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from p4flows.matrices import InvertibleMatrix, PerturbedMatrix
from p4flows.matrices.merge import probe, probe_tolerance, read_state, write_state
from p4flows.matrices.perturbed import living_matrices
from p4flows.merging.attaching import is_stepped


class AveragedModel(swa_utils.AveragedModel):
    """torch's `AveragedModel`, for models with P4 layers: the same arguments, the same use.

    A layer applies Ã, a function of A, u and v; the average of each is not that of Ã, and the
    average of inverses is not the inverse of the average. Here Ã itself is averaged, with u = 0 in
    the averaged module, and what is stored beside it is computed anew when the averaged module is
    next read: O(n²k) in an update, O(n³) before an evaluation. Orthogonal matrices are taken back
    to the nearest orthogonal one, O(n³) in each update. All else is averaged by torch.

    Args:
        model: with or without P4 layers.
        device: as in torch.
        avg_fn: as in torch.
        multi_avg_fn: as in torch, for example `torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)`.
        use_buffers: whether buffers that are not of P4 layers are averaged as well.

    Attributes:
        module: the averaged module.

    Raises:
        ValueError: from `update_parameters`, when the model has not the layers of the average; from
            the next use of `module`, when an average is singular to working precision.

    Example:
        >>> from p4flows import P4InvTransform
        >>> layer = P4InvTransform(2, init=torch.diag(torch.tensor([1.0, 3.0])))
        >>> averaged = AveragedModel(layer)
        >>> averaged.update_parameters(layer)
        >>> layer.matrix.assign(torch.diag(torch.tensor([3.0, 5.0])))
        >>> averaged.update_parameters(layer)
        >>> averaged.module.weight().diagonal().tolist()
        [2.0, 4.0]
        >>> averaged.module.logabsdet().exp().item()
        8.0
    """

    _stale = False

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model as it is now into the average.

        Args:
            model: of the structure that the average was made of.
        """
        averages, matrices = _matrices(self._modules["module"]), _matrices(model)
        shapes = [[each.frozen.shape for each in found] for found in (averages, matrices)]
        if shapes[0] != shapes[1]:
            raise ValueError("model has not the P4 layers of the average")
        number = self.n_averaged.clone()
        means = [average.frozen.clone() for average in averages]
        self._stale = False  # or torch's own reading would compute all inverses
        super().update_parameters(model)
        for average, matrix, mean in zip(averages, matrices, means, strict=True):
            latest = matrix.dense().to(mean)
            mean = latest if number == 0 else self._mean(mean, latest, number)
            directions = {name: getattr(matrix, name) for name in ("v", "seed", "draws")}
            u = torch.zeros_like(average.u)
            write_state([average], {"frozen": mean, "u": u, **directions})
            _right_averages.add(average)
            if not isinstance(average, InvertibleMatrix):
                average.correct()  # the nearest matrix of the set is the average itself
        self._stale = True

    def _mean(self, mean: Tensor, latest: Tensor, number: Tensor) -> Tensor:
        number = number.to(mean.device)
        if self.multi_avg_fn is None and self.avg_fn is not None:
            return self.avg_fn(mean, latest, number)
        average = self.multi_avg_fn or swa_utils.get_swa_multi_avg_fn()
        average([mean], [latest], number)
        return mean

    def _refresh(self) -> None:
        """Inverses and log-determinants of the averages."""
        if not self._stale:
            return
        for name, average in self._modules["module"].named_modules():  # type: ignore[union-attr]
            if isinstance(average, InvertibleMatrix):
                average.correct()
                if not bool(average.error().condition.isfinite().all()):
                    raise ValueError(f"{name}: the average is singular to working precision")
        self._stale = False

    def __getattr__(self, name: str) -> Any:
        if name == "module":
            self._refresh()
        return super().__getattr__(name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; what parameters, buffers and modules are found by."""
        self._refresh()
        return super().named_modules(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refresh()
        super()._save_to_state_dict(*args, **kwargs)


def _matrices(module: nn.Module | None) -> list[PerturbedMatrix]:
    assert module is not None
    return [each for each in module.modules() if isinstance(each, PerturbedMatrix)]


# Averages made by the class above, whose inverse may be late on purpose.
_right_averages: "weakref.WeakSet[PerturbedMatrix]" = weakref.WeakSet()


class ElementwiseAverageWarning(UserWarning):
    """The parts of a P4 layer are averaged one by one, by torch's or another `AveragedModel`.

    The averaged layer then has a wrong log-determinant, or a perturbation that belongs to other
    matrices. `p4flows.AveragedModel` is the right one.

    Example:
        >>> issubclass(ElementwiseAverageWarning, UserWarning)
        True
    """


class AverageWatch:
    """Notices copies of matrices that are averaged entry by entry.

    A copy that is written to again and again, and that no optimizer steps, is an average. It is a
    wrong one when what it stores beside A is not that of A, or when it has the A of the matrix it
    was copied from and the u of many steps.
    """

    def __init__(self) -> None:
        self._versions: weakref.WeakKeyDictionary[PerturbedMatrix, int] = (
            weakref.WeakKeyDictionary()
        )
        self._warned = False

    @torch.no_grad()
    def look(self, matrices: Iterable[PerturbedMatrix], steps: int) -> None:
        """Warn, once, of an average of entries.

        Args:
            matrices: those to be merged next.
            steps: of the optimizer, since the last look.
        """
        for copy in () if self._warned else living_matrices():
            if copy in _right_averages or is_stepped(copy) or copy.u.is_inference():
                continue
            written = copy.u._version - self._versions.get(copy, copy.u._version)
            self._versions[copy] = copy.u._version
            if written >= 2 and any(
                _is_entrywise_average(copy, matrix, often=written >= steps) for matrix in matrices
            ):
                self._warned = True
                warnings.warn(
                    "the parts of a P4 layer are being averaged one by one (by torch's "
                    "AveragedModel?): the average of u and v, or of an inverse, is not that of the "
                    "matrix. p4flows.AveragedModel takes the same arguments and averages what the "
                    "layer applies",
                    ElementwiseAverageWarning,
                    stacklevel=2,
                )
                return


def _is_entrywise_average(copy: PerturbedMatrix, matrix: PerturbedMatrix, often: bool) -> bool:
    if copy is matrix or copy.layout() != matrix.layout():
        return False
    if torch.equal(copy.frozen, matrix.frozen):
        return often and not torch.equal(copy.u, matrix.u)
    a, x, *_ = copy._stored(read_state([copy]))
    off, condition = probe(a, x, copy.seed, copy.draws)
    rounding = probe_tolerance(copy.size) * copy.size * torch.finfo(a.dtype).eps * condition
    return bool((off > rounding).any())
