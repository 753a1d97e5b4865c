"""The command line: what it prints, which exit code it has, and that TensorFlow starts without a word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sbn_tf.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
NOISE = ("oneDNN", "absl::InitializeLog", "cudart_stub", "cpu_feature_guard", "cuInit")


def in_a_process(*words, code=None):
    """Run the command line, or a line of Python, as a user does: with no variable that silences TensorFlow."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TF_CPP", "PYTEST"))}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "sbn_tf", *words] if code is None else [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "words", [[], ["grid"], *(name.split() for name in COMMANDS)], ids=lambda words: " ".join(words) or "all"
)
def test_help_says_what_a_command_takes_with_an_example(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and " ".join(["sbn-tf", *words]) in text.split("\nexample")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["chek"], "invalid choice: 'chek'"),
        (["check"], "required: dataset"),
        (["check", "phantom_nodule", "--size", "x"], "--size: invalid int value: 'x'"),
        (["compare", "phantom_nodule", "--keep", "first"], "--keep: invalid choice: 'first'"),
        (["grid"], "required: COMMAND"),
        (["grid", "stat"], "invalid choice: 'stat'"),
    ],
)
def test_wrong_usage_is_explained_in_two_lines_with_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") <= 2


def test_check_prints_the_report_and_ends_with_1_where_there_is_a_problem(capsys, monkeypatch):
    assert main(["check", "phantom_nodule", "--size", "16"]) == 0
    assert "No problem found." in capsys.readouterr().out
    assert main(["check", "no_such_set"]) == 2
    error = capsys.readouterr().err
    assert "Received: name='no_such_set'" in error and error.count("\n") <= 2
    from sbn_tf import datasets

    data = datasets.load("phantom_nodule", size=16, limit=8)  # so few that no number should rest on them
    monkeypatch.setattr(datasets, "load", lambda *_, **__: data)
    assert main(["check", "phantom_nodule"]) == 1
    assert "Problems" in capsys.readouterr().out


def test_grid_status_needs_no_tensorflow_and_a_wrong_plan_ends_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["grid", "status", str(ROOT / "profiles" / "smoke"), "--brief"]) == 0
    assert capsys.readouterr().out.strip() == "0 of 7 jobs done, 0 failed, 7 to do"
    assert not list(tmp_path.iterdir())
    (tmp_path / "own.yaml").write_text("plan: {name: a b}")
    for words in (["grid", "status", "own.yaml"], ["grid", "table", "none.yaml"], ["study", "own.yaml"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "yaml" in error and error.count("\n") <= 2
    code = "import sys; from sbn_tf.__main__ import main; "
    code += f"main(['grid', 'status', {str(ROOT / 'profiles/smoke')!r}]); assert 'keras' not in sys.modules"
    assert in_a_process(code=code).returncode == 0


def test_the_command_line_is_quiet_in_a_process_of_its_own():
    done = in_a_process("check", "phantom_nodule", "--size", "16", "--max-images", "20")
    assert done.returncode == 0 and "phantom_nodule: segmentation" in done.stdout and done.stderr == ""
    done = in_a_process("check", "no_such_set")
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2


@pytest.mark.tensorflow
def test_tensorflow_starts_without_a_word_and_errors_still_appear():
    code = "import sbn_tf, keras, os, tensorflow; keras.ops.ones(1) + 1; os.write(2, b'E: own'); 1 / 0"
    done = in_a_process(code=code)
    assert done.stderr.startswith("E: own") and "ZeroDivisionError" in done.stderr
    assert not [word for word in NOISE if word in done.stderr]


def test_only_notes_are_dropped_and_what_a_crash_writes_is_not_lost(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        "import os\n"
        "os.write(2, b'WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n')\n"
        "os.write(2, b'I0000 00:00:1.2 1 cudart_stub.cc:31] Could not find cuda drivers on your machine.\\n')\n"
        "os.write(2, b'2026-01-01 00:00:00.1: I tensorflow/core/util/port.cc:153] oneDNN is on.\\n')\n"
        "os.write(2, b'E0000 00:00:1.2 1 x.cc:1] an error\\n2026-01-01 00:00:00.1: F y.cc:1] a fatal one\\n')\n"
        "os.abort()\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += f"import runpy; runpy.run_path({str(ROOT / 'sbn_tf/core/quiet.py')!r})['quiet_tensorflow']()\n"
    code += "import importlib.util; importlib.util.find_spec('tensorflow')\n"  # a look does not use it up
    done = in_a_process(code=code + "import tensorflow")
    assert done.returncode < 0
    assert "an error" in done.stderr and "a fatal one" in done.stderr
    assert not [word for word in NOISE if word in done.stderr]
