"""Measures time and memory of a block of code."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import keras

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "torch":
    import torch

__all__ = ["Used", "measured"]


@dataclass
class Used:
    """What a block took; filled in when it ends.

    Attributes:
        seconds: wall time.
        peak_bytes: largest memory within the block; None on a system that does not report it.
        start_bytes: memory in use when the block began; None on a system that does not report it.
        note: what `peak_bytes` is.
    """

    seconds: float | None = None
    peak_bytes: int | None = None
    start_bytes: int | None = None
    note: str = ""


# A system that does not report its memory raises one of these.
_UNKNOWN: tuple = (OSError, RuntimeError, ValueError, KeyError, StopIteration)
if BACKEND == "tensorflow":
    _UNKNOWN += (tf.errors.OpError,)

# A system keeps one largest value since its last reset. A block that resets it would hide the peak of the blocks around
# it, so every open block notes the peak first.
_open_blocks: list[Used] = []


@contextlib.contextmanager
def measured() -> Iterator[Used]:
    """Measure a block: `with measured() as used: ...`, then `used.seconds` and `used.peak_bytes`.

    Blocks may be nested. A block that ends by an exception is measured up to there. Measuring itself never fails.
    """
    used = Used()
    _note_peak()
    used.note = _reset_peak()
    used.start_bytes = _bytes_in_use()
    _open_blocks.append(used)
    start = time.perf_counter()
    try:
        yield used
    finally:
        used.seconds = time.perf_counter() - start
        _note_peak()
        _open_blocks.remove(used)


def _note_peak():
    """Update every open block by the largest memory since the last reset."""
    peak = _peak_bytes() if _open_blocks else None
    for used in _open_blocks:
        if peak is not None:
            used.peak_bytes = max(peak, used.peak_bytes or 0)


def _gpus():
    """Devices that report their largest memory since a reset; JAX's report none, and the process is measured."""
    try:
        if BACKEND == "torch":
            return list(range(torch.cuda.device_count()))
        found = tf.config.list_logical_devices("GPU") if BACKEND == "tensorflow" else []
        return [f"GPU:{number}" for number, _ in enumerate(found)]
    except _UNKNOWN:
        return []


def _reset_peak() -> str:
    """Start a new peak where the system allows it, and say what the peak then is."""
    try:
        if gpus := _gpus():
            for gpu in gpus:
                if BACKEND == "torch":
                    torch.cuda.reset_peak_memory_stats(gpu)
                else:
                    tf.config.experimental.reset_memory_stats(gpu)
            return "largest memory allocated on the GPUs within the block"
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return "largest resident memory of the process within the block"
    except _UNKNOWN:
        return "largest memory of the process since it began: this system keeps no other"


def _bytes_in_use() -> int | None:
    try:
        return _memory("current", "VmRSS")
    except _UNKNOWN:
        return None


def _peak_bytes() -> int | None:
    """Largest memory since the last `_reset_peak`."""
    try:
        return _memory("peak", "VmHWM")
    except _UNKNOWN:
        return _largest_ever()


def _memory(on_gpu: str, on_linux: str) -> int:
    """Bytes under a name of the backend's GPU statistics, or of the process's status where there is no GPU."""
    if gpus := _gpus():
        if BACKEND == "torch":
            return sum(torch.cuda.memory_stats(gpu).get(f"allocated_bytes.all.{on_gpu}", 0) for gpu in gpus)
        return sum(tf.config.experimental.get_memory_info(gpu)[on_gpu] for gpu in gpus)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(on_linux))


def _largest_ever() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest if sys.platform == "darwin" else largest * 1024)
