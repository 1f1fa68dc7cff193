"""What a version must pass before it is published."""

import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_bnrnn.export.served_model import LENGTHS, TIME, operations_of, structure_of
from keras_bnrnn.traversal import sublayers


class ExportMismatchError(ValueError):
    """An exported version answers otherwise than the model that it was made of."""


def example_requests(served, functions, xla_buckets):
    """Small warm-up requests for the package's own signatures.

    Those of `serve_xla` come last, one for each bucket.

    Returns:
        List of `(signature_name, inputs)`, inputs a dict of arrays.
    """
    rng = np.random.default_rng(0)
    rows = served.batch_size or 1

    fewest = shortest_timesteps(served)

    def whole(rows, timesteps, lengths=True):
        inputs = served.example_inputs(rows, timesteps, rng)
        if lengths:
            inputs[LENGTHS] = np.full([rows], timesteps, "int32")
        return inputs

    requests = [("serving_default", whole(rows, fewest + 7, served.takes_lengths))]
    states = {name: x.numpy() for name, x in served.states(rows).items()}
    states[TIME] = np.zeros([rows], "int32")
    first = served.sequences[0]
    frames = served.example_inputs(rows, 1, rng)
    frame = {n: x[:, 0] if n in served.sequences else x for n, x in frames.items()}
    streaming = {
        "step": {**frame, **states},
        "chunk": {**whole(rows, fewest + 7), **states},
        "initial_state": {first: frame[first]},
    }
    requests += [(name, x) for name, x in streaming.items() if name in functions]
    if "text" in functions:
        requests.append(("text", {"text": np.array([b"a b c"], object)}))
    if "generate" in functions:
        asked = {
            "prompt": np.array([b"a b c"], object),
            "max_tokens": np.array([2], "int32"),
            "temperature": np.array([1.0], "float32"),
            "seed": np.array([1], "int32"),
        }
        requests.append(("generate", asked))
    requests += [("serve_xla", whole(*bucket)) for bucket in xla_buckets]
    return [
        (name, {key: np.asarray(x) for key, x in inputs.items()})
        for name, inputs in requests
    ]


def compare(model, served, serve, tolerance):
    """Compares answers on random ragged sequences with the model in memory.

    Each row of a padded batch must be answered as the model answers the row alone. If
    `serve` takes no lengths, there is no padding.

    Args:
        model: What was exported, as it is in memory.
        served: `ServedModel` of it.
        serve: The signature `serve` of the loaded version.
        tolerance: Largest difference to pass, relative to the largest output where
            that exceeds 1.

    Returns:
        Dict with the largest difference found, the tolerance, and the name of a layer
        that destroys masks, or `None`: padding is then left out of the comparison.

    Raises:
        ExportMismatchError: Where an answer differs by more.
    """
    rng = np.random.default_rng(1)
    lengths = np.array([9, 1, 6, 4], "int32") + shortest_timesteps(served) - 1
    if served.batch_size is not None:
        lengths = np.resize(lengths, served.batch_size)
    fixed = served.inputs[served.sequences[0]].shape[1]
    timesteps = lengths.max() if fixed is None else fixed
    destroyer = None
    if served.takes_lengths:
        destroyer = served.reverses_time or destroys_masks(model)
    if fixed is not None or destroyer or not served.takes_lengths:
        lengths = np.full_like(lengths, timesteps)
    inputs = served.example_inputs(len(lengths), timesteps, rng)
    request = dict(inputs)
    if served.takes_lengths:
        for name in served.sequences:
            request[name] = _with_noise(inputs[name], lengths)
        request[LENGTHS] = tf.constant(lengths)
    answers = serve(**request)
    largest, where = 0.0, None
    for row, expected in enumerate(_alone(model, served, inputs, lengths)):
        for name, y, per_step in zip(
            served.outputs, expected, served.per_step, strict=True
        ):
            y = np.asarray(keras.ops.convert_to_numpy(y))
            found = answers[name].numpy()[row]
            if per_step:
                found = found[: lengths[row]]
            if y.dtype.kind not in "iub":
                y = y.astype("float32")
                scale = max(1.0, np.abs(y).max(initial=0.0))
                gap = np.abs(found - y[0]).max(initial=0.0) / scale
            else:
                gap = float(np.any(found != y[0]))
            if not gap <= largest:
                largest, where = float(gap), name
    if _half_precision(model):
        tolerance = max(tolerance, 1e-2)
    if not largest <= tolerance:
        raise ExportMismatchError(
            "The exported version must answer as the model does, to "
            f"{tolerance:g}. Received: output {where!r}, which differs by "
            f"{largest:.2g} on random sequences. Nothing was published."
        )
    if destroyer and fixed is None:
        warnings.warn(
            f"Padding counts as frames past {destroyer!r}, which does not hand masks "
            "on: answers depend on how far a request is padded.",
            stacklevel=2,
        )
    return {
        "largest_difference": largest,
        "tolerance": tolerance,
        "padding_counts_from": destroyer,
    }


def shortest_timesteps(served):
    """The fewest timesteps, of a few, that the model takes; 1 if it takes none."""
    rng = np.random.default_rng(0)
    for timesteps in (1, 16, 128, 1024):
        inputs = served.example_inputs(served.batch_size or 1, timesteps, rng)
        try:
            served.model(served.packed(inputs), training=False)
        except (tf.errors.OpError, ValueError, ZeroDivisionError):
            continue  # convolutions and pooling want more
        return timesteps
    return 1


def _with_noise(x, lengths):
    """Sequences with NaN past the lengths; integers stay random."""
    x = x.numpy()
    if x.dtype.kind == "f":
        x[np.arange(x.shape[1]) >= lengths[:, None]] = np.nan
    return tf.constant(x)


def _alone(model, served, inputs, lengths):
    """Yields, for each row, the model's flat outputs for that row alone."""
    for row, n in enumerate(lengths):
        alone = {name: x[row : row + 1] for name, x in inputs.items()}
        if served.takes_lengths:
            alone |= {name: alone[name][:, :n] for name in served.sequences}
        if served.batch_size is not None:
            alone = {n: tf.repeat(x, served.batch_size, 0) for n, x in alone.items()}
        packed = keras.tree.pack_sequence_as(
            structure_of(model, "input"), list(alone.values())
        )
        yield keras.tree.flatten(model(packed, training=False))


def destroys_masks(model):
    """The name of an operation past which padding counts as frames, or `None`."""
    for layer in operations_of(model):
        if isinstance(layer, (keras.layers.InputLayer, keras.layers.Embedding)):
            continue
        if _makes_masks(layer):
            continue
        if isinstance(layer, keras.Model):
            name = destroys_masks(layer)
            if name is not None:
                return name
        elif _takes_sequences(layer) and not getattr(layer, "supports_masking", False):
            return layer.name
    return None


def _makes_masks(layer):
    """A Functional model records how `Masking` and others compute their masks."""
    if isinstance(layer, keras.layers.Layer):
        return False
    return all(y.dtype == "bool" for y in keras.tree.flatten(layer.output))


def _takes_sequences(layer):
    try:
        return any(len(x.shape) > 2 for x in keras.tree.flatten(layer.input))
    except (AttributeError, ValueError):  # it is called several times
        return True


def _half_precision(model):
    return any(
        getattr(layer, "compute_dtype", None) in ("float16", "bfloat16")
        for layer in sublayers(model)
    )
