"""What the package promises as a whole: its names, light imports, types."""

import importlib.resources
import subprocess
import sys

import pytest

import p4flows


@pytest.mark.parametrize("name", p4flows.__all__)
def test_public_name_is_importable_and_documented(name):
    assert getattr(p4flows, name).__doc__


def modules_loaded_by(code):
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_is_light():
    heavy = {"bgflow", "lightning", "mdtraj", "matplotlib", "openmm", "openmmtools"}
    loaded = modules_loaded_by("import p4flows")
    assert "p4flows" in loaded
    assert not heavy & loaded


def test_types_ship():
    assert importlib.resources.files("p4flows").joinpath("py.typed").is_file()


def test_a_weight_of_any_module_needs_torch_alone():
    code = (
        "import torch, p4flows; layer = p4flows.orthogonal(torch.nn.Linear(3, 3)); "
        "p4flows.MergeHook(layer); p4flows.diagnose(layer)"
    )
    assert not {"nflows", "matplotlib", "tensorboard"} & modules_loaded_by(code)
    assert "nflows" in modules_loaded_by("import p4flows; p4flows.P4InvTransform")


def test_all_names_are_listed_and_others_missed():
    assert set(p4flows.__all__) <= set(dir(p4flows))
    with pytest.raises(AttributeError, match="has no attribute 'P4Inv'"):
        _ = p4flows.P4Inv
