import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import photograph

from melfusion_pipeline.pictures_melfusion import as_pil_images, prepare_image


def test_a_picture_is_resized_on_its_shorter_side_cropped_in_the_centre_and_scaled():
    picture = photograph(5, 80, 40)
    prepared = prepare_image(picture, 16)
    resized = picture.resize((32, 16), PIL.Image.Resampling.LANCZOS).crop((8, 0, 24, 16))
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 127.5 - 1
    assert prepared.shape == (3, 16, 16) and prepared.dtype == torch.float32
    torch.testing.assert_close(prepared, expected, atol=1.01 / 127.5, rtol=0)
    assert prepare_image(PIL.Image.new("RGB", (9, 9), "white"), 8).eq(1).all()
    assert prepare_image(PIL.Image.new("RGB", (9, 9), "black"), 8).eq(-1).all()


def test_every_kind_of_picture_gives_the_same_pixels():
    picture = photograph(3, 31, 23)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [picture, array, array / 255, array.astype(np.float32) / 255, tensor, tensor.double() / 255, array[None]]
    expected = prepare_image(picture, 16)
    for kind in (*kinds, tensor[None], [picture]):
        (single,) = as_pil_images(kind)
        assert torch.equal(prepare_image(single, 16), expected)
    assert len(as_pil_images(kinds[:6])) == 6


def test_exif_rotation_cmyk_16_bit_and_transparency_are_handled():
    upright = photograph(1, 20, 32)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    upright.rotate(90, expand=True).save(file, "png", exif=exif)
    assert torch.equal(prepare_image(PIL.Image.open(file), 16), prepare_image(upright, 16))

    grey = (np.linspace(0, 65535, 256).reshape(16, 16)).astype(np.uint16)
    deep = prepare_image(PIL.Image.fromarray(grey), 16)
    torch.testing.assert_close(deep[0], torch.from_numpy(grey.astype(np.float32) / 32767.5 - 1), atol=1 / 127, rtol=0)

    assert (prepare_image(PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0)), 8) == 1).all()
    red = prepare_image(PIL.Image.new("CMYK", (4, 4), (0, 255, 255, 0)), 8)
    assert (red[0] == 1).all() and (red[1:] == -1).all()
    assert prepare_image(PIL.Image.new("RGB", (1, 1)), 8).shape == (3, 8, 8)
    assert prepare_image(PIL.Image.new("L", (1, 5000), 7), 8).shape == (3, 8, 8)


def test_grey_and_transparent_arrays_are_the_pictures_that_pil_makes_of_them():
    for mode in ("L", "RGBA"):
        picture = photograph(4, 20, 30).convert(mode)
        if mode == "RGBA":
            picture.putalpha(PIL.Image.linear_gradient("L").resize(picture.size))
        array = np.asarray(picture)
        expected = prepare_image(picture, 16)
        channels_first = torch.from_numpy(array.copy()).reshape(30, 20, -1).movedim(-1, 0)
        kinds = [array, array / 255, array.reshape(30, 20, -1), channels_first, channels_first / 255, [array]]
        kinds += [channels_first[None]] if mode == "L" else [array[None], channels_first[None]]
        for kind in kinds:
            (single,) = as_pil_images(kind)
            assert single.mode == mode and torch.equal(prepare_image(single, 16), expected)


def test_random_crops_follow_the_generator_and_stay_inside():
    picture = photograph(2, 90, 30)
    crops = [prepare_image(picture, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])


BOMB = PIL.Image.new("1", (1, 1))
WRONG_IMAGES = {
    "empty list": ([], ValueError, "empty list"),
    "path": ("picture.jpg", TypeError, "PIL image"),
    "None inside": ([None], TypeError, r"image\[0\]"),
    "zero side": (np.zeros((0, 8, 3), np.uint8), ValueError, "zero pixels"),
    "no batch": (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "no picture"),
    "NaN": (np.full((8, 8, 3), np.nan), ValueError, "NaN"),
    "text": ("a waltz for piano", TypeError, r"A text is given as `prompt='a waltz for piano'`"),
    "address": (["https://x.org/a.png"], TypeError, r"diffusers\.utils\.load_image\('https://x\.org/a\.png'\)"),
    "path object": (Path("a.png"), TypeError, r"load_image\('a\.png'\)"),
    "two channels": (np.zeros((8, 8, 2), np.uint8), ValueError, r"\[height, width, 1, 3 or 4\]"),
    "one axis": (np.zeros(8, np.uint8), ValueError, r"\[height, width\] or"),
    "channels last tensor": (torch.zeros(8, 8, 3), ValueError, r"\[1, 3 or 4, height, width\]"),
    "0..255 float": (np.full((8, 8, 3), 200.0), ValueError, r"\[0, 1\]"),
    "-1..1 tensor": (torch.full((3, 8, 8), -0.5), ValueError, r"\[0, 1\]"),
    "int64": (np.zeros((8, 8, 3), np.int64), TypeError, "uint8"),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_pictures_are_refused(case: str):
    image, error, message = WRONG_IMAGES[case]
    with pytest.raises(error, match=message):
        as_pil_images(image)


def test_damaged_and_oversized_pictures_are_refused(tmp_path: Path, monkeypatch):
    photograph().resize((300, 300)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    with pytest.raises(ValueError, match="cannot be decoded"):
        as_pil_images(PIL.Image.open(tmp_path / "cut.jpg"))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        as_pil_images(photograph())
