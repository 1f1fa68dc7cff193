"""Compares a file with its model before the file is published."""

import keras
import numpy as np

from keras_bnrnn.export.comparison import answers_of, gap, require_small
from keras_bnrnn.export.examples import example_inputs, shortest_timesteps


def compare(model, interface, answers, tolerance, batches):
    """Compares the outputs of a file with those of its model on random sequences.

    Args:
        model: The model that was exported.
        interface: The `Interface` of the model.
        answers: Function from a dict of input arrays to a dict of output arrays, which
            runs the file.
        tolerance: The largest difference that passes, relative to the largest output
            if that output exceeds 1.
        batches: List of four batch sizes.

    Raises:
        ExportMismatchError: If an output differs by more than `tolerance`.
    """
    rng = np.random.default_rng(1)
    fewest = shortest_timesteps(model, interface)
    timesteps = [fewest + extra for extra in (8, 0, 3, 8)]
    for batch_size, count in zip(batches, timesteps, strict=True):
        inputs = example_inputs(model, interface, batch_size, count, rng)
        found = answers({name: x.numpy() for name, x in inputs.items()})
        expected = answers_of(model, inputs)
        gaps = {
            name: gap(keras.ops.convert_to_numpy(y), found[name])
            for name, y in zip(interface.per_step, expected, strict=True)
        }
        require_small(gaps, tolerance, "file")
