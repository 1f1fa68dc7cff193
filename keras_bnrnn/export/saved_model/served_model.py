"""Runs a folded model on named tensors, for whole sequences or for next frames."""

import typing
import warnings

import keras
import tensorflow as tf

from keras_bnrnn.export.examples import example_inputs
from keras_bnrnn.export.interface import interface_of
from keras_bnrnn.export.masks import makes_masks
from keras_bnrnn.export.names import LENGTHS, TIME, state_names
from keras_bnrnn.export.saved_model.layers import served_copy
from keras_bnrnn.export.saved_model.tracing import Call, Tracing
from keras_bnrnn.export.saved_model.weights import ServedWeights
from keras_bnrnn.export.shapes import require_shapes
from keras_bnrnn.export.structure import nested_inputs
from keras_bnrnn.traversal import clone_graph, numbered


class State(typing.NamedTuple):
    """A state that a recurrent layer carries from frame to frame.

    Attributes:
        name: The name in signatures, such as `"lstm_h"`.
        shape: The shape without the batch, such as `(128,)`.
    """

    name: str
    shape: tuple


class ServedModel:
    """A folded model as functions of named tensors and lengths.

    Attributes:
        model: A copy of the folded model, whose layers are adapted to serving.
        weights: `ServedWeights`, the variables of the graph that are not variables of
            the copy.
        interface: `Interface`, the names and shapes of inputs and outputs.
        takes_lengths: Whether `serve` takes `lengths`.

    Args:
        folded: A folded model.
        lengths: Bool, whether `serve` takes `lengths`. `None` (default): if T is free,
            or if a layer makes a mask.

    Raises:
        ValueError: If no input has timesteps, or an input is called `lengths`; if
            `lengths` is True and the sequences have unequal fixed T.
    """

    def __init__(self, folded, lengths=None):
        self._tracing = Tracing()
        self.weights = ServedWeights()
        self.model = clone_graph(
            folded, lambda layer: served_copy(layer, self._tracing, self.weights)
        )
        self.weights.join_kernels(self.model)
        self.set_weights(folded.get_weights())
        self.interface = interface_of(self.model)
        self.takes_lengths = _takes_lengths(self.model, self.interface, lengths)

    def set_weights(self, weights):
        """Sets the weights of the model, arrays in the order of `model.weights`."""
        self.weights.set(self.model, weights)

    def example_inputs(self, rows, timesteps, rng):
        """Random inputs, a dict of tensors. See `example_inputs` of `examples.py`."""
        return example_inputs(self.model, self.interface, rows, timesteps, rng)

    @property
    def state_specs(self):
        """List of `State`; available after `predict` or `advance` was traced."""
        names, shapes = [], []
        for layer, shapes_of_layer in self._tracing.recurrent:
            names += state_names(layer, len(shapes_of_layer))
            shapes += shapes_of_layer
        taken = [*self.interface.inputs, LENGTHS, TIME, *self.interface.per_step]
        names = numbered([*taken, *names])[len(taken) :]
        return [State(*pair) for pair in zip(names, shapes, strict=True)]

    def states(self, batch_size):
        """Returns a dict of the float32 zero states at the start of a sequence."""
        return {
            state.name: tf.zeros([batch_size, *state.shape])
            for state in self.state_specs
        }

    @tf.autograph.experimental.do_not_convert
    def predict(self, inputs, lengths, compiled=False):
        """Computes the outputs for whole sequences.

        Args:
            inputs: Dict of tensors. The graph checks their shapes when it runs.
            lengths: int32 tensor (B,), clamped to 0..T; `None` if every frame is valid.
            compiled: Whether XLA compiles this function. If so, shapes are not checked,
                since XLA cannot compile the check.

        Returns:
            Dict of tensors. Floating-point outputs are float32; per-step outputs are
            zero past the lengths.
        """
        if not compiled:
            inputs = dict(inputs)
            shapes = self.interface.shapes(lengths=lengths is not None)
            if lengths is not None:
                inputs[LENGTHS], shapes[LENGTHS] = lengths, [self.interface.rows]
            inputs = require_shapes(inputs, shapes)
            lengths = inputs.pop(LENGTHS, None)
        return self._run(inputs, Call(lengths, compiled=compiled))

    @tf.autograph.experimental.do_not_convert
    def advance(self, inputs, lengths, states):
        """Computes the outputs and states for the next frames of sequences.

        Args:
            inputs: Dict of tensors.
            lengths: int32 tensor (B,), clamped to 0..T; `None` if every frame is valid.
            states: Dict of tensors, the states of the recurrent layers before these
                frames.

        The caller must check the shapes of all arguments.

        Returns:
            Dict of outputs, as `predict` returns it, and dict of the states after the
            last valid frame of each row.
        """
        flat = iter(states[state.name] for state in self.state_specs)
        before = [[next(flat) for _ in shapes] for _, shapes in self._tracing.recurrent]
        call = Call(lengths, before=before)
        outputs = self._run(inputs, call)
        after = [tf.cast(x, tf.float32) for states in call.after for x in states]
        names = [state.name for state in self.state_specs]
        return outputs, dict(zip(names, after, strict=True))

    def _run(self, inputs, call):
        """Calls the model and returns its named outputs."""
        masks = dict.fromkeys(inputs)
        cleaned = dict(inputs)
        if call.lengths is not None:
            for name in self.interface.sequences:
                # `tf.sequence_mask` clamps the lengths to 0..T.
                mask = tf.sequence_mask(call.lengths, tf.shape(inputs[name])[1])
                masks[name], cleaned[name] = mask, _zeroed(inputs[name], mask)
                call.sequences += [cleaned[name], mask]
                call.masks.append(mask)
        with (
            self._tracing.of(call),
            self.weights.in_use(),
            warnings.catch_warnings(),
        ):
            # Keras warns that the model as a whole does not support masks.
            warnings.filterwarnings("ignore", f"Layer '{self.model.name}'.* mask")
            outputs = self.model(
                self._packed(cleaned), mask=self._packed(masks), training=False
            )
        return self._named(keras.tree.flatten(outputs), call.lengths)

    def _packed(self, named):
        """Packs a dict of inputs into the structure that the model takes."""
        return nested_inputs(self.model, [named[n] for n in self.interface.inputs])

    def _named(self, outputs, lengths):
        """Names the flat outputs, and zeroes per-step outputs past the lengths."""
        named = {}
        per_step = self.interface.per_step
        for (name, has_frames), y in zip(per_step.items(), outputs, strict=True):
            if has_frames and lengths is not None:
                y = _zeroed(y, tf.sequence_mask(lengths, tf.shape(y)[1]))
            named[name] = tf.cast(y, tf.float32) if y.dtype.is_floating else y
        return named


def _takes_lengths(model, interface, lengths):
    """Returns whether `serve` takes `lengths`; decides by the model if it is `None`."""
    timesteps = interface.timesteps
    one_for_all = len(set(timesteps.values())) == 1
    if lengths is None:
        free = None in timesteps.values()
        return free or (one_for_all and makes_masks(model))
    if lengths and not one_for_all:
        raise ValueError(
            "`lengths=True` needs sequences of one T, since all of them share "
            f"`lengths`. Received: lengths=True with the T {timesteps}"
        )
    return lengths


def _zeroed(x, mask):
    """Zeroes a tensor (B, T, ...) where the mask (B, T) is false."""
    for _ in range(len(x.shape) - 2):
        mask = mask[..., None]
    return tf.where(mask, x, tf.zeros([], x.dtype))
