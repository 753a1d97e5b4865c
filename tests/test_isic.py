"""ISIC 2018 Task 1 in the challenge's folders: splits, squares, the cache; and what is refused, in two lines."""

import os

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from sbn_tf import datasets
from sbn_tf.datasets import decoding


def write_isic(root, n=20, width=40, height=30, first=0):
    images = root / "ISIC2018_Task1-2_Training_Input"
    masks = root / "ISIC2018_Task1_Training_GroundTruth"
    images.mkdir(parents=True)
    masks.mkdir()
    rng = np.random.default_rng(0)
    for k in range(first, first + n):
        tint = rng.integers(60, 250, 3)
        pixels = np.full((height, width, 3), tint, "uint8")
        mask = np.zeros((height, width), "uint8")
        mask[: height // 2] = 255
        Image.fromarray(pixels).save(images / f"ISIC_{k:07d}.jpg")
        Image.fromarray(mask).save(masks / f"ISIC_{k:07d}_segmentation.png")
    return images, masks


def test_isic_reads_official_folders(tmp_path, caplog):
    write_isic(tmp_path)
    data = datasets.load("isic2018", root=tmp_path, size=16)
    assert "80/10/10" in caplog.text
    assert [s.num_examples for s in (data.train, data.val, data.test)] == [16, 2, 2]
    ids = np.concatenate([s.ids for s in (data.train, data.val, data.test)])
    assert len(set(ids)) == 20
    np.testing.assert_array_equal(data.train.targets[0, :, 0, 0], [1] * 8 + [0] * 8)
    first = int(data.train.ids[0][-7:])
    original = Image.open(tmp_path / "ISIC2018_Task1-2_Training_Input" / f"ISIC_{first:07d}.jpg")
    np.testing.assert_allclose(data.train.images[0, 0, 0], original.getpixel((20, 15)), atol=2)
    again = datasets.load("isic2018", root=tmp_path, size=16, limit=5)
    assert set(again.train.ids) < set(data.train.ids) and again.train.num_examples == 5
    assert set(datasets.load("isic2018", root=tmp_path, size=16, seed=1).val.ids) != set(data.val.ids)


def test_isic_obeys_split_csv_and_official_parts(tmp_path, caplog):
    folder = tmp_path / "isic2018_task1"
    write_isic(folder, n=6)
    parts = ["train", "val", "test", "test", "train", "train"]
    rows = "".join(f"ISIC_{k:07d},{part}\n" for k, part in enumerate(parts))
    (folder / "split.csv").write_text("image_id,split\n" + rows)
    data = datasets.load("isic2018", root=tmp_path, size=8)
    assert list(data.test.ids) == ["ISIC_0000002", "ISIC_0000003"]
    (folder / "split.csv").write_text("image_id,split\n" + rows + "ISIC_0000099,val\n")
    with pytest.raises(ValueError, match="ISIC_0000099"):
        datasets.load("isic2018", root=tmp_path, size=8)
    (folder / "split.csv").write_text("image_id,split\n" + rows + "ISIC_0000001,test\n")
    with pytest.raises(ValueError, match=r"one row for each image .*Received: ISIC_0000001 twice"):
        datasets.load("isic2018", root=tmp_path, size=8)
    (folder / "split.csv").unlink()
    with pytest.raises(ValueError, match=r"10 training images or more for a random split.*Received: 6"):
        datasets.load("isic2018", root=tmp_path, size=8)
    for part, first in (("Validation", 10), ("Test", 20)):
        write_isic(tmp_path / part, n=3, first=first)
        for name in ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth"):
            (tmp_path / part / name.format("Training")).rename(folder / name.format(part))
    data = datasets.load("isic2018", root=tmp_path, size=8)
    assert [s.num_examples for s in (data.train, data.val, data.test)] == [6, 3, 3]
    assert "80/10/10" not in caplog.text and "official split" not in caplog.text


def test_wrong_isic_files(tmp_path):
    images, masks = write_isic(tmp_path)
    image, mask = images / "ISIC_0000003.jpg", masks / "ISIC_0000003_segmentation.png"
    whole_image, whole_mask = image.read_bytes(), mask.read_bytes()

    def fails(error, says):
        with pytest.raises(error, match=says):
            datasets.load("isic2018", root=tmp_path, size=16)

    image.write_bytes(whole_image[: len(whole_image) // 2])
    fails(ValueError, "0000003.jpg, which is truncated or corrupt")
    image.write_bytes(whole_image)
    mask.write_bytes(whole_mask[: len(whole_mask) // 2])
    fails(ValueError, "0000003_segmentation.png, which is truncated or corrupt")
    Image.fromarray(np.full((30, 40), 7, "uint8")).save(mask)
    fails(ValueError, "0 and 255. Received: a value of 7")
    Image.fromarray(np.zeros((30, 30), "uint8")).save(mask)
    fails(ValueError, "40 x 30 pixels like its image. Received: 30 x 30")
    mask.unlink()
    fails(FileNotFoundError, "ISIC_0000003_segmentation.png")
    for path in masks.iterdir():
        path.unlink()
    masks.rmdir()
    fails(FileNotFoundError, "no such folder")


@pytest.fixture
def decodes(monkeypatch):
    """The images that were decoded, in order."""
    seen, real = [], decoding.read_image
    monkeypatch.setattr(decoding, "read_image", lambda path, *rest: seen.append(path.stem) or real(path, *rest))
    return seen


def test_images_are_decoded_once_whatever_the_split(tmp_path, decodes):
    write_isic(tmp_path)
    cache = tmp_path / "cache"
    first = datasets.load("isic2018", root=tmp_path, size=16, cache=cache)
    assert len(decodes) == len(set(decodes)) == 20
    again = datasets.load("isic2018", root=tmp_path, size=16, cache=cache, seed=3)
    assert len(decodes) == 20 and set(first.val.ids) != set(again.val.ids)
    by_id = dict(zip(first.train.ids, first.train.images, strict=True))
    both = [k for k in again.train.ids if k in by_id]
    assert len(both) > 10
    for image, name in zip(again.train.images, again.train.ids, strict=True):
        np.testing.assert_array_equal(image, by_id.get(name, image))
    datasets.load("isic2018", root=tmp_path, size=16, cache=cache, fit="pad")
    assert len(decodes) == 40
    (tmp_path / "ISIC2018_Task1-2_Training_Input" / "ISIC_0000003.jpg").touch()  # a changed file is read anew
    datasets.load("isic2018", root=tmp_path, size=16, cache=cache)
    assert len(decodes) == 60


def test_limit_decodes_only_what_it_takes(tmp_path, decodes):
    write_isic(tmp_path)
    data = datasets.load("isic2018", root=tmp_path, size=16, limit=2, cache=tmp_path / "cache")
    assert set(decodes) == {*data.train.ids, *data.val.ids, *data.test.ids} and len(decodes) == 6


def test_squares_by_hand(tmp_path):
    """A picture of 40 x 20 with a red left half: what each way to a square keeps of it."""
    pixels = np.zeros((20, 40, 3), "uint8")
    pixels[:, :20, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray((pixels[..., 0] > 0).astype("uint8")).save(tmp_path / "mask.png")
    left, black = np.array([255, 0, 0]), np.zeros(3)
    rows = {"crop": (slice(None), 4), "stretch": (slice(None), 4), "pad": (slice(2, 6), 4)}
    for fit, (row, half) in rows.items():
        image, whole = decoding.read_image(tmp_path / "a.png", 8, fit, 3)
        mask, lost = decoding.read_mask(tmp_path / "mask.png", 8, fit, whole)
        assert lost == (0.5 if fit == "crop" else 0)  # 10 of its 20 columns lie outside the square
        assert whole == (40, 20) and image.shape == (8, 8, 3)
        assert (image[row, : half - 1] == left).all() and (image[row, half + 1 :] == black).all()
        expected = np.zeros((8, 8))
        expected[row, :half] = 1
        np.testing.assert_array_equal(mask, expected)
    assert (decoding.read_image(tmp_path / "a.png", 8, "pad", 3)[0][[0, 1, 6, 7]] == 0).all()


def test_a_crop_that_cuts_masks_is_told(tmp_path, caplog):
    _, masks = write_isic(tmp_path)  # 40 x 30, the upper half marked
    mask = np.zeros((30, 40), "uint8")
    mask[:, :5] = 255  # wholly outside of the square in the middle
    Image.fromarray(mask).save(masks / "ISIC_0000003_segmentation.png")
    mask[:, 20] = 255
    Image.fromarray(mask).save(masks / "ISIC_0000004_segmentation.png")
    whole = np.zeros((30, 40), "uint8")
    whole[:, 10:30] = 255
    for k in (*range(3), *range(5, 20)):
        Image.fromarray(whole).save(masks / f"ISIC_{k:07d}_segmentation.png")
    for cached in (False, True):
        caplog.clear()
        datasets.load("isic2018", root=tmp_path, size=16, cache=tmp_path / "cache")
        assert "cuts 2 of 20 masks, 1 of them wholly; fit='pad' keeps them" in caplog.text, cached
    caplog.clear()
    datasets.load("isic2018", root=tmp_path, size=16, cache=tmp_path / "cache", fit="pad")
    assert "fit='pad' keeps" not in caplog.text


def test_any_image_size_and_mode(tmp_path):
    images, masks = write_isic(tmp_path)
    for name, size, mode in (("ISIC_0000000", (37, 61), "L"), ("ISIC_0000001", (300, 200), "CMYK")):
        Image.new(mode, size).save(images / f"{name}.jpg")
        Image.new("L", size).save(masks / f"{name}_segmentation.png")
    assert datasets.load("isic2018", root=tmp_path, size=24).input_shape == (24, 24, 3)


def test_masks_of_one_and_of_many_values(tmp_path):
    for values, expected in (([[0, 255]], [0, 1]), ([[0, 1]], [0, 1]), ([[0, 0]], [0, 0]), ([[255, 255]], [1, 1])):
        Image.fromarray(np.repeat(np.array(values, "uint8"), 2, 0)).save(tmp_path / "mask.png")
        assert decoding.read_mask(tmp_path / "mask.png", 2, "stretch", (2, 2))[0].tolist() == [expected] * 2
    for values in ([[0, 7]], [[1, 255]], [[128, 255]]):
        Image.fromarray(np.repeat(np.array(values, "uint8"), 2, 0)).save(tmp_path / "mask.png")
        with pytest.raises(ValueError, match="a mask of 0 and 1 or of 0 and 255"):
            decoding.read_mask(tmp_path / "mask.png", 2, "stretch", (2, 2))


def test_every_flipped_bit_of_a_png_is_an_error_or_changes_nothing(tmp_path):
    path = tmp_path / "mask.png"
    values = np.zeros((16, 16), "uint8")
    values[3:9, 4:12] = 255
    Image.fromarray(values).save(path)
    whole, refused = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            mask, _ = decoding.read_mask(path, 16, "stretch", (16, 16))
        except ValueError as error:
            assert str(error).count("\n") == 1
            refused += 1
        else:
            np.testing.assert_array_equal(mask, values > 0)
    assert refused > 0.9 * 8 * len(whole)


def test_other_formats_are_not_even_opened(tmp_path, monkeypatch):
    """Pillow hands an EPS, whatever its ending, to Ghostscript, a program of its own."""
    path = tmp_path / "m.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n%%EOF\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it was started"))
    for read in (
        lambda: decoding.read_image(path, 8, "crop", 3),
        lambda: decoding.read_mask(path, 8, "crop", (16, 16)),
    ):
        with pytest.raises(ValueError, match=r"a png, jpg, tif or bmp image"):
            read()


def white_palette():
    image = Image.fromarray(np.zeros((4, 4), "uint8")).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    return image


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.new("RGBA", (4, 4), (255, 255, 255, 0)), "transparency"),
        (Image.new("RGB", (4, 4), (255, 0, 0)), "colours"),
        (white_palette(), "a palette"),
        (Image.new("I;16", (4, 4)), "8 bits"),
    ],
    ids=["transparent", "red", "palette", "deep"],
)
def test_masks_that_do_not_show_what_they_hold_are_refused(tmp_path, image, says):
    image.save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=says) as error:
        decoding.read_mask(tmp_path / "mask.png", 4, "stretch", (4, 4))
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_masks_of_any_grey_mode(tmp_path, mode):
    values = np.zeros((4, 4), "uint8")
    values[1] = 255
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([k for k in range(256) for _ in range(3)])
    else:
        image = image.convert(mode)
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(decoding.read_mask(tmp_path / "mask.png", 4, "stretch", (4, 4))[0], values > 0)


def test_a_second_frame_is_not_skipped(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    frames[0].save(tmp_path / "mask.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"one image in a file. Received: 2"):
        decoding.read_mask(tmp_path / "mask.tif", 4, "stretch", (4, 4))


def test_files_that_a_mac_leaves_do_not_count(tmp_path):
    """On a disk that is not its own, macOS writes a file of 4 KB, `._NAME`, beside each; Windows a Thumbs.db."""
    images, masks = write_isic(tmp_path)
    whole = datasets.load("isic2018", root=tmp_path, size=8)
    for folder in (images, masks):
        for path in list(folder.iterdir()):
            (folder / f"._{path.name}").write_bytes(b"\0\x05\x16\x07" + bytes(4092))
        (folder / ".DS_Store").touch()
        (folder / "Thumbs.db").touch()
    found = datasets.load("isic2018", root=tmp_path, size=8)
    assert found.train.ids.tolist() == whole.train.ids.tolist()


def test_split_csv_as_spreadsheets_write_it(tmp_path):
    write_isic(tmp_path, n=5)
    parts = ("train", "val", "test", "train", "train")
    rows = "image_id,split\n" + "".join(f"ISIC_{k:07d},{part}\n" for k, part in enumerate(parts))
    (tmp_path / "split.csv").write_text("\ufeff" + rows, encoding="utf-8")
    assert datasets.load("isic2018", root=tmp_path, size=8).val.ids.tolist() == ["ISIC_0000001"]
    for contents, says in (
        (rows.replace(",", ";").encode(), "Expected commas"),
        (rows.encode("utf-16"), "in UTF-8"),
        (b"image,split\n1,train\n", "columns image_id and split"),
    ):
        (tmp_path / "split.csv").write_bytes(contents)
        with pytest.raises(ValueError, match=says) as error:
            datasets.load("isic2018", root=tmp_path, size=8)
        assert str(error.value).count("\n") == 1


def test_a_mask_without_an_image_is_refused(tmp_path):
    images, _ = write_isic(tmp_path)
    (images / "ISIC_0000007.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)an image for every mask .*1 mask.*ISIC_0000007.*Add the images"):
        datasets.load("isic2018", root=tmp_path, size=16)


def test_unknown_fit_and_empty_split(tmp_path):
    write_isic(tmp_path)
    with pytest.raises(ValueError, match=r"fit one of .*Received: fit='squeeze'"):
        datasets.load("isic2018", root=tmp_path, fit="squeeze")
    names = sorted(p.stem for p in (tmp_path / "ISIC2018_Task1-2_Training_Input").iterdir())
    rows = "".join(f"{name},{'train' if k else 'test'}\n" for k, name in enumerate(names))
    (tmp_path / "split.csv").write_text("image_id,split\n" + rows)
    with pytest.raises(ValueError, match=r"images of split 'val' .*Received: none"):
        datasets.load("isic2018", root=tmp_path)


def test_an_interrupted_decoding_goes_on(tmp_path, monkeypatch):
    write_isic(tmp_path, n=60)
    real, seen = decoding.read_image, []

    def interrupted(path, *rest):
        if len(seen) == 40:
            raise KeyboardInterrupt
        seen.append(path)
        return real(path, *rest)

    cache = tmp_path / "cache"
    monkeypatch.setattr(decoding, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.load("isic2018", root=tmp_path, size=16, cache=cache)
    again = []
    monkeypatch.setattr(decoding, "read_image", lambda path, *rest: again.append(path) or real(path, *rest))
    data = datasets.load("isic2018", root=tmp_path, size=16, cache=cache)
    assert len(again) == 60 - 32  # two pieces of 16 were whole
    fresh = datasets.load("isic2018", root=tmp_path, size=16, cache=tmp_path / "another")
    assert data.digest() == fresh.digest()


def test_the_official_data(tmp_path):
    root = os.environ.get("SBN_TF_DATA")
    if not root or not os.path.isdir(os.path.join(root, "isic2018_task1")):
        pytest.skip("SBN_TF_DATA is not set or holds no isic2018_task1")
    data = datasets.load("isic2018", size=32, cache=tmp_path, limit=100)
    assert data.train.num_examples == data.val.num_examples == data.test.num_examples == 100
    name = data.train.ids[0]
    folder = os.path.join(root, "isic2018_task1")
    with Image.open(os.path.join(folder, "ISIC2018_Task1_Training_GroundTruth", f"{name}_segmentation.png")) as mask:
        share = (np.asarray(mask) > 0).mean()  # squares already: nothing is cropped
    assert abs(data.train.targets[0].mean() - share) < 0.03
