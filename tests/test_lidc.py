"""LIDC-IDRI: folds by patient, resampling by hand, the customary pickle and its damage, the way from DICOM."""

import ast
import csv
import os
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import pairwise_iou

from sbn_tf import datasets
from sbn_tf.datasets import lidc_dicom, pickle_values
from sbn_tf.datasets.lidc import centre, resample, split_by_group

PARTS = ("train", "val", "test")


def disc(side, radius, middle=None):
    """0/1 `(side, side)`: pixels whose middle is within `radius` pixels of `middle`."""
    middle = side // 2 if middle is None else middle
    rows, columns = np.mgrid[:side, :side] - middle
    return (rows**2 + columns**2 <= radius**2).astype("uint8")


def splits(data):
    return [getattr(data, part) for part in PARTS]


def real_root():
    root = os.environ.get("SBN_TF_DATA")
    if not root or not os.path.isdir(os.path.join(root, "lidc_idri")):
        pytest.skip("SBN_TF_DATA is not set or holds no lidc_idri")
    return root


# ---- folds


@pytest.mark.parametrize("num_groups", [4, 7, 40, 101])
def test_folds_test_every_patient_once_and_keep_patients_apart(num_groups):
    rng = np.random.default_rng(0)
    groups = np.array([f"P{k}" for k in np.concatenate([np.arange(num_groups), rng.integers(0, num_groups, 60)])])
    tested = []
    for fold in range(4):
        rows = split_by_group(groups, fold, seed=3)
        assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(len(groups)))
        names = {part: set(groups[rows[part]].tolist()) for part in PARTS}
        assert not names["train"] & names["val"] and not (names["train"] | names["val"]) & names["test"]
        assert len(names["test"]) in (num_groups // 4, -(-num_groups // 4))
        assert len(names["val"]) == max(1, round((num_groups - len(names["test"])) / 10))
        assert (rows["train"] == np.sort(rows["train"])).all()
        tested += names["test"]
    assert sorted(tested) == sorted(set(groups.tolist()))


def test_folds_depend_on_the_seed_and_not_on_the_order_of_the_file():
    groups = np.array([f"P{k % 30}" for k in range(100)])
    order = np.random.default_rng(1).permutation(100)
    for part in PARTS:
        names = set(groups[split_by_group(groups, 1, 0)[part]])
        assert names == set(groups[order][split_by_group(groups[order], 1, 0)[part]])
    assert set(groups[split_by_group(groups, 1, 0)["test"]]) != set(groups[split_by_group(groups, 1, 1)["test"]])
    with pytest.raises(ValueError, match=r"4 patients or more .*Received: 3"):
        split_by_group(groups[:3], 0, 0)


# ---- resampling


@pytest.mark.parametrize(("native", "spacing"), [(0.5, 0.5), (0.46, 0.5), (0.7, 0.5), (0.98, 0.5), (0.7, 1.0)])
@pytest.mark.parametrize("size", [64, 65, 128])
def test_a_disc_keeps_its_area_in_mm2(native, spacing, size):
    radius = 10.0  # mm: 314 mm2; to the nearest pixel errs by a part of the rim, within 3 % here
    mask = disc(71, radius / native)
    found = resample(mask, size, spacing / native, order=0)
    assert set(np.unique(found)) == {0, 1}
    assert abs(found.sum() * spacing**2 / (np.pi * radius**2) - 1) < 0.03
    rows, columns = np.nonzero(found)
    assert abs(rows.mean() - (size - 1) / 2) <= 0.51 and abs(columns.mean() - (size - 1) / 2) <= 0.51
    soft = resample(mask.astype("float32"), size, spacing / native, order=1)
    assert abs(soft.sum() * spacing**2 / (np.pi * radius**2) - 1) < 0.03


@pytest.mark.parametrize("side", [70, 71])
@pytest.mark.parametrize("size", [8, 9, 64, 70, 71, 72, 128])
def test_at_the_same_spacing_resampling_is_crop_and_pad(side, size):
    image = np.random.default_rng(0).random((side, side)).astype("float32")
    for order in (0, 1):
        np.testing.assert_array_equal(
            resample(image, size, 1.0, order=order), centre(image[None, ..., None], size)[0, ..., 0]
        )


def test_a_resampled_pixel_by_hand():
    image = np.random.default_rng(0).random((71, 71))
    found = resample(image, 64, 0.5)  # half a native pixel wide: the middle, 35, comes to lie at 32
    assert found[32, 32] == image[35, 35]
    np.testing.assert_allclose(found[32, 33], (image[35, 35] + image[35, 36]) / 2)
    np.testing.assert_allclose(found[31, 33], image[34:36, 35:37].mean())
    about = resample(image, 5, 1.0, middle=(10.5, 20))  # pixel (2, 2) of 5 is at row 10.5
    np.testing.assert_allclose(about[2], (image[10, 18:23] + image[11, 18:23]) / 2)


@pytest.mark.parametrize("size", [8, 9, 70, 71, 72, 99])
def test_centre_keeps_the_middle(size):
    images = np.zeros((1, 71, 71, 1))
    images[0, 35, 35] = 1
    row, column = np.argwhere(centre(images, size)[0, ..., 0] == 1)[0]
    assert abs(row - (size - 1) / 2) <= 0.5 and abs(column - (size - 1) / 2) <= 0.5


# ---- one slice of each nodule


def write_lidc(root, n=9, **changes):
    rng = np.random.default_rng(0)
    contents = {
        "image": rng.integers(-1200, 600, (n, 71, 71)).astype("int16"),
        "masks": np.zeros((n, 4, 71, 71), "uint8"),
        "patient_id": np.array([f"P{k}" for k in range(n)]),
        "split": np.array((["train", "val", "test"] * n)[:n]),
        "pixel_spacing": np.linspace(0.46, 0.98, n, dtype="float32"),
        "nodule_id": np.arange(n, dtype="int32") + 100,
    }
    contents["image"][:, 35, 35] = 400
    contents["masks"][:, 0, 35, 35] = 1
    contents |= changes
    folder = root / "lidc_idri"
    folder.mkdir()
    path = folder / "lidc_idri_maxslice_71.npz"
    np.savez_compressed(path, **{key: value for key, value in contents.items() if value is not None})
    return path


def test_lidc_window_and_crop(tmp_path):
    path = write_lidc(tmp_path)
    data = datasets.load("lidc", root=tmp_path)
    with np.load(path) as archive:
        raw = archive["image"][archive["split"] == "train"]
    by_hand = (np.clip(raw[:, 3:67, 3:67].astype("float64"), -1000, 400) + 1000) / 1400
    np.testing.assert_allclose(data.train.images[..., 0], by_hand, atol=1e-6)
    assert (data.train.images[:, 32, 32] == 1).all() and (data.train.targets[:, 32, 32, 0] == 1).all()
    padded = datasets.load("lidc", root=tmp_path, size=80, raters="drew").train
    assert (padded.images[:, 0] == 0).all() and padded.targets.sum() == 3
    np.testing.assert_array_equal(padded.rater_valid, [[True, False, False, False]] * 3)
    other = datasets.load("lidc", root=tmp_path, window=(-500, 500)).train
    np.testing.assert_allclose(other.images[..., 0], (np.clip(raw[:, 3:67, 3:67], -500.0, 500) + 500) / 1000, atol=1e-6)


def test_lidc_resampled_to_one_spacing(tmp_path):
    native = np.linspace(0.46, 0.98, 9)
    masks = np.zeros((9, 4, 71, 71), "uint8")
    for k in range(9):
        masks[k, :3] = disc(71, 8 / native[k])  # 8 mm: 201 mm2
    image = np.where(masks[:, 0], 0, -900).astype("int16")
    write_lidc(tmp_path, image=image, masks=masks)
    data = datasets.load("lidc", root=tmp_path, size=128, spacing=0.5, raters="drew")
    drawn = masks.sum(axis=(2, 3)) * native[:, None] ** 2
    np.testing.assert_allclose(drawn[:, :3], np.pi * 64, rtol=0.06)
    for split in splits(data):
        areas = split.targets.sum(axis=(1, 2)) * 0.25
        np.testing.assert_allclose(areas, drawn[split.ids - 100], rtol=0.05)
        assert (areas[:, 3] == 0).all() and set(np.unique(split.targets)) == {0, 1}
        np.testing.assert_array_equal(split.rater_valid, [[True] * 3 + [False]] * len(areas))
        assert split.images.min() >= 0 and split.images.max() <= 1
        narrow = native[split.ids - 100] * 71 < 62  # mm, of the 64 mm that are asked for: beyond is air
        assert narrow.any() and (split.images[narrow, 0, 0] == 0).all()
        inside = split.images[split.targets[..., :1] == 1]
        assert np.median(inside) == np.float32(1000 / 1400)
    with pytest.raises(ValueError, match="Expected the arrays"):
        write_lidc(tmp_path / "other", pixel_spacing=None) if (tmp_path / "other").mkdir() is None else None
        datasets.load("lidc", root=tmp_path / "other", spacing=0.5)


def test_lidc_at_its_own_spacing_is_not_changed(tmp_path):
    write_lidc(tmp_path, pixel_spacing=np.full(9, 0.7, "float32"))
    for size in (64, 71, 128):
        native, same = (datasets.load("lidc", root=tmp_path, size=size, spacing=s) for s in (None, 0.7))
        for one, other in zip(splits(native), splits(same), strict=True):
            np.testing.assert_allclose(one.images, other.images, atol=1e-6)
            np.testing.assert_array_equal(one.targets, other.targets)


def test_lidc_by_folds(tmp_path):
    write_lidc(tmp_path, n=40, split=None, patient_id=np.array([f"P{k // 2}" for k in range(40)]))
    tested = []
    for fold in range(4):
        data = datasets.load("lidc", root=tmp_path, size=16, split="patient", fold=fold)
        assert [s.num_examples for s in splits(data)] == [26, 4, 10]
        tested += data.test.ids.tolist()
        row = data.test.ids[0] - 100
        assert data.test.groups[0] == f"P{row // 2}"
    assert sorted(tested) == list(range(100, 140))
    again = datasets.load("lidc", root=tmp_path, size=16, split="patient", fold=3, seed=1)
    assert set(again.test.ids) != set(data.test.ids)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(raters="some"), r"raters one of"),
        (dict(split="paper"), r"split one of .*Received: split='paper'"),
        (dict(split="patient", fold=4), r"fold 0 to 3. Received: fold=4"),
        (dict(split="patient", fold=-1), r"fold 0 to 3"),
        (dict(split="patient", fold=1.0), r"fold 0 to 3"),
        (dict(split="patient", fold=True), r"fold 0 to 3"),
        (dict(fold=1), r"split='patient' for a fold.*Received: fold=1"),
        (dict(spacing=0), r"spacing > 0 in mm. Received: spacing=0"),
        (dict(spacing=-0.5), r"spacing > 0"),
        (dict(spacing=float("nan")), r"spacing > 0"),
        (dict(spacing="0.5"), r"spacing > 0"),
        (dict(spacing=(0.5, 0.5)), r"spacing > 0"),
        (dict(window=(400, -1000)), r"low < high. Received: window=\(400, -1000\)"),
        (dict(window=400), r"low < high"),
        (dict(window=(0, float("inf"))), r"low < high"),
        (dict(window=(0, 1, 2)), r"low < high"),
    ],
)
def test_wrong_lidc_options(tmp_path, options, says):
    write_lidc(tmp_path)
    with pytest.raises(ValueError, match=says):
        datasets.load("lidc", root=tmp_path, **options)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(split=None), r"without \['split'\]"),
        (dict(split=np.array(["train"] * 9)), r"at least one image in split 'val'"),
        (dict(split=np.array(["train", "val", "dev"] * 3)), r"Received: 'dev'"),
        (dict(masks=np.zeros((9, 3, 71, 71), "uint8")), r"Received: .*3, 71, 71"),
        (dict(masks=np.full((9, 4, 71, 71), 255, "uint8")), r"0 or 1 in masks"),
        (dict(image=np.full((9, 71, 71), np.nan)), r"NaN"),
        (dict(patient_id=np.array(["P"] * 9)), r"every patient"),
        (dict(pixel_spacing=None), r"without \['pixel_spacing'\]"),
        (dict(pixel_spacing=np.ones(8)), r"pixel_spacing \(N,\), numbers, not empty, with N = 9, in .*\(8,\)"),
        (dict(pixel_spacing=np.full(9, np.nan)), r"finite numbers in pixel_spacing"),
        (dict(pixel_spacing=np.arange(9.0)), r"0.1 to 5 mm in .*Received: 0 for nodule 0; 4 such value\(s\).\nGive"),
        (dict(pixel_spacing=np.full(9, 1e-30)), r"0.1 to 5 mm in .*Received: 1e-30 for nodule 0; 9 such"),
        (dict(pixel_spacing=np.r_[np.ones(8), 700]), r"0.1 to 5 mm in .*Received: 700 for nodule 8; 1 such"),
        (dict(pixel_spacing=np.array(["0.7"] * 9)), r"pixel_spacing \(N,\), numbers.*Received: shape \(9,\), <U3"),
        (dict(pixel_spacing=np.full(9, 1j)), r"pixel_spacing \(N,\), numbers.*complex128"),
        (dict(nodule_id=np.arange(8)), r"nodule_id.*Received"),
        (dict(nodule_id=np.zeros((9, 2), int)), r"nodule_id \(N,\).*Received: shape \(9, 2\)"),
        (dict(image=np.full((9, 71, 71), "a")), r"image \(N, H, W\), numbers.*<U1"),
        (dict(image=np.zeros((9, 71, 71), "M8[s]")), r"image \(N, H, W\), numbers.*datetime64"),
        (dict(image=np.zeros((9, 71, 71), [("a", "f4")])), r"image \(N, H, W\), numbers"),
        (dict(image=np.zeros((9, 71, 71), "complex64")), r"image \(N, H, W\), numbers.*complex64"),
        (dict(image=np.zeros((9, 71, 71), bool)), r"image \(N, H, W\), numbers.*bool"),
        (dict(image=np.zeros((9, 0, 0))), r"image \(N, H, W\), numbers, not empty in .*Received: shape \(9, 0, 0\)"),
        (dict(image=np.zeros((0, 71, 71))), r"image \(N, H, W\), numbers, not empty in .*Received: shape \(0, 71"),
        (dict(image=np.zeros((9, 71))), r"image \(N, H, W\).*Received: shape \(9, 71\)"),
        (dict(masks=np.zeros((9, 4, 71, 70))), r"with N = 9, H = 71, W = 71, in .*Received: shape \(9, 4, 71, 70\)"),
        (dict(masks=np.zeros((9, 4, 71, 71), [("a", "f4")])), r"masks \(N, 4, H, W\), numbers or booleans"),
        (dict(masks=np.full((9, 4, 71, 71), np.nan)), r"finite numbers in masks"),
        (dict(patient_id=np.zeros((9, 1))), r"patient_id \(N,\), integers or text.*float64"),
        (dict(split=np.arange(9)), r"split \(N,\), text, not empty"),
    ],
)
def test_wrong_lidc_files(tmp_path, changes, says):
    write_lidc(tmp_path, **changes)
    with pytest.raises(ValueError, match=says) as error:
        datasets.load("lidc", root=tmp_path, spacing=0.5 if "pixel_spacing" in changes else None)
    assert str(error.value).count("\n") <= 1


def test_what_lidc_files_may_hold_else(tmp_path):
    plain = datasets.load("lidc", root=write_lidc(tmp_path).parents[1])
    with np.load(tmp_path / "lidc_idri" / "lidc_idri_maxslice_71.npz") as archive:
        changes = {"masks": archive["masks"].astype(bool), "image": np.asfortranarray(archive["image"], "float32")}
    changes |= {"patient_id": np.arange(9), "nodule_id": None, "other": np.array(["a"]), "pixel_spacing": None}
    (tmp_path / "other").mkdir()
    write_lidc(tmp_path / "other", **changes)
    other = datasets.load("lidc", root=tmp_path / "other")
    for one, two in zip(splits(plain), splits(other), strict=True):
        np.testing.assert_allclose(one.images, two.images, atol=1e-6)
        np.testing.assert_array_equal(one.targets, two.targets)
        assert [f"P{k}" for k in two.groups] == one.groups.tolist() and two.ids is None


# ---- the customary patches


def patches(n=24, side=16, per_series=2, seed=0, **changes):
    """As in `data_lidc.pickle`, smaller; `changes` are of patch 5."""
    rng = np.random.default_rng(seed)
    found = {}
    for k in range(n):
        masks = [disc(side, radius) for radius in rng.integers(1, 6, 4)]
        image = rng.random((side, side))
        found[f"{seed}_{k}"] = {"image": image, "masks": masks, "series_uid": f"1.3.6.{k // per_series}"}
    if changes:
        found[f"{seed}_5"] = {k: v for k, v in (found[f"{seed}_5"] | changes).items() if v is not None}
    return found


def write_patches(root, contents, name="lidc_patches/data_lidc.pickle", protocol=4):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pickle.dumps(contents, protocol)
    if protocol == 2:  # as NumPy 1 wrote it
        data = data.replace(b"cnumpy._core.", b"cnumpy.core.")
        assert b"numpy.core.multiarray" in data
    path.write_bytes(data)
    return path


def whole(data):
    """{key: (image, masks)} of all splits."""
    found = {}
    for split in splits(data):
        found |= dict(
            zip(split.ids.tolist(), zip(np.asarray(split.images), np.asarray(split.targets), strict=True), strict=True)
        )
    return found


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "name", ["lidc_patches/a.pickle", "lidc_patches/a.pkl", "lidc_idri/a.pickle", "data_lidc.pickle"]
)
def test_patches_come_as_they_are_in_the_pickle(tmp_path, monkeypatch, protocol, name):
    contents = patches()
    write_patches(tmp_path, contents, name, protocol)
    data = datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "cache")
    found = whole(data)
    assert set(found) == set(contents)
    for key, (image, masks) in found.items():
        np.testing.assert_array_equal(image[..., 0], contents[key]["image"].astype("float32"))
        np.testing.assert_array_equal(masks, np.stack(contents[key]["masks"], -1))
    for split in splits(data):
        assert split.groups.tolist() == [contents[key]["series_uid"] for key in split.ids.tolist()]
        assert (split.images.dtype, split.targets.dtype) == (np.float32, np.uint8) and split.rater_valid.all()
    monkeypatch.setattr("sbn_tf.datasets.lidc_patches.SafePickle", None)  # what follows comes from the cache
    again = datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "cache", in_memory=False, fold=2)
    assert {k: v[0].tobytes() for k, v in whole(again).items()} == {k: v[0].tobytes() for k, v in found.items()}


def test_what_nobody_needs_of_a_patch_is_not_read(tmp_path, monkeypatch):
    contents = patches()
    shared = np.zeros((100, 100))
    for key, patch in contents.items():
        patch["more"] = [np.full((100, 100), len(key)), shared]
    path = write_patches(tmp_path, contents)
    (path.parent / "._data_lidc.pickle").write_bytes(b"\0\x05\x16\x07" + bytes(4092))  # as macOS leaves it
    read, shapes = pickle_values.PickledArray.read, set()

    def watched(self, file):
        shapes.add(self.shape)
        return read(self, file)

    monkeypatch.setattr(pickle_values.PickledArray, "read", watched)
    found = whole(datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "cache"))
    assert set(found) == set(contents) and shapes == {(16, 16)}


def test_a_patch_of_too_many_pixels_is_refused(tmp_path):
    image = np.lib.stride_tricks.as_strided(np.zeros(1, "u1"), (4097, 4096), (0, 0))
    write_patches(tmp_path, patches(image=image, masks=[image]))
    with pytest.raises(ValueError, match=r"an image of at most 16,777,216 pixels .*Received: \(4097, 4096\) uint8"):
        datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "cache")


def test_several_pickles_are_read_in_the_order_of_their_names(tmp_path):
    for seed in (1, 0):
        write_patches(tmp_path, patches(seed=seed, n=10), f"lidc_patches/part_{seed}.pickle")
    data = datasets.load("lidc_patches", root=tmp_path, size=16, split="paper", fold=3)
    assert data.train.ids.tolist() == [f"0_{k}" for k in range(10)] + [f"1_{k}" for k in range(4)]
    assert data.val.ids.tolist() == ["1_4"] and data.test.ids.tolist() == [f"1_{k}" for k in range(5, 10)]


def test_the_paper_s_split_is_by_patch_and_says_so(tmp_path, caplog):
    write_patches(tmp_path, patches(n=40, per_series=3))
    keys = [f"0_{k}" for k in range(40)]
    for fold in range(4):
        caplog.clear()
        data = datasets.load("lidc_patches", root=tmp_path, size=16, split="paper", fold=fold)
        test = keys[10 * fold : 10 * fold + 10]
        rest = [key for key in keys if key not in test]
        assert [s.ids.tolist() for s in splits(data)] == [rest[:-3], rest[-3:], test]
        tested, trained = set(data.test.groups.tolist()), set(data.train.groups.tolist())
        says = f"{len(tested & trained)} of the {len(tested)} patients or series of test are in train too"
        assert says in data.leak and says in caplog.text and "too good" in data.leak
    assert "leak" not in str(datasets.load("lidc_patches", root=tmp_path, size=16).leak)


def test_patients_of_series_from_a_csv(tmp_path):
    contents = patches(n=24, per_series=2)  # series 0 to 11; each patient has two
    folder = write_patches(tmp_path, contents).parent
    rows = [(f"1.3.6.{k}", f"LIDC-{k // 2}") for k in range(12)]

    def write(rows, header=("series_uid", "patient_id")):
        with open(folder / "series_patients.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])

    write(rows)
    data = datasets.load("lidc_patches", root=tmp_path, size=16)
    assert [len(set(s.groups.tolist())) for s in splits(data)] == [3, 1, 2]  # of six patients
    for split in splits(data):
        uids = [contents[key]["series_uid"] for key in split.ids.tolist()]
        assert split.groups.tolist() == [dict(rows)[uid] for uid in uids]
    for wrong, says in (
        (rows[1:], r"every series .*Received: none for 1, as 1.3.6.0"),
        ([*rows, ("1.3.6.0", "LIDC-9")], r"one patient_id for each series_uid"),
        ([("1.3.6.0", "")], r"one patient_id for each"),
        ([], r"rows below the header .*Received: a header alone"),
    ):
        write(wrong)
        with pytest.raises(ValueError, match=says):
            datasets.load("lidc_patches", root=tmp_path, size=16)
    write(rows, ("uid", "patient"))
    with pytest.raises(ValueError, match=r"columns series_uid and patient_id .*Received: uid, patient"):
        datasets.load("lidc_patches", root=tmp_path, size=16)


def named_in_part(tmp_path, named, table=()):
    """An npz of 12 series of 2 patches, of which `named` gives patch -> patient, and the csv beside it."""
    folder = tmp_path / "lidc_patches"
    folder.mkdir()
    contents = npz_of_patches(patient_id=np.array([named.get(k, "") for k in range(24)]))
    np.savez(folder / "a.npz", **contents)
    if table:
        with open(folder / "series_patients.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("series_uid", "patient_id"), *table])
    return dict(zip(contents["key"].tolist(), contents["series_uid"].tolist(), strict=True))


PART = {0: "P0", 3: "P0", 4: "P1 ", 5: " ", 7: "P1", 8: "P2", 9: "P2"}  # by patch: series 0, 1, 2, 3, 4 of 12


@pytest.mark.parametrize("fold", range(4))
def test_a_series_that_some_patches_name_is_one_patient_s(tmp_path, fold):
    series_of = named_in_part(tmp_path, PART)
    patient_of = {f"1.3.6.{k}": patient for k, patient in enumerate(("P0", "P0", "P1", "P1", "P2"))}
    data = datasets.load("lidc_patches", root=tmp_path, size=16, fold=fold)
    expected = {key: patient_of.get(uid, uid) for key, uid in series_of.items()}
    parts = []
    for split in splits(data):
        assert split.groups.tolist() == [expected[key] for key in split.ids.tolist()]
        parts.append(set(split.groups.tolist()))
    assert sum(map(len, parts)) == len(set(expected.values())) == 10  # none is in two of them


def test_a_csv_fills_the_series_that_no_patch_names(tmp_path):
    series_of = named_in_part(tmp_path, PART, [(f"1.3.6.{k}", f"P{k // 2}") for k in range(12) if k != 1])
    data = datasets.load("lidc_patches", root=tmp_path, size=16)
    for split in splits(data):
        assert split.groups.tolist() == [f"P{int(series_of[key][6:]) // 2}" for key in split.ids.tolist()]


@pytest.mark.parametrize(
    ("named", "table", "says"),
    [
        (PART | {1: "P9"}, (), r"one patient_id for each series_uid .*Received: 'P0' and 'P9' for '1.3.6.0'.\nMend"),
        (PART, [(f"1.3.6.{k}", "P9") for k in range(5, 11)], r"every series in .*none for 1, as 1.3.6.11.\nAdd them"),
        (
            PART,
            [(f"1.3.6.{k}", "P9") for k in range(4, 12)],
            r"Received: 'P9' for '1.3.6.4', which is 'P2' in the patch",
        ),
    ],
)
def test_patients_that_do_not_agree_are_told(tmp_path, named, table, says):
    named_in_part(tmp_path, named, table)
    with pytest.raises(ValueError, match=says) as error:
        datasets.load("lidc_patches", root=tmp_path, size=16)
    assert str(error.value).count("\n") == 1


def test_missing_and_empty_masks(tmp_path):
    contents = patches()
    contents["0_3"]["masks"] = contents["0_3"]["masks"][:2]
    contents["0_4"]["masks"][1] = np.zeros((16, 16))
    contents["0_6"]["masks"][2] = contents["0_6"]["masks"][2].astype(bool)
    write_patches(tmp_path, contents)
    expected = {"all": {"0_3": [1, 1, 0, 0], "0_4": [1, 1, 1, 1]}, "drew": {"0_3": [1, 1, 0, 0], "0_4": [1, 0, 1, 1]}}
    for raters, wanted in expected.items():
        data = datasets.load("lidc_patches", root=tmp_path, size=16, raters=raters)
        valid = {key: row for s in splits(data) for key, row in zip(s.ids.tolist(), s.rater_valid, strict=True)}
        for key in contents:
            np.testing.assert_array_equal(valid[key], wanted.get(key, [1, 1, 1, 1]))
        assert whole(data)["0_3"][1][..., 2:].sum() == 0
    contents["0_4"]["masks"] = [np.zeros((16, 16))] * 4
    write_patches(tmp_path, contents)
    datasets.load("lidc_patches", root=tmp_path, size=16)
    with pytest.raises(ValueError, match=r"none in patch '0_4'.\nUse raters='all'"):
        datasets.load("lidc_patches", root=tmp_path, size=16, raters="drew")


def test_patches_are_cropped_and_padded_about_the_centre(tmp_path):
    contents = patches()
    contents["0_0"]["masks"] = [np.pad(np.ones((1, 1)), ((0, 15), (0, 15)))] * 4  # one corner
    write_patches(tmp_path, contents)
    for size, inner, outer in ((12, slice(None), slice(2, 14)), (20, slice(2, 18), slice(None))):
        found = whole(datasets.load("lidc_patches", root=tmp_path, size=size, raters="drew"))
        for key, (image, masks) in found.items():
            assert image.shape == (size, size, 1) and masks.shape == (size, size, 4)
            np.testing.assert_allclose(image[inner, inner, 0], contents[key]["image"][outer, outer], rtol=1e-6)
            if size == 20:
                assert image[:2].sum() == image[18:].sum() == masks[:2].sum() == 0


NAN = np.full((16, 16), np.nan)
WRONG = {
    "no image": (dict(image=None), r"Expected image, masks and series_uid .*Received: no image"),
    "no masks": (dict(masks=None), r"Received: no masks"),
    "no series": (dict(series_uid=None), r"Received: no series_uid"),
    "image of 3 axes": (dict(image=np.zeros((16, 16, 1))), r"an image \(H, W\) .*\(16, 16, 1\) float64"),
    "image of text": (dict(image=np.full((16, 16), "a")), r"an image \(H, W\) of numbers"),
    "image that is a list": (dict(image=[[0.0]]), r"an image \(H, W\) .*Received: a list"),
    "image of another shape": (dict(image=np.zeros((16, 17))), r"an image \(16, 16\) like the others"),
    "image with NaN": (dict(image=NAN), r"numbers in 0..1 .*Received: nan"),
    "image in HU": (dict(image=np.full((16, 16), -1000.0)), r"in 0..1 .*Received: -1000 to -1000"),
    "image of 0..255": (dict(image=np.full((16, 16), 255, "u1")), r"in 0..1 .*Received: 255 to 255"),
    "masks of another shape": (dict(masks=[np.zeros((16, 15))] * 4), r"masks \(16, 16\) of 0 and 1 .*as mask 0"),
    "masks of 255": (dict(masks=[np.full((16, 16), 255)] * 4), r"masks of 0 and 1 .*a value of 255 in mask 0"),
    "masks of NaN": (dict(masks=[NAN] * 4), r"masks of 0 and 1 .*a value of nan"),
    "masks of a half": (dict(masks=[np.full((16, 16), 0.5)]), r"a value of 0.5 in mask 0"),
    "five masks": (dict(masks=[np.zeros((16, 16))] * 5), r"1 to 4 masks .*Received: 5 masks"),
    "no masks at all": (dict(masks=[]), r"1 to 4 masks .*Received: 0 masks"),
    "masks in one array": (dict(masks=np.zeros((4, 16, 16))), r"a list of 1 to 4 masks .*Received: a PickledArray"),
    "masks of text": (dict(masks=["a"] * 4), r"masks \(16, 16\) .*a str as mask 0"),
    "series that is a number": (dict(series_uid=12), r"a series_uid of 1 to 64 letters .*Received: int"),
    "series that is empty": (dict(series_uid=""), r"a series_uid of 1 to 64 letters .*Received: ''"),
    "series that is long": (dict(series_uid="1" * 65), r"a series_uid of 1 to 64 letters"),
    "series with a NUL": (dict(series_uid="1.2\0"), r"a series_uid of 1 to 64 letters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_patch_is_named(tmp_path, name):
    changes, says = WRONG[name]
    path = write_patches(tmp_path, patches(**changes))
    with pytest.raises(ValueError, match=says) as error:
        datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "cache")
    assert f"in patch '0_5' of {path}" in str(error.value) and str(error.value).count("\n") == 1
    folders = [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert all(name.endswith(".partial") for name in folders)  # nothing that a later call would take for whole


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ({}, r"a dict of patches .*Received: an empty one"),
        ([1, 2], r"a pickled dict .*Received: a list"),
        (patches() | {7: patches()["0_1"]}, r"a key of 1 to 128 letters in patch '7'"),
        (patches() | {"k" * 129: patches()["0_1"]}, r"a key of 1 to 128 letters"),
        (patches() | {"x": 3}, r"a dict of image, masks and series_uid in patch 'x' .*Received: a int"),
        (patches() | {"x": print}, r"Expected NumPy arrays, numbers.*Received: '(builtins|__builtin__)\.print'"),
        (patches(n=6), r"4 patients or more for 4 folds. Received: 3"),
    ],
)
def test_wrong_pickles(tmp_path, contents, says):
    write_patches(tmp_path, contents)
    with pytest.raises(ValueError, match=says) as error:
        datasets.load("lidc_patches", root=tmp_path, size=16)
    assert str(error.value).count("\n") <= 1


UNFILLED = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"


def patch_of(image, mask, series=b"X\x03\x00\x00\x001.2", key=b"X\x01\x00\x00\x00k"):
    names = (b"X\x05\x00\x00\x00image", b"X\x05\x00\x00\x00masks", b"X\x0a\x00\x00\x00series_uid")
    return b"}" + key + b"}(" + names[0] + image + names[1] + b"]" + mask + b"a" + names[2] + series + b"us."


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (patch_of(UNFILLED, b"K\x01"), r"a whole pickle .*an array without data.*\nIt is truncated or corrupt"),
        (patch_of(b"K\x01", UNFILLED), r"a whole pickle .*an array without data.*\nIt is truncated or corrupt"),
        (patch_of(b"K\x01", b"K\x01", UNFILLED), r"an array without data"),
        (patch_of(b"cnumpy\nndarray\n", b"K\x01"), r"Received: 'numpy.ndarray'.\nNothing in the file was run"),
        (patch_of(b"K\x01", b"K\x01", key=b"\x8a\x10" + b"\x01" * 16), r"beyond 64 bits as a key"),
        (b"}\x8b\x88\x13\x00\x00" + b"\x01" * 5000 + b"K\x01s.", r"Received: a whole number of 5000 bytes"),
        (b"}X\x90\x01\x00\x00" + b"k" * 400 + b"K\x01s.", r"a dict of image, .* in patch 'k{80}' of "),
    ],
)
def test_forged_patches_are_told_in_two_lines(tmp_path, contents, says):
    path = write_patches(tmp_path, {})
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=says) as error:
        datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "cache")
    assert str(error.value).count("\n") == 1 and str(path) in str(error.value)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_wrong_places(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lidc_patches/\*\.pickle or .*data_lidc\.pickle"):
        datasets.load("lidc_patches", root=tmp_path)
    first = write_patches(tmp_path, patches())
    second = write_patches(tmp_path, patches(), "lidc_patches/more.pickle")
    with pytest.raises(ValueError, match=rf"each key once .*'0_0' of {second}. Received: it is in {first} too"):
        datasets.load("lidc_patches", root=tmp_path, size=16)
    second.rename(second.with_suffix(".npz"))
    with pytest.raises(ValueError, match=r"pickles or npz files .*Received: both, as data_lidc.pickle and more.npz"):
        datasets.load("lidc_patches", root=tmp_path, size=16)
    second.with_suffix(".npz").unlink()
    with pytest.raises(ValueError, match=r"split one of .*Received: split='file'"):
        datasets.load("lidc_patches", root=tmp_path, split="file")
    with pytest.raises(ValueError, match=r"raters one of"):
        datasets.load("lidc_patches", root=tmp_path, raters="three")
    with pytest.raises(ValueError, match=r"fold 0 to 3"):
        datasets.load("lidc_patches", root=tmp_path, fold=7)
    write_patches(tmp_path, patches(n=12))
    with pytest.raises(ValueError, match=r"14 patches or more .*Received: 12"):
        datasets.load("lidc_patches", root=tmp_path, size=16, split="paper")


def test_a_damaged_pickle_leaves_no_cache(tmp_path):
    path = write_patches(tmp_path, patches())
    contents = path.read_bytes()
    for part in (0, 3, 10, 19):
        path.write_bytes(contents[: len(contents) * part // 20])
        with pytest.raises(ValueError, match=r"Expected a whole pickle .*truncated or corrupt|truncated or corrupt"):
            datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "cache")
    path.write_bytes(contents)
    assert len(whole(datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "cache"))) == 24


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    contents = patches(n=100)
    write_patches(tmp_path, contents)
    expected = whole(datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "one"))
    from sbn_tf.datasets import lidc_patches, safe_pickle

    read, count = safe_pickle.SafePickle.read, []

    def interrupted(self, key, names):
        count.append(key)
        if len(count) == 70:
            raise KeyboardInterrupt
        return read(self, key, names)

    monkeypatch.setattr(lidc_patches.SafePickle, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "two")
    found = whole(datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / "two"))
    assert len(count) == 70 + 36  # 64 were there
    assert {k: (a.tobytes(), b.tobytes()) for k, (a, b) in found.items()} == {
        k: (a.tobytes(), b.tobytes()) for k, (a, b) in expected.items()
    }


# ---- from DICOM


class Annotation:
    """A sphere in a volume, as pylidc gives an annotation."""

    def __init__(self, shape, middle, radius, spacing, slices):
        grid = np.indices(shape) - np.reshape(middle, (3, 1, 1, 1))
        sphere = (
            sum((axis * step) ** 2 for axis, step in zip(grid, (spacing, spacing, slices), strict=True)) <= radius**2
        )
        ends = [np.flatnonzero(sphere.any(axis=tuple(k for k in range(3) if k != axis))) for axis in range(3)]
        self.box = tuple(slice(int(e[0]), int(e[-1]) + 1) for e in ends)
        self.mask = sphere[self.box]

    def bbox(self):
        return self.box

    def boolean_mask(self):
        return self.mask


def scan(number=0, spacing=0.7, slices=2.0, radii=(8, 8, 8), middle=(30, 33, 7), shape=(64, 64, 15), extra=0):
    nodule = [Annotation(shape, middle, radius, spacing, slices) for radius in radii]
    volume = np.full(shape, -900, "int16")
    volume[nodule[0].box][nodule[0].mask] = 100
    calls = []

    def to_volume(verbose):
        calls.append(verbose)
        return volume

    return SimpleNamespace(
        patient_id=f"LIDC-IDRI-{number:04d}",
        series_instance_uid=f"1.3.6.1.4.{number}",
        pixel_spacing=spacing,
        to_volume=to_volume,
        cluster_annotations=lambda verbose: [nodule] + [nodule * 2] * extra,
        calls=calls,
    )


def test_patches_from_scans_have_the_spheres_areas(tmp_path):
    path = tmp_path / "lidc_patches" / "lidc_patches_128.npz"
    scans = [scan(k, spacing=spacing) for k, spacing in enumerate((0.5, 0.6, 0.7, 0.8, 0.98))]
    assert lidc_dicom.patches_from_pylidc(scans, path) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with np.load(path, allow_pickle=False) as archive:
        images, masks, keys, uids, ids = (archive[key] for key in ("image", "masks", "key", "series_uid", "patient_id"))
    assert images.shape == (5 * 9, 128, 128) and images.dtype == np.float16  # 8 mm at 2 mm a slice: 9 slices
    assert masks.shape == (45, 4, 128, 128) and masks.dtype == np.uint8 and set(np.unique(masks)) == {0, 1}
    assert len(set(keys)) == 45 and uids.tolist() == [f"1.3.6.1.4.{k}" for k in range(5) for _ in range(9)]
    assert ids[0] == "LIDC-IDRI-0000" and ids[-1] == "LIDC-IDRI-0004"
    assert (masks[:, 3] == 0).all()
    heights = np.abs(np.arange(9) - 4) * 2.0
    areas = np.pi * (64 - heights**2)
    for one, found in zip(scans, masks[:, :3].sum(axis=(2, 3)).reshape(5, 9, 3) * 0.25, strict=True):
        (nodule,) = one.cluster_annotations(False)
        drawn = nodule[0].boolean_mask().sum(axis=(0, 1)) * one.pixel_spacing**2  # as a rater drew it in native pixels
        np.testing.assert_allclose(found, np.repeat(drawn[:, None], 3, 1), rtol=0.05, atol=0.7)
        np.testing.assert_allclose(found.sum(axis=0), drawn.sum(), rtol=0.05)
        # The rim, 2 / radius of the area a mm, is off by a quarter pixel, the mean of 0 to a half, of both grids.
        rim = np.hypot(one.pixel_spacing, 0.5) / 4 * 2 / np.sqrt(64 - heights[1:-1] ** 2)
        assert rim.max() < 0.12 and (np.abs(found[1:-1, 0] / areas[1:-1] - 1) < rim).all()
    rows, columns = np.nonzero(masks[4, 0])
    assert abs(rows.mean() - 63.5) < 0.6 and abs(columns.mean() - 63.5) < 0.6
    middle = images[4]
    np.testing.assert_allclose(middle[63, 63], (100 + 1000) / 1400, atol=1e-3)
    np.testing.assert_allclose(middle[63, 85], (-900 + 1000) / 1400, atol=1e-3)
    data = datasets.load("lidc_patches", root=tmp_path)
    found = whole(data)
    assert set(found) == set(keys.tolist()) and data.train.groups[0].startswith("LIDC-IDRI-")
    for k in (0, 17, 44):
        image, marks = found[keys[k]]
        np.testing.assert_array_equal(image[..., 0], images[k].astype("float32"))
        np.testing.assert_array_equal(marks, masks[k].transpose(1, 2, 0))


def test_raters_who_drew_on_a_slice_and_those_who_did_not(tmp_path, caplog):
    lidc_dicom.patches_from_pylidc([scan(radii=(8, 4), extra=2)], tmp_path / "a.npz", size=64, spacing=0.7)
    assert "left out 2 group(s) of more than 4 annotations" not in caplog.text  # two twice are four
    with np.load(tmp_path / "a.npz") as archive:
        drew = archive["masks"][:9].any(axis=(2, 3))
    np.testing.assert_array_equal(drew[:, 0], [True] * 9)
    np.testing.assert_array_equal(drew[:, 1], [False] * 2 + [True] * 5 + [False] * 2)  # 4 mm at 2 mm a slice: 5 slices
    lidc_dicom.patches_from_pylidc([scan(extra=2)], tmp_path / "b.npz", size=64)
    assert "1.3.6.1.4.0: left out 2 group(s) of more than 4 annotations" in caplog.text


def test_cutting_goes_on_where_it_was_interrupted(tmp_path):
    scans = [scan(k) for k in range(3)]

    def interrupted():
        yield from scans[:2]
        raise KeyboardInterrupt

    whole_path, path = tmp_path / "whole.npz", tmp_path / "parts.npz"
    lidc_dicom.patches_from_pylidc([scan(k) for k in range(3)], whole_path, size=32)
    with pytest.raises(KeyboardInterrupt):
        lidc_dicom.patches_from_pylidc(interrupted(), path, size=32)
    assert not path.exists()
    (damaged, _) = sorted(next(tmp_path.glob("parts.npz.*.parts")).iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-100])  # as a power cut would
    lidc_dicom.patches_from_pylidc(scans, path, size=32)
    assert sorted(len(s.calls) for s in scans) == [1, 1, 2] and len(scans[2].calls) == 1
    with np.load(whole_path) as one, np.load(path) as other:
        assert one.files == other.files
        for key in one.files:
            np.testing.assert_array_equal(one[key], other[key])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.npz", "whole.npz"]


def test_two_builds_of_one_npz_are_not_at_once(tmp_path):
    path, lock, says = tmp_path / "new" / "a.npz", tmp_path / "new" / "a.npz.lock", []

    def scans():
        yield scan(0)
        for size in (16, 32):  # the same patches or others
            with pytest.raises(FileExistsError) as error:
                lidc_dicom.patches_from_pylidc([scan(1)], path, size=size)
            says.append(str(error.value))
        yield scan(2)

    assert lidc_dicom.patches_from_pylidc(scans(), path, size=16) == path
    held = f"Received: {lock}, held by process {os.getpid()} on "
    assert len(says) == 2
    assert all(held in one and "remove a.npz.lock and call again" in one and one.count("\n") == 1 for one in says)
    with np.load(path) as archive:
        assert set(archive["patient_id"]) == {"LIDC-IDRI-0000", "LIDC-IDRI-0002"}
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]
    path.rename(tmp_path / "b.npz")
    lock.touch()  # a build that a power cut ended
    with pytest.raises(FileExistsError, match=r"held by nobody it names.\nWait for that build; if it is gone"):
        lidc_dicom.patches_from_pylidc([scan(1)], path, size=16)
    assert lock.exists()
    lock.unlink()
    lidc_dicom.patches_from_pylidc([scan(1)], path, size=16)


def test_a_build_that_another_finished_meanwhile_does_not_write_over_it(tmp_path, monkeypatch):
    path, touch = tmp_path / "a.npz", Path.touch

    def late(self, **options):
        path.write_bytes(b"of another build")
        touch(self, **options)

    monkeypatch.setattr(Path, "touch", late)
    with pytest.raises(FileExistsError, match=r"no file at .*a.npz"):
        lidc_dicom.patches_from_pylidc([scan()], path, size=16)
    assert path.read_bytes() == b"of another build" and [p.name for p in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(path="a.pickle"), r"ends with .npz"),
        (dict(size=7), r"size >= 8. Received: size=7"),
        (dict(spacing=0), r"spacing > 0"),
        (dict(window=(3, 2)), r"low < high"),
        (dict(scans=[scan(), scan()]), r"each scan once. Received: series 1.3.6.1.4.0 twice"),
        (dict(scans=[]), r"scans with nodules. Received: 0 scans"),
        (dict(scans=[scan(spacing=0.7).__class__(**(vars(scan()) | {"pixel_spacing": 0.0}))]), r"pixel_spacing > 0"),
        (dict(scans=[scan().__class__(**(vars(scan()) | {"patient_id": "x" * 65}))]), r"of 64 letters at most"),
        (
            dict(scans=[scan().__class__(**(vars(scan()) | {"to_volume": lambda verbose: np.zeros((64, 64, 5))}))]),
            r"within its volume \(64, 64, 5\).*Received: .*\nImages are missing",
        ),
    ],
)
def test_wrong_scans(tmp_path, arguments, says):
    path = tmp_path / arguments.pop("path", "a.npz")
    with pytest.raises(ValueError, match=says):
        lidc_dicom.patches_from_pylidc(arguments.pop("scans", [scan()]), path, **arguments)
    assert not path.exists()


def test_the_file_needs_nothing_else_of_the_package():
    tree = ast.parse(Path(lidc_dicom.__file__).read_text("utf-8"))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += ["." * node.level + (node.module or "") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    others = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others == {"numpy", "scipy", "tqdm"}  # it runs in pylidc's environment


def test_an_npz_that_is_there_is_not_written_over(tmp_path):
    path = lidc_dicom.patches_from_pylidc([scan()], tmp_path / "a.npz", size=16)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"no file at .*a.npz"):
        lidc_dicom.patches_from_pylidc([scan(1)], path, size=16)
    assert path.read_bytes() == before


def npz_of_patches(n=24, side=16, **changes):
    contents = patches(n, side)
    found = {
        "image": np.stack([p["image"] for p in contents.values()]).astype("float16"),
        "masks": np.stack([np.stack(p["masks"]) for p in contents.values()]),
        "key": np.array(list(contents)),
        "series_uid": np.array([p["series_uid"] for p in contents.values()]),
        "patient_id": np.array([f"P{k // 4}" for k in range(n)]),
    } | changes
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_patches_and_its_damage(tmp_path, save):
    path = tmp_path / "lidc_patches" / "a.npz"
    path.parent.mkdir()
    contents = npz_of_patches()
    save(path, **contents)
    data = datasets.load("lidc_patches", root=tmp_path, size=16)
    assert sorted(set(np.concatenate([s.groups for s in splits(data)]))) == [f"P{k}" for k in range(6)]
    for key, (image, masks) in whole(data).items():
        row = contents["key"].tolist().index(key)
        np.testing.assert_array_equal(image[..., 0], contents["image"][row].astype("float32"))
        np.testing.assert_array_equal(masks, contents["masks"][row].transpose(1, 2, 0))
    whole_file = path.read_bytes()
    flipped = bytearray(whole_file)
    flipped[len(flipped) // 3] ^= 16
    for number, damaged in enumerate((b"", b"nonsense", whole_file[: len(whole_file) // 2], bytes(flipped))):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"whole npz file|of 0 and 1|in 0..1") as error:
            datasets.load("lidc_patches", root=tmp_path, size=16, cache=tmp_path / f"cache{number}")
        assert str(error.value).count("\n") == 1
        assert all(p.name.endswith((".partial", ".lock")) for p in (tmp_path / f"cache{number}").iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(image=None), r"without \['image'\]"),
        (dict(masks=np.zeros((24, 3, 16, 16), "u1")), r"masks \(N, 4, H, W\).*Received: shape \(24, 3, 16, 16\)"),
        (dict(masks=np.full((24, 4, 16, 16), 2, "u1")), r"masks of 0 and 1 in patch '0_0'"),
        (dict(image=np.full((24, 16, 16), np.inf)), r"numbers in 0..1 in patch '0_0'"),
        (dict(image=np.zeros((24, 16))), r"image \(N, H, W\).*Received: shape \(24, 16\)"),
        (dict(image=np.zeros((0, 16, 16))), r"image \(N, H, W\).*Received: shape \(0, 16, 16\)"),
        (
            dict(image=np.zeros((24, 0, 16)), masks=np.zeros((24, 4, 0, 16), "u1")),
            r"a\.npz\. Received: shape \(24, 0, 16\)",
        ),
        (
            dict(image=np.zeros((24, 16, 0)), masks=np.zeros((24, 4, 16, 0), "u1")),
            r"a\.npz\. Received: shape \(24, 16, 0\)",
        ),
        (dict(key=np.array(["a"] * 24)), r"each key once in all files in patch 'a'"),
        (dict(key=np.array([f"{k:0129d}" for k in range(24)])), r"a key of 1 to 128 letters"),
        (dict(key=np.arange(24)), r"key \(N,\), text.*Received: shape \(24,\), int64"),
        (dict(patient_id=np.array([{}] * 24, dtype=object)), r"whole npz file of plain arrays"),
        (dict(image=np.asfortranarray(npz_of_patches()["image"])), r"image .*C order.*Received: .*Fortran order"),
    ],
)
def test_wrong_npz_of_patches(tmp_path, changes, says):
    (tmp_path / "lidc_patches").mkdir()
    np.savez(tmp_path / "lidc_patches" / "a.npz", **npz_of_patches(**changes))
    with pytest.raises(ValueError, match=re.compile(says, re.S)) as error:
        datasets.load("lidc_patches", root=tmp_path, size=16)
    assert str(error.value).count("\n") <= 1


# ---- the real data


def test_real_lidc_raters():
    root = real_root()
    every, drew = (datasets.load("lidc", root=root, raters=raters) for raters in ("all", "drew"))
    assert [s.num_examples for s in splits(every)] == [1260, 319, 493]
    assert every.train.rater_valid.all() and not drew.train.rater_valid.all()
    masks = every.train.targets
    np.testing.assert_array_equal(drew.train.rater_valid, masks.any(axis=(1, 2)))
    assert 0.65 < pairwise_iou(masks) < 0.75
    assert every.train.images.min() >= 0 and every.train.images.max() <= 1


def test_real_lidc_resampled_keeps_areas_and_makes_a_customary_pickle(tmp_path):
    root = real_root()
    with np.load(os.path.join(root, "lidc_idri", "lidc_idri_maxslice_71.npz")) as archive:
        row = {name: k for k, name in enumerate(archive["nodule_id"].tolist())}
        areas = archive["masks"].sum(axis=(2, 3)) * archive["pixel_spacing"][:, None] ** 2
    data = datasets.load("lidc", root=root, size=128, spacing=0.5, split="patient", fold=1, in_memory=False)
    assert sum(s.num_examples for s in splits(data)) == 2072
    test = data.test
    expected = areas[[row[name] for name in test.ids.tolist()]]
    found = test.targets.sum(axis=(1, 2)) * 0.25
    large = expected > 100  # mm2
    assert large.sum() > 200
    assert np.abs(found[large] / expected[large] - 1).max() < 0.1
    assert abs(found[large].sum() / expected[large].sum() - 1) < 0.005
    rows = np.linspace(0, len(found) - 1, 40).astype(int)  # some of them, written as the customary pickle
    contents = {}
    for k in rows:
        contents[f"nodule_{test.ids[k]}"] = {
            "image": test.images[k, ..., 0].astype("float64"),
            "masks": list(test.targets[k].transpose(2, 0, 1)),
            "series_uid": str(test.groups[k]),
        }
    write_patches(tmp_path, contents, protocol=2)
    patches = datasets.load("lidc_patches", root=tmp_path)
    assert patches.input_shape == (128, 128, 1) and patches.num_outputs == 1
    read = whole(patches)
    assert set(read) == set(contents)
    for key, (image, masks) in read.items():
        np.testing.assert_array_equal(image[..., 0], contents[key]["image"].astype("float32"))
        np.testing.assert_array_equal(masks, np.stack(contents[key]["masks"], -1))
