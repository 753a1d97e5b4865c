"""MedMNIST: cards, tasks and file formats, damaged files, interrupted conversions, and memory that does not grow."""

import hashlib
import importlib.util
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from sbn_tf import datasets
from sbn_tf.datasets import files, medmnist, npz
from sbn_tf.datasets.base import BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL
from sbn_tf.datasets.chest import LABELS

PARTS = ("train", "val", "test")
COUNTS = (7, 4, 5)


def contents(name, side=28, counts=COUNTS):
    """What an official file holds, in small: random images and labels, each class at least once in train."""
    card, rng = datasets.card(name), np.random.default_rng(side)
    arrays = {}
    for part, n in zip(PARTS, counts, strict=True):
        shape = (n, side, side) if card.channels == 1 else (n, side, side, 3)
        arrays[f"{part}_images"] = rng.integers(0, 256, shape).astype("uint8")
        if card.task == MULTI_LABEL:
            labels = rng.integers(0, 2, (n, len(card.classes)))
        else:
            labels = rng.permutation(np.arange(n) % max(2, len(card.classes)))[:, None]
        arrays[f"{part}_labels"] = labels.astype("uint8")
    return arrays


def write(path, name="chestmnist", side=28, save=np.savez_compressed, **changes):
    arrays = contents(name, side) | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


def finished(folder):
    return [path.name for path in folder.glob("*") if path.is_dir() and not path.name.endswith(".partial")]


# ---- cards


@pytest.mark.parametrize(
    ("name", "task", "outputs", "channels", "total", "licence"),
    [
        # Yang et al. 2023, Table 2; DermaMNIST alone is not for commercial use.
        ("pathmnist", MULTI_CLASS, 9, 3, 107_180, "CC BY 4.0"),
        ("chestmnist", MULTI_LABEL, 14, 1, 112_120, "CC BY 4.0"),
        ("dermamnist", MULTI_CLASS, 7, 3, 10_015, "CC BY-NC 4.0"),
        ("octmnist", MULTI_CLASS, 4, 1, 109_309, "CC BY 4.0"),
        ("pneumoniamnist", BINARY, 1, 1, 5_856, "CC BY 4.0"),
        ("retinamnist", ORDINAL, 5, 3, 1_600, "CC BY 4.0"),
        ("breastmnist", BINARY, 1, 1, 780, "CC BY 4.0"),
        ("bloodmnist", MULTI_CLASS, 8, 3, 17_092, "CC BY 4.0"),
        ("tissuemnist", MULTI_CLASS, 8, 1, 236_386, "CC BY 4.0"),
        ("organamnist", MULTI_CLASS, 11, 1, 58_830, "CC BY 4.0"),
        ("organcmnist", MULTI_CLASS, 11, 1, 23_583, "CC BY 4.0"),
        ("organsmnist", MULTI_CLASS, 11, 1, 25_211, "CC BY 4.0"),
    ],
)
def test_cards_are_those_of_the_paper(name, task, outputs, channels, total, licence):
    card = datasets.card(name)
    assert name in datasets.names()
    assert (card.task, len(card.classes), card.channels, sum(card.counts)) == (task, outputs, channels, total)
    assert card.licence.startswith(licence + " (") and "Scientific Data 10:41" in card.citation
    assert card.splits == "official" and card.network == "resnet18" and "10519652" in card.source
    assert card.files == tuple(f"{name}{end}.npz" for end in ("", "_64", "_128", "_224"))
    assert [file for file, _ in card.checksums] == list(card.files)
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for _, md5 in card.checksums)
    for size, file, md5 in zip((28, 64, 128, 224), card.files, dict(card.checksums).values(), strict=True):
        assert medmnist.official_file(name, size) == (file, f"{card.source.split()[0]}/files/{file}?download=1", md5)
    assert len(medmnist.NAMES) == 12


def test_the_chest_card_is_the_paper_s():
    card = datasets.card("chestmnist")
    assert card.classes == LABELS and len(LABELS) == 14 and (LABELS[0], LABELS[-1]) == ("atelectasis", "hernia")
    assert card.counts == (78_468, 11_219, 22_433) and card.paper_normalisation == (0.498, 0.247)
    assert dict(card.checksums)["chestmnist_224.npz"] == "45bd33e6f06c3e8cdb481c74a89152aa"


def test_a_binary_card_names_class_1_and_says_what_0_is():
    card = datasets.card("breastmnist")
    assert card.classes == ("normal, benign",) and "0 is 'malignant'" in card.notes


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a package medmnist of that info.py on the path; importing it fails."""

    def install(info):
        (tmp_path / "medmnist").mkdir()
        (tmp_path / "medmnist" / "__init__.py").write_text("raise AssertionError('imported')")
        (tmp_path / "medmnist" / "info.py").write_text(info)
        monkeypatch.syspath_prepend(tmp_path)
        medmnist._table.cache_clear()
        medmnist._cards.cache_clear()

    yield install
    medmnist._table.cache_clear()
    medmnist._cards.cache_clear()


def test_an_installed_medmnist_comes_first_and_is_not_run(installed, tmp_path, caplog):
    table = {name: dict(entry) for name, entry in medmnist._table().items()}
    table["breastmnist"] |= {"MD5": "0" * 32, "url": "https://new.example/breastmnist.npz", "license": "CC0"}
    made = tmp_path / "made"
    installed(f"import os\nos.mkdir({str(made)!r})\nHOMEPAGE = ''\nINFO = {table!r}\n")
    assert medmnist.official_file("breastmnist", 28)[1:] == ("https://new.example/breastmnist.npz", "0" * 32)
    assert datasets.card("breastmnist").licence.startswith("CC0")
    assert not made.exists() and "medmnist" not in sys.modules and not caplog.text


@pytest.mark.parametrize(
    "info", ["INFO = {", "INFO = dict(a=1)", "OTHER = {}", "INFO = {}", "INFO = {'pathmnist': {'task': 'regression'}}"]
)
def test_a_table_that_cannot_be_read_is_left_for_our_own(installed, caplog, info):
    expected = datasets.card("pathmnist")
    installed(info)
    assert datasets.card("pathmnist") == expected
    assert "using our own" in caplog.text and len(caplog.messages) == 1


def test_our_table_is_that_of_medmnist():
    if importlib.util.find_spec("medmnist") is None:
        pytest.skip("medmnist is not installed: it requires torch")
    theirs = medmnist._installed_info()
    words = {"title", "citation", "notes"}
    for name, ours in medmnist._built_in_table().items():
        assert {key: theirs[name][key] for key in ours.keys() - words} == {k: ours[k] for k in ours.keys() - words}


# ---- readers


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("side", [28, 64])
@pytest.mark.parametrize("name", ["bloodmnist", "breastmnist", "chestmnist", "retinamnist", "organamnist"])
def test_every_task_and_format(tmp_path, name, side, save):
    file = f"{name}.npz" if side == 28 else f"{name}_{side}.npz"
    arrays = write(tmp_path / file, name, side, save)
    data = datasets.load(name, root=tmp_path, size=side)
    for part, n in zip((data.train, data.val, data.test), COUNTS, strict=True):
        images, labels = arrays[f"{part.name}_images"], arrays[f"{part.name}_labels"]
        assert part.images.shape == (n, side, side, data.card.channels)
        np.testing.assert_array_equal(part.images.reshape(images.shape), images)
        if data.card.task in (MULTI_CLASS, ORDINAL):
            assert part.targets.shape == (n, len(data.card.classes))
            assert (part.targets.sum(1) == 1).all()
            labels, targets = labels[:, 0], part.targets.argmax(1)
        else:
            targets = part.targets
        np.testing.assert_array_equal(targets, labels)
    assert data.num_outputs == len(data.card.classes)
    np.testing.assert_allclose(
        data.mean, arrays["train_images"].reshape(-1, data.card.channels).mean(0) / 255, rtol=1e-5
    )


def test_the_smallest_file_that_is_large_enough_is_taken(tmp_path, caplog):
    small = write(tmp_path / "chestmnist.npz", side=28)
    large = write(tmp_path / "chestmnist" / "chestmnist_64.npz", side=64)
    data = datasets.load("chestmnist", root=tmp_path, size=28)
    np.testing.assert_array_equal(data.train.images[..., 0], small["train_images"])
    np.testing.assert_array_equal(data.test.targets, small["test_labels"])
    np.testing.assert_array_equal(datasets.load("chestmnist", root=tmp_path).val.images[..., 0], large["val_images"])
    assert "resized" not in caplog.text
    resized = datasets.load("chestmnist", root=tmp_path, size=32).val.images
    assert "chestmnist_64.npz is resized from 64 to 32" in caplog.text
    by_pillow = [
        np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BILINEAR)) for i in large["val_images"]
    ]
    np.testing.assert_array_equal(resized[..., 0], by_pillow)
    with pytest.raises(FileNotFoundError, match=r"chestmnist_128(.|\n)*download=True"):
        datasets.load("chestmnist", root=tmp_path, size=128)


def test_resizing_keeps_the_mean_and_reduces_noise(tmp_path):
    write(tmp_path / "chestmnist_64.npz", side=64)
    data = datasets.load("chestmnist", root=tmp_path, size=16)
    large = datasets.load("chestmnist", root=tmp_path, size=64)
    assert abs(data.mean[0] - large.mean[0]) < 0.01
    assert data.sd[0] < large.sd[0] / 2.5  # white noise over 4 x 4: antialiased


def test_paper_normalisation(tmp_path):
    write(tmp_path / "chestmnist.npz")
    data = datasets.load("chestmnist", root=tmp_path, size=28, normalisation="paper")
    np.testing.assert_allclose([data.mean[0], data.sd[0]], [0.498, 0.247], rtol=1e-6)
    by_hand = (data.val.images[0, 0, 0, 0] / 255 - 0.498) / 0.247
    np.testing.assert_allclose(data.val.normalised()[0, 0, 0, 0], by_hand, rtol=1e-5)


def test_from_disk_and_from_memory_are_the_same(tmp_path):
    write(tmp_path / "bloodmnist.npz", "bloodmnist")
    options = dict(root=tmp_path, size=28)
    disk, memory = (datasets.load("bloodmnist", in_memory=held, **options) for held in (False, True))
    assert isinstance(memory.train.images, np.ndarray) and not isinstance(disk.train.images, np.ndarray)
    assert disk.digest() == memory.digest()
    for first, second in zip(disk.train.batches(3, seed=1), memory.train.batches(3, seed=1), strict=True):
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])
    few = datasets.load("bloodmnist", in_memory=False, limit=3, **options).train
    rows = [np.flatnonzero((memory.train.images == image).all(axis=(1, 2, 3)))[0] for image in few.images]
    assert len(rows) == 3 and rows == sorted(rows) and not isinstance(few.images, np.ndarray)
    np.testing.assert_array_equal(memory.train.targets[rows], few.targets)


def test_patients_and_names(tmp_path):
    n = dict(zip(PARTS, np.split(np.arange(16), [7, 11]), strict=True))
    extras = {f"{part}_patients": rows for part, rows in n.items()}
    extras |= {f"{part}_names": np.array([f"image {k}" for k in rows]) for part, rows in n.items()}
    write(tmp_path / "chestmnist.npz", **extras)
    data = datasets.load("chestmnist", root=tmp_path, size=28)
    np.testing.assert_array_equal(data.val.groups, [7, 8, 9, 10])
    assert list(data.test.ids[:2]) == ["image 11", "image 12"]


def test_labels_in_fortran_order_are_read(tmp_path):
    arrays = contents("chestmnist")
    write(tmp_path / "chestmnist.npz", train_labels=np.asfortranarray(arrays["train_labels"]))
    data = datasets.load("chestmnist", root=tmp_path, size=28)
    np.testing.assert_array_equal(data.train.targets, arrays["train_labels"])


def test_verify(tmp_path, monkeypatch):
    path = tmp_path / "breastmnist.npz"
    write(path, "breastmnist")
    options = dict(root=tmp_path, size=28, verify=True)
    with pytest.raises(ValueError, match=r"md5 750601b1f35ba3300ea97c75c52ff8f6 for .*\nIt is not the official file"):
        datasets.load("breastmnist", **options)
    table = medmnist._table()
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(medmnist, "_table", lambda: table | {"breastmnist": table["breastmnist"] | {"MD5": md5}})
    medmnist._cards.cache_clear()
    try:
        assert datasets.load("breastmnist", **options).train.num_examples == 7
    finally:
        medmnist._cards.cache_clear()


# ---- files that are not as expected


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("chestmnist", dict(val_labels=None), "without \\['val_labels'\\]"),
        ("chestmnist", dict(test_images=None, val_labels=None), "without \\['val_labels', 'test_images'\\]"),
        ("chestmnist", dict(train_images=np.zeros((7, 28, 20), "uint8")), "\\(N, 28, 28\\).*\\(7, 28, 20\\)"),
        ("chestmnist", dict(test_images=np.zeros((5, 32, 32), "uint8")), "test_images \\(N, 28, 28\\)"),
        ("chestmnist", dict(train_images=np.zeros((7, 28, 28), "float32")), "uint8 in C order.*, float32"),
        ("chestmnist", dict(train_images=np.zeros((7, 28, 28, 3), "uint8")), "\\(N, 28, 28\\).*\\(7, 28, 28, 3\\)"),
        ("chestmnist", dict(train_images=np.zeros(7, "uint8")), "\\(N, 28, 28\\).*\\(7,\\)"),
        ("chestmnist", dict(train_images=np.zeros((), "uint8")), "\\(N, 28, 28\\).*\\(\\)"),
        ("bloodmnist", dict(train_images=np.zeros((7, 28, 28), "uint8")), "28, 28, 3\\).*\\(7, 28, 28\\)"),
        ("chestmnist", dict(val_images=np.asfortranarray(np.zeros((4, 28, 28), "uint8"))), "Fortran order"),
        ("chestmnist", dict(val_images=np.zeros((0, 28, 28), "uint8")), "not empty"),
        ("chestmnist", dict(val_images=np.array([{}] * 4, dtype=object)), "truncated, corrupt"),
        ("chestmnist", dict(train_labels=np.array([{}], dtype=object)), "truncated, corrupt"),
        ("chestmnist", dict(train_labels=np.zeros((7, 5), "uint8")), "\\(7, 14\\).*\\(7, 5\\)"),
        ("chestmnist", dict(train_labels=np.zeros((6, 14), "uint8")), "\\(7, 14\\).*\\(6, 14\\)"),
        ("bloodmnist", dict(train_labels=np.zeros(7, "uint8")), "\\(7, 1\\).*\\(7,\\)"),
        ("bloodmnist", dict(train_labels=np.zeros((7, 1))), "integers.*float64"),
        ("chestmnist", dict(test_labels=np.full((5, 14), np.nan)), "integers.*float64"),
        (
            "chestmnist",
            dict(test_labels=np.full((5, 14), 2, "uint8")),
            "0 to 1 in test_labels.*Received: 2 for image 0",
        ),
        ("chestmnist", dict(test_labels=np.full((5, 14), -1, "int64")), "Received: -1 for image 0, column 0; 70 such"),
        ("breastmnist", dict(val_labels=np.array([[0], [1], [1], [2]])), "0 to 1 in val_labels.*2 for image 3"),
        (
            "bloodmnist",
            dict(val_labels=np.array([[0], [7], [8], [9]])),
            "0 to 7 in val_labels.*8 for image 2.*; 2 such",
        ),
        ("retinamnist", dict(val_labels=np.array([[0], [5], [4], [4]], "uint64")), "0 to 4 in val.*5 for image 1"),
        ("chestmnist", dict(train_patients=np.arange(6)), "train_patients \\(7,\\)"),
        ("chestmnist", dict(train_patients=np.zeros(7)), "train_patients \\(7,\\), integers or text.*float64"),
        ("chestmnist", dict(val_patients=np.zeros(4, [("a", "i4")])), "val_patients \\(4,\\), integers or text"),
        ("chestmnist", dict(test_names=np.full((5, 2), "a")), "test_names \\(5,\\).*\\(5, 2\\), <U1"),
        ("chestmnist", dict(test_names=np.array("a")), "test_names \\(5,\\).*\\(\\), <U1"),
        ("chestmnist", dict(train_images=np.zeros((7, 28, 28), "uint8")), "that vary"),
        (
            "chestmnist",
            dict(train_patients=np.arange(7), val_patients=np.arange(4), test_patients=np.arange(7, 12)),
            "one split. Received: 4 in both train and val",
        ),
    ],
)
def test_wrong_files(tmp_path, name, changes, says):
    write(tmp_path / f"{name}.npz", name, **changes)
    with pytest.raises(ValueError, match=says) as error:
        datasets.load(name, root=tmp_path, size=28, cache=tmp_path / "cache")
    assert str(error.value).count("\n") <= 1
    if "that vary" not in says and "one split" not in says:  # those are of the images, known when they are read
        assert not (tmp_path / "cache").exists()


def test_truncated_corrupt_and_other_files(tmp_path):
    path, folder = tmp_path / "chestmnist.npz", tmp_path / "cache"
    write(path)
    whole = path.read_bytes()
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    options = dict(root=tmp_path, size=28, cache=folder)
    for bad in (b"", b"nonsense", whole[:3000], whole[:-1], bytes(encrypted)):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"whole npz(.|\n)*truncated, corrupt"):
            datasets.load("chestmnist", **options)
    np.save(tmp_path / "one.npy", np.zeros((7, 28, 28), "uint8"))
    path.write_bytes((tmp_path / "one.npy").read_bytes())
    with pytest.raises(ValueError, match="truncated, corrupt"):
        datasets.load("chestmnist", **options)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("readme.txt", "no arrays")
        with pytest.raises(ValueError, match="without"):
            datasets.load("chestmnist", **options)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="Expected a regular file"):
        datasets.load("chestmnist", **options)
    path.rmdir()
    os.mkfifo(path)  # to open it would wait for ever
    with pytest.raises(ValueError, match="Expected a regular file"):
        datasets.load("chestmnist", **options)
    assert not folder.exists()


def test_labels_of_other_images_are_refused_before_they_are_read(tmp_path):
    """The labels of 20 million images, 20 MB in a file of 0.1 MB; of the seven images not 1 MB is needed."""
    path = tmp_path / "breastmnist.npz"
    write(path, "breastmnist", train_labels=np.zeros((20_000_000, 1), "uint8"))
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"train_labels \(7, 1\).*Received: shape \(20000000, 1\)"):
            datasets.load("breastmnist", root=tmp_path, size=28)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


ARRAYS = {
    "C order": np.arange(24, dtype="i2").reshape(2, 3, 4),
    "Fortran order": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "a number": np.array(3),
    "no rows": np.zeros((0, 3), "u1"),
    "text": np.array(["abc", "é"]),
    "bytes": np.array([b"abc", b"d"]),
    "big endian": np.arange(5, dtype=">i4"),
    "booleans": np.array([True, False]),
    "several pieces": np.arange(10_000, dtype="u2").reshape(50, 200),
    "several pieces in Fortran order": np.asfortranarray(np.arange(10_000, dtype="u2").reshape(50, 200)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_those_that_numpy_loads(tmp_path, monkeypatch, name):
    monkeypatch.setattr(npz, "PIECE_BYTES", 7001)
    np.savez_compressed(tmp_path / "a.npz", a=ARRAYS[name])
    with npz.whole(tmp_path / "a.npz") as archive:
        found = npz.read_array(archive, "a")
    with np.load(tmp_path / "a.npz") as archive:
        expected = archive["a"]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape) and found.flags.writeable
    assert found.flags.f_contiguous == expected.flags.f_contiguous
    np.testing.assert_array_equal(found, expected)


def test_an_array_is_held_once(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(20_000_000, "uint8"))
    tracemalloc.start()
    try:
        with npz.whole(tmp_path / "a.npz") as archive:
            npz.read_array(archive, "a")
        assert tracemalloc.get_traced_memory()[1] < 20e6 + 4 * npz.PIECE_BYTES  # zipfile joins and cuts its pieces
    finally:
        tracemalloc.stop()


def test_an_array_that_the_file_cannot_hold_is_not_made(tmp_path):
    """Header and directory both say 4e9 bytes; deflate stores 1,032 of zeros in a byte at most, and here are 256."""
    path, size = tmp_path / "a.npz", 4_000_000_000
    contents = header_that_lies(f"({size},)")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", contents + bytes(256))
    lies = bytearray(path.read_bytes())
    lies[(start := lies.index(b"PK\x01\x02") + 24) : start + 4] = (len(contents) + size).to_bytes(4, "little")
    path.write_bytes(lies)
    with pytest.raises(ValueError, match=r"4\d{9} bytes, more than the file can hold.*\nIt is truncated, corrupt"):
        npz.read_npz(path, {"a": (("N",), "numbers")})


def test_what_keeps_a_file_from_being_read_is_told(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"MemoryError\).\nIt is"), npz.whole(tmp_path / "a.npz"):
        raise MemoryError
    with pytest.raises(FileNotFoundError, match=r"can be read. Received: .*none.npz \(No such file.*\nCheck that"):
        npz.read_npz(tmp_path / "none.npz", {"a": (("N",), "numbers")})

    def denied(path, *args):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(zipfile, "ZipFile", denied)  # the administrator may read whatever its permissions
    with pytest.raises(
        PermissionError, match=r"Received: .*a.npz \(Permission denied\).\nCheck .*permissions"
    ) as error:
        npz.read_npz(tmp_path / "a.npz", {"a": (("N",), "numbers")})
    assert str(error.value).count("\n") == 1 and error.value.errno == 13


def test_an_array_twice_is_refused(tmp_path):
    """zipfile reads the second one."""
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.npy", archive.read("a.npy"))
    with pytest.raises(ValueError, match=r"each array once in .*a.npz. Received: a twice or more.\nMake"):
        npz.read_npz(tmp_path / "a.npz", {"a": (("N",), "numbers")})


def peak_of(path, says, read):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=says) as error:
            read(path)
        assert str(error.value).count("\n") == 1
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_padded_text_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """One text of 20 million letters: 80 MB in a file of 0.1 MB."""
    monkeypatch.setattr(npz, "MAX_BYTES", 2**26)
    path, forms = tmp_path / "a.npz", {"a": (("N",), "text"), "b": (("N",), "numbers")}
    np.savez_compressed(path, a=np.zeros(1, "<U20000000"), b=np.zeros(1))
    assert path.stat().st_size < 200_000
    says = r"at most 67,108,864 bytes .*Received: 80,000,\d+, most of them in a"
    assert peak_of(path, says, lambda path: npz.read_npz(path, forms)) < 1e6


def test_a_row_that_is_no_image_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.zeros((1, 9000, 9000), "uint8"))

    def read(path):
        with npz.whole(path) as archive:
            next(npz.read_rows(archive, "a"))

    assert peak_of(path, "a row of a has 81,000,000 bytes, more than 67,108,864", read) < 1e6


@pytest.mark.parametrize("zip64", [False, True])
def test_a_directory_of_gigabytes_is_not_read(tmp_path, zip64):
    """A sparse file whose end says that all of it is the directory, in either of the two forms."""
    path, size = tmp_path / "a.npz", 2**31
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0)
    if zip64:
        far = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, 0)
        end = far + struct.pack("<4sLQL", b"PK\6\7", 0, size, 1) + end
    with open(path, "wb") as file:
        file.write(b"PK\1\2")
        file.seek(size)
        file.write(end)
    says = r"whole npz file .*\nIt is truncated, corrupt"
    assert peak_of(path, says, lambda p: npz.read_npz(p, {"a": (("N",), "numbers")})) < 1e8


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_numpy_does_not_write_is_refused(tmp_path, method):
    write(tmp_path / "plain.npz")
    with (
        zipfile.ZipFile(tmp_path / "plain.npz") as plain,
        zipfile.ZipFile(tmp_path / "chestmnist.npz", "w", method) as z,
    ):
        for name in plain.namelist():
            z.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match=r"another method than deflate"):
        datasets.load("chestmnist", root=tmp_path, size=28)


def header_that_lies(shape, dtype="|u1", version=1):
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "header",
    [
        header_that_lies("(7000000000000, 28, 28)"),
        header_that_lies("(3, 28, 28)"),
        header_that_lies("(-7, 28, 28)"),
        header_that_lies("(7, 28, 28)", "|O"),
        header_that_lies("(7, 28, 28)", version=9),
        header_that_lies("(7, 28"),
        b"\x93NUM",
        b"",
    ],
)
@pytest.mark.parametrize("key", ["val_images", "val_labels"])
def test_headers_that_lie(tmp_path, header, key):
    path = tmp_path / "chestmnist.npz"
    write(tmp_path / "plain.npz")
    with zipfile.ZipFile(tmp_path / "plain.npz") as plain, zipfile.ZipFile(path, "w") as archive:
        for name in plain.namelist():
            archive.writestr(name, header + bytes(7 * 28 * 28) if name == f"{key}.npy" else plain.read(name))
    with pytest.raises(ValueError, match="truncated, corrupt"):
        datasets.load("chestmnist", root=tmp_path, size=28)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("key", ["train_images", "val_images", "test_images", "train_labels", "test_labels"])
def test_no_flipped_bit_passes(tmp_path, monkeypatch, save, key):
    """One bit of the array's bytes in the archive; nothing of such a file is kept, also if its time is set back."""
    monkeypatch.setattr(medmnist, "PIECE_BYTES", 28 * 28)
    path, folder = tmp_path / "chestmnist.npz", tmp_path / "cache"
    write(path, save=save)
    whole, status = path.read_bytes(), os.stat(path)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
    damaged = bytearray(whole)
    damaged[info.header_offset + 30 + len(info.filename) + 20 + info.compress_size * 2 // 3] ^= 16
    path.write_bytes(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    options = dict(root=tmp_path, size=28, cache=folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"truncated, corrupt"):
            datasets.load("chestmnist", **options)
        assert not folder.exists() or finished(folder) == []
    path.write_bytes(whole)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    arrays = contents("chestmnist")
    data = datasets.load("chestmnist", **options)
    for part in (data.train, data.val, data.test):
        np.testing.assert_array_equal(part.images[..., 0], arrays[f"{part.name}_images"])
        np.testing.assert_array_equal(part.targets, arrays[f"{part.name}_labels"])


# ---- interrupted, and memory


def cached_bytes(folder):
    (name,) = finished(folder)
    return {path.name: path.read_bytes() for path in (folder / name).glob("*.npy")}


KILLED = """
    import os, signal, sys
    from sbn_tf import datasets
    from sbn_tf.datasets import files, medmnist

    medmnist.PIECE_BYTES = 500 * 28 * 28
    calls, resize = [], files.resize_images

    def killed(images, size):
        calls.append(len(images))
        if len(calls) == 16:  # of 18 pieces: within test
            os.kill(os.getpid(), signal.SIGKILL)
        return resize(images, size)

    files.resize_images = killed
    datasets.load("chestmnist", root=sys.argv[1], size=8, cache=sys.argv[2])
"""


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(tmp_path, monkeypatch, how):
    write(tmp_path / "chestmnist.npz", **contents("chestmnist", counts=(5_250, 2_000, 1_500)))
    options = dict(root=tmp_path, size=8)
    datasets.load("chestmnist", cache=tmp_path / "whole", **options)
    if how == "killed":
        arguments = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(tmp_path / "cut")]
        assert subprocess.run(arguments, capture_output=True).returncode == -signal.SIGKILL
    monkeypatch.setattr(medmnist, "PIECE_BYTES", 500 * 28 * 28)
    resize, calls = files.resize_images, []

    def interrupted(images, size):
        calls.append(len(images))
        if how == "interrupted" and len(calls) == 16:
            raise KeyboardInterrupt
        return resize(images, size)

    monkeypatch.setattr(files, "resize_images", interrupted)
    if how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            datasets.load("chestmnist", cache=tmp_path / "cut", **options)
    assert finished(tmp_path / "cut") == []
    calls.clear()
    datasets.load("chestmnist", cache=tmp_path / "cut", **options)
    done = 8_750 - sum(calls)
    assert done == 7_250 if how == "interrupted" else 0 < done <= 7_250  # train and val; what was on the disk
    assert cached_bytes(tmp_path / "cut") == cached_bytes(tmp_path / "whole")


def write_large(path, side, counts):
    """An npz whose images are written piece by piece: runs of equal pixels, fast to compress."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for part, n in zip(PARTS, counts, strict=True):
            with archive.open(f"{part}_images.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, side, side)}
                np.lib.format.write_array_header_1_0(file, header)
                for first in range(0, n, 100):
                    coarse = rng.integers(0, 256, (min(100, n - first), side // 16, side // 16)).astype("uint8")
                    file.write(coarse.repeat(16, 1).repeat(16, 2).data)
            with archive.open(f"{part}_labels.npy", "w") as file:
                np.lib.format.write_array(file, rng.integers(0, 2, (n, 14)).astype("uint8"))


PEAKS = """
    import resource, sys
    from pathlib import Path
    from sbn_tf import datasets

    def peak():  # in bytes; Linux's ru_maxrss counts the process that started this one too
        status = Path("/proc/self/status")
        if status.exists():
            return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    for folder in ("small", "large"):
        root = f"{sys.argv[1]}/{folder}"
        data = datasets.load("chestmnist", root=root, size=224, in_memory=False, cache=f"{root}/cache")
        images = sum(len(x) for x, _ in data.train.batches(10, seed=0))
        print(images, peak())
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Converting and streaming 300 MB takes little more at the peak than 15 MB: no array of images is ever held."""
    for folder, counts in (("small", (280, 10, 10)), ("large", (5_600, 200, 200))):
        (tmp_path / folder).mkdir()
        write_large(tmp_path / folder / "chestmnist_224.npz", 224, counts)
    arguments = [sys.executable, "-c", textwrap.dedent(PEAKS), str(tmp_path)]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
    few, low, many, high = map(int, out)
    assert (few, many) == (280, 5_600)
    assert high - low < 100e6  # of the large file's 301e6


def test_the_cache_is_found_again_however_the_root_is_written(tmp_path, monkeypatch):
    write(tmp_path / "chestmnist.npz")
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, ".", str(tmp_path / ".." / tmp_path.name)):
        datasets.load("chestmnist", root=root, size=28, cache=tmp_path / "cache")
    assert len(finished(tmp_path / "cache")) == 1


def test_a_file_of_other_counts_than_the_official_one_is_told(tmp_path, caplog):
    write(tmp_path / "chestmnist.npz")
    datasets.load("chestmnist", root=tmp_path, size=28, cache=tmp_path / "cache")
    assert "the official file 78,468 / 11,219 / 22,433: it is another" in caplog.text
