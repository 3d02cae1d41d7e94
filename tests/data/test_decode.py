"""Pixels from encoded images: of every kind, turned, resized, and cropped at random."""

import io
import struct

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from fastdeq.data.decode import CentralCrop, RandomCrop, decode, identify
from tests.data.image_folders import SIDE, Pixels, jpeg, noise, png


def decoded(content: bytes) -> Pixels:
    return np.asarray(decode(content))


# Kinds of images

GREY = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
OPAQUE = np.array([0, 128, 255], np.uint8)


def test_grey_images_get_three_equal_channels():
    assert np.array_equal(decoded(png(GREY, "grey")), np.stack([GREY] * 3, -1))


def test_of_sixteen_bits_the_upper_eight_are_kept():
    wide = GREY.astype(np.uint16) * 256 + 99
    assert np.array_equal(decoded(png(wide, "grey")), np.stack([GREY] * 3, -1))
    colours = np.stack([wide, wide + 256, wide], -1)
    assert np.array_equal(decoded(png(colours)), np.stack([GREY, GREY + 1, GREY], -1))


def test_palettes_are_looked_up():
    palette = bytes([1, 2, 3, 200, 100, 50])
    indices = np.array([[0, 1], [1, 0]], np.uint8)
    found = decoded(png(indices, "palette", before={b"PLTE": palette}))
    assert np.array_equal(found, np.frombuffer(palette, np.uint8).reshape(2, 3)[indices])


def test_what_is_transparent_is_laid_on_white():
    colour = np.tile(np.array([10, 20, 30], np.uint8), (1, 3, 1))
    found = decoded(png(np.concatenate([colour, OPAQUE[None, :, None]], -1), "rgba")).astype(int)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 2].tolist() == [10, 20, 30]
    half = 255 + (np.array([10, 20, 30]) - 255) * 128 / 255
    assert np.abs(found[0, 1] - half).max() <= 1  # rounded to integers
    grey = np.stack([np.full((1, 3), 10, np.uint8), OPAQUE[None]], -1)
    assert decoded(png(grey, "grey+alpha"))[0, [0, 2]].tolist() == [[255] * 3, [10] * 3]


def test_a_colour_of_a_palette_can_be_transparent():
    chunks = {b"PLTE": bytes([1, 2, 3, 200, 100, 50]), b"tRNS": bytes([0])}
    found = decoded(png(np.array([[0, 1]], np.uint8), "palette", before=chunks))
    assert found.tolist() == [[[255, 255, 255], [200, 100, 50]]]


def on_white(key: tuple[int, ...], samples: Pixels, bits: int) -> Pixels:
    """uint8 (H, W, 3) of samples (H, W, C), where exactly those equal to ``key`` are white."""
    scaled = samples >> 8 if bits == 16 else samples * (255 // (2**bits - 1))
    transparent = (samples == key).all(axis=-1, keepdims=True)
    return np.broadcast_to(np.where(transparent, 255, scaled), (*samples.shape[:2], 3))


def keyed(key: tuple[int, ...], samples: Pixels, bits: int, **settings: bool) -> Pixels:
    """What is decoded of a PNG image of these samples with a transparent colour."""
    kind = "grey" if len(key) == 1 else "rgb"
    stored = samples.astype(np.uint16 if bits == 16 else np.uint8).squeeze(
        -1 if kind == "grey" else ()
    )
    chunk = {b"tRNS": struct.pack(f">{len(key)}H", *key)}
    return decoded(png(stored, kind, before=chunk, bits=bits, **settings))


def test_a_transparent_grey_is_compared_in_the_files_units():
    """Pillow 9281 and the PNG specification, third edition, 11.3.1.1 (tRNS)."""
    for interlaced in [False, True]:
        for bits in [1, 2, 4, 8]:
            samples = np.arange(2**bits * 3).reshape(3, -1, 1) % 2**bits
            for key in range(2**bits) if bits < 8 else (0, 1, 85, 254, 255):
                found = keyed((key,), samples, bits, interlaced=interlaced)
                assert np.array_equal(found, on_white((key,), samples, bits)), key


def test_a_transparent_colour_of_sixteen_bits_is_compared_in_all_of_them():
    """Pillow 9281: with the upper 8 alone, opaque black became white."""
    for interlaced in [False, True]:
        for channels in [1, 3]:
            values = [0, 1, 255, 256, 257, 0x0100, 0x1234, 0x1235, 0x1334, 0x3412, 0xFF00, 0xFFFF]
            samples = np.array([values, values[::-1]])[..., None].repeat(channels, axis=-1)
            for value in values:
                key = (value,) * channels
                found = keyed(key, samples, 16, interlaced=interlaced)
                assert np.array_equal(found, on_white(key, samples, 16)), value


def test_a_transparent_colour_is_one_whose_every_channel_is_equal():
    for bits in [8, 16]:
        key = (10, 20, 30) if bits == 8 else (0x0A01, 0x1402, 0x1E03)
        near = [
            np.add(key, change)
            for change in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)])
        ]
        samples = np.array([[key, *near, key[::-1], (0, 0, 0)]])
        found = keyed(key, samples, bits)
        assert np.array_equal(found, on_white(key, samples, bits)), bits
        assert found[0, 0].tolist() == [255] * 3, bits
        assert found[0, 1].tolist() == ([11, 20, 30] if bits == 8 else [10, 20, 30]), bits


def test_of_a_transparent_colour_only_the_bits_of_the_image_count():
    samples = np.array([[[0], [1], [2], [3]]])
    assert np.array_equal(keyed((0xFFFD,), samples, 2), on_white((1,), samples, 2))


def test_every_colour_of_a_palette_has_its_own_transparency():
    for bits in [1, 2, 4, 8]:
        count = min(2**bits, 4)
        colours = np.array([[1, 2, 3], [200, 100, 50], [0, 0, 0], [255, 0, 10]], np.uint8)[:count]
        alphas = np.array([0, 128, 255, 255])[:count]  # the file leaves the last ones out: opaque
        chunks = {b"PLTE": colours.tobytes(), b"tRNS": bytes(alphas[:2].tolist())}
        indices = np.arange(2 * count, dtype=np.uint8).reshape(2, -1) % count
        found = decoded(png(indices, "palette", before=chunks, bits=bits))
        laid = np.round(255 + (colours.astype(int) - 255) * alphas[:, None] / 255)
        assert np.array_equal(found, laid[indices]), bits


def test_of_sixteen_bits_of_transparency_the_upper_eight_count():
    alpha = np.array([[0, 0x8000, 0xFFFF]], np.uint16)
    colour = np.array([0x0A63, 0x1463, 0x1E63], np.uint16)
    for channels, kind in ((1, "grey+alpha"), (3, "rgba")):
        pixels = np.stack([*(np.full_like(alpha, value) for value in colour[:channels]), alpha], -1)
        found = decoded(png(pixels, kind))
        half = np.round(255 + ((colour[:channels] >> 8).astype(int) - 255) * 0x80 / 255)
        expected = np.array([[[255] * channels, half, colour[:channels] >> 8]])
        assert np.array_equal(found, np.broadcast_to(expected, (1, 3, 3)))


def test_an_image_with_a_transparent_colour_is_turned_too():
    for bits in [8, 16]:
        samples = np.array([[[0], [7], [9]]]) * (2 ** (bits - 8))
        stored = samples[..., 0].astype(np.uint16 if bits == 16 else np.uint8)
        exif = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, 6, 0, 0)  # clockwise
        chunks = {b"tRNS": struct.pack(">H", samples[0, 1, 0]), b"eXIf": exif}
        found = decoded(png(stored, "grey", before=chunks))
        assert found.tolist() == [[[0] * 3], [[255] * 3], [[9] * 3]], bits


def test_cmyk_is_converted():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 1] = 255  # magenta alone: no green is left
    found = decoded(jpeg(ink, "CMYK", quality=95)).astype(int)
    assert np.abs(found - [255, 0, 255]).max() <= 3  # the loss of a constant image


def test_images_are_turned_as_their_metadata_say():
    for orientation in range(1, 9):
        upright = np.zeros((16, 24, 3), np.uint8)
        upright[:8, :8] = 255  # the upper left corner is white
        # Where row 0 and column 0 of the stored image are to be seen (EXIF 2.3, tag 274).
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright),
            7: np.rot90(upright, 2).transpose(1, 0, 2),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[274] = orientation
        found = decoded(jpeg(np.ascontiguousarray(stored), quality=95, exif=exif))
        assert found.shape == upright.shape, orientation
        assert np.array_equal(found > 127, upright > 127), orientation


def test_metadata_that_cannot_be_read_say_nothing():
    broken = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 9, 0x112, 3, 2**31, 2**31 - 1)
    assert decoded(jpeg(noise(0), exif=broken)).shape == (SIDE, SIDE, 3)


# The middle


def test_the_shorter_side_is_resized_until_the_square_is_its_share():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :], 80, axis=0)
    image = decode(png(ramp, "grey"))
    found = np.asarray(CentralCrop(size=28, share=0.875).apply(image, np.random.default_rng()))
    # 64 columns become 32, each the mean of a symmetric window around 2 j + 0.5; 28 are kept.
    expected = 2 * np.arange(2, 30) + 0.5
    assert found.shape == (28, 28, 3)
    assert np.abs(found - expected[None, :, None]).max() <= 0.5


def test_the_default_share_is_the_published_one():
    for size, shorter in [(224, 256), (32, 37), (299, 342)]:
        crop = CentralCrop(size=size)
        assert round(size / crop.share) == shorter, size


def test_a_jpeg_is_read_with_its_loss():
    ramp = np.stack(np.broadcast_arrays(*np.ogrid[:40, :48], 128), axis=-1).astype(np.uint8)
    # Smooth: at quality 95, without subsampling, the loss is the rounding of a few coefficients.
    found = decoded(jpeg(ramp, quality=95, subsampling=0)).astype(int)
    assert np.abs(found - ramp).max() <= 4


# Random crops


def boxes(crop: RandomCrop, width: int, height: int, count: int = 4000) -> Pixels:
    random = np.random.default_rng(0)
    return np.array([crop.draw(width, height, random) for _ in range(count)])


def test_the_area_of_a_crop_is_uniform_and_its_shape_log_uniform():
    # In a square, parts of half its area at most fit whatever their ratio: none is drawn again.
    crop, side = RandomCrop(size=32, area=(0.08, 0.5)), 1000
    left, top, right, bottom = boxes(crop, side, side).T
    area = (right - left) * (bottom - top) / side**2
    shape = np.log((right - left) / (bottom - top))
    for found, low, high in ((area, 0.08, 0.5), (shape, np.log(3 / 4), np.log(4 / 3))):
        uniform = (found - low) / (high - low)
        assert uniform.min() > -0.02  # rounding to a pixel of 1000 moves the area by 0.5 %
        assert uniform.max() < 1.02
        # Kolmogorov and Smirnov's distance at 1 % for 4000 draws
        steps = np.arange(len(found)) / len(found)
        assert np.abs(np.sort(uniform) - steps).max() < 1.63 / np.sqrt(len(found))
    assert abs(np.corrcoef(area, shape)[0, 1]) < 5 / np.sqrt(len(area))


def test_the_place_of_a_crop_is_uniform_up_to_the_edges():
    crop = RandomCrop(size=32, area=(0.25, 0.25), ratio=(1, 1))
    left, top, right, bottom = boxes(crop, 10, 10).T
    assert set((right - left).tolist()) == set((bottom - top).tolist()) == {5}
    counts = np.bincount(6 * left + top, minlength=36)
    expected = len(left) / 36
    # Chi-squared with 35 degrees of freedom: 66.6 is its 0.1 % point.
    assert ((counts - expected) ** 2 / expected).sum() < 66.6


def test_a_crop_lies_within_the_image():
    for width, height in [(1, 1), (3, 500), (500, 3), (640, 480), (32, 32)]:
        left, top, right, bottom = boxes(RandomCrop(size=32), width, height, 500).T
        assert (left >= 0).all(), (width, height)
        assert (top >= 0).all(), (width, height)
        assert (right <= width).all(), (width, height)
        assert (bottom <= height).all(), (width, height)
        assert (right > left).all(), (width, height)
        assert (bottom > top).all(), (width, height)


def test_where_no_part_fits_it_is_the_largest_in_the_centre():
    for width, height, box in [
        (1000, 100, (433, 0, 566, 100)),
        (100, 1000, (0, 433, 100, 566)),
        (90, 100, (0, 0, 90, 100)),
    ]:
        assert RandomCrop(size=32)._central(width, height) == box, box


def test_a_part_of_the_whole_area_of_a_wide_image_is_the_central_one():
    # Of 10 : 1, the whole area never fits into a ratio of 4 / 3 at most.
    assert (
        boxes(RandomCrop(size=32, area=(1, 1)), 1000, 100, 3).tolist() == [[433, 0, 566, 100]] * 3
    )


def test_the_share_of_mirrored_images_is_as_set():
    for flip, least, most in [(0, 0, 0), (1, 400, 400), (0.25, 57, 143)]:
        pixels = noise(0, 8, 8)
        crop = RandomCrop(size=8, area=(1, 1), ratio=(1, 1), flip=flip)
        random, image = np.random.default_rng(0), Image.fromarray(pixels)
        found = [np.asarray(crop.apply(image, random)) for _ in range(400)]
        mirrored = [np.array_equal(one, pixels[:, ::-1]) for one in found]
        plain = [np.array_equal(one, pixels) for one in found]
        assert sum(mirrored) + sum(plain) == 400, flip
        assert least <= sum(mirrored) <= most, flip  # 100 ± 5 standard deviations of 8.7


# Other formats


def saved(image: Image.Image, kind: str, **settings: object) -> bytes:
    into = io.BytesIO()
    image.save(into, kind, **settings)
    return into.getvalue()


def test_webp_bmp_tiff_and_gif_are_read_exactly():
    pixels = noise(3, 5, 7)
    image = Image.fromarray(pixels)
    for content in [
        saved(image, "WEBP", lossless=True),
        saved(image, "BMP"),
        saved(image, "TIFF"),
        saved(image, "TIFF", compression="tiff_lzw"),
    ]:
        assert np.array_equal(decoded(content), pixels)
        identify(content)
    grey = Image.fromarray(GREY)
    for kind in ("BMP", "TIFF", "GIF"):
        assert np.array_equal(decoded(saved(grey, kind)), np.stack([GREY] * 3, -1)), kind


def test_of_several_frames_the_first_is_read():
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue", "lime")]
    more = {"save_all": True, "append_images": frames[1:]}
    for content in [
        saved(frames[0], "GIF", **more),
        saved(frames[0], "WEBP", lossless=True, **more),
        saved(frames[0], "TIFF", **more),
    ]:
        assert decoded(content).tolist() == [[[255, 0, 0]] * 4] * 3


def test_what_is_transparent_in_other_formats_is_laid_on_white():
    colours = np.tile(np.array([10, 20, 30], np.uint8), (1, 3, 1))
    image = Image.fromarray(np.concatenate([colours, OPAQUE[None, :, None]], -1))
    for content in [saved(image, "WEBP", lossless=True, exact=True), saved(image, "TIFF")]:
        assert decoded(content)[0, [0, 2]].tolist() == [[255] * 3, [10, 20, 30]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([1, 2, 3, 200, 100, 50])
    assert decoded(saved(palette, "GIF", transparency=0)).tolist() == [[[255] * 3, [200, 100, 50]]]


def test_tiff_is_turned_upright_and_its_sixteen_bits_cut_but_no_other_numbers_are_read():
    pixels = noise(3, 5, 7)
    turned = saved(Image.fromarray(np.rot90(pixels)), "TIFF", tiffinfo={274: 6})
    assert np.array_equal(decoded(turned), pixels)
    wide = GREY.astype(np.uint16) * 256 + 99
    assert np.array_equal(decoded(saved(Image.fromarray(wide), "TIFF")), np.stack([GREY] * 3, -1))
    for kind in (np.int32, np.float32):
        content = saved(Image.fromarray(wide.astype(kind)), "TIFF")
        with pytest.raises(ValueError, match="more than 16 bits per channel, or not whole"):
            decode(content)


def test_a_truncated_image_of_any_format_is_refused_in_one_line():
    image = Image.fromarray(noise(3, 40, 40))
    for kind in ("WEBP", "BMP", "TIFF", "GIF"):
        content = saved(image, kind)
        for kept in (0, 3, len(content) // 2):
            with pytest.raises(ValueError, match=r"^not a readable image \([^\n]+\)$"):
                decode(content[:kept])
