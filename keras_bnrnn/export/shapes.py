"""Checks the shapes of a signature's inputs by operations of the graph."""

import tensorflow as tf


def require_shapes(tensors, shapes):
    """Checks the ranks and sizes of tensors when the graph runs.

    TensorFlow Serving does not compare a request with the shapes of the signature. A
    tensor of a wrong shape would broadcast, or fail in the middle of the graph.

    The check costs two operations a tensor and ten more, whatever the ranks.

    Args:
        tensors: Dict of tensors.
        shapes: Dict of the shape of each of them, a sequence of sizes: an int, or a
            str such as `"B"` for a free size, which is the same wherever that str
            stands. `...` at the end stands for any further axes. The first tensor
            with a free size defines it.

    Returns:
        Dict of tensors that depend on the check. If it fails, running them raises
        `tf.errors.InvalidArgumentError`, whose text names the first wrong tensor, the
        shape that it must have, and the shapes of all.
    """
    # The sizes of all tensors in one vector, with -1 behind the last size of each. As
    # long as the tensors before it are right, a tensor's sizes have fixed places.
    constants = {END: 0}
    for shape in shapes.values():
        for size in shape:
            if isinstance(size, int):
                constants.setdefault(size, len(constants))
    where, floor, messages, first_with = [], [], [], {}
    for name, shape in shapes.items():
        sizes = [size for size in shape if size is not ...]
        message = _message(name, shape, first_with)
        for size in [*sizes, END]:
            here = len(constants) + len(where)
            if isinstance(size, str):
                where.append(first_with.setdefault(size, (here, name))[0])
            else:
                where.append(constants[size])
            floor.append(END if size == END else 0)
            messages.append(message)

    found = {name: _shape_when_run(x) for name, x in tensors.items()}
    parts = [list(constants)]
    for name, shape in shapes.items():
        some = found[name][: len(shape) - 1] if ... in shape else found[name]
        parts += [some, [END]]
    # Tensors of too few axes leave the vector shorter, and no index must miss it.
    parts.append([END] * len(where))
    every = tf.concat(parts, 0)
    given = every[len(constants) : len(constants) + len(where)]
    # A free size equals itself, but an end must not pass for it.
    wanted = tf.maximum(tf.gather(every, where), floor)
    same = tf.equal(given, wanted)
    data = [tf.gather(messages, tf.argmin(same))]
    for name, shape in found.items():
        data += [f"`{name}`", shape]
    # Not `tf.debugging.Assert`: it wraps this operation in a conditional of a dozen.
    check = tf.raw_ops.Assert(condition=tf.reduce_all(same), data=data, summarize=8)
    with tf.control_dependencies([check]):
        return {name: tf.identity(x) for name, x in tensors.items()}


END = -1


def _shape_when_run(x):
    """The shape of a tensor, as a tensor that no optimizer replaces by a constant.

    `tf.shape` and Grappler take a shape for a fact if the signature fixes all of it.
    They do not look into an `Optional`.
    """
    if x.shape.is_fully_defined():
        with tf.device("CPU:0"):  # the GPU's kernel takes no strings
            wrapped = tf.raw_ops.OptionalFromValue(components=[x])
            (x,) = tf.raw_ops.OptionalGetValue(
                optional=wrapped, output_types=[x.dtype], output_shapes=[None]
            )
    return tf.shape(x)


def _message(name, shape, first_with):
    sizes = ", ".join("..." if size is ... else str(size) for size in shape)
    if len(shape) == 1:
        sizes += ","
    text = f"`{name}` must have the shape ({sizes})"
    owners = {}
    for size in shape:
        if isinstance(size, str) and size in first_with:
            owners.setdefault(first_with[size][1], []).append(size)
    for owner, free in owners.items():
        text += f", with the {' and '.join(free)} of `{owner}`"
    return f"{text}. Received the shapes:"
