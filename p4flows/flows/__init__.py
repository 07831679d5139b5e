"""Complete flows of nflows, and conversion between P4 layers and other linear layers."""

from p4flows.flows.conversion import plain, swap_linear
from p4flows.flows.paper import bent_stacked_flow, realnvp_flow
from p4flows.flows.spline import spline_flow

__all__ = ["bent_stacked_flow", "plain", "realnvp_flow", "spline_flow", "swap_linear"]
