"""Arrays on disk: indexed as numpy indexes, checked as they are read, and files that grow as numpy reads them."""

import copy
import os
import pickle
import signal
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sbn_tf.datasets.arrays import DiskArray, NpyWriter, row_crc32, row_sums, stored_rows


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (40, 5, 6, 3)).astype("uint8")


@pytest.fixture
def on_disk(tmp_path, images):
    np.save(tmp_path / "images.npy", images)
    return DiskArray(tmp_path / "images.npy", None, row_crc32(images), row_sums(images))


INDICES = [
    3,
    -1,
    np.int64(7),
    slice(None),
    slice(5, 9),
    slice(30, 3, -4),
    [5, 2, 2, 39],
    np.array([], int),
    np.arange(40) % 3 == 0,
    (4, 2),
    (slice(2, 5), slice(None), 1),
    ([7, 1], ..., 0),
    np.array([[3, 1], [0, 2]]),
    (np.array([[3, 1], [0, 2]]), 4),
    (..., 0),
    Ellipsis,
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_numpy_s(on_disk, images, index):
    found = on_disk[index]
    assert isinstance(found, np.ndarray | np.uint8) and found.dtype == images.dtype
    np.testing.assert_array_equal(found, images[index])


@pytest.mark.parametrize("rows", [[3, 1, 2], slice(10, 30, 3), np.arange(40) % 7 == 1], ids=str)
def test_selected_rows_are_numpy_s(on_disk, images, rows):
    chosen, expected = on_disk.select(rows), images[rows]
    assert chosen.shape == expected.shape and len(chosen) == len(expected) and chosen.nbytes == expected.nbytes
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_array_equal(chosen.select([1, 0])[0], expected[1])
    np.testing.assert_array_equal(np.stack(list(chosen)), expected)
    np.testing.assert_array_equal(np.concatenate(list(chosen.pieces(num_bytes=200))), expected)
    np.testing.assert_array_equal(chosen.crc32(), [zlib.crc32(image.tobytes()) for image in expected])
    by_hand = np.stack([expected.sum((1, 2), dtype=int), (expected.astype(int) ** 2).sum((1, 2))], -1)
    np.testing.assert_array_equal(chosen.sums(), by_hand)
    unknown = DiskArray(on_disk.path).select(rows)  # worked out where they are not known
    np.testing.assert_array_equal(unknown.crc32(), chosen.crc32())
    np.testing.assert_array_equal(unknown.sums(), by_hand)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "pickle"])
def test_copies_name_the_file(on_disk, images, copied):
    chosen = on_disk.select([4, 5])
    chosen[:]  # with an open file
    assert len(pickle.dumps(chosen)) < 3000
    np.testing.assert_array_equal(copied(chosen), images[4:6])


@pytest.mark.parametrize("dtype", ["float32", "int64", "<U8", "bool"])
def test_any_plain_dtype(tmp_path, dtype):
    values = np.arange(24).reshape(12, 2).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    np.testing.assert_array_equal(DiskArray(tmp_path / "a.npy", None, row_crc32(values))[[3, 1]], values[[3, 1]])


def test_a_flipped_bit_is_an_error_in_its_row_alone(on_disk, images):
    data = bytearray(on_disk.path.read_bytes())
    data[-1] ^= 1
    on_disk.path.write_bytes(data)
    np.testing.assert_array_equal(on_disk[:39], images[:39])
    with pytest.raises(ValueError, match=r"as it was written. Received: row 39 is not what was written.\nDelete"):
        on_disk[[0, 39]]


@pytest.mark.parametrize("kept", [0, 5, 60, 500])
def test_a_file_cut_short_is_an_error(tmp_path, on_disk, kept):
    os.truncate(on_disk.path, kept)
    with pytest.raises(ValueError, match="it ends before row 39"):  # under an array that is open already
        on_disk[39]
    with pytest.raises(ValueError, match=r"(?s)whole \.npy file .*truncated, corrupt or missing"):
        DiskArray(on_disk.path)


@pytest.mark.parametrize(
    "array", [np.array([{}], object), np.asfortranarray(np.ones((3, 2))), np.float64(3)], ids=["object", "order", "0-d"]
)
def test_other_npy_files_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match="plain numbers in C order"):
        DiskArray(tmp_path / "a.npy")


def test_a_file_that_is_gone_is_an_error_of_two_lines(on_disk):
    on_disk.path.unlink()
    with pytest.raises(ValueError, match=r"Received: it is gone\.\nDelete the folder"):
        on_disk[0]


def test_forked_processes_and_threads_read_at_once(on_disk, images):
    """A fork shares its parent's open file: with one position in it for all, each would read another's rows."""
    unchecked = DiskArray(on_disk.path)
    unchecked[0]  # open before the fork

    def right(seed):
        indices = np.random.default_rng(seed).integers(0, 40, 2000)
        return all((unchecked[k] == images[k]).all() for k in indices)

    children = []
    for seed in range(3):
        child = os.fork()
        if not child:
            signal.alarm(60)  # rather dead than waited for
            os._exit(0 if right(seed) else 1)
        children.append(child)
    assert right(3)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(4)))


def test_rows_out_of_range_are_refused(on_disk):
    with pytest.raises(IndexError):
        on_disk[40]
    with pytest.raises(IndexError, match="rows of 0 to 39"):
        DiskArray(on_disk.path, np.array([40]))


def test_a_growing_file_is_numpy_s_once_finished(tmp_path, images):
    path = tmp_path / "grown.npy"
    writer = NpyWriter(path, images.shape[1:], "uint8")
    writer.append(images[:7])
    writer.append(images[7:20])
    writer.close()
    np.testing.assert_array_equal(stored_rows(path, images.shape[1:], "uint8"), images[:20])
    writer = NpyWriter(path, images.shape[1:], "uint8", rows=15)  # what is behind is cut off
    writer.append(images[15:])
    writer.close(finish=True)
    np.testing.assert_array_equal(np.load(path), images)


def test_stored_rows_of_another_array_do_not_count(tmp_path, images):
    writer = NpyWriter(tmp_path / "a.npy", (5, 6, 3), "uint8")
    writer.append(images)
    writer.close()
    assert len(stored_rows(tmp_path / "a.npy", (5, 6, 3), "int8")) == 0
    assert len(stored_rows(tmp_path / "a.npy", (6, 5, 3), "uint8")) == 0
    assert len(stored_rows(tmp_path / "absent.npy", (6, 5, 3), "uint8")) == 0


def test_rows_of_another_shape_or_dtype_are_not_written(tmp_path, images):
    writer = NpyWriter(tmp_path / "a.npy", (5, 6, 3), "uint8")
    for wrong in (images[:, :4], images.astype("float32")):
        with pytest.raises(ValueError, match=r"Expected rows \(5, 6, 3\) uint8"):
            writer.append(wrong)
    writer.close()


def test_sums_of_float_images():
    images = np.random.default_rng(0).random((3, 4, 5, 2)).astype("float32")
    by_hand = np.stack([images.sum((1, 2), dtype="float64"), (images.astype("float64") ** 2).sum((1, 2))], -1)
    np.testing.assert_allclose(row_sums(images), by_hand, rtol=1e-7)
