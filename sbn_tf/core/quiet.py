"""Keep TensorFlow's start-up lines off the console: `import sbn_tf`, before Keras, is enough.

TensorFlow 2.21 writes its first lines to file descriptor 2 before it reads TF_CPP_MIN_LOG_LEVEL, so no variable
silences them. While TensorFlow is first imported, what it writes there therefore passes through `grep`, which drops the
notes and lets every other line through: also those of a crash, since `grep` outlives it.
"""

import contextlib
import importlib.abc
import importlib.util
import os
import shutil
import subprocess
import sys

__all__ = ["quiet_tensorflow"]

# A note or a warning in either format of the log, the header before them, and the lines that continue one.
_NOTES = (
    r"^[IW][0-9]{4} |^[0-9]{4}-[0-9]{2}-[0-9]{2} .*: [IW] |absl::InitializeLog\(\)"
    r"|^To enable the following instructions|Unable to register cu[A-Z]+ (factory|plugin)"
)


def quiet_tensorflow() -> None:
    """Have TensorFlow start without its notes, whoever imports it first. Nothing is imported now.

    TF_CPP_MIN_LOG_LEVEL, which silences later notes, becomes 3 unless it is set: at 2 a machine without a GPU
    reports that cuInit failed. Errors of TensorFlow are Python exceptions, fatal ones are written at 3 too.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if "tensorflow" not in sys.modules and not any(isinstance(one, _FirstImport) for one in sys.meta_path):
        sys.meta_path.insert(0, _FirstImport())


class _FirstImport(importlib.abc.MetaPathFinder):
    """Finds TensorFlow as it would be found anyway, and filters standard error while it is loaded."""

    searching = False

    def find_spec(self, fullname, path=None, target=None):
        """Where TensorFlow is, with a loader that is quiet; None for any other module."""
        if fullname != "tensorflow" or self.searching:
            return None
        self.searching = True  # the search below asks this finder too
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_quietly(module):
                with _without_notes():
                    load(module)

            spec.loader.exec_module = load_quietly
        return spec


@contextlib.contextmanager
def _without_notes():
    """Filter what is written to file descriptor 2."""
    grep = shutil.which("grep")
    try:
        real = os.dup(2)
    except OSError:  # a process without standard error
        real = None
    if grep is None or real is None:
        yield
        return
    command = [grep, "--line-buffered", "-a", "-v", "-E", _NOTES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=real, env={**os.environ, "LC_ALL": "C"}) as filtered:
        os.dup2(filtered.stdin.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
            os.close(real)
