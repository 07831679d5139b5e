"""P4Module inside FrEIA's networks."""

import pytest
import torch

pytest.importorskip("FrEIA", reason="needs the extra `integrations`")

import FrEIA.framework as framework
import FrEIA.modules as modules

from p4flows import MergeHook
from p4flows.freia import P4Module

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("shape", [(4,), (3, 2, 2)], ids=["rows", "images"])
def test_both_directions_and_jacobian(shape):
    torch.manual_seed(0)
    network = framework.SequenceINN(*shape)
    network.append(P4Module, rank=2)
    network.double()
    torch.nn.init.normal_(network[0].layer.matrix.u, std=0.3)
    x = torch.randn(5, *shape, dtype=torch.float64)
    z, logabsdet = network(x)
    back, opposite = network(z, rev=True)
    torch.testing.assert_close((back, opposite), (x, -logabsdet))
    size = x[0].numel()
    jacobian = torch.autograd.functional.jacobian(lambda one: network(one[None])[0][0], x[0])
    expected = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
    torch.testing.assert_close(logabsdet[0], expected)


def test_is_a_node_of_a_graph():
    """Also of one with conditions, which it ignores."""
    torch.manual_seed(0)
    start, condition = framework.InputNode(4), framework.ConditionNode(2)
    node = framework.Node(start, P4Module, {"init": "reverse"}, conditions=condition)
    graph = framework.GraphINN([start, condition, node, framework.OutputNode(node)])
    x, c = torch.randn(5, 4), torch.randn(5, 2)
    z, logabsdet = graph(x, c=c)
    torch.testing.assert_close(z, x.flip(1))
    assert logabsdet.shape == (5,) and not logabsdet.any()
    torch.testing.assert_close(graph(z, c=c, rev=True)[0], x)


def test_trains_between_couplings():
    torch.manual_seed(0)

    def net(inputs, outputs):
        return torch.nn.Sequential(
            torch.nn.Linear(inputs, 16), torch.nn.ReLU(), torch.nn.Linear(16, outputs)
        )

    network = framework.SequenceINN(4)
    for _ in range(2):
        network.append(modules.RNVPCouplingBlock, subnet_constructor=net)
        network.append(P4Module)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    hook = MergeHook(network, optimizer)
    losses = []
    for _ in range(200):
        x = torch.randn(128, 4) * torch.tensor([3.0, 1.0, 0.2, 1.0]) + 1.0
        z, logabsdet = network(x)
        loss = (z.square().sum(-1) / 2 - logabsdet).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert hook.stats.merged == 8
    assert sum(losses[-20:]) / 20 < losses[0] - 3.0


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="dims_in must be one shape of one or three numbers"):
        P4Module([(3, 4)])


def test_page(section):
    names = section("FrEIA")
    assert names["outputs"].shape == (2, 3, 8, 8) and names["logabsdet"].shape == (2,)
