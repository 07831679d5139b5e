"""A flow class for nessai's configuration."""

from typing import Any

from p4flows.flows.conversion import swap_linear
from p4flows.merging.hook import MergeHook

try:
    from nessai.flows.realnvp import RealNVP
except ImportError as error:
    raise ImportError("p4flows.nessai needs nessai: pip install nessai") from error


class P4RealNVP(RealNVP):
    """nessai's RealNVP with P4Inv layers between the couplings, and the hook that merges them.

    `flow_config={"flow": P4RealNVP, ...}` is all that nessai needs; the other entries are those of
    its RealNVP.

    Args:
        features: dimension of the data, which nessai finds itself.
        hidden_features: `n_neurons` of the configuration.
        num_layers: `n_blocks` of the configuration.
        num_blocks_per_layer: `n_layers` of the configuration.
        **options: the other options of nessai's RealNVP but `linear_transform`.

    Attributes:
        hook: the `MergeHook`, which follows whichever optimizer nessai makes.

    Example:
        >>> import torch
        >>> flow = P4RealNVP(4, 8, num_layers=2, num_blocks_per_layer=1)
        >>> flow.eval().log_prob(torch.zeros(5, 4)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_layers: int,
        num_blocks_per_layer: int,
        **options: Any,
    ) -> None:
        super().__init__(
            features,
            hidden_features,
            num_layers,
            num_blocks_per_layer,
            linear_transform="lu",
            **options,
        )
        swap_linear(self)
        self.hook = MergeHook(self)
