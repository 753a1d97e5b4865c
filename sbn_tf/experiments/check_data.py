"""The command `sbn-tf check`: what is in a dataset, split by split, and what looks wrong in it."""

from __future__ import annotations

import argparse

import pandas as pd

from sbn_tf import datasets
from sbn_tf.datasets.folder import Folder, faults, is_folder
from sbn_tf.experiments import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sbn-tf check`."""
    parser.add_argument("dataset", help="a name of sbn_tf.datasets.names(), or a folder of images")
    parser.add_argument("--size", type=int, help="image side in pixels; default: the dataset's own")
    parser.add_argument("--max-images", type=int, help="look at so many images of each split; default: all")
    parser.add_argument("--data-root", help="folder of the real data; default: SBN_TF_DATA, or data/")
    add_folder_arguments(parser)


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how the files of a folder are read."""
    parser.add_argument(
        "--threshold", type=int, help="of a folder: mask pixels at least so bright, 1 to 255, are foreground"
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="of a folder: leave out rows whose files cannot be read, and say so"
    )


def run(given: argparse.Namespace) -> int:
    """Print all faults of a folder's files, then the report of the dataset; 1 where there is a problem, else 0."""
    name, found = given.dataset, []
    if is_folder(name):
        name = Folder(name, given.threshold, given.skip_broken)
        found = faults(name)
    elif given.threshold is not None or given.skip_broken:
        raise ValueError(f"Expected --threshold and --skip-broken with a folder. Received: the dataset {name!r}")
    if found:
        print(f"{len(found)} fault{'s' * (len(found) > 1)}:\n")
        print(report.to_markdown(pd.DataFrame(found).set_index("file")), flush=True)
        if not given.skip_broken:
            return 1
    data = datasets.load(name, root=given.data_root, size=given.size)
    about = datasets.check(data, max_images=given.max_images)
    print(about)
    if about.problems and is_folder(given.dataset):
        print(f"\n`sbn-tf train{' --skip-broken' * bool(found)}` runs all the same.")
    return 1 if found or about.problems else 0
