"""Compaction: turns every mask into right padding.

A row's valid frames move to the front, in the direction of the layer. Then t, the index
of a frame, counts the valid frames of its own sequence; a recurrence needs no mask
inside its loop; and what is computed past the end of a row is dropped.

Indices select rows of flattened tensors (B*T, ...). Moving the frames replaces the
transposition to time-major frames, so it costs little more than that. The gradient of a
move is a move, too.
"""

from keras import ops

from keras_bnrnn import backend


class Frames:
    """The order in which a layer reads the frames of a batch.

    Args:
        mask: Boolean tensor (B, T), true at valid frames; `None` if all are valid.
        backwards: Whether the layer reads a sequence from its last frame.
        time_major: Whether frames are arranged as (T, B, ...); (B, T, ...) otherwise.

    Attributes:
        lengths: int32 tensor (B,), the number of valid frames of each row, or `None`.
        valid: Boolean tensor (T, B, 1) or (B, T, 1): whether a frame of the arranged
            ones is before the end of its row. `None` without a mask.
    """

    def __init__(self, mask, backwards=False, time_major=True):
        self._backwards = backwards
        self._time_major = time_major
        self.lengths = self.valid = None
        if mask is None:
            return
        self._batch, self._timesteps = batch, timesteps = ops.shape(mask)
        self._mask = mask
        # In the order of processing, each of shape (B, T): whether a frame is valid,
        # and the t of the last valid frame up to it, -1 if there is none.
        self._processed = ops.flip(mask, axis=1) if backwards else mask
        self._t = ops.cumsum(ops.cast(self._processed, "int32"), axis=1) - 1
        self.lengths = self._t[:, -1] + 1
        positions = ops.arange(timesteps, dtype="int32")
        self._rows = ops.arange(batch, dtype="int32")[:, None]
        is_valid = positions < self.lengths[:, None]
        self.valid = self._laid_out(is_valid)[..., None]
        # (B, T): the position of the frame of each t; those of padding come last.
        late = ops.where(self._processed, positions, positions + timesteps)
        self._position = ops.argsort(late, axis=1)

    def arrange(self, sequences):
        """The frames of sequences, in the order of their t.

        Args:
            sequences: Tensor of shape (B, T, ...).

        Returns:
            Tensor of shape (T, B, ...) or (B, T, ...); 0 past the end of a row.
            Masked positions, NaN included, have no effect and a gradient of 0.
        """
        if self.lengths is None:
            if self._backwards:
                sequences = ops.flip(sequences, axis=1)
            return self._laid_out(sequences)
        source = self._position
        t = self._t
        if self._backwards:
            source = self._timesteps - 1 - source
            t = ops.flip(t, axis=1)
        return _moved(
            sequences,
            self._laid_out(self._rows * self._timesteps + source),
            self.valid,
            self._index_of(t),
            self._mask[..., None],
        )

    def restore(self, outputs, repeat=False):
        """Outputs at the positions of their frames, in the order of processing.

        Args:
            outputs: Tensor of shape (T, B, ...) or (B, T, ...), in the order of t.
            repeat: Whether masked positions repeat the output before them. Before the
                first valid frame, and without `repeat`, they are 0.

        Returns:
            Tensor of shape (B, T, ...).
        """
        if self.lengths is None:
            return self._laid_out(outputs)
        move = _moved_and_repeated if repeat else _moved
        return move(
            outputs,
            self._index_of(self._t),
            self._processed[..., None],
            self._laid_out(self._rows * self._timesteps + self._position),
            self.valid,
        )

    def last_output(self, last, repeat=False):
        """The output at the last position, from that of the last valid frame (B, U).

        `repeat` is as in `restore`.
        """
        if self.lengths is None:
            return last
        shown = self.lengths > 0 if repeat else self._processed[:, -1]
        return ops.where(shown[:, None], last, ops.zeros((), last.dtype))

    def _laid_out(self, frames):
        """Exchanges (B, T, ...) and (T, B, ...) if frames are time-major."""
        if not self._time_major:
            return frames
        return ops.transpose(frames, (1, 0, *range(2, len(frames.shape))))

    def _index_of(self, t):
        """(B, T): the flat index of the arranged frames at t, those below 0 at 0."""
        t = ops.maximum(t, 0)
        if self._time_major:
            return t * self._batch + self._rows
        return self._rows * self._timesteps + t


def at_end(sequence, initial, lengths):
    """The states at the end of each row.

    Args:
        sequence: Tensor of shape (T, B, U), the states after each timestep.
        initial: Tensor of shape (B, U), the state of rows without a frame.
        lengths: int32 tensor (B,).

    Returns:
        Tensor of shape (B, U).
    """
    timesteps, batch = ops.shape(sequence)[:2]
    rows = ops.arange(batch, dtype="int32")
    last = ops.maximum(lengths, 1) - 1
    is_last = ops.arange(timesteps, dtype="int32")[:, None] == last  # (T, B)
    is_any = (lengths > 0)[:, None]
    index = last * batch + rows
    inverse = ops.broadcast_to(rows, (timesteps, batch))
    states = _moved(sequence, index, is_any, inverse, is_last[..., None], lead=1)
    return ops.where(is_any, states, initial)


def _moved(x, index, shown, inverse, present, lead=2):
    """Moves frames by an index, with a gradient that moves them back.

    Args:
        x: Tensor of shape (N, M, ...), or (N, ...) for an inverse of rank 1.
        index: int32 tensor, for each result the index of its frame in the flat `x`.
        shown: Boolean tensor of the shape of `index` and 1: where results are not 0.
        inverse: int32 tensor (N, M), for each frame of `x` the index of its result.
        present: Boolean tensor (N, M, 1): which frames of `x` have a result.
        lead: The rank of `index`.
    """

    def forward(x):
        return [_taken(x, index, shown, 2)], []

    def backward(arguments, kept, upstream):
        return [_taken(upstream[0], inverse, present, lead)]

    return backend.custom_gradient(lambda x: forward(x)[0], forward, backward)(x)[0]


def _moved_and_repeated(x, index, valid, inverse, present):
    """`_moved`, with results that repeat the valid one before them."""
    shown = ops.logical_or(valid, ops.cumsum(ops.cast(valid, "int32"), axis=1) > 0)

    def forward(x):
        return [_taken(x, index, shown, 2)], []

    def backward(arguments, kept, upstream):
        (d,) = upstream
        gradient = _taken(d, inverse, present, 2)
        repeated = ops.where(
            ops.logical_and(shown, ops.logical_not(valid)), d, ops.zeros((), d.dtype)
        )

        def with_repeated():
            flat = _flat(repeated, 2)
            count = ops.shape(x)[0] * ops.shape(x)[1]
            sums = ops.segment_sum(flat, ops.reshape(index, (-1,)), count)
            return gradient + ops.reshape(sums, ops.shape(x))

        # A loss seldom looks at masked outputs, and the sum costs more than the move.
        return [ops.cond(ops.any(repeated != 0), with_repeated, lambda: gradient)]

    return backend.custom_gradient(lambda x: forward(x)[0], forward, backward)(x)[0]


def _taken(x, index, shown, lead):
    """The frames of `x`, whose first `lead` axes count frames, at flat indices."""
    taken = ops.take(_flat(x, lead), index, axis=0)
    rank = len(taken.shape)
    while len(shown.shape) < rank:
        shown = shown[..., None]
    return ops.where(shown, taken, ops.zeros((), x.dtype))


def _flat(x, lead):
    """`x` with its first `lead` axes as one."""
    return ops.reshape(x, (-1, *x.shape[2:])) if lead == 2 else x
