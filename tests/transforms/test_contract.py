"""Every public transform keeps the contract, in both directions."""

import pytest
from torch_versions import compiles_stacks

import p4flows.transforms
from transforms.contract import CHECKS, build, check_compile
from transforms.registry import CONSTRUCTORS, AtContext, Pixels


def test_registry_holds_every_public_transform():
    made = [constructor() for constructor in CONSTRUCTORS.values()]
    wrapped = (Pixels, AtContext)
    made = [each.transform if isinstance(each, wrapped) else each for each in made]
    registered = {type(each).__name__ for each in made}
    assert registered == set(p4flows.transforms.__all__)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", CONSTRUCTORS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(check, name, direction):
    if check is check_compile and name.startswith("BentStack"):
        compiles_stacks()
    check(build(CONSTRUCTORS[name], direction))
