import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from pixart_jax.data import images
from pixart_jax.data.buckets import Fit
from pixart_jax.images import to_model
from tests.data.tiny_sets import encoded, picture

STORED = {  # EXIF orientation: how the upright image is turned before it is stored
    1: None,
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_90,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_270,
}


def image(height=24, width=40) -> Image.Image:
    return Image.fromarray(picture(0, height, width))


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def difference(pixels: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(pixels.astype(int) - expected).mean())


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_applied_once_to_pixels_and_size(orientation):
    upright = picture(0, 32, 48)
    stored = Image.fromarray(upright)
    if STORED[orientation] is not None:
        stored = stored.transpose(STORED[orientation])
    png = encoded(stored, exif=exif(orientation))
    tiff = encoded(stored, "TIFF", tiffinfo={0x0112: orientation})
    jpeg = encoded(stored, "JPEG", quality=98, exif=exif(orientation))
    for data in (png, tiff, jpeg):
        assert images.size(data) == (32, 48)
        assert difference(images.decode(data), upright) < (3 if data is jpeg else 1e-9)
    fitted, how, size = images.fitted(jpeg, (16, 24))
    assert size == (32, 48) and how == Fit(16, 24, 0, 0)
    assert difference(fitted, images.to_bucket(upright, (16, 24))[0]) < 4


def test_exif_behind_a_png_s_pixels_is_found_and_damaged_exif_is_none():
    data = encoded(image().transpose(Image.ROTATE_90), exif=exif(6))
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + int.from_bytes(data[at : at + 4], "big")]
    late = data.replace(chunk, b"").replace(data[-12:], chunk + data[-12:])
    for form in (data, late):
        assert images.size(form) == (24, 40)
        np.testing.assert_array_equal(images.decode(form), picture())
    broken = encoded(image(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert images.size(broken) == images.decode(broken).shape[:2] == (24, 40)


def test_transparent_parts_lie_on_white():
    rgba = np.dstack([picture(), np.full((24, 40), 255, np.uint8)])
    rgba[:12, :, 3] = 0
    decoded = images.decode(encoded(rgba))
    assert (decoded[:12] == 255).all() and (decoded[12:] == picture()[12:]).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    palette.putpixel((1, 2), 1)
    decoded = images.decode(encoded(palette, transparency=0))
    assert tuple(decoded[2, 1]) == (255, 0, 0) and tuple(decoded[0, 0]) == (255, 255, 255)
    la = np.dstack([np.full((4, 4), 50, np.uint8), np.full((4, 4), 255, np.uint8)])
    la[0, :, 1], la[1, :, 1] = 0, 128
    decoded = images.decode(encoded(la))
    assert (decoded[0] == 255).all() and (decoded[2:] == 50).all()
    assert abs(int(decoded[1, 0, 0]) - 152) <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "RGB"])
def test_a_picture_of_any_mode_is_rgb(mode):
    data = encoded(image().convert("RGBA" if mode == "LA" else "RGB").convert(mode))
    decoded = images.decode(data)
    assert decoded.shape == (24, 40, 3) and decoded.dtype == np.uint8
    assert images.size(data) == (24, 40)
    if mode != "1":
        expected = image().convert("L" if mode in ("L", "LA") else "RGB").convert("RGB")
        assert difference(decoded, np.asarray(expected, int)) < (0.01 if mode != "P" else 30)


def test_gray_and_colour_of_16_bits_are_scaled_to_8():
    gray = picture()[..., 0]
    for form in (gray, gray.astype(np.uint16) * 257):
        expected = np.repeat(gray[..., None], 3, -1)
        np.testing.assert_array_equal(images.decode(encoded(form)), expected)
    # a PNG of 16 bits a channel, which Pillow cannot write
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in picture().astype("u2") * 257)
    header = struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    np.testing.assert_array_equal(images.decode(data), picture())


def test_other_codecs_are_close_and_cmyk_is_right_with_and_without_adobe_s_inversion():
    ink = image().convert("CMYK")
    # Pillow writes inks inverted, with Adobe's marker, as Photoshop does
    adobe = encoded(ink, "JPEG", quality=98)
    plain = encoded(Image.fromarray(255 - np.asarray(ink), "CMYK"), "JPEG", quality=98)
    at = plain.index(b"\xff\xee")
    plain = plain[:at] + plain[at + 2 + int.from_bytes(plain[at + 2 : at + 4], "big") :]
    assert b"Adobe" in adobe and b"Adobe" not in plain
    for data in (encoded(ink, "TIFF"), encoded(image(), "WEBP")):
        assert difference(images.decode(data), picture()) < 3
    for data in (adobe, plain):
        assert difference(images.decode(data), picture()) < 3
        assert difference(images.fitted(data, (24, 40))[0], picture()) < 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    first, *rest = (Image.new("RGB", (12, 8), colour) for colour in ("red", "lime", "blue"))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=rest, **lossless)
    assert images.size(data) == (8, 12) and (images.decode(data) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "data", [b"", b"not an image", encoded(picture(), "JPEG")[:-200], encoded(picture())[:60]]
)
def test_what_is_no_whole_image_is_refused(data):
    with pytest.raises(images.UnreadableImage):
        images.decode(data)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_pictures_of_one_pixel_a_side_fill_their_bucket(size):
    data = encoded(np.full((*size, 3), 90, np.uint8))
    pixels, _, original = images.fitted(data, (32, 64))
    assert original == size and pixels.shape == (32, 64, 3) and (pixels == 90).all()
    assert images.to_bucket(np.full((1, 1, 3), 77, np.uint8), (32, 64))[1] == Fit(64, 64, 16, 0)
    pixels, fit = images.to_bucket(picture(), (24, 40))  # of the bucket's size: untouched
    np.testing.assert_array_equal(pixels, picture())
    assert fit == Fit(24, 40, 0, 0)


def test_model_range_is_minus_one_to_one():
    values = to_model(np.arange(256, dtype=np.uint8))
    assert values.dtype == np.float32 and values[0] == -1 and values[255] == 1
    np.testing.assert_array_equal(np.rint((values + 1) * 127.5), np.arange(256))


def test_sizes_are_read_from_a_file_s_beginning():
    class Counted(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            data = super().read(size)
            self.taken += len(data)
            return data

    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    for kind in ("JPEG", "PNG"):
        file = Counted(data := encoded(noise, kind))
        assert images.size(file) == (600, 800) and file.taken < len(data) / 5, kind


def test_a_huge_picture_is_refused_by_its_header_and_a_large_one_is_not():
    def jpeg(height, width):
        data = bytearray(encoded(picture(), "JPEG"))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        return bytes(data)

    with warnings.catch_warnings(action="ignore"):
        assert images.size(jpeg(10_000, 12_000)) == (10_000, 12_000)
    for read in (images.size, images.decode, lambda data: images.fitted(data, (64, 64))):
        with pytest.raises(images.UnreadableImage, match="more than 178,956,970 pixels"):
            read(jpeg(20_000, 10_000))


def test_a_large_jpeg_decoded_reduced_is_the_same_picture_within_a_level():
    from sklearn.datasets import load_sample_image

    photograph = Image.fromarray(load_sample_image("china.jpg"))
    pixels = np.asarray(photograph.resize((1536, 1024), Image.Resampling.LANCZOS))
    data = encoded(pixels, "JPEG", quality=92)
    whole = images.decode(data)
    for bucket in ((256, 256), (256, 384), (128, 128)):
        exact, how = images.to_bucket(whole, bucket)
        fast, found, size = images.fitted(data, bucket)
        assert found == how and size == (1024, 1536) and fast.shape == exact.shape
        assert difference(fast, exact) < 1.0, bucket
    # not shrunk to a half, or no JPEG: the very pixels
    png = encoded(pixels[:300, :400])
    for form, bucket in ((data, (640, 960)), (png, (64, 64))):
        exact, _ = images.to_bucket(images.decode(form), bucket)
        np.testing.assert_array_equal(images.fitted(form, bucket)[0], exact)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_any_damage_is_a_readable_picture_or_one_line(kind):
    data, rng = encoded(picture(0, 64, 64), kind), np.random.default_rng(0)
    for _ in range(300):
        spoilt = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            spoilt[place] = rng.integers(256)
        cut = bytes(spoilt[: rng.integers(1, len(data) + 1)])
        for read in (images.size, images.decode, lambda data: images.fitted(data, (16, 16))):
            try:
                read(cut)
            except images.UnreadableImage as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_32_bits_are_refused(mode):
    data = io.BytesIO()
    Image.new(mode, (4, 4), 200).save(data, "TIFF")
    with pytest.raises(
        images.UnreadableImage, match="32-bit integers" if mode == "I" else "floating-point"
    ):
        images.decode(data.getvalue())


def test_16_bit_gray_with_a_transparent_value_is_laid_on_white():
    data = io.BytesIO()
    values = np.array([[0, 30000], [65535, 30000]], np.uint16)
    Image.fromarray(values).save(data, "PNG", transparency=30000)
    assert images.decode(data.getvalue())[..., 0].tolist() == [[0, 255], [255, 255]]
