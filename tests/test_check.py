"""The check of a dataset: its numbers against numpy, and each fault that is planted is named."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import jaccard_score

from sbn_tf import datasets
from sbn_tf.datasets import check, pieces
from sbn_tf.datasets.arrays import DiskArray
from sbn_tf.datasets.base import BINARY, MULTI_CLASS, MULTI_LABEL, SEGMENTATION, Data, Split
from sbn_tf.experiments.check_plot import plot_check

SIDE = 6


def images(n, seed=0, channels=1):
    return np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, channels), "uint8")


def labels(n, seed=0, num_labels=3):
    found = np.random.default_rng(seed).integers(0, 2, (max(n, 4), num_labels), "uint8")
    found[:4] = [[0], [1], [1], [0]]  # both kinds of each
    return found


def masks(n, seed=0, raters=2):
    return np.random.default_rng(seed).integers(0, 2, (n, SIDE, SIDE, raters), "uint8")


def labelled(**changes):
    """Three clean splits of labels, with the changes that a test plants."""
    return {name: (images(n, k), labels(n, k)) for k, (name, n) in enumerate(SIZES.items())} | changes


def masked(**changes):
    return {name: (images(n, k), masks(n, k)) for k, (name, n) in enumerate(SIZES.items())} | changes


SIZES = {"train": 40, "val": 20, "test": 20}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


# ---- the numbers


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("piece_bytes", [2**22, 100])
def test_numbers_of_labels_are_those_of_numpy(monkeypatch, channels, dtype, piece_bytes):
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    x, y = images(30, channels=channels), labels(30)
    x = x if dtype == "uint8" else (x / 255).astype("float32")
    split = Split(name="train", task=MULTI_LABEL, images=x, targets=y, groups=np.arange(30) % 7)
    (row,) = check(split).table
    assert (row["images"], row["dtype"], row["shape"]) == (30, dtype, f"6 x 6 x {channels}")
    assert (row["min"], row["max"], row["patients"]) == (x.min(), x.max(), 7)
    np.testing.assert_allclose([row["mean"], row["sd"]], [x.mean(dtype="float64"), x.std(dtype="float64")], rtol=1e-6)
    assert list(row["positives"].values()) == y.sum(0).tolist()
    report = check(split)
    (tally,) = report.tallies
    assert tally.histogram.tolist() == np.histogram(x, tally.edges)[0].tolist() and tally.histogram.sum() == x.size


def test_numbers_of_masks_are_those_of_numpy_and_sklearn():
    x, y = images(12), masks(12, raters=3)
    y[2, ..., 1] = 0  # this rater drew nothing
    valid = np.ones((12, 3), bool)
    valid[5, 2] = valid[7, 0] = False
    (row,) = check((x, y, valid), SEGMENTATION).table
    share = y.mean(axis=(1, 2))[valid]
    assert (row["masks"], row["empty masks"]) == (34, 1)
    np.testing.assert_allclose(row["masks an image"], 34 / 12)
    np.testing.assert_allclose(row["foreground, median"], np.median(share))
    np.testing.assert_allclose([row["foreground, min"], row["foreground, max"]], [share.min(), share.max()])
    both = [
        jaccard_score(y[n, ..., a].ravel(), y[n, ..., b].ravel())
        for n in range(12)
        for a, b in ((0, 1), (0, 2), (1, 2))
        if valid[n, [a, b]].all() and y[n, ..., a].any() and y[n, ..., b].any()
    ]
    assert len(both) == 30
    np.testing.assert_allclose(row["raters' IoU"], np.mean(both))


@pytest.mark.parametrize("batch", [None, 7])
@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (MULTI_LABEL, labels(30)),
        (MULTI_CLASS, np.arange(30) % 4),
        (BINARY, np.arange(30) % 2),
        (SEGMENTATION, masks(30)),
        (SEGMENTATION, masks(30)[..., 0]),
    ],
)
def test_a_stream_is_checked_like_its_arrays(task, targets, batch):
    x = images(30)
    stream = tf.data.Dataset.from_tensor_slices((x, targets))
    stream = stream if batch is None else stream.batch(batch)
    ours, theirs = check((x, targets), task), check(stream, task)
    assert ours.table == theirs.table and ours.problems == theirs.problems
    if task == MULTI_CLASS:
        assert ours.table[0]["positives"] == {"0": 8, "1": 8, "2": 7, "3": 7}
        one_hot = check((x, np.eye(4, dtype="uint8")[targets]), task)
        assert one_hot.table == ours.table


def test_rows_on_disk_are_checked_like_those_in_memory(tmp_path):
    x, y = images(30), masks(30)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    on_disk = [DiskArray(tmp_path / f"{key}.npy") for key in "xy"]
    splits = [Split(name="train", task=SEGMENTATION, images=a, targets=b) for a, b in ((x, y), on_disk)]
    assert check(splits[0]).table == check(splits[1]).table


def test_max_images_takes_a_part_and_says_so():
    data = datasets.load("phantom_lesion", size=8, num_train=40, num_val=30, num_test=20)
    report = check(data, max_images=25)
    assert [row["images"] for row in report.table] == [25, 25, 20]
    assert "train: 25 images of 40 were looked at." in report.notes and len(report.notes) == 3
    endless = tf.data.Dataset.from_tensor_slices((images(4), labels(4))).repeat()
    report = check(endless, MULTI_LABEL, max_images=9)
    assert report.table[0]["images"] == 9 and "images: 9 images from the start were looked at." in report.notes
    assert not any("too few" in sentence for sentence in report.problems)  # it was we who took so few


def test_a_sample_names_images_by_their_place_in_the_split():
    x = images(200)
    x[150:] = 7
    split = Split(name="train", task=MULTI_LABEL, images=x, targets=labels(200))
    (problem,) = [sentence for sentence in check(split, max_images=150).problems if "one value" in sentence]
    first = int(problem.split("(first: image ")[1].split(")")[0])
    assert first >= 150


@pytest.mark.parametrize(
    ("task", "targets", "note"),
    [
        (MULTI_LABEL, np.tile(np.uint8([0, 1, 1]), (200, 1)), "Every one of the 9 images of train looked at is of b."),
        (MULTI_LABEL, np.tile(np.uint8([0, 1, 1]), (200, 1)), "None of the 9 images of train looked at is of a."),
        (MULTI_CLASS, np.r_[np.zeros(195, int), 1, 1, 1, 2, 2], "None of the 9 images of train looked at is of b, c."),
        (
            SEGMENTATION,
            np.zeros((200, SIDE, SIDE, 1), "uint8"),
            "All masks of the 9 images of train looked at are empty.",
        ),
    ],
)
def test_what_a_sample_lacks_is_a_note(task, targets, note):
    targets = targets.copy()
    if task == MULTI_LABEL:
        targets[-1] = [1, 0, 0]
        targets[:8, 2] = 0
    x = images(200)
    report = check(
        {"train": (x, targets)}, task, classes=("a", "b", "c")[: 1 if task == SEGMENTATION else 3], max_images=9
    )
    assert [found for found in report.notes if found.startswith(note[:-1])], report.notes
    assert report.problems == []
    if task == MULTI_LABEL:
        assert check({"train": (x, targets)}, task).problems == []


# ---- clean data, and planted faults


@pytest.mark.parametrize("name", ["phantom_chest", "phantom_lesion", "phantom_nodule"])
def test_phantoms_have_no_problem(name):
    report = check(datasets.load(name, size=16))
    assert report.problems == [] and "No problem found." in str(report)
    assert report.notes == ["Patients are not known, so a patient may be in two splits."]


@pytest.mark.parametrize(("sources", "task"), [(labelled(), MULTI_LABEL), (masked(), SEGMENTATION)])
def test_what_the_faults_are_planted_in_has_none(sources, task):
    assert check(sources, task).problems == []


def with_rows(source, **rows):
    """The images of a source with some of them replaced: `row_3=values`."""
    changed = source[0].copy()
    for key, value in rows.items():
        changed[int(key[4:])] = value
    return (changed, *source[1:])


TRAIN, VAL, TEST = labelled().values()
M_TRAIN, M_VAL, M_TEST = masked().values()
NAN = (TRAIN[0] / 255).astype("float32")
NAN[3, 2, 2] = np.nan


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train": with_rows(TRAIN, row_7=9, row_9=0)}, "train has 2 images of one value throughout (first: image 7)"),
        (
            {"train": (with_rows(TRAIN, row_7=TRAIN[0][5])[0], np.concatenate([TRAIN[1][:7], TRAIN[1][5:6]] * 5))},
            "train has 1 image identical to another of it (first: image 5 and image 7)",
        ),
        (
            {"val": with_rows(VAL, row_3=VAL[0][2], row_5=VAL[0][2])},
            "val has 2 images identical to another of it, 2 of them with another target (first: image 2 and image 3)",
        ),
        (
            {"test": with_rows(TEST, row_4=TRAIN[0][11], row_9=TRAIN[0][30])},
            "train and test share 2 images, identical in every pixel (first: image 11 of train, image 4 of test)",
        ),
        ({"train": (TRAIN[0], TRAIN[1] * np.uint8([1, 0, 1]))}, "train has no image of b: nothing can be learnt"),
        ({"val": (VAL[0], VAL[1] * np.uint8([0, 1, 0]))}, "val has no image of a, c"),
        ({"test": (TEST[0], TEST[1] | np.uint8([0, 0, 1]))}, "Every image of test is of c."),
        (
            {
                "test": (
                    np.concatenate([images(50, k) for k in (5, 6)]),
                    np.eye(100, 3, dtype="uint8") + labels(100) * 0,
                )
            },
            "Shares of classes differ between test and train: ",
        ),
        ({"val": (VAL[0][:9], VAL[1][:9])}, "val has 9 images: too few for any number."),
        ({"train": (TRAIN[0].astype("float32"), TRAIN[1])}, "train has float pixels up to 255: divide by 255"),
        ({"train": (NAN, TRAIN[1])}, "train has 1 image with NaN or infinity (first: image 3)"),
        ({"train": (TRAIN[0] // 200, TRAIN[1])}, "train has uint8 pixels of 0 and 1 only"),
        ({"test": (TEST[0] // 3, TEST[1])}, "The pixel mean of test is "),
        (
            {"test": (np.repeat(TEST[0], 3, -1), TEST[1])},
            "Images of test are (6, 6, 3) uint8, of train (6, 6, 1) uint8.",
        ),
        ({"test": (TEST[0], TEST[1] * 2)}, "test has other targets than 0 and 1, as 2."),
    ],
)
def test_faults_of_labelled_images_are_named(changes, problem):
    found = check(labelled(**changes), MULTI_LABEL, classes=("a", "b", "c")).problems
    assert [sentence for sentence in found if sentence.startswith(problem)], found


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"val": (VAL[0], M_VAL[1] * 0)}, "All masks of val are empty."),
        ({"train": (TRAIN[0], M_TRAIN[1] | 1)}, "100.0% of the pixels of train's masks are foreground: are 0 and 1"),
        ({"test": (TEST[0], M_TEST[1] * 255)}, "test has other targets than 0 and 1, as 255."),
        ({"test": (TEST[0], M_TEST[1] * M_TEST[1][..., ::-1])}, "The foreground of test's masks is "),
    ],
)
def test_faults_of_masks_are_named(changes, problem):
    found = check(masked(**changes), SEGMENTATION).problems
    assert [sentence for sentence in found if sentence.startswith(problem)], found


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (7, "train has 2 images of classes without a name, beyond 0 to 1 (first: image 3, of class 7)."),
        (2, "train has 2 images of classes without a name, beyond 0 to 1 (first: image 3, of class 2)."),
        (-1, "train has other targets than classes 0, 1, 2, ..., as -1."),
        (2**40, "train has other targets than classes 0, 1, 2, ..., as 1099511627776."),
        (np.nan, "train has other targets than classes 0, 1, 2, ..., as nan."),
        (0.5, "train has other targets than classes 0, 1, 2, ..., as 0.5."),
    ],
)
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_class_numbers_that_no_name_is_of_are_problems(label, problem, column):
    y = (np.arange(40) % 2).astype(np.asarray(label).dtype)
    y[[3, 9]] = label
    y = y[:, None] if column else y
    report = check({"train": (TRAIN[0], y), "val": (VAL[0], np.arange(20) % 2)}, MULTI_CLASS, classes=("a", "b"))
    assert report.problems == [problem]
    assert list(report.table[0]["positives"]) == ["a", "b"]
    assert report.table[0]["positives"]["b"] == 18 and "18 (45.0%)" in str(report)
    figure = plot_check(report)
    shown = {ax.get_xlabel() for ax in figure.axes if ax.images}
    assert shown <= {"a", "b", str(label), "?"} and {"a", "b"} <= shown


def test_text_is_no_class_number():
    report = check((TRAIN[0], np.array(["cat", "dog"] * 20)), MULTI_CLASS, classes=("cat", "dog"))
    assert report.problems[0] == "images has other targets than classes 0, 1, 2, ..., as cat."
    assert {ax.get_xlabel() for ax in plot_check(report).axes if ax.images} == {"?"}
    report = check((TRAIN[0], np.array(["cat", "dog"] * 20)), MULTI_CLASS)
    assert "other targets" in str(report) and report.table[0]["positives"] == {}
    plot_check(report)


def test_images_of_none_of_the_labels_are_counted():
    y = TRAIN[1].copy()
    y[10:15] = 0
    report = check({"train": (TRAIN[0], y), "val": VAL}, MULTI_LABEL, classes=("a", "b", "c"))
    n = int((y.sum(1) == 0).sum())
    assert report.table[0]["none of these"] == n >= 5
    lines = [line for line in str(report).splitlines() if line.startswith("| none of these ")]
    assert len(lines) == 1 and f"{n} ({n / 40:.1%})" in lines[0]
    assert "none of these" not in str(check((TRAIN[0], np.arange(40) % 2), BINARY))


def test_masks_of_the_whole_image_are_a_note():
    y = M_TRAIN[1].copy()
    y[[4, 11], ..., 1] = 1
    y[30] = 1
    report = check(masked(train=(TRAIN[0], y)), SEGMENTATION)
    note = "4 masks of train, of 3 images, cover the whole image (first: image 4)."
    assert report.problems == [] and note in report.notes
    valid = np.ones((40, 2), bool)
    valid[[4, 11], 1] = valid[30, 0] = False  # masks that are not there
    notes = check({"train": (TRAIN[0], y, valid)}, SEGMENTATION).notes
    assert "1 mask of train, of 1 image, covers the whole image (first: image 30)." in notes


def test_classes_of_which_an_image_has_none_or_two_are_named():
    y = np.eye(3, dtype="uint8")[np.arange(40) % 3]
    y[4] = 0
    y[8] = 1
    found = check((TRAIN[0], y), MULTI_CLASS).problems
    assert found == ["images has 2 images not of exactly one class (first: image 4)."]


def test_a_leak_of_patients_is_named_and_ids_are_used():
    splits = [
        Split(
            name=name,
            task=MULTI_LABEL,
            images=x,
            targets=y,
            groups=np.arange(len(x)) + 100 * k,
            ids=np.array([f"{name}-{row}" for row in range(len(x))]),
        )
        for k, (name, (x, y)) in enumerate(labelled(val=with_rows(VAL, row_3=VAL[0][2])).items())
    ]
    splits[2].groups[5:7] = [17, 18]  # as two of train
    card = datasets.card("phantom_chest")
    problems = check(Data(card, *splits, leak="this test's splits share patients"), classes=("a", "b", "c")).problems
    assert "train and test share 2 patients (first: 17): a leak." in problems
    assert "Patients may be in two splits: this test's splits share patients." in problems
    assert [sentence for sentence in problems if "(first: image val-2 and image val-3)" in sentence]


# ---- how it reads and looks


def test_it_reads_as_markdown():
    text = str(check(labelled(), MULTI_LABEL, classes=("a", "b", "c"), name="mine"))
    lines = text.splitlines()
    assert lines[0] == "mine: multi-label" and "No problem found." in lines
    assert [cell.strip() for cell in lines[2].split("|")] == ["", "", "train", "val", "test", ""]
    n = int(TRAIN[1][:, 0].sum())
    assert [line for line in lines if line.startswith("| a ") and f"{n} ({n / 40:.1%})" in line]


@pytest.mark.parametrize(
    ("sources", "task"),
    [
        (labelled(), MULTI_LABEL),
        (masked(), SEGMENTATION),
        ((images(30, channels=3), np.arange(30) % 4), MULTI_CLASS),
        ((images(5), np.zeros((5, SIDE, SIDE), "uint8")), SEGMENTATION),
        (datasets.load("phantom_nodule", size=8, num_train=12, num_val=10, num_test=10), None),
    ],
)
def test_picture(sources, task):
    report = check(sources, task)
    figure = plot_check(report)
    figure.canvas.draw()
    assert plt.get_fignums() == [figure.number]
    shown = [ax for ax in figure.axes if ax.images]
    assert len(shown) == min(24, report.table[0]["images"])
    pixels, balance = figure.axes[-2:]
    assert pixels.get_xlabel() == "pixel value, as stored" and "share" in balance.get_xlabel()
    for text in [figure._suptitle, *(label for ax in (pixels, balance) for label in (ax.xaxis.label, ax.yaxis.label))]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_the_wall_is_a_copy_of_images_that_were_there():
    x, y = images(60), labels(60)
    (tally,) = check((x, y), MULTI_LABEL).tallies
    rows = [np.flatnonzero((x == image).all(axis=(1, 2, 3)))[0] for image, _, _ in tally.wall]
    assert len(set(rows)) == 24 and max(rows) > 30
    for row, (image, target, _) in zip(rows, tally.wall, strict=True):
        assert image.base is None and (target == y[row]).all()


# ---- wrong arguments


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((images(4), labels(4)), {}, "Expected task one of"),
        ((images(4), labels(4)), {"task": "regression"}, "Expected task one of"),
        ((images(4), labels(4)), {"task": MULTI_LABEL, "max_images": 0}, "Expected max_images"),
        ((images(4), labels(4)), {"task": MULTI_LABEL, "classes": ("a",)}, "Expected 3 class names"),
        ((images(4), labels(5)), {"task": MULTI_LABEL}, "Expected as many targets as images"),
        ((images(4), labels(4)), {"task": SEGMENTATION}, "Expected masks"),
        ((images(4), masks(4)), {"task": MULTI_LABEL}, "Expected labels"),
        ((images(0), labels(4)[:0]), {"task": MULTI_LABEL}, "Expected at least one image"),
        (images(4), {"task": MULTI_LABEL}, r"Expected pairs \(image, target\)"),
        ({}, {"task": MULTI_LABEL}, "Expected one split or more"),
        (
            tf.data.Dataset.from_tensor_slices((images(4), labels(4))).repeat(),
            {"task": MULTI_LABEL},
            "Expected a dataset with an end",
        ),
        (tf.data.Dataset.from_tensor_slices(images(4)), {"task": MULTI_LABEL}, r"Expected pairs \(image, target\)"),
    ],
)
def test_refuses(data, options, message):
    with pytest.raises(ValueError, match=message) as error:
        check(data, **options)
    assert str(error.value).count("\n") <= 1
