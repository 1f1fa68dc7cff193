"""Command-line options that the programs of this folder share."""

import argparse

# The choices of --normalize, and the names of the layers in tables and figures.
LABELS = {"none": "LSTM", "input": "BNLSTM", "joint": "BNLSTM joint"}
# Arguments that may change between two parts of one run.
NOT_CONFIGURATION = {"output_dir", "data_dir", "epochs"}


def parser(description):
    """Returns an `ArgumentParser` that keeps the line breaks of a module docstring."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run(parser, *, output_dir, epochs):
    """Adds the options of `training.fit` and of a trial.

    Args:
        parser: `argparse.ArgumentParser`.
        output_dir: str, the default of `--output-dir`.
        epochs: int, the default of `--epochs`; `None`: the size of the model has it.
    """
    add = parser.add_argument
    add(
        "--output-dir",
        default=output_dir,
        help=f"folder for all output files (default: {output_dir})",
    )
    add(
        "--epochs",
        type=positive,
        default=epochs,
        help="total number of epochs; an interrupted run continues "
        f"(default: {epochs or 'by size'})",
    )
    add(
        "--hours",
        type=positive_float,
        help="limit on the training time; training stops within an epoch when the "
        "time is over (default: no limit)",
    )
    add("--seed", type=int, default=1, help="seed of everything random (default: 1)")
    add(
        "--smoke",
        action="store_true",
        help="use a tiny model and little data: a trial of some seconds",
    )


def add_batch_size(parser, *, unit, default):
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=default,
        help=f"{unit} in a batch (default: {default})",
    )


def add_statistics(parser, *, default, note=""):
    parser.add_argument(
        "--statistics",
        choices=("sequence", "frame"),
        default=default,
        help="what a minibatch's mean and variance cover: all valid frames together, "
        f"or each timestep alone{note} (default: {default})",
    )


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text}")
    return value


def positive_float(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0. Received: {text}")
    return value


def fraction(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1). Received: {text}")
    return value


def configuration(arguments):
    """Returns a dict of the arguments that a run depends on."""
    return {
        name: value
        for name, value in vars(arguments).items()
        if name not in NOT_CONFIGURATION
    }


def missing(error):
    """Returns a one-line message for a package that is not installed.

    Args:
        error: The `ImportError`.
    """
    return f"error: {error} (the examples need `pip install 'keras-bnrnn[examples]'`)"
