"""The command line: `python -m sbn_tf`, or the script `sbn-tf`."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]

GRID = "State, tables and estimates of a grid that Snakemake runs."
# Words of a command -> the module that has its `add_arguments(parser)` and `run(given)`, what it does, an example. Only
# the module of the command that runs is imported, by its name: some load TensorFlow, and `--help` shall not.
COMMANDS = {
    "train": (
        "sbn_tf.experiments.train",
        "Train on a folder of images and masks or labels; write a network that reads new images.",
        "sbn-tf train my_data --out my_network",
    ),
    "predict": (
        "sbn_tf.experiments.predict",
        "Masks or labels of new images, with their uncertainty; exit code 1 where a file could not be read.",
        "sbn-tf predict my_network new_images --out results",
    ),
    "check": (
        "sbn_tf.experiments.check_data",
        "Say what is in a dataset and what looks wrong in it; exit code 1 where something does.",
        "sbn-tf check phantom_nodule",
    ),
    "compare": (
        "sbn_tf.experiments.compare",
        "Train methods on one dataset, or read what is trained, and print one table with intervals.",
        "sbn-tf compare phantom_nodule --recipe quick --methods deterministic,partial",
    ),
    "study": (
        "sbn_tf.experiments.study",
        "Train and score every variant of a plan's questions; exit code 1 where one fails.",
        "sbn-tf study profiles/study.yaml --questions scale",
    ),
    "grid status": (
        "sbn_tf.experiments.grid",
        "Say which jobs of a grid are done, which failed and what remains.",
        "sbn-tf grid status profiles/small",
    ),
    "grid report": (
        "sbn_tf.experiments.grid",
        "Write and print what ran, for how long, and what failed.",
        "sbn-tf grid report profiles/small",
    ),
    "grid table": (
        "sbn_tf.experiments.grid_results",
        "Write the table of the results that a grid has so far.",
        "sbn-tf grid table profiles/small",
    ),
    "grid finish": (
        "sbn_tf.experiments.grid_results",
        "Write the report and the table, as a grid does at its end.",
        "sbn-tf grid finish profiles/small",
    ),
    "grid estimate": (
        "sbn_tf.experiments.estimates",
        "Count the operations, hours and memory that a grid will take; nothing is trained.",
        "sbn-tf grid estimate profiles/paper",
    ),
}
AGAIN = "What was done stays: the same command again goes on."
EXIT_CODES = "exit codes: 0 fine, 1 a problem was found or a part failed, 2 wrong input, 130 stopped by Ctrl-C"


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the usage of every option."""

    def error(self, message):
        self.exit(2, f"{message}\n`{self.prog} --help` lists what it takes.\n")


def _parsed(arguments):
    """The arguments of one command, which alone is imported, and its `run`."""
    examples = "\n".join(["examples:", *(f"  {example}" for _, _, example in COMMANDS.values())])
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser(
        prog="sbn-tf",
        description="Sparse Bayesian networks in Keras. `sbn-tf COMMAND --help` explains a command.",
        epilog=f"{examples}\n\n{EXIT_CODES}",
        **layout,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    groups = {"": commands}
    for words, (module, line, example) in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in groups:
            parent = commands.add_parser(group, help=GRID, description=GRID, epilog=f"example: {example}", **layout)
            groups[group] = parent.add_subparsers(metavar="COMMAND", required=True)
        one = groups[group].add_parser(name, help=line, description=line, epilog=f"example: {example}", **layout)
        if arguments[: len(words.split())] == words.split():
            command = importlib.import_module(module)
            command.add_arguments(one)
            one.set_defaults(run=command.run, command=words)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words of the command line; None: those of this process.

    Returns:
        The exit code: 0 fine, 1 a problem was found or a part failed, 2 wrong input.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given = _parsed(arguments)
        logging.getLogger("tensorflow").setLevel("ERROR")  # it warns that each network is traced again
        return given.run(given) or 0
    except KeyboardInterrupt:
        print(f"Stopped. {AGAIN}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"Free some space. {AGAIN}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
