"""Runs loops over timesteps by TensorFlow.

In a plain graph a loop can be cut into blocks of timesteps. What one product computes
for all timesteps of a block stays in the cache until the loop has used it.
"""

import tensorflow as tf

from keras_bnrnn.backend.context import compiled_by_xla, in_plain_graph

# The number of blocks that `scan_blocks` runs at the same time. No block needs the sums
# of another one. If TensorFlow may run 10 blocks, as by default, many sums wait, and
# what they read is kept: three GRU layers then need 1.5 times the memory.
BLOCKS_AT_ONCE = 2


def run_turns(turn, start, end, values, step=1, length=1, exact=False):
    """Calls a function for the timesteps from `start` to before `end`, in a graph.

    Args:
        turn: Function `(t, values)` that returns the next values.
        start, end: Ints or int32 scalar tensors.
        values: Nested structure of tensors and of `tf.TensorArray`.
        step: 1, or -1 to run to timesteps before `start`. Default: 1.
        length: The number of timesteps in each turn of the loop. Another loop runs the
            timesteps that are left. Default: 1.
        exact: Whether the number of timesteps is a multiple of `length`, where `start`
            or `end` is a tensor. Then there is no other loop. Default: `False`.

    Returns:
        The last values.
    """
    known = isinstance(start, int) and isinstance(end, int)
    total = max((end - start) * step, 0) if known else None

    def loop(t, values, length):
        def body(t, values):
            for k in range(length):
                values = turn(t + k * step if k else t, values)
            return t + length * step, values

        def is_left(t, _):
            last = t + (length - 1) * step if length > 1 else t
            return last < end if step > 0 else last > end

        return tf.while_loop(is_left, body, (t, values), parallel_iterations=32)

    t = tf.convert_to_tensor(start)
    if total is None or total >= length:
        t, values = loop(t, values, length)
    if length > 1 and (total % length if known else not exact):
        _, values = loop(t, values, 1)
    return values


def scan(
    body,
    carry,
    sequences,
    specs,
    length,
    unroll=False,
    reverse=False,
    differentiable=False,
    ahead=False,
    stacks=None,
    turns=None,
    prepare=None,
    block=None,
    in_place=None,
    turn_length=1,
):
    """Runs a loop over timesteps.

    Args:
        body: Function `body(carry, elements)` of two lists of tensors. `elements` holds
            the timestep of each sequence. It returns the next carry and the list of the
            tensors to stack.
        carry: List of tensors, the first carry.
        sequences: Tensors of shape (T, ...), read one timestep at a time. An element
            may be what `unstacked` returns.
        specs: Shape and dtype of each tensor to stack.
        length: T, an int or a tensor.
        unroll: Whether to unroll the loop. T must then be an int. Default: `False`.
        reverse: Whether t runs from T - 1 to 0. Default: `False`.
        differentiable: Whether the backend can differentiate the loop. Otherwise
            timesteps are read as slices. Slices cost least, but the gradient of each
            slice has the size of the whole sequence. Default: `False`.
        ahead: Whether to read each timestep one turn ahead, where XLA compiles the
            loop. It has no effect with `unroll`. Default: `False`.
        stacks: The number of tensors to stack, the first ones of `specs`. Where
            `in_plain_graph()`, the other ones are left as they are, one tensor for each
            timestep. `None` (default): all are stacked.
        turns: The number of turns, T or 0, an int or a tensor. Stacked tensors are 0 if
            there is no turn. `None` (default): T.
        prepare: Function that computes, from a block (n, ...) of the first sequence,
            the list of the blocks that the loop reads instead. It needs
            `in_plain_graph()`, and has no effect on the other sequences. Not with
            `unroll`, `reverse` or `ahead`. Default: `None`.
        block: The number of timesteps of a block, an int or a tensor. Only with
            `prepare`.
        in_place: Index of a tensor to stack. XLA writes its stack over the first
            sequence, which has the same shape and dtype, and so needs memory for one of
            the two. Not with `unroll` or `ahead`. `None` (default): for none.
        turn_length: The number of timesteps in a turn of the loop, in a plain graph and
            without `differentiable`. Default: 1.

    Returns:
        The last carry, and the list of stacked tensors (T, ...) in the order of t. For
        tensors left unstacked the list has what `unstacked` needs.
    """
    readers = [
        _reader(sequence, length, differentiable and not unroll)
        for sequence in sequences
    ]
    if unroll:
        kept = {}
        for t in reversed(range(length)) if reverse else range(length):
            carry, kept[t] = body(carry, [read(t) for read in readers])
        return list(carry), [
            tf.stack([kept[t][i] for t in range(length)]) for i in range(len(specs))
        ]

    plain = in_plain_graph() and not differentiable
    exact = _divides(turn_length, length)
    if prepare is not None:
        block = _whole_turns(block, turn_length)
    stacks_all = stacks is None and turns is None and prepare is None
    if plain and turn_length > 1 and not reverse and stacks_all:
        return _in_long_turns(body, carry, readers, specs, length, turn_length)

    arrays = [
        tf.TensorArray(dtype, size=length, element_shape=tf.TensorShape(shape))
        for shape, dtype in specs
    ]
    if not compiled_by_xla():
        in_place, ahead = None, False
    if in_place is not None:
        arrays[in_place] = arrays[in_place].unstack(sequences[0])
        del readers[0]
    arrays = tuple(arrays)
    last = length - 1

    def elements_at(i):
        return tuple(read(last - i if reverse else i) for read in readers)

    def elements_ahead(i, arrays):
        """Returns what turn i gets from the turn before it."""
        if in_place is not None:
            return (arrays[in_place].read(last - i if reverse else i),)
        return elements_at(i) if ahead else ()

    def run(start, end, carry, arrays, elements_at, maximum=None):
        """Runs the turns from `start` to before `end`."""

        def turn(i, values):
            carry, elements, arrays = values
            elements_now = elements if ahead else (*elements, *elements_at(i))
            carry, kept = body(list(carry), list(elements_now))
            t = last - i if reverse else i
            arrays = tuple(a.write(t, k) for a, k in zip(arrays, kept, strict=True))
            # A turn writes, and then reads for the next one. If it also read from the
            # sequence before the write, XLA would copy the sequence in each turn.
            elements = elements_ahead(tf.minimum(i + 1, last), arrays)
            return tuple(carry), elements, arrays

        values = tuple(carry), elements_ahead(0, arrays), arrays
        if plain:
            carry, _, arrays = run_turns(
                turn, start, end, values, length=turn_length, exact=exact
            )
            return carry, arrays
        _, (carry, _, arrays) = tf.while_loop(
            lambda i, _: i < end,
            lambda i, values: (i + 1, turn(i, values)),
            (tf.convert_to_tensor(start), values),
            # XLA differentiates a loop of a known number of turns only.
            maximum_iterations=maximum,
            parallel_iterations=32,
            swap_memory=True,
        )
        return carry, arrays

    if prepare is None:
        end = length if turns is None else turns
        carry, arrays = run(0, end, carry, arrays, elements_at, length)
    else:

        def run_block(k, carry, arrays):
            start, end = ends(k, block, length)
            prepared = prepare(sequences[0][start:end])

            def elements_of_block(i):
                first = [block[i - start] for block in prepared]
                return *first, *(read(i) for read in readers[1:])

            return k + 1, *run(start, end, carry, arrays, elements_of_block)

        blocks = _number_of_blocks(length, block, turns)
        _, carry, arrays = tf.while_loop(
            lambda k, *_: k < blocks, run_block, (tf.constant(0), tuple(carry), arrays)
        )
    rows = tf.shape(carry[0])[:1] if carry else None

    def result(i):
        if stacks is not None and i >= stacks and in_plain_graph():
            return arrays[i].flow
        if turns is None:
            return arrays[i].stack()
        return Unstacked(arrays[i].flow, specs[i]).stack(rows)

    return list(carry), [result(i) for i in range(len(specs))]


def _in_long_turns(body, carry, readers, specs, length, turn_length):
    """Does what `scan` does, where each turn of the loop writes one stack of timesteps.

    Converters to ONNX support one write in a turn.
    """
    count = length // turn_length

    def loop(carry, turns, first, width):
        arrays = tuple(
            tf.TensorArray(dtype, size=turns, element_shape=[width, *shape])
            for shape, dtype in specs
        )

        def turn(k, values):
            carry, arrays = values
            found = []
            for j in range(width):
                t = first + k * width + j
                carry, kept = body(list(carry), [read(t) for read in readers])
                found.append(kept)
            stacks = [tf.stack(tensors) for tensors in zip(*found, strict=True)]
            arrays = tuple(a.write(k, s) for a, s in zip(arrays, stacks, strict=True))
            return tuple(carry), arrays

        carry, arrays = run_turns(turn, 0, turns, (tuple(carry), arrays))
        return carry, [
            stacked(array, shape, turns, width)
            for array, (shape, _) in zip(arrays, specs, strict=True)
        ]

    def stacked(array, shape, turns, width):
        """Stacks the timesteps of all turns: (turns * width, ...)."""
        shape = tf.TensorShape(shape)
        stack = tf.raw_ops.TensorListStack(
            input_handle=array.flow,
            # In full: there may be no turn, and so no tensor with a shape to read.
            element_shape=tf.concat([[width], _full_shape(shape, rows)], axis=0),
            element_dtype=array.dtype,
        )
        # Not -1, which is any number if there are no rows. And not the shape of the
        # stack, which tf2onnx computes wrongly.
        timesteps = tf.reshape(turns * width, [1])
        flat = tf.reshape(stack, tf.concat([timesteps, tf.shape(stack)[2:]], axis=0))
        return tf.ensure_shape(flat, (None, *shape))

    rows = tf.shape(carry[0])[:1] if carry else None
    parts = []
    if not isinstance(length, int) or count:
        carry, stacks = loop(carry, count, 0, turn_length)
        parts.append(stacks)
    if not _divides(turn_length, length) or not count:
        whole = count * turn_length
        carry, stacks = loop(carry, length - whole, whole, 1)
        parts.append(stacks)
    known = length if isinstance(length, int) else None
    joined = [
        stacks[0] if len(stacks) == 1 else tf.concat(stacks, axis=0)
        for stacks in zip(*parts, strict=True)
    ]
    return list(carry), [tf.ensure_shape(x, (known, *x.shape[1:])) for x in joined]


def scan_blocks(
    body,
    carry,
    sequences,
    specs,
    length,
    block,
    sums,
    of_block,
    finished,
    finish,
    width,
    turns=None,
    in_place=None,
    turn_length=1,
):
    """Runs a loop from the last timestep to the first, and sums over blocks of it.

    In a plain graph, the tensors of a block of timesteps are stacked and summed while
    they are in the cache. XLA has one block.

    Args:
        body, carry, sequences, turns, in_place, turn_length: As for `scan`.
        specs: Shape and dtype of each tensor to stack.
        length: T, an int or a tensor.
        block: The number of timesteps of a block, an int or a tensor.
        sums: List of tensors, where the sums start. Their dtypes are those of the sums.
        of_block: Function `(carry, stacks, start, end)` that returns the list of what
            the timesteps from `start` to before `end` add to the sums. `carry` is what
            the block starts from, `stacks` are its tensors (end - start, ...).
        finished: The indices of the stacks that `finish` gets.
        finish: Function that computes a tensor (n, B, F) from a list of stacks (n, ...)
            of a block of n timesteps. Where nothing needs its results, TensorFlow does
            not call it.
        width: F.

    Returns:
        The last carry, the results of `finish` for all timesteps, (T, B, F), and the
        list of sums.
    """
    if not in_plain_graph():
        last, stacks = scan(
            body,
            carry,
            sequences,
            specs,
            length,
            reverse=True,
            turns=turns,
            in_place=in_place,
        )
        sums = added(sums, of_block(carry, stacks, 0, length))
        return last, finish([stacks[i] for i in finished]), sums

    readers = [_reader(sequence, length, False) for sequence in sequences]
    exact = _divides(turn_length, length)
    block = _whole_turns(block, turn_length)

    def run_block(start, end, carry):
        first = list(carry)
        carry, stacks = turns_back(
            lambda t, carry: body(carry, [read(t) for read in readers]),
            carry,
            specs,
            start,
            end,
            turn_length,
            exact,
        )
        stacks_left = [stacks[i] for i in finished]
        return carry, stacks_left, of_block(first, stacks, start, end)

    carry, results, sums = blocks_back(
        run_block,
        carry,
        [specs[i] for i in finished],
        length,
        block,
        sums,
        finish,
        width,
        turns,
        BLOCKS_AT_ONCE,
    )
    known = length if isinstance(length, int) else None
    if turns is not None:
        results = tf.reshape(results, [length, tf.shape(carry[0])[0], width])
    return carry, tf.ensure_shape(results, (known, *results.shape[1:])), sums


def turns_back(body, carry, specs, start, end, turn_length=1, exact=False, last=None):
    """Runs a loop from the timestep before `end` to `start`, in a plain graph.

    Args:
        body: Function `(t, carry)` that returns the next carry and the list of the
            tensors to stack.
        carry: List of tensors, the first carry.
        specs: Shape and dtype of each tensor to stack.
        start, end: Ints or int32 scalar tensors.
        turn_length: As for `scan`.
        exact: As for `run_turns`.
        last: Function as `body` that runs the timestep `start` after the loop. `None`
            (default): `body` runs it.

    Returns:
        The last carry, and the list of the stacks (end - start, ...).
    """
    arrays = tuple(
        tf.TensorArray(dtype, size=end - start, element_shape=tf.TensorShape(shape))
        for shape, dtype in specs
    )

    def turn(t, values, body=body):
        carry, arrays = values
        carry, kept = body(t, list(carry))
        arrays = tuple(
            array.write(t - start, tensor)
            for array, tensor in zip(arrays, kept, strict=True)
        )
        return tuple(carry), arrays

    stop = start - 1 if last is None else start
    values = tuple(carry), arrays
    values = run_turns(turn, end - 1, stop, values, -1, turn_length, exact)
    if last is not None:
        values = turn(start, values, last)
    carry, arrays = values
    return list(carry), [array.stack() for array in arrays]


def blocks_back(
    run_block,
    carry,
    specs,
    length,
    block,
    sums,
    finish,
    width,
    turns=None,
    at_once=10,
):
    """Runs blocks of timesteps from the last to the first, in a plain graph.

    Args:
        run_block: Function `(start, end, carry)` that runs the timesteps from the one
            before `end` to `start`. It returns the next carry, a list of stacks
            (end - start, ...), and the list of what the block adds to the sums.
        carry: List of tensors, the first carry. The first one has B rows.
        specs: Shape and dtype of a timestep of each stack.
        length, block, sums, width, turns: As for `scan_blocks`.
        finish: As for `scan_blocks`, of the stacks of a block.
        at_once: The number of blocks that may run at the same time. Default: 10.

    Returns:
        As `scan_blocks`. There are no finished timesteps if there is no turn.
    """
    blocks = _number_of_blocks(length, block, turns)
    (batch, *_), dtype = specs[0]

    def run(k, carry, sums, arrays):
        start, end = ends(k, block, length)
        carry, stacks, terms = run_block(start, end, list(carry))
        arrays = tuple(a.write(k, s) for a, s in zip(arrays, stacks, strict=True))
        return k - 1, tuple(carry), tuple(added(sums, terms)), arrays

    def array_of(shape):
        # The last block may be shorter.
        return tf.TensorArray(
            dtype,
            size=blocks,
            element_shape=tf.TensorShape([None, *shape]),
            infer_shape=False,
        )

    arrays = tuple(array_of(tf.TensorShape(shape)) for shape, _ in specs)
    _, carry, sums, arrays = tf.while_loop(
        lambda k, *_: k >= 0,
        run,
        (blocks - 1, tuple(carry), tuple(sums), arrays),
        parallel_iterations=at_once,
    )
    rows = tf.shape(carry[0])[0]
    # TensorFlow removes this loop if nothing needs what it computes.
    _, finished = tf.while_loop(
        lambda k, *_: k < blocks,
        lambda k, finished: (
            k + 1,
            finished.write(k, finish([array.read(k) for array in arrays])),
        ),
        (tf.constant(0), array_of((batch, width))),
    )
    finished = concatenated(finished.flow, rows, width, dtype)
    return list(carry), tf.ensure_shape(finished, (None, batch, width)), list(sums)


def concatenated(handle, rows, width, dtype):
    """Concatenates the tensors (n, B, F) of a list over n.

    Args:
        handle: Variant tensor, a list of TensorFlow.
        rows: B. In full: there is no shape to read in an empty list.
        width: F.
        dtype: Of the tensors.
    """
    return tf.raw_ops.TensorListConcatV2(
        input_handle=handle,
        element_shape=tf.stack([-1, rows, width]),
        leading_dims=tf.zeros([0], tf.int64),
        element_dtype=dtype,
    ).tensor


def _divides(turn_length, length):
    """Returns whether T is known to be a multiple of the timesteps of a turn.

    Args:
        turn_length: The number of timesteps of a turn.
        length: T, an int or a tensor. Of a tensor it is not known.
    """
    return isinstance(length, int) and length % turn_length == 0


def _whole_turns(block, turn_length):
    """Returns the number of timesteps of a block, rounded to whole turns."""
    return tf.maximum(block // turn_length, 1) * turn_length


def _number_of_blocks(length, block, turns):
    """Returns the number of blocks, 0 if there is no turn."""
    blocks = -(-length // block)
    return blocks if turns is None else tf.where(tf.equal(turns, 0), 0, blocks)


def ends(k, block, length):
    """Returns the first timestep of block k, and the one after its last."""
    start = k * block
    return start, tf.minimum(start + block, length)


def added(sums, terms):
    """Adds two lists of tensors, one by one, with the dtypes of the first."""
    return [a + tf.cast(b, a.dtype) for a, b in zip(sums, terms, strict=True)]


class Unstacked:
    """A sequence of T tensors of one shape, as `tf.TensorArray` holds them in a graph.

    Args:
        handle: Variant tensor, the `flow` of a `tf.TensorArray`.
        spec: Shape and dtype of a timestep.
    """

    def __init__(self, handle, spec):
        self._handle = handle
        self._shape, self._dtype = tf.TensorShape(spec[0]), spec[1]

    def read(self, t):
        element = tf.raw_ops.TensorListGetItem(
            input_handle=self._handle,
            index=t,
            element_shape=tf.constant(-1),  # any
            element_dtype=self._dtype,
        )
        element.set_shape(self._shape)
        return element

    def between(self, start, end, rows):
        """Stacks the timesteps from `start` to before `end`; `rows` as in `stack`."""
        stack = tf.raw_ops.TensorListGather(
            input_handle=self._handle,
            indices=tf.range(start, end),
            element_shape=_full_shape(self._shape, rows),
            element_dtype=self._dtype,
        )
        return tf.ensure_shape(stack, (None, *self._shape))

    def stack(self, rows):
        """Stacks the tensors (B, ...), zeros where no turn of a loop wrote one.

        Args:
            rows: int32 tensor of shape (1,), B.
        """
        stack = tf.raw_ops.TensorListStack(
            input_handle=self._handle,
            element_shape=_full_shape(self._shape, rows),
            element_dtype=self._dtype,
        )
        return tf.ensure_shape(stack, (None, *self._shape))


def _full_shape(shape, rows):
    """Returns the shape of a timestep, with `rows` (1,) for an unknown first size."""
    if shape.rank and shape[0] is None:
        return tf.concat([rows, shape[1:]], axis=0)
    return shape


def unstacked(tensor, spec):
    """Makes a sequence that `scan` reads from a tensor that it left unstacked.

    Args:
        tensor: The tensor.
        spec: Shape and dtype of a timestep.
    """
    return Unstacked(tensor, spec) if tensor.dtype == tf.variant else tensor


def between(sequence, start, end, like):
    """Stacks the timesteps from `start` to before `end` of a sequence.

    Args:
        sequence: As `unstacked` returns it, of tensors (B, F).
        start, end: Ints or scalar tensors.
        like: Tensor of B rows.
    """
    if not isinstance(sequence, Unstacked):
        return sequence[start:end]
    return sequence.between(start, end, tf.shape(like)[:1])


def _reader(sequence, length, differentiable):
    """Returns a function that reads the timestep t of a sequence."""
    if isinstance(sequence, Unstacked):
        return sequence.read
    if not differentiable:
        return lambda t: sequence[t]
    array = tf.TensorArray(
        sequence.dtype, size=length, element_shape=sequence.shape[1:]
    )
    return array.unstack(sequence).read
