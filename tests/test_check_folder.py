"""`sbn-tf check FOLDER`: all faults of a folder at once, masks with soft edges, and rows that are left out."""

import csv
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from sbn_tf import datasets
from sbn_tf.__main__ import main
from sbn_tf.datasets.folder import Folder, faults


def write_folder(folder, header=("image", "mask"), count=12, rows=None):
    """Squares of noise, masks of their left halves, and the csv."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    mask = np.zeros((20, 20), "uint8")
    mask[:, :10] = 255
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 20), "uint8")).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    rows = [(f"{i}.png", f"{i}.png") for i in range(count)] if rows is None else rows
    with open(folder / "images.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def soften(path):
    """Gives a mask a soft edge: 0, 100, 200 and 255."""
    mask = np.asarray(Image.open(path)).copy()
    mask[:, 9], mask[:, 10] = 200, 100
    Image.fromarray(mask).save(path)


def test_all_faults_come_at_once_with_their_remedies(tmp_path, capsys):
    folder = write_folder(tmp_path / "data", ("image", "mask", "split"), rows=[])
    rows = [[f"{i}.png", f"{i}.png", "train"] for i in range(12)]
    rows[4][2], rows[6][2] = "training", "Val"
    with open(folder / "images.csv", "a", newline="") as file:
        csv.writer(file).writerows(rows)
    whole = (folder / "images" / "1.png").read_bytes()
    (folder / "images" / "1.png").write_bytes(whole[:90])
    (folder / "images" / "2.png").unlink()
    soften(folder / "masks" / "3.png")
    Image.new("L", (7, 7)).save(folder / "masks" / "5.png")
    shutil.copy(folder / "masks" / "7.png", folder / "masks" / "no row.png")
    assert main(["check", str(folder)]) == 1
    said = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:4]] for line in said.splitlines() if line.startswith("| ")]
    assert said.startswith("7 faults") and lines[0] == ["file", "fault", "remedy"]
    expected = {
        "images/1.png": ("truncated", "Get it again"),
        "images/2.png": ("not there", "Put it there"),
        "masks/3.png": ("a value of 100", "--threshold"),
        "masks/5.png": ("7 x 7", "its image's size"),
        "masks/no row.png": ("Expected a row", "Add a row"),
    }
    by_file = {}
    for file, fault, remedy in lines[1:]:
        by_file.setdefault(file, []).append((fault, remedy))
    for file, (fault, remedy) in expected.items():
        ((found, does),) = by_file.pop(file)
        assert fault in found and remedy in does and str(folder) not in found
    assert ["'training' in row 5" in one and "'Val'" not in one for one, _ in by_file["images.csv"]] == [True, False]


def test_a_folder_without_faults_has_none(tmp_path, capsys):
    folder = write_folder(tmp_path / "data", count=40)
    assert faults(folder) == []
    main(["check", str(folder), "--size", "16"])
    assert capsys.readouterr().out.startswith("data: segmentation")


@pytest.mark.parametrize("name", ["patient_id", "Patient ID", "patients", "PatientID", "subject_id"])
def test_a_column_like_patient_is_asked_about(tmp_path, name):
    rows = [(f"{i}.png", f"{i}.png", f"p{i}") for i in range(12)]
    folder = write_folder(tmp_path / "data", ("image", "mask", name), rows=rows)
    ((file, fault, remedy),) = faults(folder)
    assert file == "images.csv" and repr(name) in fault and "Did you mean `patient`?" in remedy
    with pytest.raises(ValueError, match="Did you mean `patient`"):
        datasets.load(folder, size=16)


def test_a_label_like_patient_is_a_label(tmp_path):
    folder = write_folder(tmp_path / "data", ("image", "patent"), rows=[(f"{i}.png", i % 2) for i in range(12)])
    shutil.rmtree(folder / "masks")
    assert faults(folder) == [] and datasets.card(folder).classes == ("patent",)


def test_a_threshold_cuts_soft_edges(tmp_path):
    folder = write_folder(tmp_path / "data", count=12)
    for i in range(12):
        soften(folder / "masks" / f"{i}.png")
    with pytest.raises(ValueError, match="--threshold"):
        datasets.load(folder, size=20, cache=tmp_path / "cache")
    for threshold, columns in ((1, 11), (100, 11), (101, 10), (200, 10), (201, 9)):
        assert faults(Folder(folder, threshold)) == []
        data = datasets.load(Folder(folder, threshold), size=20, cache=tmp_path / "cache")
        assert (data.train.targets.sum((1, 2, 3)) == 20 * columns).all()
    Image.fromarray(np.eye(20, dtype="uint8")).save(folder / "masks" / "0.png")  # of 0 and 1: nothing to cut
    assert faults(Folder(folder, 128)) == []
    with pytest.raises(ValueError, match="1 to 255"):
        Folder(folder, 0)


def test_broken_rows_are_left_out_and_named(tmp_path, caplog, capsys):
    folder = write_folder(tmp_path / "data", count=14)
    (folder / "images" / "1.png").write_bytes(b"no image")
    (folder / "masks" / "3.png").unlink()
    with pytest.raises((ValueError, FileNotFoundError)):
        datasets.load(folder, size=16)
    with caplog.at_level(logging.WARNING):
        data = datasets.load(Folder(folder, skip_broken=True), size=16)
    ids = sorted(str(one) for part in (data.train, data.val, data.test) for one in part.ids)
    assert ids == sorted(f"{i}.png" for i in range(14) if i not in (1, 3))
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 2 and "images/1.png" in said[0] and "masks/3.png" in said[1]
    assert main(["check", str(folder), "--skip-broken", "--size", "16"]) == 1
    found = capsys.readouterr().out
    assert found.startswith("2 faults") and "segmentation" in found
    for i in range(14):
        (folder / "images" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a row whose files can be read"):
        datasets.card(Folder(folder, skip_broken=True))


def test_options_of_a_folder_are_refused_elsewhere(capsys):
    assert main(["check", "phantom_nodule", "--skip-broken"]) == 2
    assert "with a folder" in capsys.readouterr().err
