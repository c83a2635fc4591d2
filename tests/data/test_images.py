import io

import numpy as np
import pytest
from PIL import Image

from pixart_jax.data import images
from pixart_jax.data.buckets import Fit


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def picture(height=24, width=40) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 128)], -1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_pixels_and_size(orientation):
    upright = picture()
    undo = {
        1: None,
        2: Image.FLIP_LEFT_RIGHT,
        3: Image.ROTATE_180,
        4: Image.FLIP_TOP_BOTTOM,
        5: Image.TRANSPOSE,
        6: Image.ROTATE_90,
        7: Image.TRANSVERSE,
        8: Image.ROTATE_270,
    }
    image = Image.fromarray(upright)
    if undo[orientation] is not None:
        image = image.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    np.testing.assert_array_equal(images.decode(data), upright)
    assert images.size(data) == (24, 40)


def test_transparent_parts_lie_on_white():
    rgba = np.dstack([picture(), np.full((24, 40), 255, np.uint8)])
    rgba[:12, :, 3] = 0
    decoded = images.decode(encoded(Image.fromarray(rgba)))
    assert (decoded[:12] == 255).all()
    np.testing.assert_array_equal(decoded[12:], picture()[12:])


def test_a_palette_with_a_transparent_colour_lies_on_white():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    palette.putpixel((1, 2), 1)
    decoded = images.decode(encoded(palette, "PNG", transparency=0))
    assert tuple(decoded[2, 1]) == (255, 0, 0) and tuple(decoded[0, 0]) == (255, 255, 255)


def test_gray_of_8_and_16_bits_is_the_same_picture():
    gray = picture()[..., 0]
    expected = np.repeat(gray[..., None], 3, -1)
    np.testing.assert_array_equal(images.decode(encoded(Image.fromarray(gray))), expected)
    np.testing.assert_array_equal(images.decode(encoded(Image.fromarray(gray.astype(np.uint16) * 257))), expected)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_cmyk_and_other_codecs_are_close_to_the_picture(kind):
    image = Image.fromarray(picture())
    data = encoded(image.convert("CMYK") if kind != "WEBP" else image, kind, **({"quality": 98} if kind != "TIFF" else {}))
    assert np.abs(images.decode(data).astype(int) - picture()).mean() < 3


@pytest.mark.parametrize(
    "data", [b"", b"not an image", encoded(Image.fromarray(picture()), "JPEG")[:-200], encoded(Image.fromarray(picture()))[:60]]
)
def test_what_is_no_whole_image_is_refused(data):
    with pytest.raises(images.UnreadableImage):
        images.decode(data)


def test_a_one_pixel_picture_fills_its_bucket():
    pixels, fit = images.to_bucket(np.full((1, 1, 3), 77, np.uint8), (32, 64))
    assert pixels.shape == (32, 64, 3) and (pixels == 77).all() and fit == Fit(64, 64, 16, 0)


def test_a_picture_of_the_bucket_s_size_is_untouched():
    pixels, fit = images.to_bucket(picture(), (24, 40))
    np.testing.assert_array_equal(pixels, picture())
    assert fit == Fit(24, 40, 0, 0)


def test_model_range_is_minus_one_to_one():
    values = images.to_model(np.array([0, 255, 128], np.uint8))
    assert values.dtype == np.float32 and values[0] == -1 and values[1] == 1
    np.testing.assert_array_equal(np.rint((images.to_model(np.arange(256, dtype=np.uint8)) + 1) * 127.5), np.arange(256))
