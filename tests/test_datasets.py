"""The data contract: shapes, the laws of the streams, phantoms in their stated ranges, readers, messages."""

import dataclasses
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import pairwise_iou
from sklearn.metrics import roc_auc_score

from sbn_tf import datasets
from sbn_tf.datasets import MULTI_LABEL, SEGMENTATION, Data, Split, cache, npz, phantoms
from sbn_tf.datasets.base import TASKS, channel_statistics

PHANTOMS = ("phantom_chest", "phantom_lesion", "phantom_nodule")
REAL = {"nih_chest": "nih_chestxray14_64", "isic2018": "isic2018_task1", "lidc": "lidc_idri"}


@pytest.fixture(scope="module")
def phantom():
    made = {}

    def get(name):
        if name not in made:
            made[name] = datasets.load(name)
        return made[name]

    return get


@pytest.fixture(params=REAL)
def real(request):
    root = os.environ.get("SBN_TF_DATA")
    if not root:
        pytest.skip("SBN_TF_DATA is not set")
    if not os.path.isdir(os.path.join(root, REAL[request.param])):
        pytest.skip(f"{REAL[request.param]} is not in SBN_TF_DATA")
    return datasets.load(request.param, size=32, limit=40)


def arrays_of(dataset):
    return [(x.numpy(), y.numpy()) for x, y in dataset]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for (x, y), (u, v) in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, u)
        np.testing.assert_array_equal(y, v)


def numbered(n=23, size=4, raters=3):
    """Masks and images whose corner pixel tells the example's number."""
    images = np.zeros((n, size, size, 1), "float32")
    images[:, 0, 0, 0] = np.arange(n)
    targets = np.zeros((n, size, size, raters), "uint8")
    for r in range(raters):
        targets[:, r, r, r] = 1  # rater r marks pixel (r, r)
    return Split(name="train", task=SEGMENTATION, images=images, targets=targets)


# ---- shapes and cards


@pytest.mark.parametrize(
    ("name", "image", "target", "outputs"),
    [
        ("phantom_chest", (32, 32, 1), (14,), 14),
        ("phantom_lesion", (32, 32, 3), (32, 32, 1), 1),
        ("phantom_nodule", (32, 32, 1), (32, 32, 4), 1),
    ],
)
def test_shapes(phantom, name, image, target, outputs):
    data = phantom(name)
    assert (data.input_shape, data.num_outputs) == (image, outputs)
    for split, n in ((data.train, 600), (data.val, 150), (data.test, 300)):
        assert split.num_examples == n
        assert split.images.shape == (n, *image)
        assert split.targets.shape == (n, *target)
        assert (split.images.dtype, split.targets.dtype) == (np.uint8, np.uint8)
        assert split.truth_probs.dtype == np.float32
    streamed = (*target[:-1], 1) if data.card.task == SEGMENTATION else target
    x, y = next(iter(data.train.batches(50)))
    assert x.shape == (50, *image) and y.shape == (50, *streamed)
    assert x.dtype == y.dtype == "float32"


@pytest.mark.parametrize("name", datasets.names())
def test_card_reads_well(name):
    card = datasets.card(name)
    assert card.name == name and card.task in TASKS
    assert card.licence in str(card) and card.title in str(card)


def test_every_help_that_a_message_or_page_names_is_there():
    root = Path(__file__).resolve().parents[1]
    pages = [root / "README.md", root / "data" / "README.md", *(root / "sbn_tf" / "datasets").glob("*.py")]
    named = {name for page in pages for name in re.findall(r"help\(datasets\.(\w+)\)", page.read_text("utf-8"))}
    assert {"folder", "lidc_dicom", "load"} <= named
    for name in named:
        assert getattr(datasets, name).__doc__


def test_import_does_no_work():
    code = "import sys, sbn_tf.datasets; print(*({'sbn_tf.experiments.plots', 'medmnist', 'torch'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


# ---- determinism, subsets


@pytest.mark.parametrize("name", PHANTOMS)
def test_phantoms_are_bit_identical_for_a_seed_and_whatever_the_limit(phantom, name):
    few = datasets.load(name, limit=20)
    fewer = datasets.load(name, limit=7)
    whole = phantom(name).train
    rows = [np.flatnonzero((whole.images == image).all(axis=(1, 2, 3)))[0] for image in few.train.images]
    assert rows == sorted(rows)
    np.testing.assert_array_equal(whole.targets[rows], few.train.targets)
    np.testing.assert_array_equal(whole.truth_probs[rows], few.train.truth_probs)
    kept = {image.tobytes() for image in few.train.images}
    assert {image.tobytes() for image in fewer.train.images} < kept
    again = datasets.load(name, seed=1, num_train=5, num_val=5, num_test=5).train
    assert (again.images != whole.images[:5]).any()
    np.testing.assert_array_equal(
        again.images, datasets.load(name, seed=1, num_train=5, num_val=9, num_test=9).train.images
    )


@pytest.mark.parametrize("name", PHANTOMS)
def test_phantoms_show_the_same_scene_at_any_size(name):
    small = datasets.load(name, size=16, num_train=40, num_val=1, num_test=1).train
    large = datasets.load(name, size=64, num_train=40, num_val=1, num_test=1).train
    if small.task == MULTI_LABEL:
        np.testing.assert_array_equal(small.targets, large.targets)
    else:
        area = [split.targets.mean(axis=(1, 2)).ravel() for split in (small, large)]
        assert np.corrcoef(*area)[0, 1] > 0.98


# ---- streams


def test_unseeded_stream_is_the_file_in_order():
    split = numbered()
    batches = arrays_of(split.batches(5))
    assert [len(x) for x, _ in batches] == [5, 5, 5, 5, 3]
    assert len(batches) == split.steps(5) == len(split.batches(5)) == 5
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), split.images)
    assert len(split.batches(5, drop_remainder=True)) == split.steps(5, drop_remainder=True) == 4


@pytest.mark.parametrize("name", PHANTOMS)
def test_resumed_stream_equals_the_uninterrupted_one(name):
    split = datasets.load(name, size=8, num_train=23, num_val=1, num_test=1).train
    options = dict(seed=7, augment="flips_and_quarter_turns")
    whole = arrays_of(split.batches(5, epochs=5, **options))
    assert len(whole) == 25
    assert_same(whole[15:], arrays_of(split.batches(5, initial_epoch=3, epochs=5, **options)))
    assert_same(whole, arrays_of(split.batches(5, epochs=5, **options)))
    assert not np.array_equal(whole[0][0], arrays_of(split.batches(5, **(options | {"seed": 8})))[0][0])


@pytest.mark.parametrize("task", ["masks", "labels"])
@pytest.mark.parametrize(
    "options", [{}, {"seed": 7, "initial_epoch": 1, "epochs": 4}, {"seed": 0, "drop_remainder": True}]
)
def test_batches_without_tensorflow_are_those_of_tf_data(task, options, monkeypatch):
    split = numbered() if task == "masks" else datasets.load("phantom_chest", size=8, num_train=23).train
    if task == "masks":
        split = dataclasses.replace(split, rater_valid=np.arange(69).reshape(23, 3) % 5 != 1)
    raters = [None, "mean", "majority"] if task == "masks" else [None]
    augmented = [None, "flips_and_quarter_turns"] if "seed" in options else [None]
    for given in [{**options, "rater": rater, "augment": turns} for rater in raters for turns in augmented]:
        theirs = arrays_of(split.batches(5, **given))
        with monkeypatch.context() as patch:
            patch.setattr(keras.backend, "backend", lambda: "jax")
            ours = split.batches(5, **given)
        assert isinstance(ours, keras.utils.PyDataset) and len(ours) == len(theirs)
        assert_same(theirs, list(ours))
        assert_same(theirs[-1:], [ours[len(ours) - 1]])  # any batch by its number
        assert all(part.dtype == np.float32 for batch in ours for part in batch)
        with pytest.raises(IndexError, match="Received: 99"):
            ours[99]


def test_draws_belong_to_the_example_and_not_to_its_place():
    split = numbered()
    by_batch = {}
    for batch_size in (4, 23):
        stream = arrays_of(split.batches(batch_size, seed=3, rater="random"))
        ids = np.concatenate([x[:, 0, 0, 0] for x, _ in stream])
        masks = np.concatenate([y for _, y in stream])
        by_batch[batch_size] = masks[np.argsort(ids)]
    np.testing.assert_array_equal(by_batch[4], by_batch[23])


def test_each_epoch_is_a_new_order_of_all_examples():
    split = numbered()
    orders = []
    for epoch in range(4):
        stream = split.batches(5, seed=0, initial_epoch=epoch, epochs=epoch + 1)
        orders.append(np.concatenate([x.numpy()[:, 0, 0, 0] for x, _ in stream]).astype(int))
        assert sorted(orders[-1]) == list(range(23))
    assert len({tuple(order) for order in orders}) == 4


def test_random_rater_is_uniform_over_the_valid_ones():
    split = numbered(n=40)
    valid = np.ones((40, 3), bool)
    valid[:20, 1] = False
    split = Split(split.name, split.task, split.images, split.targets, rater_valid=valid)
    counts = np.zeros((40, 3))
    for x, y in split.batches(40, seed=0, epochs=300):
        rows = x.numpy()[:, 0, 0, 0].astype(int)
        counts[rows] += y.numpy()[:, [0, 1, 2], [0, 1, 2], 0]
    assert (counts.sum(axis=1) == 300).all()  # always one rater's mask, never a mixture
    assert (counts[:20, 1] == 0).all()
    # 6,000 draws: five standard errors are 0.03.
    np.testing.assert_allclose(counts[:20].sum(0) / 6000, [1 / 2, 0, 1 / 2], atol=0.035)
    np.testing.assert_allclose(counts[20:].sum(0) / 6000, [1 / 3, 1 / 3, 1 / 3], atol=0.035)


def test_majority_and_mean_by_hand():
    targets = np.zeros((1, 8, 8, 4), "uint8")
    targets[0, 0, 0] = [1, 0, 0, 0]
    targets[0, 0, 1] = [1, 1, 0, 0]
    targets[0, 0, 2] = [1, 1, 1, 0]
    images = np.zeros((1, 8, 8, 1), "uint8")
    split = Split("val", SEGMENTATION, images, targets)
    np.testing.assert_array_equal(split.mean_mask()[0, 0, :4, 0], [0.25, 0.5, 0.75, 0])
    np.testing.assert_array_equal(split.majority()[0, 0, :4, 0], [0, 1, 1, 0])
    three = Split("val", SEGMENTATION, images, targets, rater_valid=np.array([[True, True, True, False]]))
    np.testing.assert_allclose(three.mean_mask()[0, 0, :4, 0], [1 / 3, 2 / 3, 1, 0], rtol=1e-6)
    for rater, truth in (
        (None, split.majority()),
        ("majority", split.majority()),
        ("mean", split.mean_mask()),
    ):
        np.testing.assert_array_equal(arrays_of(split.batches(1, rater=rater))[0][1], truth)


def test_augmentation_is_the_square_s_eight_symmetries_alike_on_image_and_mask():
    picture = np.arange(9, dtype="float32").reshape(3, 3) / 9
    mask = (picture > 0.5).astype("uint8")
    n = 400
    split = Split(
        "train",
        SEGMENTATION,
        np.repeat(picture[None, ..., None], n, 0),
        np.repeat(mask[None, ..., None], n, 0),
    )
    images, masks = arrays_of(split.batches(n, seed=0, augment="flips_and_quarter_turns"))[0]
    np.testing.assert_array_equal(masks, images > 0.5)
    turned = [np.rot90(p, k) for p in (picture, picture[:, ::-1]) for k in range(4)]
    counts = [sum(np.array_equal(image[..., 0], t) for image in images) for t in turned]
    assert sum(counts) == n and min(counts) > 25  # 50 each, five standard errors are 33
    assert_same([(images, masks)], arrays_of(split.batches(n, seed=0, augment="flips_and_quarter_turns")))


def test_normalisation_by_hand(phantom):
    data = phantom("phantom_lesion")
    pixels = data.train.images / 255.0
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(data.sd, pixels.std(axis=(0, 1, 2)), rtol=1e-5)
    for split in (data.train, data.test):
        by_hand = (split.images / 255.0 - data.mean) / data.sd
        np.testing.assert_allclose(split.normalised(), by_hand, atol=1e-5)
        np.testing.assert_allclose(next(iter(split.batches(9)))[0], by_hand[:9], atol=1e-5)
    assert abs(data.train.normalised().mean()) < 1e-4
    np.testing.assert_array_equal(data.val.normalised([3, 1]), data.val.normalised()[[3, 1]])


def test_statistics_do_not_depend_on_the_piece_they_are_summed_in():
    images = np.random.default_rng(0).random((2500, 3, 3, 2), "float32")
    mean, sd = channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(sd, images.std(axis=(0, 1, 2)), rtol=1e-5)


def test_pos_weight_by_hand():
    labels = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]], "uint8")
    images = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 1)).astype("uint8")
    others = [Split(name, MULTI_LABEL, images, 1 - labels) for name in ("val", "test")]
    data = Data(datasets.card("nih_chest"), Split("train", MULTI_LABEL, images, labels), *others)
    np.testing.assert_array_equal(data.pos_weight(), [3, 4, 0])  # 3/1; no positive: 4 examples; no negative


def test_a_damaged_row_stops_the_stream_and_says_what_to_do(tmp_path, caplog):
    """Rows of files, one bit of which is flipped after the split is made."""
    source = numbered(n=20)
    arrays = {"images": source.images, "targets": source.targets}
    layout = {key: (values.shape[1:], str(values.dtype)) for key, values in arrays.items()}
    found = cache.cached("n", "n", layout, lambda start: [arrays], cache=tmp_path)
    split = Split("train", SEGMENTATION, **found)
    assert_same(arrays_of(split.batches(5)), arrays_of(source.batches(5)))
    data = bytearray(found["images"].path.read_bytes())
    data[-1] ^= 1
    found["images"].path.write_bytes(data)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"row 19 is not what was written\.\nDelete the folder"):
        arrays_of(split.batches(5))
    assert "row 19 is not what was written.\nDelete the folder" in caplog.text  # not in the middle of thirty lines


# ---- phantoms: the stated model


def test_chest_phantom_prevalence_and_ceiling():
    test = datasets.load("phantom_chest", num_train=1, num_val=2, num_test=6000, size=8).test
    prevalence = test.targets.mean(axis=0)
    np.testing.assert_allclose(prevalence, phantoms.PREVALENCE, rtol=0.03)  # even counts: no noise
    np.testing.assert_allclose(test.truth_probs.mean(axis=0), phantoms.PREVALENCE, rtol=0.01)
    ceiling = [roc_auc_score(test.targets[:, k], test.truth_probs[:, k]) for k in range(14)]
    assert min(ceiling) > 0.88 and max(ceiling) < 0.97


def test_chest_phantom_has_every_label_in_every_split(phantom):
    data = phantom("phantom_chest")
    for split in (data.train, data.val, data.test):
        assert split.targets.any(axis=0).all()
    assert data.pos_weight().max() < 100


@pytest.mark.parametrize("name", ["phantom_lesion", "phantom_nodule"])
def test_truth_probs_are_the_share_of_raters_who_mark(phantom, name):
    split = phantom(name).train
    truth = np.broadcast_to(split.truth_probs, split.targets.shape)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        chosen = (truth > max(low, 0.01)) & (truth <= low + 0.2)
        assert abs(split.targets[chosen].mean() - truth[chosen].mean()) < 0.03


def test_nodule_phantom_raters_disagree_as_lidc_s_do(phantom):
    masks = phantom("phantom_nodule").train.targets
    drew = masks.any(axis=(1, 2)).sum(axis=1)
    assert 0.65 < pairwise_iou(masks) < 0.75  # LIDC: 0.70
    assert 0.4 < (drew == 4).mean() < 0.55
    assert 0.4 < ((drew > 0) & (drew < 4)).mean() < 0.6
    assert (drew == 0).mean() < 0.08


def test_lesion_phantom_ceiling(phantom):
    test = phantom("phantom_lesion").test
    guess, truth = test.truth_probs > 0.5, test.targets > 0
    iou = (guess & truth).sum(axis=(1, 2, 3)) / (guess | truth).sum(axis=(1, 2, 3))
    assert 0.75 < iou.mean() < 0.9


# ---- the real data


def test_real_data_keep_the_contract(real):
    for split in (real.train, real.val, real.test):
        assert split.num_examples == 40
        assert split.images.shape[1:] == real.input_shape == (32, 32, real.card.channels)
        assert split.targets.max() == 1
        if split.groups is not None:
            others = [s for s in (real.train, real.val, real.test) if s is not split]
            assert not any(np.isin(split.groups, s.groups).any() for s in others)
    if real.card.name != "isic2018":
        assert real.train.groups is not None
    x, y = next(iter(real.train.batches(8, seed=0)))
    assert abs(float(np.mean(x))) < 1 and set(np.unique(y)) <= {0, 1}


# ---- readers, on files made here


# ---- messages


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(name="chestmnits"), "phantom_chest, .*Received: name='chestmnits'"),
        (dict(name="phantom_lesion", size=7), "size >= 8. Received: size=7"),
        (dict(name="phantom_lesion", size=32.0), "integer size"),
        (dict(name="phantom_lesion", limit=0), "limit >= 1. Received: limit=0"),
        (dict(name="phantom_lesion", seed=-1), "seed >= 0"),
        (dict(name="phantom_lesion", num_val=0), "num_val >= 1"),
        (dict(name="phantom_lesion", colour="red"), "Received: colour='red'"),
        (dict(name="phantom_lesion", normalisation="none"), "normalisation one of"),
        (dict(name="phantom_lesion", normalisation="paper"), "no constants"),
        (dict(name="lidc", raters="some"), "raters one of"),
        (dict(name="chestmnist", size=300), "size <= 224"),
    ],
)
def test_wrong_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        datasets.load(**arguments)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(batch_size=0), "batch_size >= 1"),
        (dict(batch_size=2, initial_epoch=1, epochs=1), "initial_epoch < epochs"),
        (dict(batch_size=2, seed=-1), "seed >= 0"),
        (dict(batch_size=2, seed=0, augment="flips"), "flips_and_quarter_turns"),
        (dict(batch_size=2, augment="flips_and_quarter_turns"), "a seed"),
        (dict(batch_size=2, rater="random"), "a seed"),
        (dict(batch_size=2, rater="first"), "rater one of"),
    ],
)
def test_wrong_streams(options, says):
    with pytest.raises(ValueError, match=says):
        numbered().batches(**options)


def test_labels_have_no_raters_and_masks_no_pos_weight(phantom):
    with pytest.raises(ValueError, match="only masks have raters"):
        phantom("phantom_chest").train.batches(2, rater="mean")
    with pytest.raises(ValueError, match="a split with masks"):
        phantom("phantom_chest").train.majority()
    with pytest.raises(ValueError, match="per label"):
        phantom("phantom_nodule").pos_weight()


@pytest.mark.parametrize("name", [n for n in datasets.names() if n not in PHANTOMS])
def test_absent_data_say_where_to_get_them(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SBN_TF_DATA", str(tmp_path / "here"))
    with pytest.raises(FileNotFoundError) as error:
        datasets.load(name)
    first, second = str(error.value).split("\n")
    assert str(tmp_path / "here") in first
    assert datasets.card(name).source in second and "SBN_TF_DATA" in second


def test_truncated_and_corrupt_npz(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez_compressed(path, image=np.random.default_rng(0).integers(0, 255, (9, 28, 28)))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[2000:2100] = bytes(100)
    for contents in (b"", b"nonsense", whole[:3000], bytes(damaged)):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match="truncated, corrupt"):
            npz.read_npz(path, {"image": (("N", "H", "W"), "numbers")})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no arrays")
    with pytest.raises(ValueError, match="without"):
        npz.read_npz(path, {"image": (("N", "H", "W"), "numbers")})


def test_split_refuses_what_it_cannot_hold():
    images = np.zeros((2, 8, 8, 1), "float32")
    masks = np.zeros((2, 8, 8, 1), "uint8")
    bad = images.copy()
    bad[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity in image 1"):
        Split("train", SEGMENTATION, bad, masks)
    with pytest.raises(ValueError, match="at least one image"):
        Split("train", SEGMENTATION, images[:0], masks[:0])
    with pytest.raises(ValueError, match="0 and 1"):
        Split("train", SEGMENTATION, images, masks + 2)
    with pytest.raises(ValueError, match="Expected targets"):
        Split("train", SEGMENTATION, images, masks[:, :4])
    with pytest.raises(ValueError, match="none for image 1"):
        Split("train", SEGMENTATION, images, masks, rater_valid=np.array([[True], [False]]))
    with pytest.raises(ValueError, match="Expected 2 groups"):
        Split("train", SEGMENTATION, images, masks, groups=np.arange(3))


def test_an_image_in_two_splits_is_refused():
    def split(name, ids, groups=None):
        images, labels = np.random.default_rng(0).random((2, 8, 8, 1), "float32"), np.zeros((2, 14), "uint8")
        return Split(name, MULTI_LABEL, images, labels, ids=ids, groups=groups)

    card = datasets.card("nih_chest")
    with pytest.raises(ValueError, match=r"every image .*Received: 1 in both train and test, as b"):
        Data(card, split("train", ["a", "b"]), split("val", ["c", "d"]), split("test", ["b", "e"]))
    with pytest.raises(ValueError, match="groups of every split"):
        Data(card, split("train", None, [1, 2]), split("val", None), split("test", None))


def test_a_card_is_a_table_in_a_notebook():
    card = dataclasses.replace(datasets.card("lidc_patches"), title="a < b", notes="")
    shown = ElementTree.fromstring(card._repr_html_())
    assert shown.find("caption").text == "lidc_patches: a < b"
    rows = {row.find("th").text: row.find("td").text for row in shown.iter("tr")}
    assert rows["classes"] == "nodule" and rows["raters"].startswith("4") and "notes" not in rows
    assert all(f"{key} " in str(card) and value in str(card) for key, value in rows.items())
