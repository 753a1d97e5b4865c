"""Pickles of plain data read as `pickle` reads them; whatever else a pickle can hold is refused, and nothing runs."""

import collections
import io
import itertools
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest

from sbn_tf.datasets.pickle_values import PickledArray, Stored
from sbn_tf.datasets.safe_pickle import SafePickle, load

PROTOCOLS = range(6)
EVENTS = {"pickle.find_class", "import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
EVENTS |= {"subprocess.Popen", "ctypes.dlopen", "ctypes.dlsym", "socket.connect", "code.__new__", "object.__setattr__"}
_watch = {"on": False, "seen": []}


def _hook(event, arguments):
    if _watch["on"] and event in EVENTS:
        _watch["seen"].append((event, arguments))


sys.addaudithook(_hook)  # for the life of the process: Python has no way to take one off


@pytest.fixture
def watched():
    """What the interpreter imports, compiles, runs or calls in the system while a test switches it on."""
    for codec in ("latin-1", "utf-8", "raw-unicode-escape", "ascii"):
        b"x".decode(codec)  # imported at its first use
    _watch["seen"].clear()
    yield _watch
    _watch["on"] = False


def refused(tmp_path, contents, says=None, watched=None):
    """The error of a file, of at most two lines, after which the sentinel has to be absent."""
    path = tmp_path / "file.pickle"
    path.write_bytes(contents)
    if watched is not None:
        watched["on"] = True
    try:
        with pytest.raises(ValueError, match=says) as error:
            load(path)
    finally:
        if watched is not None:
            watched["on"] = False
            assert watched["seen"] == []
    assert str(error.value).count("\n") == 1 and str(path) in str(error.value)
    assert not (tmp_path / "ran").exists()
    return str(error.value)


def read(tmp_path, contents):
    path = tmp_path / "file.pickle"
    path.write_bytes(contents)
    return load(path)


def assert_equal(found, expected):
    assert type(found) is (dict if isinstance(expected, dict) else type(expected))
    if isinstance(expected, np.ndarray | np.generic):
        assert (found.dtype, found.shape) == (expected.dtype.newbyteorder("="), expected.shape)
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


class PythonPickler(pickle._Pickler):
    def memoize(self, obj):
        if id(obj) not in self.memo:  # Python's own fails for an empty array in protocol 5
            super().memoize(obj)


def old_numpy(value, protocol, monkeypatch):
    """`pickle.dumps` with the module names of NumPy 1."""
    which, out = pickle.whichmodule, io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(pickle, "whichmodule", lambda *a: which(*a).replace("numpy._core", "numpy.core"))
        PythonPickler(out, protocol).dump(value)
    return out.getvalue()


# ---- plain data


def plain_values():
    rng = np.random.default_rng(0)
    cube = rng.integers(0, 200, (2, 3, 4)).astype("u1")
    shared = rng.random((3, 2))
    return {
        "none and numbers": [None, True, False, 0, -1, 255, 2**40, -(2**70), 10**60, 0.5, float("inf"), 1 + 2j],
        "text and bytes": ["", "a", "é\n\\u0041 \U0001f600", "x" * 5000, b"", b"\x00\xff", bytes(range(256)) * 20],
        "bytearrays": [bytearray(), bytearray(b"\xff\x00"), bytearray(5000)],
        "containers": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, {"a": 1}, {1: "b", "c": [{}]}],
        "sets": [set(), {1, 2}, frozenset(), frozenset({"a", b"b"})],
        "ordered": collections.OrderedDict([("b", 1), ("a", np.arange(3))]),
        "kinds": [np.arange(3).astype(t) for t in ("b1", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16")],
        "orders": [cube, np.asfortranarray(cube), cube.transpose(1, 0, 2), cube[:, ::2], cube[::-1], cube.T],
        "shapes": [np.zeros(()), np.zeros(0), np.zeros((0, 3)), np.zeros((1, 1, 1, 1))],
        "big endian": [np.arange(5, dtype=">i4"), np.arange(5, dtype=">f8"), np.array(["ab", "c"], ">U2")],
        "texts": [np.array(["abc", "é\U0001f600"]), np.array([b"ab", b"c"])],
        "scalars": [np.float32(0.5), np.int64(-3), np.bool_(True), np.complex64(1j), np.str_("uid"), np.bytes_(b"b")],
        "long scalar": [np.str_("1.2.3" * 200)],
        "large": np.arange(10_000, dtype="f4").reshape(100, 100),
        "shared": [shared, shared, {"again": shared}],
        "numpy keys": {np.int64(3): 1, np.str_("a"): 2},
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", plain_values())
@pytest.mark.parametrize("old", [False, True], ids=["numpy2", "numpy1"])
@pytest.mark.filterwarnings("ignore")  # numpy's, of the names of NumPy 1
def test_plain_data_come_as_pickle_gives_them(tmp_path, monkeypatch, watched, name, protocol, old):
    value = plain_values()[name]
    contents = old_numpy(value, protocol, monkeypatch) if old else pickle.dumps(value, protocol)
    watched["on"] = True
    found = read(tmp_path, contents)
    watched["on"] = False
    assert watched["seen"] == []
    assert_equal(found, pickle.loads(contents))


def test_pickles_of_python_2(tmp_path):
    # Written by hand, as Python 2 writes text, bytes and long numbers: `str` is Latin-1 text here, as with
    # `pickle.load(..., encoding="latin1")`.
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n"
    array += b"(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x80\\n'\ntb"
    protocol_0 = b"(dS'image'\n" + array + b"sS'n'\nL12L\nsS'on'\nI01\ns."
    found = read(tmp_path, protocol_0)
    assert_equal(found, {"image": np.array([0x80, 10], "u1"), "n": 12, "on": True})
    assert_equal(found, pickle.loads(protocol_0, encoding="latin1"))
    protocol_2 = b"\x80\x02}U\x01kT\x02\x00\x00\x00\xe9!s."
    assert read(tmp_path, protocol_2) == {"k": "é!"} == pickle.loads(protocol_2, encoding="latin1")


def test_what_is_shared_or_circular_is_so_again(tmp_path):
    inner = [np.arange(4000)]
    inner.append(inner)
    found = read(tmp_path, pickle.dumps([inner, inner]))
    assert found[0] is found[1] and found[0][1] is found[0]
    np.testing.assert_array_equal(found[0][0], np.arange(4000))


def test_arrays_are_the_caller_s_own(tmp_path):
    for value in (np.zeros(3), np.zeros(4000)):
        found = read(tmp_path, pickle.dumps(value))
        found += 1
        assert found.flags.writeable and found.sum() == len(value)


# ---- a dict, read item by item


def patches(n, side=64):
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (4, side, side)).astype("u1")
    return {
        f"patch_{k}": {"image": rng.random((side, side)), "masks": list(masks + 0), "series_uid": f"1.2.{k // 8}"}
        for k in range(n)
    }


def test_an_item_is_read_when_it_is_asked_for(tmp_path):
    path = tmp_path / "data.pickle"
    values = patches(5)
    path.write_bytes(pickle.dumps(values))
    found = SafePickle(path)
    assert list(found) == list(values) and len(found) == 5 and "patch_3" in found and "patch_5" not in found
    assert_equal(found["patch_3"], values["patch_3"])
    peeked = found.peek("patch_4")
    assert isinstance(peeked["image"], PickledArray)
    assert (peeked["image"].shape, peeked["image"].dtype) == ((64, 64), np.float64)
    assert peeked["series_uid"] == "1.2.0" and [m.shape for m in peeked["masks"]] == [(64, 64)] * 4
    with pytest.raises(KeyError):
        found["patch_5"]
    path.write_bytes(pickle.dumps(list(values)))
    with pytest.raises(ValueError, match=r"Expected a pickled dict .*Received: a list"):
        SafePickle(path)


UNFILLED = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"


@pytest.mark.parametrize("where", [b"%s", b"]%sa", b"}K\x01%ss", b"](%s\x85e", b"}K\x01]](%seas"])
@pytest.mark.parametrize(
    ("part", "says"),
    [
        (UNFILLED, r"array without data\).\nIt is truncated or corrupt"),
        (b"cnumpy\nndarray\n", r"Received: 'numpy.ndarray'.\nNothing in the file was run"),
        (b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R", r"Received: dtype '<f8'.\nNothing in the file was run"),
    ],
    ids=["array", "name", "dtype"],
)
def test_what_stands_for_no_value_is_refused_before_it_is_peeked_at(tmp_path, where, part, says):
    path = tmp_path / "file.pickle"
    path.write_bytes(b"}K\x00" + where % part + b"s.")
    with pytest.raises(ValueError, match=says) as error:
        SafePickle(path)
    assert str(error.value).count("\n") == 1


def test_a_circle_of_containers_is_whole(tmp_path):
    circle = {"a": []}
    circle["a"].append(circle)
    (tmp_path / "file.pickle").write_bytes(pickle.dumps(circle))
    found = SafePickle(tmp_path / "file.pickle")["a"]
    assert found[0]["a"] is found


@pytest.mark.parametrize("how", ["replaced", "written to", "longer"])
def test_a_file_that_changed_since_is_told(tmp_path, how):
    path = tmp_path / "data.pickle"
    path.write_bytes(pickle.dumps({"a": np.zeros(4000), "b": 1}))
    found, status = SafePickle(path), os.stat(path)
    np.testing.assert_array_equal(found["a"], np.zeros(4000))
    other = pickle.dumps({"a": np.ones(4000), "b": 1})
    if how == "replaced":  # of the same size and time
        (tmp_path / "other").write_bytes(other)
        os.utime(tmp_path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(tmp_path / "other", path)
    else:
        path.write_bytes(other + b"." * (how == "longer"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (10**9 if how == "written to" else 0)))
    says = {"replaced": "inode", "written to": "time of change", "longer": "size"}[how]
    with pytest.raises(ValueError, match=rf"as it was when it was opened. Received: another {says}.\nOpen it again"):
        found["a"]


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path, monkeypatch):
    path = tmp_path / "data.pickle"
    path.write_bytes(pickle.dumps({"a": np.zeros(4000)}))
    found, read_stored = SafePickle(path), Stored.read

    def read(self, file):
        with open(path, "ab") as other:
            other.write(b"more")
        return read_stored(self, file)

    monkeypatch.setattr(Stored, "read", read)
    with pytest.raises(ValueError, match=r"as it was when it was opened. Received: another size"):
        found["a"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_memory_does_not_grow_with_the_patches(tmp_path, protocol):
    peaks = []
    for n in (20, 220):
        path = tmp_path / f"{n}.pickle"
        path.write_bytes(pickle.dumps(patches(n), protocol))
        tracemalloc.start()
        total = sum(float(item["image"].sum()) for item in SafePickle(path).values())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total > 0
    parts = (PickledArray(), Stored(0, 0, "bytes"), (64, 64), 2**31, 4096)
    patch = ({"image": 0, "masks": 0, "series_uid": 0}, [0] * 4, "patch_100", "1.2.25")
    place = 5 * sum(map(sys.getsizeof, parts)) + sum(map(sys.getsizeof, patch))  # 1.7 kB, of 49 kB of pixels
    assert (peaks[1] - peaks[0]) / 200 < 2 * place  # twice: tables and lists grow ahead, memory is given in steps


# ---- what is no plain data: one refusal for each name


def call(module, name, arguments=b")", protocol=0):
    """A pickle that calls a function: by GLOBAL, or by STACK_GLOBAL from protocol 4 on."""
    if protocol < 4:
        return b"c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + b"R"
    parts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + parts + b"\x93" + arguments + b"R"


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def dtype(name, *state, order="<", flags=b"K\x00"):
    """A dtype as NumPy pickles it, or with the state that is given."""
    made = b"cnumpy\ndtype\n" + text(name) + b"\x89\x88\x87R"
    plain = b"(K\x03" + text(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff" + flags + b"tb"
    return made + (b"".join(state) if state else plain)


def array(shape=b"K\x02\x85", kind=None, data=b"C\x02\x00\x01", fortran=b"\x89"):
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return made + b"(K\x01" + shape + (kind or dtype("u1", order="|")) + fortran + data + b"tb"


def test_the_hand_written_forms_are_right(tmp_path):
    for contents in (array(), array(kind=dtype("i1", order="|"))):
        np.testing.assert_array_equal(read(tmp_path, b"\x80\x02" + contents + b"."), [0, 1])
        np.testing.assert_array_equal(pickle.loads(b"\x80\x02" + contents + b"."), [0, 1])


NAMES = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "setattr"),
    ("builtins", "__import__"),
    ("builtins", "open"),
    ("builtins", "object"),
    ("builtins", "type"),
    ("builtins", "dict"),
    ("__builtin__", "eval"),
    ("operator", "attrgetter"),
    ("functools", "partial"),
    ("collections", "defaultdict"),
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("_codecs", "decode"),
    ("_codecs", "lookup"),
    ("codecs", "encode"),
    ("importlib", "import_module"),
    ("pickle", "loads"),
    ("numpy", "load"),
    ("numpy", "memmap"),
    ("numpy", "fromfile"),
    ("numpy", "matrix"),
    ("numpy", "core.multiarray._reconstruct"),
    ("numpy", "ndarray.__setstate__"),
    ("numpy", "dtype.__setstate__"),
    ("numpy", "_core.numeric._frombuffer"),
    ("numpy.core", "multiarray._reconstruct"),
    ("numpy.core.multiarray", "_reconstruct.__call__"),
    ("numpy.core.multiarray", "fromfile"),
    ("numpy._core.multiarray", "_reconstruct.__globals__"),
    ("numpy.f2py", "compile"),
    ("numpy.f2py.crackfortran", "getlincoef"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy.ctypeslib", "load_library"),
    ("ctypes", "CDLL"),
    ("numpy.lib.npyio", "load"),
    ("builtins", "set.__init__"),
    ("builtins", "Set"),
    ("Builtins", "set"),
    ("sbn_tf.datasets.safe_pickle", "load"),
    ("", ""),
]


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize(("module", "name"), NAMES)
def test_any_other_name_is_refused_and_told(tmp_path, watched, module, name, protocol):
    command = text(f"touch {tmp_path / 'ran'}") + b"\x85"
    message = refused(tmp_path, call(module, name, command, protocol) + b".", "alone in", watched)
    assert f"Received: '{module}.{name}'" in message and "Nothing in the file was run" in message


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_object_that_runs_a_command_is_refused_and_the_command_does_not_run(tmp_path, watched, protocol):
    class Harm:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    contents = pickle.dumps({"patch": {"image": np.zeros(2), "harm": Harm()}}, protocol)
    pickle.loads(contents)
    assert (tmp_path / "ran").exists()  # it does run elsewhere
    (tmp_path / "ran").unlink()
    refused(tmp_path, contents, "(posix|nt).system", watched)


class Own:
    def __init__(self):
        self.value = 1

    def __setstate__(self, state):
        raise AssertionError("a method of the file's class ran")


OBJECTS = {
    "class": Own,
    "object": Own(),
    "built-in function": len,
    "function": pytest.raises,
    "numpy.load": np.load,
    "object array": np.array([{}, None]),
    "structured array": np.zeros(2, [("a", "f4")]),
    "date": np.datetime64("2020-01-01"),
    "masked array": np.ma.zeros(3),
    "long double": np.arange(3, dtype="longdouble"),
    "dtype": np.dtype("f4"),
    "defaultdict": collections.defaultdict(list),
    "Counter": collections.Counter("a"),
    "slice": slice(3),
    "range": range(3),
    "exception": Exception("a"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_of_any_class_are_refused(tmp_path, watched, name, protocol):
    refused(tmp_path, pickle.dumps([OBJECTS[name]], protocol), "Expected NumPy arrays, numbers", watched)


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
NDARRAY = b"cnumpy\nndarray\n"
OBJECT_CLEARED = dtype("O", b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
OVERLAP = text("|") + b"N" + text("a") + text("b") + b"\x86}" + text("a") + b"K\x08K\x00\x86s"
FORGED = {
    "a call of what a call gave": call("numpy.core.multiarray", "_reconstruct", NDARRAY + b"K\x00\x85C\x01b\x87")
    + b")R",
    "a call of an array's result as a name": call("collections", "OrderedDict") + text("x") + b"\x85R",
    "a call within the arguments": RECONSTRUCT + call("os", "system", text("true") + b"\x85") + b"\x85R",
    "a name as a value": NDARRAY,
    "a name in a list": b"]" + NDARRAY + b"a",
    "a dtype as a value": dtype("f8"),
    "a name as a key": b"}" + NDARRAY + b"K\x01s",
    "a dict as a key": b"}}K\x01s",
    "a nested tuple as a key": b"})\x85\x85K\x01s",
    "an array as a key": b"}" + array() + b"K\x01s",
    "a whole number of 65 bits as a key": b"}\x8a\x09" + bytes(8) + b"\x01K\x01s",
    "a negative number of 65 bits as a key": b"}\x8a\x09" + bytes(7) + b"\x7f\xffK\x01s",
    "a number of 5,000 bytes as a key": b"}\x8b" + struct.pack("<i", 5000) + b"\x01" * 5000 + b"K\x01s",
    "a long number in a key": b"}\x8a\x09" + bytes(8) + b"\x01K\x01\x86K\x01s",
    "a long number in a set": b"\x8f(\x8a\x09" + bytes(8) + b"\x01\x90",
    "a long number in a frozenset": b"(\x8a\x09" + bytes(8) + b"\x01\x91",
    "a complex number as a key": b"}"
    + call("builtins", "complex", b"G" + bytes(8) + b"G" + bytes(8) + b"\x86")
    + b"K\x01s",
    "a negative memo index": b"]p-1\n0g-1\n",
    "a key twice": b"}" + text("a") + b"K\x01s" + text("a") + b"K\x02s",
    "another class than ndarray": RECONSTRUCT + b"cnumpy\ndtype\nK\x00\x85C\x01b\x87R",
    "another shape at first": RECONSTRUCT + NDARRAY + b"K\x05\x85C\x01b\x87R",
    "ndarray called": NDARRAY + b"K\x05\x85\x85R",
    "encode to another codec": call("_codecs", "encode", text("x") + text("rot13") + b"\x86"),
    "encode with a handler": call("_codecs", "encode", text("x") + text("latin1") + text("strict") + b"\x87"),
    "bytes of a number": call("builtins", "bytes", b"J\xff\xff\xff\x7f\x85"),
    "bytearray of a number": call("builtins", "bytearray", b"J\xff\xff\xff\x7f\x85"),
    "set of a text": call("builtins", "set", text("abc") + b"\x85"),
    "scalar of objects": call("numpy.core.multiarray", "scalar", OBJECT_CLEARED + b"C\x08" + bytes(8) + b"\x86"),
    "object dtype": array(kind=dtype("O"), data=b"C\x10" + bytes(16)),
    "object dtype, flags cleared": array(kind=OBJECT_CLEARED, data=b"C\x10" + bytes(16)),
    "object dtype, longer name": array(kind=dtype("O8"), data=b"C\x10" + bytes(16)),
    "void dtype": array(kind=dtype("V1")),
    "dtype of a list of fields": b"cnumpy\ndtype\n]\x89\x88\x87R",
    "dtype of a name": b"cnumpy\ndtype\n" + NDARRAY + b"\x85R",
    "dtype by comma": array(kind=dtype("u1,O")),
    "dtype with a shape": array(kind=dtype("2u1")),
    "dtype with flags": array(kind=dtype("u1", order="|", flags=b"K\x3f")),
    "dtype with a flag that is True": array(kind=dtype("u1", order="|", flags=b"\x88")),
    "dtype with overlapping fields": array(kind=dtype("u1", b"(K\x03" + OVERLAP + b"K\x08K\x01K\x00tb")),
    "dtype with another size": array(kind=dtype("u1", b"(K\x03" + text("|") + b"NNNK\x08K\x01K\x00tb")),
    "dtype with metadata": array(
        kind=dtype("u1", b"(K\x04" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00}tb")
    ),
    "dtype built twice": array(kind=dtype("u1", order="|") + b"(K\x03" + text("|") + b"NNNK\x01K\x01K\x00tb"),
    "array shorter than its shape": array(shape=b"K\x03\x85"),
    "array longer than its shape": array(shape=b"K\x01\x85"),
    "array of a negative length": array(shape=b"J\xfe\xff\xff\xff\x85"),
    "array of two negative lengths": array(shape=b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86"),
    "array of a giant shape": array(shape=b"\x8a\x09" + bytes(8) + b"\x01\x85"),
    "array of no elements and a giant shape": array(shape=b"K\x00\x8a\x05" + bytes(4) + b"\x01\x86", data=b"C\x00"),
    "array whose size wraps round": array(shape=b"\x8a\x05\x00\x00\x00\x00\x01\x8a\x05\x00\x00\x00\x00\x01\x86"),
    "array of a fractional length": array(shape=b"G" + struct.pack(">d", 2.0) + b"\x85"),
    "array of a boolean length": array(shape=b"K\x02\x88\x86"),
    "array of 40 axes": array(shape=b"(" + b"K\x01" * 39 + b"K\x02t"),
    "array of a list": array(data=b"]K\x01aK\x02a"),
    "array of wide text": array(data=text("\u0100a")),
    "array of no bool": array(kind=dtype("b1", order="|"), data=b"C\x02\x00\x02"),
    "array of no text": array(shape=b"K\x01\x85", kind=dtype("U1", b""), data=b"C\x04\xff\xff\xff\xff"),
    "array without a state": RECONSTRUCT + NDARRAY + b"K\x00\x85C\x01b\x87R",
    "array built twice": array() + b"(K\x01K\x02\x85" + dtype("u1", order="|") + b"\x89C\x02\x00\x01tb",
    "array with a strange order": array(fortran=text("F")),
    "array of a dtype of text": array(kind=text("u1")),
    "frombuffer with axes that repeat": call(
        "numpy.core.numeric",
        "_frombuffer",
        b"(C\x02\x00\x01" + dtype("u1", order="|") + b"K\x01K\x02\x86" + text("K") + b"K\x01K\x01\x86t",
    ),
    "frombuffer of a name": call(
        "numpy.core.numeric", "_frombuffer", b"(" + NDARRAY + dtype("u1", order="|") + b"K\x02\x85" + text("C") + b"t"
    ),
    "a state for a name": RECONSTRUCT + b"}" + text("a") + b"K\x01sb0N",
    "a slot state for a name": NDARRAY + b"N}" + text("name") + text("os.system") + b"s\x86b0N",
    "a state for a dict": b"}}" + text("__class__") + b"K\x01sb",
    "a state for a list": b"]N}" + text("append") + b"K\x01s\x86b",
    "INST": b"(I1\niposix\nsystem\n",
    "INST of an allowed name": b"(ibuiltins\nset\n",
    "OBJ": b"(cbuiltins\nset\no",
    "NEWOBJ": b"cbuiltins\nset\n)\x81",
    "NEWOBJ of ndarray": NDARRAY + b"K\x02\x85\x85\x81",
    "NEWOBJ_EX": NDARRAY + b")}\x92",
    "a persistent id": b"Pabc\n",
    "a binary persistent id": text("abc") + b"Q",
    "an extension": b"\x82\x01",
    "an extension of two bytes": b"\x83\x01\x00",
    "an extension of four bytes": b"\x84\x01\x00\x00\x00",
    "a buffer out of band": b"\x97",
    "a read-only buffer out of band": b"C\x01a\x98",
    "a name by numbers": b"K\x01K\x02\x93",
    "an item for a list": b"]K\x01K\x02s",
    "items for a number": b"K\x01(K\x01K\x02u",
    "append to a dict": b"}K\x01a",
    "append to a name": NDARRAY + b"K\x01a",
    "add to a list": b"](K\x01\x90",
    "add a list to a set": b"\x8f(]\x90",
    "an odd number of items": b"}(K\x01u",
    "no mark": b"K\x01t",
    "an empty stack": b"",
    "two values left": b"K\x01K\x02",
    "a mark left": b"(K\x01",
    "a memo index that is not there": b"h\x05",
    "a huge memo index": b"K\x01p99999999999999999999\n0g99999999999999999998\n",
    "a memo index that is no number": b"K\x01pabc\n",
    "an unknown operation": b"\xff",
    "an unknown protocol's": b"\x80\xff\xfe",
    "a giant length": b"\x8e" + b"\xff" * 7 + b"\x7f" + b"abc",
    "a giant text": b"\x8d" + b"\xff" * 8 + b"abc",
    "a giant bytearray": b"\x96" + b"\xff" * 7 + b"\x7f" + b"abc",
    "a negative length": b"T\xff\xff\xff\xffabc",
    "a negative length of a number": b"\x8b\xff\xff\xff\xffabc",
    "a number of many digits": b"L" + b"9" * 10_000 + b"L\n",
    "text that is no utf-8": b"X\x02\x00\x00\x00\xff\xfe",
    "text without quotes": b"Sabc\n",
    "lists in lists": b"(l" * 1 + b"]" * 100_000 + b"a" * 100_000,
    "tuples in tuples": b")" + b"\x85" * 100_000,
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("prefix", [b"", b"\x80\x04"], ids=["bare", "protocol4"])
def test_forged_pickles_are_refused(tmp_path, watched, name, prefix):
    refused(tmp_path, prefix + FORGED[name] + b".", "Expected", watched)


def test_a_forged_frame_and_what_follows_the_end(tmp_path, watched):
    whole = pickle.dumps({"a": 1}, 4)
    refused(tmp_path, whole + pickle.dumps(2), "something follows its end", watched)
    assert read(tmp_path, whole.replace(whole[3:11], b"\xff" * 8)) == {"a": 1}  # frames say nothing of the values


def test_a_memo_index_can_be_any_number_and_costs_nothing(tmp_path):
    assert read(tmp_path, b"]p4000000000\n0g4000000000\n.") == []


KEYS = {  # of how the container begins, how it ends, and what follows a key
    "dict": (b"}(", b"u", b"N"),
    "set": (b"\x8f(", b"\x90", b""),
    "frozenset": (b"(", b"\x91", b""),
}


@pytest.mark.parametrize("kind", KEYS)
def test_tuples_of_one_hash_do_not_take_quadratic_time(tmp_path, kind):
    """-1 and -2 have the same hash, and so have all 2**13 tuples of thirteen of them."""
    tuples = list(itertools.product((-1, -2), repeat=13))
    assert len(set(map(hash, tuples))) == 1
    first, last, value = KEYS[kind]
    number = {n: b"J" + n.to_bytes(4, "little", signed=True) for n in (-1, -2)}
    contents = b"".join(b"(" + b"".join(number[n] for n in key) + b"t" + value for key in tuples)
    start = time.process_time()
    refused(tmp_path, first + contents + last + b".", "a key that is no number and no short text")
    assert time.process_time() - start < 5  # 8,192 * 8,192 / 2 comparisons take longer


@pytest.mark.parametrize("kind", ["dict", "set", "frozenset", "memo"])
def test_numbers_of_one_hash_do_not_take_quadratic_time(tmp_path, kind):
    prime = sys.hash_info.modulus
    numbers = [prime * k for k in range(1, 20_001)]
    assert set(map(hash, numbers)) == {0}
    if kind == "memo":
        contents = b"]0" + b"".join(b"g%d\n" % n for n in numbers) + b"."
    else:  # by hand: Python takes that time to make such a set
        first, last, value = KEYS[kind]
        contents = first + b"".join(b"\x8a\x0a" + n.to_bytes(10, "little") + value for n in numbers) + last + b"."
    start = time.process_time()
    refused(tmp_path, contents, "beyond 64 bits|memo index out of range")
    assert time.process_time() - start < 2  # 20,000 * 20,000 / 2 comparisons take longer


def test_numbers_of_64_bits_are_keys(tmp_path):
    value = {-(2**63): 1, 2**64 - 1: 2, "a": {2**62}}
    assert read(tmp_path, pickle.dumps(value)) == value


# ---- memory


def peak_of(path, says):
    """Bytes that are held at most until a file is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=says) as error:
            load(path)
        assert str(error.value).count("\n") == 1
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_arrays_that_share_their_bytes_are_no_more_than_the_file(tmp_path):
    """A hundred arrays over the same 100,000 memoised bytes: 10 MB in a file of 0.1 MB."""
    shared = b"B" + struct.pack("<I", 100_000) + bytes(100_000) + b"q\x000"
    one = array(b"J" + struct.pack("<i", 100_000) + b"\x85", dtype("u1", order="|"), b"h\x00")
    path = tmp_path / "a.pickle"
    path.write_bytes(shared + b"]" + one + b"a.")
    assert load(path)[0].tolist() == [0] * 100_000
    path.write_bytes(shared + b"]" + (one + b"a") * 100 + b".")
    assert peak_of(path, "its arrays have more bytes than it") < 1e6


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"\x8b\xff\xff\xff\x7f", "a whole number of 2147483647 bytes"),  # LONG4
        (b"I", "within a line"),
        (b"L1", "within a line"),
        (b"F", "within a line"),
        (b"cnumpy\n", "within a line"),
        (b"g", "within a line"),
    ],
)
def test_what_the_file_says_is_long_is_not_read(tmp_path, start, says):
    path = tmp_path / "a.pickle"
    path.write_bytes(start)
    os.truncate(path, 2**32)  # sparse
    assert peak_of(path, says) < 1e6


@pytest.mark.parametrize("code", [b"S", b"V"])
def test_a_line_is_sought_piece_by_piece(tmp_path, code):
    path = tmp_path / "a.pickle"
    path.write_bytes(code)
    os.truncate(path, 2**26)
    assert peak_of(path, "within a line") < 5e6


def test_small_values_are_bounded(tmp_path, monkeypatch):
    """A byte of the file, EMPTY_SET, makes 216 in memory; a call of three copies a list of any length."""
    monkeypatch.setattr("sbn_tf.datasets.pickle_machine.MAX_BYTES", 2_000_000)
    path = tmp_path / "a.pickle"
    path.write_bytes(b"](" + b"\x8f" * 100_000 + b"e.")
    assert peak_of(path, "more than 2,000,000 bytes of small values") < 4e6
    monkeypatch.setattr("sbn_tf.datasets.pickle_machine.MAX_CALLS_BYTES", 2_000_000)
    copied = b"(" + b"".join(b"M" + struct.pack("<H", k) for k in range(1000)) + b"l\x85q\x01"
    path.write_bytes(b"cbuiltins\nset\nq\x00" + copied + b"](" + b"h\x00h\x01R" * 1000 + b"e.")
    assert peak_of(path, "calls that make more than 2,000,000 bytes") < 4e6


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_no_regular_file(tmp_path, make):
    make(tmp_path / "a.pickle")
    with pytest.raises(ValueError, match=r"Expected a regular file. Received: .*a.pickle, a folder, a pipe or a dev"):
        SafePickle(tmp_path / "a.pickle")


# ---- broken files


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_cut_short_anywhere_is_refused(tmp_path, watched, protocol):
    whole = pickle.dumps(patches(3, side=40), protocol)
    for part in range(20):
        refused(tmp_path, whole[: len(whole) * part // 20], "truncated or corrupt", watched)
    refused(tmp_path, whole[:-1], "truncated or corrupt")


def mutants(whole, count, seed):
    """Files that differ from a whole one by a bit, a byte, or a piece that is gone, doubled or moved."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 4))):
            start = rng.randrange(len(changed))
            kind = rng.randrange(4)
            if kind == 0:
                changed[start] ^= 1 << rng.randrange(8)
            elif kind == 1:
                changed[start] = rng.randrange(256)
            elif kind == 2:
                del changed[start : start + rng.randrange(1, 9)]
            else:
                changed[start:start] = changed[(k := rng.randrange(len(changed))) : k + rng.randrange(1, 30)]
        yield bytes(changed)


def is_plain(value, depth=0):
    if isinstance(value, dict):
        return all(is_plain(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple | set | frozenset):
        return all(is_plain(part) for part in value)
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biufcSU" and value.tobytes() is not None
    return type(value) in (str, bytes, bytearray, int, float, complex, bool, type(None))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_flipped_bits_give_an_error_or_plain_data_and_run_nothing(tmp_path, watched, protocol):
    value = {"k": {"image": np.arange(6.0).reshape(2, 3), "masks": [np.eye(2, dtype="u1")] * 2, "series_uid": "1.2"}}
    value["s"] = [np.float32(1), np.array(["ab"]), {1, 2}, bytearray(b"a"), b"b", (1, 2**40, 1j), "é"]
    whole, path, outcomes = pickle.dumps(value, protocol), tmp_path / "file.pickle", collections.Counter()
    for changed in mutants(whole, 800, seed=protocol):
        path.write_bytes(changed)
        watched["on"] = True
        try:
            found = load(path)
        except ValueError as error:
            watched["on"] = False
            assert str(error).count("\n") == 1
            outcomes["refused"] += 1
        else:
            watched["on"] = False
            assert is_plain(found)
            outcomes["plain"] += 1
        assert watched["seen"] == []
    assert len(outcomes) == 2 and min(outcomes.values()) > 20  # both happen


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pickle")
