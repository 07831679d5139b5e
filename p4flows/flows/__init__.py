"""Complete flows of nflows, and conversion between P4 layers and other linear layers."""

from p4flows.flows.builders import bent_stacked_flow, realnvp_flow, spline_flow
from p4flows.flows.conversion import plain, swap_linear

__all__ = ["bent_stacked_flow", "plain", "realnvp_flow", "spline_flow", "swap_linear"]
