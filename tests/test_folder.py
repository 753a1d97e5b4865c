"""A folder of one's own: what is read is what was written, splits hold, and each bad input has its message."""

import csv
import logging
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from sbn_tf import datasets
from sbn_tf.datasets import folder
from sbn_tf.datasets.base import BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION

SIDE = 16
SPLITS = ["train"] * 8 + ["val"] * 2 + ["test"] * 2


def pixels(k, mode="L"):
    shape = (SIDE, SIDE) if mode == "L" else (SIDE, SIDE, 3)
    return np.random.default_rng(k).integers(0, 256, shape, "uint8")


def mask(k):
    return np.random.default_rng([k, 1]).integers(0, 2, (SIDE, SIDE), "uint8")


def write_csv(path, columns, header=None):
    header = header or list(columns)
    with open(path / "images.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *zip(*columns.values(), strict=True)])


def make(path, columns, mode="L", suffix="png"):
    """A folder with an image for each row of the columns, which get `image` where it is not theirs."""
    n = len(next(iter(columns.values())))
    columns = {"image": [f"i{k:02}.{suffix}" for k in range(n)]} | columns
    (path / "images").mkdir(parents=True)
    for k, name in enumerate(columns["image"]):
        (path / "images" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels(k, mode)).save(path / "images" / name)
    for column in [name for name in columns if name.startswith("mask")]:
        (path / "masks").mkdir(exist_ok=True)
        for name in filter(None, columns[column]):
            Image.fromarray(mask(int(name[1:3]) + 100 * (len(name) - 7)) * 255).save(path / "masks" / name)
    write_csv(path, columns)
    return path


def labelled(path, **columns):
    return make(path / "my_data", {"split": SPLITS, "label": list("abcabcabcabc")} | columns)


def segmented(path, **columns):
    return make(path / "my_data", {"split": SPLITS, "mask": [f"m{k:02}.png" for k in range(12)]} | columns)


def load(path, **options):
    return datasets.load(str(path), **({"size": SIDE} | options))


# ---- what is read is what was written


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_pixels_come_through(tmp_path, mode, suffix):
    data = load(make(tmp_path / "my_data", {"split": SPLITS, "label": list("abcabcabcabc")}, mode, suffix))
    assert data.card.channels == (1 if mode == "L" else 3)
    k = 0
    for part in (data.train, data.val, data.test):
        for image, name in zip(part.images, part.ids, strict=True):
            np.testing.assert_array_equal(image.squeeze(), pixels(k, mode))
            assert name == f"i{k:02}.{suffix}"
            k += 1
    assert k == 12


def test_one_image_of_16_bits_makes_all_of_them_floats(tmp_path):
    path = make(tmp_path / "my_data", {"split": SPLITS, "label": list("abcabcabcabc")})
    deep = pixels(3).astype("uint16") * 256 + 3
    Image.fromarray(deep).save(path / "images" / "i03.png")
    found = load(path).train.images
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[3, ..., 0], deep / 65535, rtol=1e-6)
    np.testing.assert_allclose(found[2, ..., 0], pixels(2) / 255, rtol=1e-6)


def test_jpeg_is_read_as_pillow_reads_it(tmp_path):
    path = make(tmp_path / "my_data", {"split": SPLITS, "label": list("abcabcabcabc")}, "RGB", "jpg")
    expected = np.asarray(Image.open(path / "images" / "i03.jpg"))
    np.testing.assert_array_equal(load(path).train.images[3], expected)


@pytest.mark.parametrize(
    ("columns", "task", "classes", "targets"),
    [
        ({"label": list("bcaabcabcabc")}, MULTI_CLASS, ("a", "b", "c"), [[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
        ({"label": ["10", "9", "8"] * 4}, MULTI_CLASS, ("8", "9", "10"), [[0, 0, 1], [0, 1, 0], [1, 0, 0]]),
        ({"label": ["mal", "ben", "mal"] * 4}, BINARY, ("mal",), [[1], [0], [1]]),
        ({"grade": ["2", "0", "1.0"] * 4}, ORDINAL, ("0", "1", "2"), [[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
        ({"mass": ["1", "0", "1.0"] * 4}, BINARY, ("mass",), [[1], [0], [1]]),
        (
            {"mass": [1, 0, 1] * 4, "pleural, thick": [0, 0, 1] * 4},
            MULTI_LABEL,
            ("mass", "pleural, thick"),
            [[1, 0], [0, 0], [1, 1]],
        ),
    ],
)
def test_label_columns(tmp_path, columns, task, classes, targets):
    path = make(tmp_path / "my_data", {"split": SPLITS} | columns)
    card, data = datasets.card(str(path)), load(path)
    assert (card.task, card.classes, card.network, card.counts) == (task, classes, "resnet18", (8, 2, 2))
    assert data.train.task == task and data.train.targets.dtype == np.uint8
    np.testing.assert_array_equal(data.train.targets[:3], targets)
    if columns.get("label", [""])[0] == "mal":
        assert card.notes == "1 is 'mal', 0 is 'ben'."
    x, y = next(iter(data.train.batches(5, seed=0)))
    assert x.shape == (5, SIDE, SIDE, 1) and y.shape == (5, len(classes))


def test_masks_come_through(tmp_path):
    data = load(segmented(tmp_path))
    assert (data.card.task, data.card.classes, data.card.num_raters) == (SEGMENTATION, ("foreground",), 1)
    assert data.card.network == "unet"
    np.testing.assert_array_equal(data.val.targets[..., 0], [mask(8), mask(9)])


def test_raters_come_through_and_an_empty_cell_is_a_missing_mask(tmp_path):
    columns = {f"mask_{r + 1}": [f"m{k:02}{'x' * r}.png" for k in range(12)] for r in range(3)}
    columns["mask_2"][1] = columns["mask_1"][4] = columns["mask_3"][4] = ""
    data = load(make(tmp_path / "my_data", {"split": SPLITS} | columns))
    assert data.card.num_raters == data.train.num_raters == 3
    valid = np.ones((8, 3), bool)
    valid[1, 1] = valid[4, 0] = valid[4, 2] = False
    np.testing.assert_array_equal(data.train.rater_valid, valid)
    for k in range(8):
        for r in range(3):
            np.testing.assert_array_equal(data.train.targets[k, ..., r], mask(k + 100 * r) * valid[k, r])
    assert datasets.check(data).table[0]["masks"] == 21


def test_a_mask_of_nothing_is_a_mask(tmp_path):
    path = segmented(tmp_path)
    Image.fromarray(np.zeros((SIDE, SIDE), "uint8")).save(path / "masks" / "m03.png")
    split = load(path).train
    assert split.rater_valid.all() and not split.targets[3].any() and split.targets[2].any()


def test_the_csv_may_be_as_programs_write_it(tmp_path):
    path = labelled(tmp_path)
    lines = (path / "images.csv").read_text("utf-8").splitlines()
    text = "\r\n".join(["\ufeff" + lines[0].replace(",", " , "), *lines[1:], ",,", ""])  # a mark, blanks, empty rows
    (path / "images.csv").write_text(text, "utf-8", newline="")
    assert load(path).train.num_examples == 8


def test_files_may_lie_in_folders_and_hidden_ones_are_left_alone(tmp_path):
    path = labelled(tmp_path, image=[f"site {k % 2}/b/i{k:02}.png" for k in range(12)])
    for name in (".DS_Store", "Thumbs.db", "site 1/._i01.png", ".cache/x.png"):
        (path / "images" / name).parent.mkdir(exist_ok=True)
        (path / "images" / name).write_bytes(b"x")
    assert load(path).val.ids.tolist() == ["site 0/b/i08.png", "site 1/b/i09.png"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")], ids="/".join)
def test_names_in_either_form_of_unicode_are_the_same(tmp_path, forms):
    """A Mac writes an accent as a letter of its own (NFD) on some disks; a csv from elsewhere has it in NFC."""
    in_csv, on_disk = ((lambda text, form=form: unicodedata.normalize(form, text)) for form in forms)
    names, mask_names = ([f"{what}é{k:02}.png" for k in range(12)] for what in "im")
    path = segmented(tmp_path)
    for k in range(12):
        (path / f"images/i{k:02}.png").rename(path / "images" / on_disk(names[k]))
        (path / f"masks/m{k:02}.png").rename(path / "masks" / on_disk(mask_names[k]))
        change("image", k + 1, in_csv(names[k]))(path)
        change("mask", k + 1, in_csv(mask_names[k]))(path)
    data = load(path)
    assert data.train.ids.tolist() == names[:8]
    for k in range(8):
        np.testing.assert_array_equal(data.train.images[k].squeeze(), pixels(k))
        np.testing.assert_array_equal(data.train.targets[k, ..., 0], mask(k))


def test_classes_and_patients_in_either_form_of_unicode_are_the_same(tmp_path):
    labels = [unicodedata.normalize(form, name) for name in ("nævus", "mélanome") for form in ("NFC", "NFD")] * 3
    path = labelled(tmp_path, label=labels, patient=[unicodedata.normalize("NFD", "é")] * 8 + ["b"] * 2 + ["c"] * 2)
    assert load(path).card.classes == ("nævus",)
    change("patient", 10, unicodedata.normalize("NFC", "é"))(path)
    with pytest.raises(ValueError, match="'é' in train and val"):
        load(path)


def test_class_numbers_are_in_the_order_of_numbers(tmp_path):
    assert load(labelled(tmp_path, label=["10.0", "9.0", "-1"] * 4)).card.classes == ("-1", "9.0", "10.0")


@pytest.mark.parametrize("patients", [["1", "1.0"], ["01.00", "01"]])
def test_a_patient_spelt_in_two_ways_is_refused(tmp_path, patients):
    path = labelled(tmp_path, patient=patients[:1] * 8 + ["b", "b"] + patients[1:] * 2)
    with pytest.raises(ValueError, match=r"one spelling of each patient.*\nWrite all of them one way"):
        load(path)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3), ("CMYK", 3)]
)
def test_channels_are_those_of_the_most_colourful_file(tmp_path, mode, channels):
    path = labelled(tmp_path)
    suffix = "tif" if mode == "CMYK" else "png"
    Image.fromarray(pixels(0, "RGB")).convert(mode).save(
        path / "images" / "i00.png", format=suffix.replace("tif", "tiff")
    )
    assert datasets.card(path).channels == channels
    assert load(path).input_shape == (SIDE, SIDE, channels)


def test_fit_and_size(tmp_path):
    path = labelled(tmp_path)
    wide = np.zeros((SIDE, 2 * SIDE), "uint8")
    wide[:, SIDE // 2 : 3 * SIDE // 2] = 200  # the centre square
    Image.fromarray(wide).save(path / "images" / "i00.png")
    assert (load(path, fit="crop").train.images[0] == 200).all()
    padded = load(path).train.images[0]  # unasked, nothing is cut off
    assert (padded[0] == 0).all() and (padded[SIDE // 2] == 200).any()
    assert load(path, size=8).input_shape == (8, 8, 1)
    with pytest.raises(ValueError, match="Expected fit one of"):
        load(path, fit="squeeze")
    with pytest.raises(ValueError, match="Expected options of"):
        load(path, fits="crop")


def test_limit_decodes_no_more_than_it_asks_for(tmp_path):
    path = labelled(tmp_path)
    few = load(path, limit=3, in_memory=False, cache=tmp_path / "cache")
    assert [part.num_examples for part in (few.train, few.val, few.test)] == [3, 2, 2]
    (cache,) = (tmp_path / "cache").glob("my_data-16px-*/images.npy")
    assert len(np.load(cache)) == 7
    whole = load(path)
    for image, name in zip(few.train.images, few.train.ids, strict=True):
        np.testing.assert_array_equal(image, whole.train.images[whole.train.ids.tolist().index(name)])


def test_another_file_is_another_image(tmp_path):
    path = labelled(tmp_path)
    assert (load(path).train.images[0].squeeze() == pixels(0)).all()
    Image.fromarray(pixels(99)).save(path / "images" / "i00.png")
    assert (load(path).train.images[0].squeeze() == pixels(99)).all()


# ---- names and cards


def test_names_of_folders(tmp_path, monkeypatch):
    path = labelled(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("my_data", "./my_data", "my_data/", str(path), path):
        assert datasets.card(name).name == "my_data"
    monkeypatch.chdir(path)
    assert datasets.card(".").name == "my_data"
    with pytest.raises(ValueError, match="Expected a dataset among") as error:
        datasets.card("my_dota")
    assert str(error.value).count("\n") == 1
    with pytest.raises(ValueError, match="Expected a dataset among"):
        datasets.card("")


@pytest.mark.parametrize(
    ("base", "name"), [("Meine Daten (2)", "Meine_Daten_2"), ("lidc", "lidc_folder"), ("Ä", "folder"), ("a.b", "a_b")]
)
def test_card(tmp_path, base, name):
    path = make(tmp_path / base, {"split": SPLITS, "label": list("abcabcabcabc")})
    card = datasets.card(f"{tmp_path}/{base}")
    assert card.name == name and card.source == f"the folder {base}" and str(tmp_path) not in str(card)
    assert (card.licence, card.citation, card.default_size) == ("yours", "none", 64)
    assert load(path).card == card


# ---- a split of one's own, and one that is drawn


def test_split_by_image_is_seeded_and_told(tmp_path, caplog):
    path = make(tmp_path / "my_data", {"label": list("abc") * 10})
    assert datasets.card(path).counts is None
    first, again, other = load(path), load(path), load(path, seed=1)
    assert [part.num_examples for part in (first.train, first.val, first.test)] == [24, 3, 3]
    assert set(first.train.ids) | set(first.val.ids) | set(first.test.ids) == {f"i{k:02}.png" for k in range(30)}
    assert again.test.ids.tolist() == first.test.ids.tolist() != other.test.ids.tolist()
    assert "no column split: made a random split by image, 24 / 3 / 3 images, with seed 0" in caplog.text


@pytest.mark.parametrize("seed", range(5))
def test_split_by_patient_keeps_patients_whole(tmp_path, caplog, seed):
    patients = ["big"] * 20 + [f"p{k // 2}" for k in range(40)]
    path = make(tmp_path / "my_data", {"label": list("abc") * 20, "patient": patients})
    data = load(path, seed=seed, size=8)
    of = [set(part.groups) for part in (data.train, data.val, data.test)]
    assert not of[0] & of[1] and not of[0] & of[2] and not of[1] & of[2] and "big" in of[0]
    assert [part.num_examples for part in (data.train, data.val, data.test)] == [48, 6, 6]
    assert "a random split by patient" in caplog.text
    assert data.train.groups[list(data.train.ids).index("i00.png")] == "big"


def test_a_class_that_a_split_lacks_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load(labelled(tmp_path, label=list("abcabcab" + "ab" + "cc")))
    assert "split val has no image of c" in caplog.text and "split test has no image of a, b" in caplog.text
    assert "split train" not in caplog.text


def test_a_grade_that_no_image_has_is_told(tmp_path, caplog):
    path = make(tmp_path / "my_data", {"split": SPLITS, "grade": [0, 1, 3] * 4})
    assert datasets.card(path).classes == ("0", "1", "2", "3")
    assert "no image is of grade 2" in caplog.text


# ---- bad input


def change(name, row, value):
    return lambda path: rewrite(path, lambda rows: rows[row].__setitem__(rows[0].index(name), value))


def rewrite(path, edit):
    with open(path / "images.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    edit(rows)
    with open(path / "images.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def text(content, encoding="utf-8"):
    return lambda path: (path / "images.csv").write_bytes(content.encode(encoding))


def save(name, values, **options):
    def do(path):
        image = values if isinstance(values, Image.Image) else Image.fromarray(values)
        image.save(path / name, **options)

    return do


def replace(path, make_one):
    path.unlink()
    make_one(path)


def cut(name):
    def do(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])

    return do


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return save("images/i00.png", pixels(0), format="JPEG", exif=exif)


def rows_of(rows):
    """(number, row) of those below the header."""
    return list(enumerate(rows[1:]))


BAD_LABELS = {
    "no csv": (lambda path: (path / "images.csv").unlink(), "Expected a folder with an images.csv"),
    "empty csv": (text(""), "Received: an empty file"),
    "blank csv": (text("\n\n,,\n"), "Received: an empty file"),
    "header alone": (text("image,split,label\n"), "Received: a header alone"),
    "no image column": (lambda path: rewrite(path, lambda rows: rows[0].__setitem__(0, "file")), "a column image"),
    "capital": (lambda path: rewrite(path, lambda rows: rows[0].__setitem__(0, "Image")), "'image' in small letters"),
    "two image columns": (lambda path: rewrite(path, lambda rows: rows[0].__setitem__(2, "image")), "'image' twice"),
    "column without a name": (lambda path: rewrite(path, lambda rows: rows[0].__setitem__(2, "")), "one without"),
    "semicolons": (text("image;split;label\ni00.png;train;a\n"), "Expected commas between the columns"),
    "tabs": (text("image\tsplit\tlabel\ni00.png\ttrain\ta\n"), "Expected commas between the columns"),
    "utf-16": (text("image,split,label\n", "utf-16"), "in UTF-8"),
    "latin-1": (text("image,split,label\nä.png,train,a\n", "latin-1"), "in UTF-8"),
    "open quote": (text('image,split,label\n"i00.png,train,a\n'), "Expected a table with commas"),
    "too many cells": (lambda path: rewrite(path, lambda rows: rows[3].append("x")), "Expected 3 cells in line 4"),
    "too few cells": (lambda path: rewrite(path, lambda rows: rows[3].pop()), "Expected 3 cells in line 4"),
    "duplicate row": (lambda path: rewrite(path, lambda rows: rows.append(rows[1])), "one row for each image"),
    "same file": (change("image", 2, "./i00.png"), "Received: i00.png in 2 of them"),
    "no such image": (change("image", 1, "x.png"), "Received: 1 of 12 are not there, as x.png"),
    "other case": (change("image", 1, "I00.PNG"), "small and capital letters count"),
    "no row": (lambda path: rewrite(path, lambda rows: rows.pop()), "Received: 1 without one, as i11.png"),
    "stray file": (lambda path: (path / "images" / "notes.txt").write_text("x"), "without one, as notes.txt"),
    "leaves the folder": (change("image", 1, "../images/i00.png"), "Expected the name of a file below"),
    "absolute": (change("image", 1, "/etc/passwd"), "Expected the name of a file below"),
    "drive": (change("image", 1, "C:/i00.png"), "Expected the name of a file below"),
    "backslash": (change("image", 1, "a\\i00.png"), "Expected the name of a file below"),
    "no name": (change("image", 1, ""), "Expected the name of a file below"),
    "unknown split": (change("split", 4, "training"), "Received: 'training' in row 4"),
    "no split": (change("split", 4, ""), "Expected split train, val or test"),
    "empty split": (
        lambda path: rewrite(path, lambda rows: [row.__setitem__(1, "train") for row in rows[1:] if row[1] == "val"]),
        "Received: none of val",
    ),
    "empty label": (change("label", 5, ""), "Received: '' in row 5"),
    "NaN label": (change("label", 5, "nan"), "Received: 'nan' in row 5"),
    "one number, two spellings": (
        lambda path: rewrite(
            path, lambda rows: [row.__setitem__(2, ("0", "0.0", "1")[k % 3]) for k, row in rows_of(rows)]
        ),
        "Received: '0' and '0.0'",
    ),
    "two spellings": (change("label", 5, "A"), "Received: 'A' and 'a'"),
    "one class": (
        lambda path: rewrite(path, lambda rows: [row.__setitem__(2, "a") for row in rows[1:]]),
        "two classes or more",
    ),
    "nothing to learn": (
        lambda path: rewrite(path, lambda rows: [row.pop() for row in rows]),
        "Expected mask columns, or label",
    ),
    "a pipe": (lambda path: replace(path / "images/i05.png", os.mkfifo), "Expected a regular file"),
    "too large a csv": (lambda path: os.truncate(path / "images.csv", 2**32), "a table of at most 33,554,432 bytes"),
    "two forms of a name": (
        lambda path: [
            save(f"images/{unicodedata.normalize(form, 'é.png')}", pixels(5))(path) for form in ("NFC", "NFD")
        ],
        "in two forms of Unicode",
    ),
    "masks without a column": (lambda path: (path / "masks").mkdir(), "Expected a column mask"),
    "corrupt": (cut("images/i05.png"), "truncated or corrupt"),
    "no image at all": (lambda path: (path / "images/i05.png").write_text("hello"), "truncated or corrupt"),
    "empty file": (lambda path: (path / "images/i05.png").write_bytes(b""), "truncated or corrupt"),
    "gif": (save("images/i05.png", pixels(5), format="GIF"), "Expected a png, jpg, tif or bmp"),
    "32 bits": (
        lambda path: Image.fromarray(pixels(5).astype("float32")).save(path / "images/i05.png", format="TIFF"),
        "Expected an image of 8 bits",
    ),
    "turned": (turned(), "Expected an image that is stored upright"),
    "pages": (
        lambda path: Image.fromarray(pixels(1)).save(
            path / "images/i05.png", format="TIFF", save_all=True, append_images=[Image.fromarray(pixels(2))]
        ),
        "Expected one image in a file. Received: 2",
    ),
}

BAD_MASKS = {
    "no such mask": (change("mask", 1, "x.png"), "Expected the masks that images.csv names"),
    "no masks folder": (lambda path: (path / "masks").rename(path / "other"), "Received: 12 of 12 are not there"),
    "empty cell": (change("mask", 2, ""), "one mask or more in each row"),
    "shared mask": (change("mask", 2, "m00.png"), "one cell for each mask"),
    "leaves the folder": (change("mask", 2, "../masks/m01.png"), "Expected the name of a file below"),
    "stray mask": (save("masks/z.png", mask(0)), "Received: 1 without one, as z.png"),
    "other size": (save("masks/m03.png", mask(3)[:-1]), "Expected a mask of 16 x 16 pixels like its image"),
    "three values": (save("masks/m03.png", mask(3) + mask(4)), "Expected a mask of 0 and 1 or of 0 and 255"),
    "corrupt": (cut("masks/m03.png"), "truncated or corrupt"),
    "mask and label": (
        lambda path: rewrite(path, lambda rows: [row.append("label" if k == 0 else "a") for k, row in enumerate(rows)]),
        "Received: columns mask, label",
    ),
    "mask and mask_1": (
        lambda path: rewrite(path, lambda rows: [row.append("mask_1" if k == 0 else "") for k, row in enumerate(rows)]),
        "without a gap",
    ),
    "gap": (lambda path: rewrite(path, lambda rows: rows[0].__setitem__(2, "mask_2")), "without a gap"),
    "masks": (lambda path: rewrite(path, lambda rows: rows[0].__setitem__(2, "masks")), "without a gap"),
}


@pytest.mark.parametrize(
    ("make_one", "spoil", "message"),
    [pytest.param(labelled, *case, id=name) for name, case in BAD_LABELS.items()]
    + [pytest.param(segmented, *case, id=f"masks: {name}") for name, case in BAD_MASKS.items()],
)
def test_bad_input_has_two_lines_and_leaves_no_cache(tmp_path, make_one, spoil, message):
    path = make_one(tmp_path)
    spoil(path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(path, cache=tmp_path / "cache")
    assert message in str(error.value)
    assert "Expected" in str(error.value) and "Received: " in str(error.value)
    assert str(error.value).count("\n") <= 1
    finished = [found for found in (tmp_path / "cache").glob("*/manifest.json")]
    assert finished == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": ["0"] * 11 + ["2"]}, "Received: '2' in row 12"),
        ({"a": ["0"] * 11 + [""], "b": ["1"] * 12}, "Received: '' in row 12"),
        ({"a": ["0"] * 11 + ["NaN"]}, "A column that is none of image, split, patient"),
        ({"age": list(range(12)), "label": list("ab" * 6)}, "Received: columns age, label"),
        ({"grade": ["0", "1", "x"] * 4}, "Received: 'x' in row 3"),
        ({"grade": ["0", "1", "-1"] * 4}, "Received: '-1' in row 3"),
        ({"grade": ["0", "1", ""] * 4}, "Received: '' in row 3"),
        ({"grade": ["0", "1", "9"] * 4}, "Expected grades from 0 to K-1"),
        ({"grade": ["0"] * 12}, "Expected grades from 0 to K-1"),
        ({"label": list("ab" * 6), "grade": list("01" * 6)}, "Received: columns label, grade"),
        ({"label": list("ab" * 6), "patient": ["p"] * 12}, "Received: 'p' in train and val"),
        ({"label": list("ab" * 6), "patient": ["p", ""] * 6}, "'' in row 2 below the header"),
    ],
)
def test_bad_columns(tmp_path, columns, message):
    path = make(tmp_path / "my_data", {"split": SPLITS} | columns)
    with pytest.raises(ValueError, match="Expected") as error:
        load(path)
    assert message in str(error.value) and str(error.value).count("\n") == 1


@pytest.mark.parametrize("patient", [None, [f"p{k % 9}" for k in range(30)]])
def test_too_few_to_draw_a_split_from(tmp_path, patient):
    n = 9 if patient is None else 30
    columns = {"label": (["a", "b"] * 15)[:n]} | ({} if patient is None else {"patient": patient})
    with pytest.raises(ValueError, match=r"Expected a column split, or 10 (image|patient)s or more") as error:
        load(make(tmp_path / "my_data", columns))
    assert str(error.value).count("\n") == 1


def test_no_such_folder():
    with pytest.raises(FileNotFoundError, match=r"no such folder .*\nCheck the path.") as error:
        datasets.load("path/to/nothing")
    assert str(error.value).count("\n") == 1


def test_class_names_in_a_column_of_another_name_are_one_fault(tmp_path):
    path = make(tmp_path / "my_data", {"class": ["bar", "foo"] * 15})
    with pytest.raises(ValueError, match=r"texts such as 'bar' in column 'class'.\nRename 'class' to label"):
        load(path)
    assert [one.file for one in folder.faults(path)] == ["images.csv"]


def test_a_file_put_right_is_read_on(tmp_path):
    path = labelled(tmp_path)
    whole = (path / "images" / "i05.png").read_bytes()
    cut("images/i05.png")(path)
    with pytest.raises(ValueError, match="corrupt"):
        load(path)
    (path / "images" / "i05.png").write_bytes(whole)
    np.testing.assert_array_equal(load(path).train.images[5].squeeze(), pixels(5))


def test_headers_alone_are_read_for_a_card(tmp_path, monkeypatch):
    path = labelled(tmp_path)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("an image was decoded"))
    assert datasets.card(path).channels == 1
