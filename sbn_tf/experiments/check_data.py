"""The command `sbn-tf check`: what is in a dataset, split by split, and what looks wrong in it."""

from __future__ import annotations

import argparse

from sbn_tf import datasets

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sbn-tf check`."""
    parser.add_argument("dataset", help="a name of sbn_tf.datasets.names(), or a folder of images")
    parser.add_argument("--size", type=int, help="image side in pixels; default: the dataset's own")
    parser.add_argument("--max-images", type=int, help="look at so many images of each split; default: all")
    parser.add_argument("--data-root", help="folder of the real data; default: SBN_TF_DATA, or data/")


def run(given: argparse.Namespace) -> int:
    """Print the report of a dataset; 1 where it has a problem, 0 where it has none."""
    data = datasets.load(given.dataset, root=given.data_root, size=given.size)
    report = datasets.check(data, max_images=given.max_images)
    print(report)
    return 1 if report.problems else 0
