"""AveragedModel: running averages (EMA, SWA) of what P4 layers apply, not of its parts."""

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from p4flows.matrices import PerturbedMatrix
from p4flows.matrices.merge import write_state


class AveragedModel(swa_utils.AveragedModel):
    """torch's `AveragedModel`, for models with P4 layers: the same arguments, the same use.

    A layer applies Ã, a function of A, u and v, and the average of each is not that of Ã. Here Ã
    itself is averaged, with u = 0 in the averaged module: O(n²k) in an update. Inverse and
    log-determinant are derived from the average when it is next read, O(n³); an average of
    orthogonal matrices becomes the nearest orthogonal one. All else is averaged by torch.

    Args:
        model: with or without P4 layers.
        device: as in torch.
        avg_fn: as in torch.
        multi_avg_fn: as in torch, for example `torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)`.
        use_buffers: whether buffers that are not of P4 layers are averaged as well.

    Attributes:
        module: the averaged module.

    Raises:
        ValueError: from `update_parameters`, when the model has not the layers of the average; when
            the averaged module is read, and an average is singular to working precision.

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

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model as it is now into the average.

        Args:
            model: of the structure that the average was made of.
        """
        averages, matrices = _matrices(self.module), _matrices(model)
        shapes = [[each.frozen.shape for each in found] for found in (averages, matrices)]
        if shapes[0] != shapes[1]:
            raise ValueError("model has not the P4 layers of the average")
        number = self.n_averaged.clone()
        means = [average.frozen.clone() for average in averages]
        super().update_parameters(model)
        for average, matrix, mean in zip(averages, matrices, means, strict=True):
            latest = matrix.dense().to(mean)
            mean = latest if number == 0 else self._mean(mean, latest, number)
            # The fingerprint of another matrix: the rest is derived when it is read.
            write_state([average], {"frozen": mean, "u": torch.zeros_like(average.u)})
            average._seen = ()

    def _mean(self, mean: Tensor, latest: Tensor, number: Tensor) -> Tensor:
        number = number.to(mean.device)
        if self.multi_avg_fn is None and self.avg_fn is not None:
            return self.avg_fn(mean, latest, number)
        average = self.multi_avg_fn or swa_utils.get_swa_multi_avg_fn()
        average([mean], [latest], number)
        return mean


def _matrices(module: nn.Module) -> list[PerturbedMatrix]:
    return [each for each in module.modules() if isinstance(each, PerturbedMatrix)]
