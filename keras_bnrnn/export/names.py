"""Names the inputs, outputs and states of an exported model."""

import re

import keras

from keras_bnrnn.export.structure import structure_of
from keras_bnrnn.traversal import numbered

LENGTHS = "lengths"
TIME = "t"


def input_names(model):
    """Returns the names of a model's flat inputs.

    The names are the keys of a dict of inputs, or else the names of the `keras.Input`s.
    A single input without a name is called `inputs`, one of several
    `inputs_<number>`.

    Raises:
        ValueError: If an input is called `lengths`.
    """
    names = _keys(structure_of(model, "input"))
    if names is None:
        names = [x.name for x in model.inputs]
        for i, name in enumerate(names):
            if re.fullmatch(r"(input_layer|keras_tensor)(_\d+)?", name):
                names[i] = "inputs" if len(names) == 1 else f"inputs_{i}"
    if LENGTHS in names:
        raise ValueError(
            f"An input of the model must not be called {LENGTHS!r}: the signature has "
            f"an input of this name. Received: inputs {names}"
        )
    return names


def output_names(model):
    """Returns the names of a model's flat outputs.

    The names are the keys of a dict of outputs, or else the names of the layers that
    return the outputs, numbered if they repeat.
    """
    if isinstance(model, keras.Sequential):
        names = [model.layers[-1].name] * len(keras.tree.flatten(model.outputs))
    else:
        names = _keys(structure_of(model, "output")) or model.output_names
    # A layer may return several outputs: its states, or the outputs of several calls.
    return numbered(names)


def state_names(layer, count):
    """Returns the names of a layer's states, such as `lstm_h` and `lstm_c`."""
    if count == 1:
        suffixes = ["h"]
    elif isinstance(getattr(layer, "cell", None), keras.layers.LSTMCell) or (
        count == 2 and hasattr(layer.cell, "peephole")
    ):
        suffixes = ["h", "c"]
    else:
        suffixes = [f"state_{i}" for i in range(count)]
    return [f"{layer.name}_{suffix}" for suffix in suffixes]


def _keys(structure):
    """Returns the keys of a flat dict in the order of `keras.tree`, or `None`."""
    if isinstance(structure, dict):
        keys = keras.tree.flatten({key: key for key in structure})
        if len(keys) == len(keras.tree.flatten(structure)):
            return keys
    return None
