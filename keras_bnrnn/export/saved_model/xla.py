"""Makes the signature `serve_xla`, which XLA compiles for given sizes."""

import numbers

import tensorflow as tf

from keras_bnrnn.export.names import LENGTHS
from keras_bnrnn.export.shapes import require_shapes


def check_buckets(buckets):
    """Checks a list of `(B, T)` and returns it sorted by size, smallest first."""
    if buckets is None:
        return []
    whole = isinstance(buckets, (list, tuple)) and all(
        isinstance(bucket, (list, tuple))
        and len(bucket) == 2
        and all(
            isinstance(n, numbers.Integral) and not isinstance(n, bool) and n > 0
            for n in bucket
        )
        for bucket in buckets
    )
    if not whole:
        raise ValueError(
            "`xla_buckets` must be a list of pairs (B, T) of positive integers. "
            f"Received: xla_buckets={buckets!r}"
        )
    pairs = {(int(rows), int(timesteps)) for rows, timesteps in buckets}
    return sorted(pairs, key=lambda bucket: (bucket[0] * bucket[1], bucket))


def xla_function(served, buckets):
    """Makes `serve_xla`, which pads a request to a bucket and runs its XLA program."""
    interface = served.interface
    for name, x in interface.inputs.items():
        fixed = [(0, x.shape[0])]
        if name in interface.sequences:
            fixed.append((1, x.shape[1]))
        if x.dtype == "string" or any(n is not None for _, n in fixed):
            raise ValueError(
                "`xla_buckets` needs numeric inputs with a free batch size and T. "
                f"Received: input {name!r} of {x.dtype} and shape {x.shape}"
            )
    inputs = interface.specs()
    lengths_spec = tf.TensorSpec([None], tf.int32, name=LENGTHS)
    shapes = {**interface.shapes(), LENGTHS: [interface.rows]}

    @tf.function(jit_compile=True, autograph=False)
    def compiled(tensors, lengths):
        return served.predict(tensors, lengths, compiled=True)

    def in_bucket(tensors, lengths, bucket):
        rows, timesteps = bucket
        first = tensors[interface.sequences[0]]
        batch_size, own_timesteps = tf.shape(first)[0], tf.shape(first)[1]
        padded = {}
        for name, x in tensors.items():
            sizes = [rows, timesteps] if name in interface.sequences else [rows]
            padded[name] = _padded(x, sizes)
        lengths = tf.clip_by_value(lengths, 0, own_timesteps)
        answers = compiled(padded, _padded(lengths, [rows]))
        per_step = interface.per_step
        return {
            name: y[:batch_size, :own_timesteps] if per_step[name] else y[:batch_size]
            for name, y in answers.items()
        }

    @tf.function(autograph=False, input_signature=[*inputs.values(), lengths_spec])
    def serve_xla(*tensors):
        tensors = dict(zip([*inputs, LENGTHS], tensors, strict=True))
        tensors = require_shapes(tensors, shapes)
        lengths = tensors.pop(LENGTHS)
        shape = tf.shape(tensors[interface.sequences[0]])[:2]
        fits = tf.reduce_all(shape <= tf.constant(buckets), axis=1)
        smallest = tf.argmax(tf.concat([fits, [True]], 0), output_type=tf.int32)
        branches = [
            lambda bucket=bucket: in_bucket(tensors, lengths, bucket)
            for bucket in buckets
        ]
        branches.append(lambda: served.predict(tensors, lengths))
        return tf.switch_case(smallest, branches)

    return serve_xla


def _padded(x, sizes):
    """Pads a tensor with zeros at the end, so that its first axes have `sizes`."""
    behind = [size - tf.shape(x)[axis] for axis, size in enumerate(sizes)]
    behind += [0] * (len(x.shape) - len(sizes))
    padded = tf.pad(x, [[0, n] for n in behind])
    padded.set_shape([*sizes, *x.shape[len(sizes) :]])
    return padded
