"""The benchmark of learning at a toy's length, from data to table and curves."""

import dataclasses
import gzip
import json
import math
import struct
import sys

import learning
import learning_contestants
import learning_data as data
import learning_report as report
import pytest
import torch
from nflows.transforms import NaiveLinear
from PIL import Image
from torch import nn

# nflows' layers call torch.qr and torch.triangular_solve.
pytestmark = pytest.mark.filterwarnings("ignore:torch.*is deprecated:UserWarning")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def photographs(tmp_path):
    """Two pictures of noise, tall enough for held-out bands."""
    files = []
    for index, (height, width) in enumerate([(200, 40), (210, 30)]):
        generator = torch.Generator().manual_seed(index)
        grey = torch.randint(256, (height, width), generator=generator, dtype=torch.uint8)
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(grey.numpy()).save(files[-1])
    return files


@pytest.fixture
def call(monkeypatch, tmp_path, photographs):
    """Runs learning.py on tiny patches and a tiny ICA, in this process; the folder it wrote to."""
    tasks = {
        "patches8": lambda output, directory: data.patches(3, photographs),
        "ica64": lambda output, directory: data.ica(6),
    }
    monkeypatch.setattr(learning, "TASKS", learning.TASKS | tasks)
    monkeypatch.setattr(data, "held_out_rows", lambda features: 50)

    def runner(*arguments):
        monkeypatch.setattr(
            sys,
            "argv",
            ["learning", *arguments, "--workers", "1", "--output", str(tmp_path / "out")],
        )
        learning.main()
        return tmp_path / "out"

    return runner


def records(folder):
    return {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}


def test_rates_are_searched_with_one_seed_and_nothing_runs_twice(call):
    arguments = ["--task", "patches8", "--contestants", "p4", "lu", "swap", "--steps", "8"]
    arguments += ["--rates", "1e-3", "1e-2", "--seeds", "0", "1"]
    output = call(*arguments)
    found = records(output / "patches8-8")
    assert len(found) == 3 * (2 + 1)
    for name in ("p4", "lu", "swap"):
        own = [r for r in found.values() if r["contestant"] == name]
        (second,) = (r for r in own if r["seed"] == 1)
        ends = {r["rate"]: r["curve"][-1]["value"] for r in own if r["seed"] == 0}
        assert second["rate"] == min(ends, key=ends.get)
    for record in found.values():
        assert record["diverged"] is None
        steps, cpu, wall, values = zip(*(p.values() for p in record["curve"]), strict=True)
        assert steps == tuple(range(9)) and values[-1] < values[0]
        assert list(cpu) == sorted(cpu) and wall[-1] > 0
    table = (output / "patches8-8.md").read_text()
    assert "| nflows LULinear | 0.01 (edge, of 2) |" in table and "seeds 0, 1;" in table
    assert (output / "patches8-8.png").stat().st_size > 0
    # An interrupted call: one run is missing, the others are left as they are.
    folder = output / "patches8-8"
    missing = folder / "lu-0.01-1.json"
    missing.unlink()
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    call(*arguments)
    assert missing.exists()
    assert {file: file.stat().st_mtime_ns for file in written} == written


def test_a_run_that_diverges_is_recorded_and_does_not_win(call):
    output = call(
        *("--task", "ica64", "--contestants", "relative-sgd", "lu", "--steps", "12"),
        *("--rates", "1e-2", "1e4", "--seeds", "0"),
    )
    found = records(output / "ica64-12")
    assert 1 <= found["relative-sgd-10000-0.json"]["diverged"] <= 12
    assert found["relative-sgd-0.01-0.json"]["diverged"] is None
    table = (output / "ica64-12.md").read_text()
    (line,) = (line for line in table.splitlines() if "relative gradient, SGD" in line)
    assert "0.01 (edge, of 2)" in line and "1 of 2" in line


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, RuntimeError])
def test_only_a_failed_factorisation_counts_as_diverged(error):
    """A mistake of the benchmark's own is not to be taken for a layer that cannot be trained."""

    class Failing(NaiveLinear):
        def forward(self, inputs, context=None):
            if self.training:
                raise error("on purpose")
            return super().forward(inputs, context)

    task = dataclasses.replace(data.ica(3), flow=lambda layer: data.LogisticSources(Failing(3)))
    if error is RuntimeError:
        with pytest.raises(RuntimeError, match="on purpose"):
            learning.train(task, "naive", 1e-3, 0, 5, "failing")
    else:
        assert learning.train(task, "naive", 1e-3, 0, 5, "failing")["diverged"] == 1


def test_table_alone_runs_nothing(call):
    with pytest.raises(SystemExit, match="no runs of ica64, 8 steps"):
        call("--task", "ica64", "--steps", "8", "--table")


def test_quick_takes_every_contestant_of_an_ica_that_learns(call):
    output = call("--task", "ica64", "--quick")
    names = {record["contestant"] for record in records(output / "ica64-50").values()}
    assert {"p4", "p4-paper", "lu", "qr", "naive", "relative", "relative-sgd"} <= names
    assert not {"swap", "random"} & names
    for record in records(output / "ica64-50").values():
        assert record["curve"][-1]["value"] > -0.2


def test_every_layer_has_the_log_determinant_of_its_jacobian():
    x = torch.randn(4, 6)
    for name, contestant in learning_contestants.CONTESTANTS.items():
        if not (contestant.takes_part("patches8", 6) or contestant.takes_part("ica64", 6)):
            continue
        torch.manual_seed(1)
        layer = contestant.layer(6)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        layer.eval()
        outputs, logabsdet = layer(x)
        assert outputs.shape == x.shape and logabsdet.shape == (4,)
        jacobian = torch.func.jacrev(lambda row, of=layer: of(row[None])[0][0])(x[0])
        expected = torch.linalg.slogdet(jacobian).logabsdet.expand(4)
        torch.testing.assert_close(logabsdet, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_relative_gradient_is_the_gradient_times_the_gram_matrix():
    weight, x = torch.randn(5, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    relative = learning_contestants.RelativeGradientLinear(5).double()
    exact = NaiveLinear(5).double()
    relative.weight = nn.Parameter(weight.clone())
    exact._weight = nn.Parameter(weight.clone())
    gradients = []
    for layer, own in ((relative, relative.weight), (exact, exact._weight)):
        inputs = x.clone().requires_grad_()
        outputs, logabsdet = layer(inputs)
        (outputs.pow(4).sum(1) - logabsdet).mean().backward()
        gradients.append((own.grad, inputs.grad))
    (own, own_inputs), (euclidean, inputs) = gradients
    torch.testing.assert_close(own, euclidean @ weight.T @ weight)
    torch.testing.assert_close(own_inputs, inputs)


def test_excess_of_the_true_unmixing_is_zero():
    task = data.ica(4)
    mixing = data.mixing_matrix(4)
    assert torch.linalg.cond(mixing).item() == pytest.approx(data.CONDITION)
    flow = task.flow(NaiveLinear)
    with torch.no_grad():
        flow.layer._weight.copy_(torch.linalg.inv(mixing))
        flow.layer.bias.zero_()
    assert learning.evaluate(task, flow) == pytest.approx(0.0, abs=1e-5)


def idx(array):
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    return header + array.numpy().tobytes()


def test_mnist_is_read_from_plain_and_compressed_files(tmp_path):
    images = torch.randint(256, (5, 3, 2), dtype=torch.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    assert torch.equal(data.read_idx(tmp_path / "train-images-idx3-ubyte"), images)
    assert torch.equal(data.mnist_images(tmp_path, "t10k"), images.flatten(1))
    task = data.mnist(tmp_path)
    assert task.batch(7, torch.Generator().manual_seed(0)).shape == (7, 6)
    assert math.isfinite(learning.evaluate(task, task.flow(NaiveLinear)))


def test_nll_of_mnist_is_that_of_grey_values(tmp_path):
    """A flow that makes the values uniform on [0, 256) has the NLL n ln 256."""
    images = torch.arange(256, dtype=torch.uint8).reshape(64, 2, 2)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
    task = data.mnist(tmp_path)

    class Logistic(nn.Module):
        def log_prob(self, inputs):
            return data.logistic_log_density(inputs)

    nll = learning.evaluate(task, Logistic())
    assert nll == pytest.approx(4 * math.log(256), rel=1e-4)


def test_what_is_no_idx_file_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"text")
    with pytest.raises(ValueError, match="is not an IDX file of unsigned bytes"):
        data.read_idx(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match=r"neither train-images.* nor .*\.gz in"):
        data.mnist_images(tmp_path, "train")


def test_mnist_needs_its_folder(call):
    with pytest.raises(SystemExit):
        call("--task", "mnist")


def test_curves_are_read_between_their_points():
    points = [(0.0, 4.0), (1.0, 2.0), (3.0, 1.0)]
    record = {"curve": [{"cpu": cpu, "value": value} for cpu, value in points]}
    assert report.value_at(record, 0.5) == 3.0 and report.value_at(record, 9.0) == 1.0
    assert report.seconds_to(record, 1.5) == 2.0 and report.seconds_to(record, 0.5) == math.inf
