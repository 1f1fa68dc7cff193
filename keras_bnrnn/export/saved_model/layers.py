"""Copies the layers of a folded model and adapts the copies to serving."""

import inspect

import keras
import tensorflow as tf

from keras_bnrnn.export.saved_model.loops import (
    has_served_loop,
    masked_outputs,
    served_loop,
)
from keras_bnrnn.traversal import copy_of, sublayers

MASK_ARGUMENTS = {"mask", "query_mask", "value_mask", "key_mask"}


def served_copy(layer, tracing, weights):
    """Copies a layer for the served graph.

    Args:
        layer: A layer or an operation of a folded model.
        tracing: The `Tracing` of the served model.
        weights: The `ServedWeights` of the served model.

    Returns:
        A new layer. An operation is returned unchanged.
    """
    clone = copy_of(layer)
    if not isinstance(clone, keras.layers.Layer):
        return clone
    for part in sublayers(clone):
        if hasattr(part, "use_cudnn"):
            # A cuDNN operation, traced if a GPU is visible, cannot run on a CPU server.
            part.use_cudnn = False
        if isinstance(part, keras.layers.RNN):
            _run_served_loop(part, tracing, weights)
        elif type(part) is keras.layers.TimeDistributed:
            _run_frames_at_once(part, tracing)
    if isinstance(clone, keras.layers.Embedding):
        _pass_mask_on(clone)
        if type(clone).call is keras.layers.Embedding.call:
            _look_up_halves(clone, weights)
    _join_lengths(clone, tracing)
    return clone


def _run_served_loop(layer, tracing, weights):
    """Makes a recurrent layer run `served_loop`, from the states of the call."""
    own_loop = layer.inner_loop
    # Zeros at masked frames would hide the output before them, which is the last output
    # of a row if these frames are padding. `masked_outputs` sets the zeros.
    zero_output, layer.zero_output_for_mask = layer.zero_output_for_mask, False

    def inner_loop(sequences, initial_state, mask, training=False):
        call = tracing.call
        if call is None:  # Keras infers shapes
            return own_loop(sequences, initial_state, mask, training)
        lasts = not call.in_frames
        continues = lasts and call.before is not None
        if continues:
            given = call.before[len(call.after)]
            flat = keras.tree.flatten(initial_state)
            flat = [tf.cast(x, y.dtype) for x, y in zip(given, flat, strict=True)]
            initial_state = keras.tree.pack_sequence_as(initial_state, flat)
        if mask is not None:
            mask = tf.cast(keras.tree.flatten(mask)[0], tf.bool)
        lengths = _lengths_of(mask, call)
        of_lengths = any(mask is own for own in call.masks)
        if has_served_loop(layer):
            results = served_loop(
                layer,
                sequences,
                initial_state,
                mask,
                lengths=lengths if of_lengths else None,
                joined=weights.joined.get(id(layer)),
                compiled=call.compiled,
                wants_states=continues or layer.return_state,
            )
        else:
            results = own_loop(sequences, initial_state, mask, training)
        if mask is not None:
            before = _last_output(layer.cell, initial_state) if continues else None
            results = masked_outputs(
                layer, results, mask, lengths, of_lengths, zero_output, before
            )
        if lasts:
            states = keras.tree.flatten(results[2])
            shapes = [tuple(x.shape[1:]) for x in states]
            tracing.recurrent.append((layer, shapes))
            call.after.append(states)
        return results

    layer.inner_loop = inner_loop


def _lengths_of(mask, call):
    """Returns the lengths of the rows of a mask, within 0..T, or `None`.

    Args:
        mask: Boolean tensor (B, T), or `None`.
        call: `Call`.
    """
    if mask is None or call.lengths is None or call.in_frames:
        return None
    if not _comes_from(mask, call.sequences):
        return None
    return tf.clip_by_value(call.lengths, 0, tf.shape(mask)[1])


def _last_output(cell, states):
    """Returns the state of a cell that holds its last output.

    Args:
        cell: A cell. Its first state is its output, as `keras.layers.RNN` requires.
        states: The states of the cell, nested as the cell returns them.
    """
    if isinstance(cell, keras.layers.StackedRNNCells):
        states = states[-1]
    return keras.tree.flatten(states)[0]


def _run_frames_at_once(time_distributed, tracing):
    """Makes a `TimeDistributed` apply its layer to all frames as one batch.

    If T is free, `TimeDistributed` of Keras 3.15 mistakes the batch size for T.
    """

    layer = time_distributed.layer
    takes_mask = "mask" in inspect.signature(layer.call).parameters

    def as_frames(x):
        frames = tf.reshape(x, tf.concat([[-1], tf.shape(x)[2:]], 0))
        frames.set_shape([None, *x.shape[2:]])
        return frames

    def call(inputs, training=None, mask=None):
        shape = tf.shape(inputs)
        options = {}
        if takes_mask and mask is not None and len(mask.shape) > 2:
            options["mask"] = as_frames(mask)
        now = tracing.call
        if now is not None:
            outer, now.in_frames = now.in_frames, True
        y = layer(as_frames(inputs), training=False, **options)
        if now is not None:
            now.in_frames = outer
        outputs = tf.reshape(y, tf.concat([shape[:2], tf.shape(y)[1:]], 0))
        outputs.set_shape([*inputs.shape[:2], *y.shape[1:]])
        return outputs

    time_distributed.call = call


def _pass_mask_on(embedding):
    """Makes an `Embedding` pass on the mask of its ids, which Keras drops."""
    own_mask = embedding.compute_mask

    def compute_mask(inputs, mask=None):
        own = own_mask(inputs, mask)
        if own is None or mask is None:
            return mask if own is None else own
        for _ in range(len(own.shape) - len(mask.shape)):
            mask = mask[..., None]
        return keras.ops.logical_and(own, mask)

    embedding.compute_mask = compute_mask
    embedding.supports_masking = True


def _look_up_halves(embedding, weights):
    """Makes an `Embedding` gather rows of its float16 table and cast only those."""
    call = embedding.call

    def call_with_halves(inputs):
        half = weights.half(embedding._embeddings)
        if half is None:
            return call(inputs)
        rows = tf.gather(half, tf.cast(inputs, tf.int32))
        return tf.cast(rows, embedding.compute_dtype)

    embedding.call = call_with_halves


def _join_lengths(layer, tracing):
    """Combines every sequence mask that a layer receives with the mask of `lengths`.

    A Functional model records the operations that compute the masks of `Masking` and
    `Embedding`. These masks depend on the values of the inputs alone.
    """
    call = layer.call
    signature = inspect.signature(call)
    names = MASK_ARGUMENTS.intersection(signature.parameters)
    if not names:
        return

    def join(mask):
        now = tracing.call
        if mask is None or len(mask.shape) != 2:
            return mask
        if any(mask is own for own in now.masks):
            return mask
        if not _comes_from(mask, now.sequences):
            return mask  # the mask of an input without `lengths`
        valid = tf.sequence_mask(now.lengths, tf.shape(mask)[1])
        return tf.logical_and(tf.cast(mask, tf.bool), valid)

    def call_with_lengths(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if tracing.call is not None and tracing.call.lengths is not None:
            for name in names.intersection(bound.arguments):
                mask = bound.arguments[name]
                bound.arguments[name] = keras.tree.map_structure(join, mask)
        return call(*bound.args, **bound.kwargs)

    layer.call = call_with_lengths


def _comes_from(tensor, sources):
    """Returns whether a tensor of a graph is computed from one of `sources`."""
    wanted = {id(source.op) for source in sources}
    seen, queue = set(), [tensor.op]
    while queue:
        operation = queue.pop()
        if id(operation) in wanted:
            return True
        if id(operation) not in seen:
            seen.add(id(operation))
            queue.extend(x.op for x in operation.inputs)
    return False
