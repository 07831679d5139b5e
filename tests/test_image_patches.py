"""The example of image patches from photographs to figure, at a toy's length."""

import json
import math
import sys

import image_patches as example
import photographs
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(tmp_path):
    """Two pictures, whose grey value is 0 in the bands of training and 255 in those held out."""
    files = []
    for index, (height, width) in enumerate([(400, 20), (250, 11)]):
        band = torch.arange(height) // photographs.BAND % photographs.PERIOD
        grey = 255 * (band == photographs.HELD_OUT).to(torch.uint8)
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(grey[:, None].expand(height, width).contiguous().numpy()).save(files[-1])
    return files


@pytest.fixture
def noisy(tmp_path):
    """A picture of noise."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(256, (210, 30), generator=generator, dtype=torch.uint8)
    Image.fromarray(grey.numpy()).save(tmp_path / "noisy.png")
    return [tmp_path / "noisy.png"]


@pytest.mark.parametrize("size", [2, 8, 64])
@pytest.mark.parametrize("height", [130, 192, 200, 427, 1411])
def test_rows_of_patches_are_all_in_bands_of_one_kind(size, height):
    held_out = [
        {y for top in photographs.rows(height, size, kind) for y in range(top, top + size)}
        for kind in (False, True)
    ]
    assert not held_out[0] & held_out[1]
    assert held_out[1] <= {y for y in range(height) if y // 64 % 5 == 2}


def test_held_out_patches_share_no_pixel_with_training(pictures):
    """Patches of one grey value have features of pure noise: none lies across a border."""
    data = photographs.Photographs(5, pictures)
    for held_out in (False, True):
        drawn = data.draw(500, torch.Generator().manual_seed(1), held_out)
        assert (data.pictures(drawn).abs() < 1 / 256).all()


def test_features_are_standardised_and_stand_for_pixels(noisy):
    data = photographs.Photographs(4, noisy)
    x = data.draw(20_000, torch.Generator().manual_seed(1))
    assert x.shape == (20_000, 15)
    torch.testing.assert_close(x.std(0), torch.ones(15), rtol=0.03, atol=0)
    pixels = data.pictures(x)
    assert pixels.sum((1, 2)).abs().max() < 1e-5
    torch.testing.assert_close(pixels.flatten(1)[:, :-1] / data.scale, x)
    weights = torch.randn(3, 15)
    product = (data.filters(weights)[:, None] * pixels[None, :9]).sum((2, 3))
    torch.testing.assert_close(product, weights @ x[:9].T, rtol=1e-4, atol=1e-4)
    # As drawn from brighter photographs: filters do not see the mean.
    brighter = (data.filters(weights)[:, None] * (pixels[None, :9] + 0.5)).sum((2, 3))
    torch.testing.assert_close(brighter, product, rtol=1e-3, atol=1e-3)


def test_patches_are_those_of_the_picture(tmp_path):
    """Grey values that name their pixel, so that a patch tells where it was."""
    grey = torch.arange(10 * 20, dtype=torch.uint8).reshape(10, 20)
    Image.fromarray(grey.numpy()).save(tmp_path / "named.png")
    data = photographs.Photographs(3, [tmp_path / "named.png"])
    patches = 256 * data.pictures(data.draw(300, torch.Generator().manual_seed(0)))
    expected = torch.tensor([[-21.0, -20, -19], [-1, 0, 1], [19, 20, 21]])
    assert (patches - expected).abs().max() < 1


def test_size_is_at_most_a_band():
    with pytest.raises(ValueError, match="size must be between 2 and 64, got 65"):
        photographs.Photographs(65, [])


def test_photographs_come_with_scikit_image(monkeypatch):
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'p4flows\[examples\]'"):
        photographs.Photographs(8)


def test_all_photographs_are_there():
    pytest.importorskip("skimage", reason="needs the extra `examples`")
    for name in photographs.NAMES:
        with Image.open(photographs.folder() / name) as image:
            # Of every photograph, something is held out.
            assert image.height >= 3 * photographs.BAND


def test_script_writes_picture_and_numbers_and_continues(noisy, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(example.PRESETS, "quick", example.Preset(2, 6, hidden=(5,)))
    monkeypatch.setattr(example, "HELD_OUT", 100)
    source = photographs.Photographs(example.SIZE, noisy)
    monkeypatch.setattr(example, "Photographs", lambda size: source)
    monkeypatch.setattr(sys, "argv", ["image_patches", "--output", str(tmp_path / "out")])
    example.main()
    stem = tmp_path / "out" / "image_patches-quick-0"
    record = json.loads(stem.with_suffix(".json").read_text())
    assert math.isfinite(record["nll_nats"]) and record["round_trip_error"] < 1e-3
    assert stem.with_suffix(".png").stat().st_size > 0
    assert "NLL" in capsys.readouterr().out
    example.main()
    assert json.loads(stem.with_suffix(".json").read_text()) == record

    stem.with_suffix(".png").unlink()
    monkeypatch.setattr(example, "Photographs", None)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--figures"])
    example.main()
    assert stem.with_suffix(".png").stat().st_size > 0
    example.plt.close("all")


def test_learned_features_are_drawn_as_they_enter_a_patch(noisy):
    """Noise of one unit behind the first layer changes a patch by its column of the inverse."""
    torch.manual_seed(0)
    data = photographs.Photographs(example.SIZE, noisy)
    layer = example.first_layer(example.patch_flow(data.features, example.Preset(1, 1, (5,))))
    with torch.no_grad():
        layer.matrix.u.normal_(std=0.1)
        units = torch.eye(data.features)
        drawn = data.pictures(layer.inverse(units)[0] - layer.inverse(0 * units)[0])
        columns = data.pictures(layer.weight_inverse().T)
    torch.testing.assert_close(drawn, columns, rtol=1e-4, atol=1e-5)
