"""Describes the named inputs and outputs of an exported model."""

import dataclasses

import keras
import tensorflow as tf

from keras_bnrnn.export.masks import reverses_time
from keras_bnrnn.export.names import input_names, output_names
from keras_bnrnn.export.structure import nested_inputs


@dataclasses.dataclass(frozen=True)
class Interface:
    """The named inputs and outputs of a model.

    Attributes:
        inputs: Dict from the name of each input to its `KerasTensor`.
        sequences: The names of the inputs with timesteps.
        per_step: Dict from the name of each output to a bool: whether the output has
            one frame for each input frame, in the same order.
    """

    inputs: dict
    sequences: list
    per_step: dict

    @property
    def batch_size(self):
        """The batch size of the model, an int; `None` if it is free."""
        return self.inputs[self.sequences[0]].shape[0]

    @property
    def timesteps(self):
        """Dict from the name of each sequence to its T, an int or `None`."""
        return {name: self.inputs[name].shape[1] for name in self.sequences}

    @property
    def rows(self):
        """The batch size of lengths and states, as `require_shapes` takes it."""
        return "B" if self.batch_size is None else self.batch_size

    def specs(self, one_frame=False):
        """Returns a dict from the name of each input to its `tf.TensorSpec`.

        Args:
            one_frame: Whether a sequence is a single frame, without the axis T.
        """
        return {
            name: tf.TensorSpec(
                [x.shape[0], *x.shape[2:]]
                if one_frame and name in self.sequences
                else x.shape,
                x.dtype,
                name=name,
            )
            for name, x in self.inputs.items()
        }

    def shapes(self, one_frame=False, lengths=True):
        """Returns a dict from the name of each input to its required shape.

        `require_shapes` takes this dict. The free batch size is `"B"`. A free T is
        `"T"` in all sequences that share it. Every other free size has a name of its
        own. The first sequence is the first entry, because it defines B and T.

        Args:
            one_frame: Whether a sequence is a single frame, without the axis T.
            lengths: Whether all sequences share their lengths, and therefore their T.
        """
        first = self.sequences[0]
        shapes = {}
        for name in [first, *(name for name in self.inputs if name != first)]:
            sizes = list(self.inputs[name].shape)
            names = ["B", *(f"{name}_{axis}" for axis in range(1, len(sizes)))]
            if name == first or (lengths and name in self.sequences):
                names[1] = "T"
            sizes = [n if x is None else x for n, x in zip(names, sizes, strict=True)]
            if one_frame and name in self.sequences:
                del sizes[1]
            shapes[name] = sizes
        return shapes


def interface_of(model):
    """Describes the inputs and outputs of a model.

    Args:
        model: A built Sequential or Functional model.

    Returns:
        `Interface`.

    Raises:
        ValueError: If no input has timesteps, or an input is called `lengths`.
    """
    inputs = dict(zip(input_names(model), model.inputs, strict=True))
    sequences = _sequences(inputs)
    names = output_names(model)
    per_step = _per_step(model, inputs, sequences)
    return Interface(inputs, sequences, dict(zip(names, per_step, strict=True)))


def _sequences(inputs):
    """Returns the names of the inputs with timesteps (the axis after the batch).

    These are the inputs whose T is free. If there are none, these are the inputs of
    rank 3 and more, and the integer inputs of rank 2 (token ids).
    """
    free = [n for n, x in inputs.items() if len(x.shape) > 1 and x.shape[1] is None]
    if free:
        return free
    fixed = [
        name
        for name, x in inputs.items()
        if len(x.shape) > 2
        or (len(x.shape) == 2 and x.dtype.startswith(("int", "uint")))
    ]
    if not fixed:
        shapes = {name: x.shape for name, x in inputs.items()}
        raise ValueError(
            "`model` must have an input of shape (batch, timesteps, ...). "
            f"Received: inputs {shapes}"
        )
    return fixed


def _per_step(model, inputs, sequences):
    """Returns a bool for each output: whether it has one frame per input frame."""
    if reverses_time(model) is not None:
        return [False] * len(model.outputs)
    if inputs[sequences[0]].shape[1] is not None:
        # A fixed T cannot be told from another size of the same value.
        return [False] * len(model.outputs)

    def output_shapes(timesteps):
        probes = [
            keras.KerasTensor((1, timesteps, *x.shape[2:]), x.dtype)
            if name in sequences
            else keras.KerasTensor((1, *x.shape[1:]), x.dtype)
            for name, x in inputs.items()
        ]
        outputs = model(nested_inputs(model, probes))
        return [tuple(y.shape) for y in keras.tree.flatten(outputs)]

    # An axis of size T for two different T is the axis of the timesteps. The two T are
    # large, since convolutions and pooling may need many timesteps.
    few, many = 4099, 8209
    return [
        len(a) > 1 and (a[1], b[1]) == (few, many)
        for a, b in zip(output_shapes(few), output_shapes(many), strict=True)
    ]
