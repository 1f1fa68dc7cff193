"""Checks the shapes of a signature's inputs with operations in the graph."""

import tensorflow as tf


def require_shapes(tensors, shapes):
    """Checks the ranks and sizes of tensors when the graph runs.

    TensorFlow Serving does not compare the shapes of a request with the signature.
    Without this check, a tensor of a wrong shape would broadcast, or fail in the middle
    of the graph.

    The check adds two operations for each tensor and ten operations in all.

    Args:
        tensors: Dict of tensors.
        shapes: Dict from the name of each tensor to its shape, a sequence of sizes. A
            size is an int, or a str such as `"B"` for a free size. Sizes with the same
            str must be equal. `...` at the end stands for any further axes. The first
            tensor that has a free size defines its value.

    Returns:
        Dict of tensors that depend on the check. If the check fails, running these
        tensors raises `tf.errors.InvalidArgumentError`. The message names the first
        wrong tensor, its required shape, and the shapes of all tensors.
    """
    # One vector holds the constants, then the sizes of all tensors, with END (-1) after
    # the last size of each tensor. If all earlier tensors have the right rank, the
    # positions of a tensor's sizes in this vector are known.
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
    # Tensors of too low a rank shorten the vector: pad it to keep indices in range.
    parts.append([END] * len(where))
    every = tf.concat(parts, 0)
    given = every[len(constants) : len(constants) + len(where)]
    # A free size is compared with itself: the floor of 0 rejects END in its position.
    wanted = tf.maximum(tf.gather(every, where), floor)
    same = tf.equal(given, wanted)
    data = [tf.gather(messages, tf.argmin(same))]
    for name, shape in found.items():
        data += [f"`{name}`", shape]
    # `tf.debugging.Assert` would wrap this operation in a conditional of a dozen
    # operations.
    check = tf.raw_ops.Assert(condition=tf.reduce_all(same), data=data, summarize=8)
    with tf.control_dependencies([check]):
        return {name: tf.identity(x) for name, x in tensors.items()}


END = -1


def _shape_when_run(x):
    """Returns the shape of a tensor when the graph runs, never as a constant.

    `tf.shape` and Grappler replace a fully defined shape by a constant, although a
    request may have another shape. They cannot see the shape inside an `Optional`.
    """
    if x.shape.is_fully_defined():
        with tf.device("CPU:0"):  # the GPU kernel does not support strings
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
