"""Image files: what is not read as it looks is refused by name; memory is bounded before anything is decoded."""

import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from sbn_tf.datasets import decoding

PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # of the colour types of the PNG specification


def png(path, width, height, bits, colour, data=None):
    """A PNG by its specification; Pillow writes none of 16 bits in colour."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    if data is None:
        row = b"\0" + bytes(range(1, 1 + width * PNG_CHANNELS[colour] * bits // 8))
        data = row * height
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def tiff(path, bits, samples, photometric, kind=1):
    """A TIFF of 4 x 4 pixels by its specification, one strip."""
    extra = [1] if (photometric, samples) in ((1, 2), (2, 4)) else []
    tags = [(256, 4, 4), (257, 4, 4), (258, 3, [bits] * samples), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, samples), (278, 4, 4), (279, 4, 16 * samples * bits // 8)]
    tags += [(338, 3, 2)] * len(extra) + [(339, 3, [kind] * samples)]
    pixels = bytes(16 * samples * bits // 8)
    directory, behind, start = b"", b"", 8 + len(pixels)
    for tag, form, value in tags:
        values = value if isinstance(value, list) else [value]
        content = struct.pack("<" + {3: "H", 4: "I"}[form] * len(values), *values)
        if len(content) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(behind)
            behind += content
            content = struct.pack("<I", place)
        directory += struct.pack("<HHI", tag, form, len(values)) + content.ljust(4, b"\0")
    path.write_bytes(
        b"II*\0" + struct.pack("<I", start) + pixels + struct.pack("<H", len(tags)) + directory + bytes(4) + behind
    )
    return path


def refused(path, says, read=decoding.read_image):
    arguments = (4, "stretch", 3) if read is decoding.read_image else (4, "stretch", (4, 4))
    with pytest.raises(ValueError, match=says) as error:
        read(path, *arguments)
    assert str(error.value).count("\n") == 1 and str(path) in str(error.value)


# ---- depth


DEEP = {
    "png grey": lambda path: png(path, 4, 4, 16, 0),
    "png RGB": lambda path: png(path, 4, 4, 16, 2),
    "png LA": lambda path: png(path, 4, 4, 16, 4),
    "png RGBA": lambda path: png(path, 4, 4, 16, 6),
    "tiff grey": lambda path: tiff(path, 16, 1, 1),
    "tiff white is 0": lambda path: tiff(path, 16, 1, 0),
    "tiff RGB": lambda path: tiff(path, 16, 3, 2),
    "tiff RGBA": lambda path: tiff(path, 16, 4, 2),
    "tiff CMYK": lambda path: tiff(path, 16, 4, 5),
    "tiff 32": lambda path: tiff(path, 32, 1, 1),
    "tiff float": lambda path: tiff(path, 32, 1, 1, 3),
}


@pytest.mark.parametrize(
    ("name", "read"),
    [(name, decoding.read_mask) for name in DEEP]
    + [(name, decoding.read_image) for name in DEEP if name not in ("png grey", "tiff grey")],
)
def test_more_than_8_bits_are_refused_whatever_the_mode(tmp_path, name, read):
    """Pillow calls RGB of 16 bits "RGB", and keeps the higher eight: values of 0 to 4095 become 0 to 15."""
    path = DEEP[name](tmp_path / "a.png")
    with Image.open(path) as image:
        image.load()  # a whole file: nothing but its depth is wrong
    refused(path, r"8 bits a channel, or a grey one of 16. Received: (16|32) bits.*\nWindow it", read)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_is_read_at_full_depth(tmp_path, ending, channels):
    """scikit-image's way to floats, `img_as_float`: uint16 divided by 65535."""
    stored = np.array([[0, 1, 2, 255], [256, 257, 4095, 4096], [65534, 65535, 7, 8], [9, 10, 11, 12]], "uint16")
    Image.fromarray(stored).save(tmp_path / f"a.{ending}")
    found, whole = decoding.read_image(tmp_path / f"a.{ending}", 4, "stretch", channels)
    assert found.dtype == np.float32 and whole == (4, 4) and found.shape == (4, 4, channels)
    for k in range(channels):
        np.testing.assert_array_equal(np.rint(found[..., k].astype("float64") * 65535), stored)
    assert decoding.grey_and_deep(tmp_path / f"a.{ending}") == (True, True)


def test_a_tiff_of_16_bits_with_the_high_byte_first(tmp_path):
    stored = np.arange(16, dtype=">u2").reshape(4, 4) * 257
    Image.frombytes("I;16B", (4, 4), stored.tobytes()).save(tmp_path / "a.tif")
    found = decoding.read_image(tmp_path / "a.tif", 4, "stretch", 1)[0][..., 0]
    np.testing.assert_allclose(found, stored / 65535, rtol=1e-6)


def test_both_depths_in_one_dataset_have_one_scale(tmp_path):
    eight = np.arange(16, dtype="uint8").reshape(4, 4) * 17
    Image.fromarray(eight).save(tmp_path / "a.png")
    Image.fromarray(eight.astype("uint16") * 257).save(tmp_path / "b.png")
    pairs = [(tmp_path / name,) for name in ("a.png", "b.png")]
    found = np.asarray(decoding.decoded("x", pairs, 4, "stretch", 1, tmp_path / "cache", deep=True)["images"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[..., 0], np.stack([eight / 255] * 2), rtol=1e-6)
    with pytest.raises(ValueError, match="Received: 16 bits"):
        decoding.decoded("y", pairs, 4, "stretch", 1, tmp_path / "cache")


def test_signed_pixels_are_refused(tmp_path):
    refused(tiff(tmp_path / "a.tif", 8, 1, 1, 2), "Received: 8 bits with a sign")


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 1), (6, 3)])
def test_8_bits_come_through(tmp_path, colour, channels):
    path = png(tmp_path / "a.png", 4, 4, 8, colour)
    stored = np.tile(np.arange(1, 1 + 4 * PNG_CHANNELS[colour], dtype="uint8").reshape(1, 4, -1), (4, 1, 1))
    found = decoding.read_image(path, 4, "stretch", channels)[0]
    np.testing.assert_array_equal(found, stored[..., :channels])


def test_a_tiff_of_8_bits_comes_through(tmp_path):
    assert not decoding.read_image(tiff(tmp_path / "a.tif", 8, 3, 2), 4, "stretch", 3)[0].any()


# ---- size


def test_too_many_pixels_are_told(tmp_path):
    refused(
        png(tmp_path / "a.png", 14_000, 14_000, 8, 0, b""), r"196000000 pixels\).*exceeds|196000000 pixels\) exceeds"
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_jpeg_is_told_by_what_it_takes(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.jpg")
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    place = content.index(b"\xff\xc0") + 5  # start of frame: length, bits, height, width
    content[place : place + 4] = struct.pack(">HH", 10_000, 10_000)
    (tmp_path / "a.jpg").write_bytes(content)
    refused(tmp_path / "a.jpg", "10000 x 10000 pixels, decoded 1,600,000,000 bytes")


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    path = png(tmp_path / "a.png", 4, 4, 8, 0)
    os.truncate(path, 2**32)  # sparse
    refused(path, "a file of more than 536,870,912")


@pytest.mark.parametrize("fit", [1, 3, 12])
def test_no_more_threads_decode_than_there_is_memory_for(tmp_path, monkeypatch, fit):
    """By hand: 8 bytes a pixel, and half of the limit for several at a time."""
    pairs = [(png(tmp_path / f"{k}.png", 60, 60, 8, 2),) for k in range(12)]
    monkeypatch.setattr(decoding, "MAX_BYTES", 2 * fit * 8 * 60 * 60)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    read, threads = decoding.read_image, set()

    def watched(*arguments):
        threads.add(threading.current_thread())
        time.sleep(0.01)
        return read(*arguments)

    monkeypatch.setattr(decoding, "read_image", watched)
    images = np.asarray(decoding.decoded("a", pairs, 60, "stretch", 3, tmp_path / "cache")["images"])
    assert (len(threads) == 1) == (fit == 1) and len(threads) <= fit  # an idle one may take several images
    assert (threading.main_thread() in threads) == (fit == 1)
    assert (images == images[0]).all()


# ---- regular files


def test_a_named_pipe_and_a_device_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "a.png")  # to open it would wait for ever
    os.symlink("/dev/zero", tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        refused(tmp_path / name, "Expected a regular file")
        refused(tmp_path / name, "Expected a regular file", decoding.read_mask)
