import io

import numpy as np
import pytest
from PIL import Image

from pixart_jax.data import images
from pixart_jax.data.buckets import Fit
from pixart_jax.images import to_model


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def picture(height=24, width=40) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 128)], -1).astype(
        np.uint8
    )


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
    np.testing.assert_array_equal(
        images.decode(encoded(Image.fromarray(gray.astype(np.uint16) * 257))), expected
    )


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_cmyk_and_other_codecs_are_close_to_the_picture(kind):
    image = Image.fromarray(picture())
    data = encoded(
        image.convert("CMYK") if kind != "WEBP" else image,
        kind,
        **({"quality": 98} if kind != "TIFF" else {}),
    )
    assert np.abs(images.decode(data).astype(int) - picture()).mean() < 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encoded(Image.fromarray(picture()), "JPEG")[:-200],
        encoded(Image.fromarray(picture()))[:60],
    ],
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
    values = to_model(np.array([0, 255, 128], np.uint8))
    assert values.dtype == np.float32 and values[0] == -1 and values[1] == 1
    np.testing.assert_array_equal(
        np.rint((to_model(np.arange(256, dtype=np.uint8)) + 1) * 127.5), np.arange(256)
    )


def photograph() -> np.ndarray:
    """uint8 [1024, 1536, 3]: a photograph with fine detail, the one in scikit-learn enlarged."""
    from sklearn.datasets import load_sample_image

    return np.asarray(
        Image.fromarray(load_sample_image("china.jpg")).resize(
            (1536, 1024), Image.Resampling.LANCZOS
        )
    )


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "RGB"])
def test_a_picture_of_any_mode_is_rgb(mode):
    data = encoded(
        Image.fromarray(picture()).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    )
    decoded = images.decode(data)
    assert (
        decoded.shape == (24, 40, 3) and decoded.dtype == np.uint8 and images.size(data) == (24, 40)
    )
    if mode != "1":
        gray = np.asarray(Image.fromarray(picture()).convert("L").convert("RGB"), int)
        expected = gray if mode in ("L", "LA") else picture().astype(int)
        assert np.abs(decoded - expected).mean() < (0.01 if mode != "P" else 30)


def test_gray_with_alpha_lies_on_white():
    la = np.dstack([np.full((4, 4), 50, np.uint8), np.full((4, 4), 255, np.uint8)])
    la[0, :, 1], la[1, :, 1] = 0, 128
    decoded = images.decode(encoded(Image.fromarray(la)))
    assert (
        (decoded[0] == 255).all()
        and (decoded[2:] == 50).all()
        and abs(int(decoded[1, 0, 0]) - 152) <= 1
    )


def test_colour_of_16_bits_is_scaled_to_8():
    """A PNG of 16 bits a channel, which Pillow cannot write: its bytes by hand."""
    import struct
    import zlib

    wide = picture().astype(np.uint16) * 257
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines))
    )
    np.testing.assert_array_equal(images.decode(data + chunk(b"IEND", b"")), picture())


def without_adobe_marker(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def test_cmyk_is_right_with_and_without_adobe_s_inversion():
    ink = Image.fromarray(picture()).convert("CMYK")
    # Pillow writes inks inverted, with Adobe's marker, as Photoshop does
    adobe = encoded(ink, "JPEG", quality=98)
    assert b"Adobe" in adobe
    plain = without_adobe_marker(
        encoded(Image.fromarray(255 - np.asarray(ink), "CMYK"), "JPEG", quality=98)
    )
    for data in (adobe, plain):
        assert np.abs(images.decode(data).astype(int) - picture()).mean() < 3
        fitted, _, size = images.fitted(data, (24, 40))
        assert size == (24, 40) and np.abs(fitted.astype(int) - picture()).mean() < 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert images.size(data) == (8, 12) and (images.decode(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_s_and_a_tiff_s_rotation_is_applied_once(orientation):
    upright = picture(32, 48)
    turned = images.decode(encoded(Image.fromarray(upright)))  # exact
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {
        2: Image.FLIP_LEFT_RIGHT,
        3: Image.ROTATE_180,
        4: Image.FLIP_TOP_BOTTOM,
        5: Image.TRANSPOSE,
        6: Image.ROTATE_90,
        7: Image.TRANSVERSE,
        8: Image.ROTATE_270,
    }
    image = Image.fromarray(upright)
    image = image.transpose(stored[orientation]) if orientation in stored else image
    tiff, jpeg = (
        encoded(image, "TIFF", tiffinfo={0x0112: orientation}),
        encoded(image, "JPEG", quality=98, exif=exif),
    )
    np.testing.assert_array_equal(images.decode(tiff), turned)
    assert images.size(tiff) == images.size(jpeg) == (32, 48)
    assert np.abs(images.decode(jpeg).astype(int) - upright).mean() < 3
    fitted, how, size = images.fitted(jpeg, (16, 24))
    assert size == (32, 48) and how == Fit(16, 24, 0, 0)
    assert np.abs(fitted.astype(int) - images.to_bucket(upright, (16, 24))[0]).mean() < 4


def test_exif_behind_a_png_s_pixels_is_found_and_damaged_exif_is_none():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(picture()).transpose(Image.ROTATE_90), "PNG", exif=exif)
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + int.from_bytes(data[at : at + 4], "big")]
    late = data.replace(chunk, b"").replace(data[-12:], chunk + data[-12:])
    for form in (data, late):
        assert images.size(form) == (24, 40)
        np.testing.assert_array_equal(images.decode(form), picture())
    broken = encoded(
        Image.fromarray(picture()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage"
    )
    assert images.size(broken) == images.decode(broken).shape[:2] == (24, 40)


def test_sizes_are_read_from_a_file_s_beginning():
    class Counted(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            data = super().read(size)
            Counted.taken += len(data)
            return data

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8))
    for kind in ("JPEG", "PNG"):
        Counted.taken, data = 0, encoded(noise, kind)
        assert images.size(Counted(data)) == (600, 800) and Counted.taken < len(data) / 5, kind


def test_a_huge_picture_is_refused_by_its_header_and_a_large_one_is_not():
    def jpeg(height, width):
        data = bytearray(encoded(Image.fromarray(picture()), "JPEG"))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        return bytes(data)

    assert images.size(jpeg(10_000, 12_000)) == (10_000, 12_000)
    for read in (images.size, images.decode, lambda data: images.fitted(data, (64, 64))):
        with pytest.raises(images.UnreadableImage, match="more than 178,956,970 pixels"):
            read(jpeg(20_000, 10_000))


def test_floating_point_pictures_are_refused():
    with pytest.raises(images.UnreadableImage, match="floating-point"):
        images.decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


def test_a_large_jpeg_decoded_reduced_is_the_same_picture_within_a_level():
    pixels = photograph()
    data = encoded(Image.fromarray(pixels), "JPEG", quality=92)
    for bucket in ((256, 256), (256, 384), (128, 128)):
        exact, how = images.to_bucket(images.decode(data), bucket)
        fast, found, size = images.fitted(data, bucket)
        assert found == how and size == (1024, 1536) and fast.shape == exact.shape
        assert np.abs(fast.astype(int) - exact).mean() < 1.0, bucket
    # not shrunk to a half: the very pixels
    exact, _ = images.to_bucket(images.decode(data), (640, 960))
    np.testing.assert_array_equal(images.fitted(data, (640, 960))[0], exact)
    png = encoded(Image.fromarray(pixels[:300, :400]))
    np.testing.assert_array_equal(
        images.fitted(png, (64, 64))[0], images.to_bucket(images.decode(png), (64, 64))[0]
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_any_damage_is_a_readable_picture_or_one_line(kind):
    data = encoded(Image.fromarray(picture(64, 64)), kind)
    rng = np.random.default_rng(0)
    for _ in range(300):
        spoilt = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            spoilt[place] = rng.integers(256)
        spoilt = bytes(spoilt[: rng.integers(1, len(data) + 1)])
        for read in (images.size, images.decode, lambda data: images.fitted(data, (16, 16))):
            try:
                read(spoilt)
            except images.UnreadableImage as fault:
                assert "\n" not in str(fault)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_pictures_of_one_pixel_a_side_fill_their_bucket(size):
    data = encoded(Image.fromarray(np.full((*size, 3), 90, np.uint8)))
    pixels, _, original = images.fitted(data, (32, 64))
    assert original == size and pixels.shape == (32, 64, 3) and (pixels == 90).all()
