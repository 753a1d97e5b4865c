"""DICOM and NIfTI: values, windows and spacing are those that pydicom and nibabel say, on files that they ship."""

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import NETWORK_CARD
from PIL import Image

from sbn_tf import datasets
from sbn_tf.datasets import decoding, medical
from sbn_tf.experiments import predict, prediction_page
from sbn_tf.experiments.predictor import NetworkCard, Predictor


@pytest.fixture
def dicom():
    pydicom = pytest.importorskip("pydicom", reason="needs the extra sbn_tf[dicom]")
    from pydicom.data import get_testdata_file

    def make(name, path=None, **changes):
        """A shipped file; with a path a copy of it with changes."""
        found = get_testdata_file(name, download=False)
        if path is None:
            return Path(found)
        file = pydicom.dcmread(found)
        for key, value in changes.items():
            setattr(file, key, value)
        file.save_as(path)
        return path

    return make


@pytest.fixture
def nifti():
    nibabel = pytest.importorskip("nibabel", reason="needs the extra sbn_tf[nifti]")
    return lambda name: Path(nibabel.__file__).parent / "tests" / "data" / name


def test_a_dicom_has_its_own_window(dicom):
    """The definition of LINEAR in PS3.3 C.11.2.1.2: centre 600, width 1600."""
    import pydicom

    path = dicom("MR_small.dcm")
    stored = pydicom.dcmread(path).pixel_array
    expected = np.clip((stored - 599.5) / 1599 + 0.5, 0, 1)
    np.testing.assert_allclose(medical.read(path), expected, atol=1e-6)
    assert medical.pixel_spacing(path) == (0.3125, 0.3125) and medical.slices(path) == [""]
    shown = prediction_page._small(path, "L")  # its picture in a report
    np.testing.assert_allclose(shown, 255 * expected, atol=0.51)
    window = np.clip((stored - 100.0) / 500, 0, 1)
    np.testing.assert_allclose(prediction_page._small(path, "L", (100, 600)), 255 * window, atol=0.51)


def test_a_given_window_is_in_hounsfield_units(dicom):
    import pydicom

    path = dicom("CT_small.dcm")
    units = pydicom.dcmread(path).pixel_array - 1024.0
    expected = np.clip((units + 160) / 400, 0, 1)
    np.testing.assert_allclose(medical.read(path, (-160, 240)), expected, atol=1e-6)
    whole = medical.read(path)  # no window in it: all of its 16 bits
    np.testing.assert_allclose(whole, (units + 1024 + 32768) / 65535, atol=1e-6)


def test_a_window_without_a_width_does_not_count_and_a_slope_below_0_turns_nothing_round(dicom, tmp_path):
    import pydicom

    path = dicom("MR_small.dcm", tmp_path / "a.dcm", WindowWidth=None)
    stored = pydicom.dcmread(path).pixel_array.astype("float64")
    bits = int(pydicom.dcmread(path).BitsStored)
    low = -(2 ** (bits - 1)) if pydicom.dcmread(path).PixelRepresentation else 0
    np.testing.assert_allclose(medical.read(path), (stored - low) / (2**bits - 1), atol=1e-6)
    changes = {"RescaleSlope": -1, "RescaleIntercept": 0, "WindowCenter": -600, "WindowWidth": 1600}
    path = dicom("MR_small.dcm", tmp_path / "b.dcm", **changes)
    np.testing.assert_allclose(medical.read(path), np.clip((-stored + 600.5) / 1599 + 0.5, 0, 1), atol=1e-5)


def test_monochrome1_is_turned_round(dicom, tmp_path):
    path = dicom("MR_small.dcm", tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(medical.read(path), 1 - medical.read(dicom("MR_small.dcm")), atol=1e-6)


def test_frames_and_colours_of_dicom(dicom):
    import pydicom

    path = dicom("rtdose.dcm")
    assert medical.slices(path) == [f"#{k}" for k in range(15)]
    stored = pydicom.dcmread(path).pixel_array
    np.testing.assert_allclose(medical.read(f"{path}#7"), stored[7] / (2**32 - 1), atol=1e-6)
    assert medical.pixel_spacing(f"{path}#7") == (10, 10)
    path = dicom("SC_rgb_small_odd.dcm")
    np.testing.assert_allclose(medical.read(path), pydicom.dcmread(path).pixel_array / 255, atol=1e-6)
    assert decoding.grey_and_deep(path) == (False, True)
    assert medical.pixel_spacing(path) == (33.333333, 33.333333)
    assert medical.pixel_spacing("a.png") is None


@pytest.mark.parametrize(("name", "ending"), [("anatomical.nii", ""), ("example_nifti2.nii.gz", "4-D")])
def test_a_slice_of_a_nifti(nifti, name, ending):
    import nibabel

    path = nifti(name)
    if ending:
        with pytest.raises(ValueError, match=r"2 or 3 dimensions. Received: \(32, 20, 12, 2\)"):
            medical.read(f"{path}#0")
        return
    volume = nibabel.load(path).get_fdata()
    found = medical.read(f"{path}#3")
    assert found.shape == (41, 33)  # the first axis runs to the right
    expected = (volume[..., 3].T - volume.min()) / (volume.max() - volume.min())
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(
        medical.read(f"{path}#3", (10, 90)), np.clip((volume[..., 3].T - 10) / 80, 0, 1), atol=1e-6
    )
    assert medical.pixel_spacing(f"{path}#3") == (2, 2) and len(medical.slices(path)) == 25
    pixels, whole = decoding.read_image(f"{path}#3", 41, "pad", 3)
    assert whole == (33, 41)
    np.testing.assert_allclose(pixels[:, 4:37, 1], found, atol=1e-6)


def test_spacing_is_of_height_and_width(nifti):
    assert medical.pixel_spacing(f"{nifti('standard.nii.gz')}#0") == (3, 1)


def test_a_folder_of_slices_with_masks_of_slices(nifti, tmp_path):
    import nibabel

    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    volume = np.random.default_rng(0).normal(0, 100, (16, 12, 8)).astype("float32")
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "images" / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image((volume > 50).astype("uint8"), np.eye(4)), tmp_path / "masks" / "a.nii.gz")
    Image.fromarray(np.zeros((12, 16), "uint8")).save(tmp_path / "images" / "plain.png")
    Image.fromarray(np.zeros((12, 16), "uint8")).save(tmp_path / "masks" / "plain.png")
    splits = ["train"] * 6 + ["val", "test"]
    rows = [f"a.nii.gz#{k},{splits[k]},a.nii.gz#{k}" for k in range(8)] + ["plain.png,train,plain.png"]
    (tmp_path / "images.csv").write_text("\n".join(["image,split,mask", *rows]) + "\n")
    data = datasets.load(str(tmp_path), size=16, window=(-200, 200), cache=tmp_path / "cache")
    np.testing.assert_allclose(data.train.images[2, 2:14, :, 0], np.clip(volume[..., 2].T / 400 + 0.5, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(data.train.targets[2, 2:14, :, 0], volume[..., 2].T > 50)
    assert data.test.ids.tolist() == ["a.nii.gz#7"]
    (tmp_path / "masks" / "a.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="8 of 9 are not there"):
        datasets.load(str(tmp_path), size=16)


def test_a_prediction_has_the_area_in_square_millimetres(dicom, nifti, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(dicom("MR_small.dcm"), tmp_path / "in" / "a.dcm")
    shutil.copy(nifti("standard.nii.gz"), tmp_path / "in" / "b.nii.gz")  # 7 slices of 5 x 4 pixels of 3 x 1 mm
    (tmp_path / "in" / "c.nii").write_bytes(b"nothing")
    Image.fromarray(np.zeros((4, 4), "uint8")).save(tmp_path / "in" / "d.png")
    network = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(1, 1, activation="sigmoid")])
    network.set_weights([np.zeros((1, 1, 1, 1)), np.array([0.1])])  # everything is foreground
    card = NetworkCard.model_validate({**NETWORK_CARD, "window": None, "fit": "stretch"})
    table = predict.predict_folder(Predictor(network, card), tmp_path / "in", tmp_path / "out").set_index("image")
    assert table.index.tolist() == ["a.dcm", *(f"b.nii.gz#{k}" for k in range(7)), "d.png"]
    assert table["area_pixels"].tolist() == [64 * 64, *[20] * 7, 16]
    assert float(table["area_mm2"].iloc[0]) == 64 * 64 * 0.3125**2 and float(table["area_mm2"].iloc[3]) == 20 * 3
    assert table["area_mm2"].iloc[-1] in ("", None) or np.isnan(table["area_mm2"].iloc[-1])
    assert (tmp_path / "out" / "masks" / "b.nii.gz#6.png").is_file()
    assert "whole DICOM or NIfTI" in (tmp_path / "out" / "skipped.csv").read_text()


def test_what_cannot_be_read_is_refused(dicom, nifti, tmp_path):
    def refused(path, says, **options):
        with pytest.raises(ValueError, match=says) as error:
            medical.read(path, **options)
        assert str(error.value).count("\n") <= 1

    refused(dicom("examples_palette.dcm"), "PALETTE COLOR")
    refused(dicom("rtplan.dcm"), "no image")
    refused(dicom("rtdose.dcm"), "one of the 15 images")
    refused(f"{dicom('rtdose.dcm')}#15", "#0 to #14")
    refused(dicom("MR_truncated.dcm"), "Expected a whole DICOM")
    refused(dicom("CT_small.dcm"), "low < high", window=(3, 1))
    for name in ("a.dcm", "a.nii"):
        (tmp_path / name).write_bytes(b"nothing")
        refused(tmp_path / name, "Expected a whole DICOM or NIfTI file")
    with pytest.raises(ValueError, match="mask as png"):
        medical.mask(dicom("CT_small.dcm"))
    with pytest.raises(ValueError, match="0 and 1 or of 0 and 255"):
        medical.mask(f"{nifti('anatomical.nii')}#3")


def test_a_missing_library_is_named_with_its_extra(monkeypatch, tmp_path):
    for library, extra, name in (("pydicom", "dicom", "a.dcm"), ("nibabel", "nifti", "a.nii.gz")):
        (tmp_path / name).write_bytes(b"any")
        monkeypatch.setitem(__import__("sys").modules, library, None)
        with pytest.raises(ValueError, match=rf'{library}.*\npip install "sbn_tf\[{extra}\]"'):
            medical.read(tmp_path / name)
