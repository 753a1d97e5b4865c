"""Data of one's own as tf.data.Datasets or arrays: what goes in comes out, wherever it lies, or is refused in words."""

import copy
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from sbn_tf import datasets
from sbn_tf.datasets import from_arrays, from_tf_data
from sbn_tf.datasets.arrays import DiskArray
from sbn_tf.datasets.base import BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION

SIDE = 6
SIZES = (20, 9, 7)


def images(n, seed=0, dtype="uint8", channels=1):
    found = np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, channels), "uint8")
    return found if dtype == "uint8" else (found / 255).astype(dtype)


def masks(n, seed=0, raters=2):
    return np.random.default_rng(seed).integers(0, 2, (n, SIDE, SIDE, raters), "uint8")


def three(targets, **options):
    """(images, targets) of three splits; `targets(n, seed)`."""
    return [(images(n, k, **options), targets(n, k)) for k, n in enumerate(SIZES)]


def numbers(n, seed=0):
    return np.arange(n) % 3


TARGETS = {
    "multi-label": (MULTI_LABEL, lambda n, k: np.random.default_rng(k).integers(0, 2, (n, 4)), lambda y: y),
    "bool labels": (MULTI_LABEL, lambda n, k: np.random.default_rng(k).random((n, 4)) > 0.5, lambda y: y),
    "binary": (BINARY, lambda n, k: np.arange(n) % 2, lambda y: y[:, None]),
    "binary of floats": (BINARY, lambda n, k: (np.arange(n) % 2)[:, None].astype("float32"), lambda y: y),
    "class numbers": (MULTI_CLASS, numbers, lambda y: np.eye(3)[y]),
    "a column of them": (ORDINAL, lambda n, k: numbers(n)[:, None], lambda y: np.eye(3)[y[:, 0]]),
    "one-hot": (MULTI_CLASS, lambda n, k: np.eye(3)[numbers(n)], lambda y: y),
    "masks": (SEGMENTATION, masks, lambda y: y),
    "one mask": (SEGMENTATION, lambda n, k: masks(n, k)[..., 0], lambda y: y[..., None]),
}


def stream(arrays, batch):
    found = tf.data.Dataset.from_tensor_slices(arrays)
    return found if batch is None else found.batch(batch)


# ---- what goes in comes out


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "uint8") for name in TARGETS), ("class numbers", "float64"), ("masks", "float16")]
)
def test_streams_and_arrays_come_through(name, batch, dtype, tmp_path):
    task, make, expected = TARGETS[name]
    parts = three(make, dtype=dtype)
    data = from_tf_data(*(stream(part, batch) for part in parts), task=task, cache=tmp_path)
    same = from_arrays(*parts, task=task)
    for (x, y), split, other in zip(parts, *((d.train, d.val, d.test) for d in (data, same)), strict=True):
        assert split.images.dtype == ("uint8" if dtype == "uint8" else "float32")
        np.testing.assert_array_equal(split.images, x.astype(split.images.dtype))
        np.testing.assert_array_equal(split.targets, expected(y))
        np.testing.assert_array_equal(split.images, other.images)
        np.testing.assert_array_equal(split.targets, other.targets)
    assert data.digest() == same.digest() and data.card.counts == SIZES
    x, y = next(iter(data.train.batches(5, seed=0)))
    assert x.shape == (5, SIDE, SIDE, 1) and len(y) == 5
    assert list(tmp_path.iterdir()) == []  # small: it is in memory now


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("shape", [(SIDE, SIDE), (SIDE, SIDE, 1), (SIDE, SIDE, 3), (SIDE, 9), (5, SIDE, 3)])
def test_single_images_and_batches_are_told_apart_by_rank(shape, batch):
    x = [np.random.default_rng(k).integers(0, 256, (n, *shape), "uint8") for k, n in enumerate(SIZES)]
    parts = [stream((found, numbers(len(found))), batch) for found in x]
    data = from_tf_data(*parts, task=MULTI_CLASS)
    assert data.input_shape == (*shape[:2], shape[2] if len(shape) == 3 else 1)
    np.testing.assert_array_equal(data.val.images.reshape(x[1].shape), x[1])


def test_rater_valid_comes_through():
    valid = [np.random.default_rng(k).random((n, 2)) > 0.3 for k, n in enumerate(SIZES)]
    for found in valid:
        found[:, 0] |= ~found.any(axis=1)
    parts = [(*part, found) for part, found in zip(three(masks), valid, strict=True)]
    for data in (
        from_arrays(*parts, task=SEGMENTATION),
        from_tf_data(*(stream(part, 4) for part in parts), task=SEGMENTATION),
        from_tf_data(*(stream(part, None) for part in parts), task=SEGMENTATION, in_memory=False),
    ):
        for split, found in zip((data.train, data.val, data.test), valid, strict=True):
            np.testing.assert_array_equal(split.rater_valid, found)


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("multi-label", None, ("0", "1", "2", "3")),
        ("multi-label", list("abcd"), tuple("abcd")),
        ("binary", None, ("1",)),
        ("binary", ("healthy", "ill"), ("ill",)),
        ("binary", ("ill",), ("ill",)),
        ("class numbers", None, ("0", "1", "2")),
        ("class numbers", tuple("abcd"), tuple("abcd")),  # a class that no image has
        ("masks", None, ("foreground",)),
        ("masks", ("lesion",), ("lesion",)),
    ],
)
def test_classes_and_card(name, classes, expected):
    task, make, _ = TARGETS[name]
    card = from_arrays(*three(make), task=task, classes=classes, name="mine").card
    assert (card.name, card.classes, card.task) == ("mine", expected, task)
    assert card.network == ("unet" if task == SEGMENTATION else "resnet18")
    assert "train 20, val 9, test 7" in str(card)


def test_patients_of_arrays():
    parts = three(numbers)
    patients = [np.arange(n) // 2 + 100 * k for k, n in enumerate(SIZES)]
    data = from_arrays(*parts, task=MULTI_CLASS, patients=patients)
    assert data.test.groups.tolist() == patients[2].tolist()
    patients[2][0] = 3
    with pytest.raises(ValueError, match="Expected every patient of"):
        from_arrays(*parts, task=MULTI_CLASS, patients=patients)


def test_a_check_finds_nothing_in_clean_data():
    data = from_arrays(*[(images(30, k), numbers(30)) for k in range(3)], task=MULTI_CLASS)
    assert datasets.check(data).problems == []


@pytest.mark.parametrize(
    ("targets", "classes", "warned"),
    [
        (lambda n, k: numbers(n) + 1, None, True),
        (lambda n, k: np.eye(4)[numbers(n) + 1], None, True),
        (lambda n, k: numbers(n) + (k > 0), None, False),  # train has a class 0
        (lambda n, k: numbers(n) + 1, ("none", "cyst", "tumour", "stone"), False),
    ],
)
def test_classes_counted_from_1_are_told(caplog, targets, classes, warned):
    with caplog.at_level(logging.WARNING):
        data = from_arrays(*three(targets), task=MULTI_CLASS, classes=classes)
    assert data.num_outputs == 4
    assert ("my_data: no image is of class 0" in caplog.text) == warned


# ---- the cache


def on_disk(folder, **options):
    parts = [stream(part, None) for part in three(numbers)]
    return from_tf_data(*parts, task=MULTI_CLASS, cache=folder, in_memory=False, **options)


@pytest.fixture
def collect():
    """Garbage collection of what a test makes: going through what came before it takes two seconds a time."""
    gc.freeze()
    yield gc.collect
    gc.unfreeze()


KEEPERS = {
    "data": lambda data: data,
    "a split": lambda data: data.test,
    "a subset": lambda data: data.val.subset([2, 3]),
    "an array": lambda data: data.train.images,
    "a copy": lambda data: copy.copy(data.train.images),
    "a deep copy": lambda data: copy.deepcopy(data),
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_a_temporary_cache_is_removed_when_nothing_holds_its_rows(tmp_path, keeper, collect):
    data = on_disk(tmp_path)
    assert isinstance(data.train.images, DiskArray)
    assert len(list(tmp_path.glob("temporary-*/my_data-*/images.npy"))) == 3
    kept = KEEPERS[keeper](data)
    del data
    collect()
    assert len(list(tmp_path.glob("temporary-*/my_data-*/images.npy"))) == 3
    del kept
    collect()
    assert list(tmp_path.iterdir()) == []


def test_a_stream_keeps_the_rows_it_reads(tmp_path, collect):
    data = on_disk(tmp_path)
    expected, kept = data.train.normalised(), data.train.batches(5)
    del data
    collect()
    np.testing.assert_allclose(np.concatenate([x for x, _ in kept.as_numpy_iterator()]), expected, rtol=1e-6)


def test_a_pickle_names_the_rows(tmp_path):
    data = on_disk(tmp_path)
    again = pickle.loads(pickle.dumps(data.train.images))
    np.testing.assert_array_equal(again, three(numbers)[0][0])


SCRIPT = """
import os, signal, sys
import numpy as np
from sbn_tf.datasets import from_tf_data

class Source:
    element = np.arange(360, dtype="uint8").reshape(10, 6, 6, 1), np.arange(10) % 2
    cardinality = staticmethod(lambda: 1)
    as_numpy_iterator = staticmethod(lambda: iter([Source.element]))

def made():
    data = from_tf_data(Source, Source, Source, task="multi-class", cache=sys.argv[1], in_memory=False)
    print(len(os.listdir(sys.argv[1])), flush=True)
    return data

data = made()
child = os.fork()
if child == 0:
    its_own = made()
    sys.exit(3)  # with all that is called at exit
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
print(len(os.listdir(sys.argv[1])), int(np.asarray(data.train.images).sum()), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and signals are of POSIX")
def test_a_fork_removes_its_own_alone_and_the_next_call_what_a_killed_process_left(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM, done.stderr
    first, of_child, after_child, total = map(int, done.stdout.split())
    assert (first, of_child, after_child) == (1, 2, 1)
    assert total == np.arange(360, dtype="uint8").sum()
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "temporary-notes").mkdir()  # not a name of ours
    elsewhere = tmp_path / "temporary-999999999-00000000-0123456789ab"  # another machine's
    elsewhere.mkdir()
    mine, again = on_disk(tmp_path), on_disk(tmp_path)  # this process lives: its first one is not swept
    assert len(list(tmp_path.iterdir())) == 4 and elsewhere.exists()
    np.testing.assert_array_equal(mine.val.images, again.val.images)


def counted(arrays, calls):
    def generate():
        for element in zip(*arrays, strict=True):
            calls.append(1)
            yield element

    signature = tuple(tf.TensorSpec(part.shape[1:], part.dtype) for part in arrays)
    return tf.data.Dataset.from_generator(generate, output_signature=signature)


@pytest.mark.parametrize("name", TARGETS)
def test_each_dataset_is_read_once_and_with_a_key_never_again(tmp_path, name):
    task, make, _ = TARGETS[name]
    parts, calls = three(make), [[], [], []]
    options = dict(task=task, cache=tmp_path, key="v1")
    first = from_tf_data(*map(counted, parts, calls), **options)  # of unknown length
    assert [len(found) for found in calls] == list(SIZES)
    again = from_tf_data(*map(counted, parts, calls), **options)
    assert [len(found) for found in calls] == list(SIZES)
    assert again.digest() == first.digest() and again.card == first.card


def test_another_key_or_other_shapes_are_another_cache(tmp_path):
    parts = three(numbers)
    options = dict(task=MULTI_CLASS, cache=tmp_path, key="v1")
    first = from_tf_data(*(counted(part, []) for part in parts), **options)
    other = from_tf_data(*(counted(part, []) for part in parts[::-1]), **(options | {"key": "v2"}))
    assert other.card.counts == SIZES[::-1]
    smaller = from_tf_data(*(counted((x[:, :4], y), []) for x, y in parts), **options)
    assert smaller.input_shape == (4, SIDE, 1) and first.input_shape == (SIDE, SIDE, 1)


def unknown(array, calls):
    """A dataset that does not tell its shapes."""

    def generate():
        calls.append(1)
        yield from zip(array, numbers(len(array)), strict=True)

    signature = (tf.TensorSpec((None, None, None), "uint8"), tf.TensorSpec((), "int64"))
    return tf.data.Dataset.from_generator(generate, output_signature=signature)


def test_a_damaged_cache_of_a_key_is_made_anew_of_the_same_shapes(tmp_path):
    options = dict(task=MULTI_CLASS, cache=tmp_path, key="v1")
    x, calls = images(20), []
    from_tf_data(*(unknown(x, calls) for _ in range(3)), **options)
    (found,) = tmp_path.glob("my_data-val-*/images_crc32.npy")
    found.write_bytes(b"")
    data = from_tf_data(*(unknown(x, calls) for _ in range(3)), **options)
    np.testing.assert_array_equal(data.val.images, x)
    assert len(calls) == 4
    found.write_bytes(b"")
    with pytest.raises(ValueError, match="of one shape under one key in val") as error:
        from_tf_data(*(unknown(x[:, :4], calls) for _ in range(3)), **options)
    assert str(error.value).count("\n") == 1 and "Give another key" in str(error.value)


SIDES = ("", "_crc32", "_sums")


@pytest.mark.parametrize(
    "file",
    [f"{what}{side}" for what in ("images", "targets", "rater_valid") for side in SIDES[: 2 + (what == "images")]],
)
def test_a_cache_of_a_key_that_lacks_a_file_is_made_anew(tmp_path, file):
    parts, calls = [(*part, np.ones((len(part[0]), 2), bool)) for part in three(masks)], [[], [], []]
    options = dict(task=SEGMENTATION, cache=tmp_path, key="v1")
    first = from_tf_data(*map(counted, parts, calls), **options)
    (found,) = tmp_path.glob(f"my_data-val-*/{file}.npy")
    found.unlink()
    again = from_tf_data(*map(counted, parts, calls), **options)
    assert again.digest() == first.digest() and found.exists()
    assert (len(calls[0]), len(calls[2])) == (SIZES[0], SIZES[2])  # those of train and test were whole


@pytest.mark.parametrize("damage", [b"", b"{}", b"[3]", b"\xff\xfe{"])
def test_a_damaged_manifest_of_a_key_is_made_anew(tmp_path, damage):
    options = dict(task=MULTI_CLASS, cache=tmp_path, key="v1")
    x = images(20)
    from_tf_data(*(unknown(x, []) for _ in range(3)), **options)
    (found,) = tmp_path.glob("my_data-val-*/manifest.json")
    found.write_bytes(damage)
    data = from_tf_data(*(unknown(x, []) for _ in range(3)), **options)
    np.testing.assert_array_equal(data.val.images, x)


def test_a_generator_that_gives_its_elements_once_is_read_whole():
    parts = three(numbers)
    once = [iter(list(zip(*part, strict=True))) for part in parts]
    signature = (tf.TensorSpec((SIDE, SIDE, 1), "uint8"), tf.TensorSpec((), "int64"))
    data = from_tf_data(
        *(tf.data.Dataset.from_generator(lambda k=k: once[k], output_signature=signature) for k in range(3)),
        task=MULTI_CLASS,
    )
    np.testing.assert_array_equal(data.train.images, parts[0][0])


def test_an_interrupted_build_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.tensors, "PIECE_BYTES", 4 * SIDE * SIDE)
    x, y = images(20), numbers(20)
    broken, calls = x.astype("float32") / 255, []
    whole = broken.copy()
    broken[13, 2, 2] = np.nan
    others = [stream((whole[:5], y[:5]), None)] * 2
    options = dict(task=MULTI_CLASS, cache=tmp_path, key="mine", in_memory=False)
    with pytest.raises(ValueError, match="Received: nan for image 13 of train"):
        from_tf_data(counted((broken, y), calls), *others, **options)
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [".partial"]
    data = from_tf_data(counted((whole, y), calls), *others, **options)
    np.testing.assert_array_equal(data.train.images, whole)


def test_a_failure_leaves_no_temporary_cache(tmp_path):
    parts = three(numbers)
    parts[2] = (parts[2][0], parts[2][1] - 1)
    with pytest.raises(ValueError, match="Expected class numbers"):
        from_tf_data(*(stream(part, None) for part in parts), task=MULTI_CLASS, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- bad input


def with_value(array, index, value):
    array = array.copy()
    array[index] = value
    return array


X = images(20)
F = X.astype("float32") / 255
Y = numbers(20)
M = masks(20)


@pytest.mark.parametrize(
    ("task", "train", "message"),
    [
        (MULTI_CLASS, (with_value(F, (7, 1, 2, 0), 1.5), Y), "Received: 1.5 for image 7 of train"),
        (MULTI_CLASS, (with_value(F, (7, 1, 2, 0), -0.1), Y), "Received: -0.1 for image 7 of train"),
        (MULTI_CLASS, (with_value(F, (7, 1, 2, 0), np.nan), Y), "Received: nan for image 7 of train"),
        (MULTI_CLASS, (with_value(F, (7, 1, 2, 0), np.inf), Y), "Received: inf for image 7 of train"),
        (MULTI_CLASS, (X.astype("float32"), Y), "Divide numbers of 0..255 by 255"),
        (MULTI_CLASS, (X.astype("int32"), Y), "Received: int32"),
        (MULTI_CLASS, (X > 9, Y), "Received: bool"),
        (MULTI_CLASS, (np.repeat(X, 4, -1), Y), "Expected images"),
        (MULTI_CLASS, (X, with_value(Y, 5, -1)), "Received: -1 for image 5 of train"),
        (MULTI_CLASS, (X, with_value(Y, 5, 7)), "Expected class numbers 0 to 2 for 3 classes. Received: 7 for image 5"),
        (MULTI_CLASS, (X, Y + 0.5), "Received: 0.5 for image 0 of train"),
        (
            MULTI_CLASS,
            (X, with_value(np.eye(3)[Y], 4, 1)),
            "Expected one class for each image. Received: 3 for image 4",
        ),
        (MULTI_CLASS, (X, np.array(list("abcde") * 4)), "Expected class numbers"),
        (MULTI_LABEL, (X, Y), "Expected labels"),
        (MULTI_LABEL, (X, Y[:, None] * [1, 1]), "Received: 2 for image 2 of train"),
        (MULTI_LABEL, (X, with_value(np.eye(3)[Y], (6, 1), np.nan)), "Received: nan for image 6 of train"),
        (BINARY, (X, Y), "Received: 2 for image 2 of train"),
        (BINARY, (X, np.eye(2)[Y % 2]), "Expected 0 or 1 for each image of train"),
        (SEGMENTATION, (X, M * 255), "map them to mask > 0"),
        (SEGMENTATION, (X, M[:, :-1]), "Expected masks"),
        (SEGMENTATION, (X, Y), "Expected masks"),
        (SEGMENTATION, (X, M, np.zeros((20, 2), bool)), "Expected one valid mask or more per image"),
        (SEGMENTATION, (X, M, np.ones((20, 3), bool)), "Expected rater_valid of 2 bool"),
        (SEGMENTATION, (X, M, np.ones((20, 2), int)), "Expected rater_valid of 2 bool"),
        (MULTI_CLASS, (X, Y, Y), "Expected pairs (image, target)"),
        (MULTI_CLASS, (X,), "Expected pairs (image, target)"),
        (MULTI_CLASS, (X[:0], Y[:0]), "Expected at least one image in train"),
        (MULTI_CLASS, (X[:, :4], Y), "Expected splits of one shape"),
        (MULTI_CLASS, (X * 0, Y), "Expected training images that vary"),
    ],
)
@pytest.mark.parametrize("batch", ["arrays", 6])
def test_bad_values_are_refused_in_two_lines(task, train, message, batch, tmp_path):
    good = {MULTI_CLASS: Y, BINARY: Y % 2, MULTI_LABEL: np.eye(3)[Y][:, : np.shape(train[-1])[-1]], SEGMENTATION: M}[
        task
    ]
    good = (F if train[0].dtype == F.dtype else X, good, *([np.ones((20, 2), bool)] if task == SEGMENTATION else []))
    options = dict(task=task, classes=("a", "b", "c") if task == MULTI_CLASS else None)
    with pytest.raises(ValueError) as error:
        if batch == "arrays":
            from_arrays(train, good, good, **options)
        else:
            from_tf_data(*(stream(part, batch) for part in (train, good, good)), cache=tmp_path, **options)
    assert message in str(error.value) and str(error.value).count("\n") <= 1
    assert list(tmp_path.iterdir()) == []


def test_rounding_outside_0_to_1_is_cut_off():
    x = with_value(with_value(F, (0, 0, 0, 0), 1 + 1e-6), (0, 0, 1, 0), -1e-6)
    found = from_arrays((x, Y), (F, Y), (F, Y), task=MULTI_CLASS).train.images
    assert found.max() == 1 and found.min() == 0


def test_images_of_several_shapes_are_refused():
    def generate():
        for side in (6, 6, 7):
            yield np.zeros((side, side, 1), "uint8"), 0

    signature = (tf.TensorSpec((None, None, 1), "uint8"), tf.TensorSpec((), "int64"))
    varying = tf.data.Dataset.from_generator(generate, output_signature=signature)
    with pytest.raises(ValueError, match=r"Expected images of one shape, \(6, 6, 1\), in train. Received: \(7, 7, 1\)"):
        from_tf_data(varying, varying, varying, task=MULTI_CLASS)


GOOD = stream((X, Y), 4)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ((GOOD.repeat(), GOOD, GOOD), {}, "Expected a dataset with an end for train"),
        ((GOOD, (X, Y), GOOD), {}, "Expected a tf.data.Dataset for val. Received: tuple"),
        ((GOOD, GOOD, GOOD.filter(lambda x, y: False)), {}, "Expected at least one image in test"),
        ((GOOD, GOOD.map(lambda x, y: {"x": x}), GOOD), {}, "Expected pairs"),
        ((GOOD, GOOD.map(lambda x, y: x), GOOD), {}, "Expected pairs"),
        ((GOOD,) * 3, {"task": "regression"}, "Expected task one of"),
        ((GOOD,) * 3, {"name": "my data"}, "Expected a name of letters"),
        ((GOOD,) * 3, {"name": "lidc"}, "that no dataset has"),
        ((GOOD,) * 3, {"classes": "abc"}, "Expected classes"),
        ((GOOD,) * 3, {"classes": ("a", "a", "b")}, "Expected classes"),
        ((GOOD,) * 3, {"classes": ("a", "b")}, "Expected class numbers 0 to 1 for 2 classes"),
        ((GOOD,) * 3, {"key": ""}, "Expected key"),
        ((GOOD,) * 3, {"key": 3}, "Expected key"),
    ],
)
def test_bad_arguments_are_refused(parts, options, message):
    with pytest.raises(ValueError) as error:
        from_tf_data(*parts, **({"task": MULTI_CLASS} | options))
    assert message in str(error.value) and str(error.value).count("\n") <= 1


@pytest.mark.parametrize("patients", [(np.arange(20), np.arange(9)), (np.arange(3),) * 3])
def test_patients_of_other_counts_are_refused(patients):
    with pytest.raises(ValueError, match=r"Expected (patients|20 groups)"):
        from_arrays(*three(numbers), task=MULTI_CLASS, patients=patients)


def test_one_hot_targets_keep_a_column_that_never_occurs():
    images = np.random.default_rng(0).random((3, 8, 8, 1)).astype("float32")
    one_hot = np.eye(4, dtype="uint8")[[0, 1, 2]]
    images_of = [images, images / 2, images / 3]
    parts = [(found, one_hot) for found in images_of]
    data = from_arrays(*parts, task="multi-class")
    assert data.num_outputs == 4 and data.card.classes == ("0", "1", "2", "3")
    np.testing.assert_array_equal(data.val.targets, one_hot)
    wider = [*parts[:2], (images_of[2], np.eye(5, dtype="uint8")[[0, 1, 2]])]
    mixed = [*parts[:2], (images_of[2], np.array([0, 1, 2]))]
    for wrong, options in ((wider, {}), (mixed, {}), (parts, {"classes": ("a", "b", "c")})):
        with pytest.raises(ValueError, match="one-hot targets of one width") as error:
            from_arrays(*wrong, task="multi-class", **options)
        assert str(error.value).count("\n") == 1
