import numpy as np
import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma

from pixart_jax.data import buckets
from pixart_jax.errors import UserError

RELEASED = {
    256: alpha.ASPECT_RATIO_256_BIN,
    512: alpha.ASPECT_RATIO_512_BIN,
    1024: alpha.ASPECT_RATIO_1024_BIN,
    2048: sigma.ASPECT_RATIO_2048_BIN,
}


def as_sizes(table):
    return {float(key): tuple(map(int, size)) for key, size in table.items()}


@pytest.mark.parametrize("base", buckets.BASES)
def test_inference_tables_equal_the_released_ones(base):
    assert buckets.INFERENCE_TABLES[base] == as_sizes(RELEASED[base])
    assert list(buckets.INFERENCE_TABLES[base]) == [float(key) for key in RELEASED[base]]
    assert len(buckets.INFERENCE_TABLES[base]) == (40 if base == 2048 else 33)


@pytest.mark.parametrize("base", buckets.BASES)
def test_training_tables_are_the_2048_table_scaled(base):
    # The 2048 table is the one of the four that was released with all 40 entries.
    whole = as_sizes(sigma.ASPECT_RATIO_2048_BIN)
    scaled = {key: (h * base // 2048, w * base // 2048) for key, (h, w) in whole.items()}
    assert buckets.TABLES[base] == scaled and len(scaled) == 40
    assert set(buckets.INFERENCE_TABLES[base].items()) <= set(scaled.items())


def test_no_training_bucket_has_two_keys():
    for base in buckets.BASES:
        assert all(buckets.key_of(size) == key for key, size in buckets.TABLES[base].items())
    assert buckets.key_of((64, 96)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("base", buckets.BASES)
def test_nearest_equals_the_released_choice_for_10000_random_sizes(base):
    rng = np.random.default_rng(base)
    sizes = np.exp(rng.uniform(np.log(32), np.log(8192), (10_000, 2))).astype(int)
    keys = np.array(list(buckets.TABLES[base]))
    released = PixArtImageProcessor.classify_height_width_bin
    for height, width in sizes.tolist():
        found = buckets.nearest(height, width, base, inference=True)
        assert found == released(height, width, RELEASED[base])
        nearest = keys[np.abs(keys - height / width).argmin()]
        assert buckets.nearest(height, width, base) == buckets.TABLES[base][nearest]


# The official rule, as diffusion/data/datasets writes it: get_closest_ratio over the 40 keys as
# text and sizes as floats, then the resize that its transform is given, and torchvision's
# CenterCrop, which rounds the half.


def official_choice(height, width, ratios):
    aspect_ratio = height / width
    closest_ratio = min(ratios.keys(), key=lambda ratio: abs(float(ratio) - aspect_ratio))
    return ratios[closest_ratio], float(closest_ratio)


def official_crop(ori_h, ori_w, closest_size):
    if closest_size[0] / ori_h > closest_size[1] / ori_w:
        resize_size = closest_size[0], int(ori_w * closest_size[0] / ori_h)
    else:
        resize_size = int(ori_h * closest_size[1] / ori_w), closest_size[1]
    return (
        *resize_size,
        int(round((resize_size[0] - closest_size[0]) / 2.0)),
        int(round((resize_size[1] - closest_size[1]) / 2.0)),
    )


@pytest.mark.parametrize("base", buckets.BASES)
def test_bucket_and_crop_equal_the_official_code_s_for_10000_random_sizes(base):
    released = {
        key: [h * base / 2048, w * base / 2048]
        for key, (h, w) in sigma.ASPECT_RATIO_2048_BIN.items()
    }
    table = tuple(buckets.TABLES[base].values())
    rng = np.random.default_rng(base + 1)
    wild = np.exp(rng.uniform(np.log(32), np.log(8192), (9_000, 2))).astype(int)
    keys = np.array([float(key) for key in released])
    # sizes that lie on, or within a pixel of, a border between two buckets
    border = (keys[:-1] + keys[1:]) / 2
    widths = rng.integers(100, 4000, 1000)
    near = np.stack([np.rint(widths * rng.choice(border, 1000)).astype(int), widths], -1)
    for height, width in np.concatenate([wild, near]).tolist():
        (h, w), key = official_choice(height, width, released)
        assert (
            buckets.nearest(height, width, base) == (h, w) == buckets.assign(height, width, table)
        ), (height, width)
        assert buckets.key_of((int(h), int(w))) == key
        fit = buckets.fit(height, width, (int(h), int(w)))
        expected = official_crop(height, width, (int(h), int(w)))
        # its rounding leaves some a pixel short, which CenterCrop fills with black
        if expected[0] >= h and expected[1] >= w:
            assert (fit.height, fit.width, fit.top, fit.left) == expected


def test_fit_covers_the_bucket_and_keeps_the_ratio():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 5000, (2000, 2)).tolist():
        bucket = buckets.nearest(height, width, 512)
        fit = buckets.fit(height, width, bucket)
        assert fit.height >= bucket[0] and fit.width >= bucket[1]
        assert fit.height == bucket[0] or fit.width == bucket[1]  # no more is cut off than must be
        assert 0 <= fit.top <= fit.height - bucket[0] and 0 <= fit.left <= fit.width - bucket[1]
        scale = max(bucket[0] / height, bucket[1] / width)
        assert abs(fit.height - height * scale) < 1 and abs(fit.width - width * scale) < 1


def test_assign_takes_the_nearest_ratio_and_the_largest_size_that_is_filled():
    own = ((64, 64), (96, 96), (64, 96), (96, 64))
    for size, expected in (
        ((64, 64), (64, 64)),
        ((95, 95), (64, 64)),
        ((500, 500), (96, 96)),
        ((10, 10), (64, 64)),
        ((64, 96), (64, 96)),
        ((300, 100), (96, 64)),
    ):
        assert buckets.assign(*size, own) == expected


@pytest.mark.parametrize("size", [(0, 64), (64, -1), (float("nan"), 64)])
def test_a_size_without_a_ratio_and_an_unknown_base_are_refused(size):
    with pytest.raises(UserError, match="both sides must be positive"):
        buckets.nearest(*size)
    with pytest.raises(UserError, match="no bucket table for base 768"):
        buckets.nearest(64, 64, 768)
