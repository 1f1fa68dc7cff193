"""Compaction: turns every mask into right padding.

The valid frames of a row move to the front, in the direction of the layer. The index t
of a moved frame counts the valid frames of its own sequence. A recurrence then needs no
mask inside its loop: results past the end of a row are dropped.

Indices select rows of flattened tensors (B*T, ...). Moving the frames replaces the
transposition to time-major frames, and costs little more. The gradient of a move is a
move, too.
"""

from keras import ops

from keras_bnrnn import backend


class Frames:
    """The order in which a layer reads the frames of a batch.

    Args:
        mask: Boolean tensor (B, T), true at valid frames; `None` if all are valid.
        backwards: Whether the layer reads a sequence from its last frame. Default:
            `False`.
        time_major: Whether arranged frames have the shape (T, B, ...), otherwise
            (B, T, ...). Default: `True`.

    Attributes:
        lengths: int32 tensor (B,), the number of valid frames of each row, or `None`.
        valid: Boolean tensor (T, B, 1) or (B, T, 1), true at arranged frames before
            the end of their row. `None` without a mask.
    """

    def __init__(self, mask, backwards=False, time_major=True):
        self._backwards = backwards
        self._time_major = time_major
        self.lengths = self.valid = None
        if mask is None:
            return
        self._batch, self._timesteps = batch, timesteps = ops.shape(mask)
        self._mask = mask
        # (B, T) in the order of processing: `_processed` is true at valid frames, and
        # `_t` is the t of the last valid frame so far, -1 before the first one.
        self._processed = ops.flip(mask, axis=1) if backwards else mask
        self._t = ops.cumsum(ops.cast(self._processed, "int32"), axis=1) - 1
        self.lengths = ops.sum(ops.cast(mask, "int32"), axis=1)
        positions = ops.arange(timesteps, dtype="int32")
        self._rows = ops.arange(batch, dtype="int32")[:, None]
        is_valid = positions < self.lengths[:, None]
        self.valid = self._laid_out(is_valid)[..., None]
        # (B, T): the position of the frame of each t. Masked positions come last.
        late = ops.where(self._processed, positions, positions + timesteps)
        self._position = ops.argsort(late, axis=1)

    def arrange(self, sequences):
        """Moves the valid frames of each row to the front, in the order of their t.

        Args:
            sequences: Tensor of shape (B, T, ...).

        Returns:
            Tensor of shape (T, B, ...) or (B, T, ...), 0 past the end of a row.
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
        """Moves outputs back to the positions of their frames.

        Args:
            outputs: Tensor of shape (T, B, ...) or (B, T, ...), in the order of t.
            repeat: Whether masked positions repeat the output before them. Without
                `repeat`, and before the first valid frame, they are 0. Default:
                `False`.

        Returns:
            Tensor of shape (B, T, ...), in the order of processing.
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
        """Returns the output at the last position.

        Args:
            last: Tensor of shape (B, U), the output at the last valid frame.
            repeat: As in `restore`.

        Returns:
            Tensor of shape (B, U).
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
        """Returns flat indices (B, T) of arranged frames; a negative t counts as 0."""
        t = ops.maximum(t, 0)
        if self._time_major:
            return t * self._batch + self._rows
        return self._rows * self._timesteps + t


def at_end(sequence, initial, lengths, time_major=True):
    """Selects the states at the end of each row.

    Args:
        sequence: Tensor of shape (T, B, U), the states after each timestep.
        initial: Tensor of shape (B, U), the states of rows without a valid frame.
        lengths: int32 tensor (B,).
        time_major: Whether `sequence` is time-major; otherwise its shape is (B, T, U).
            Default: `True`.

    Returns:
        Tensor of shape (B, U).
    """
    first, second = ops.shape(sequence)[:2]
    timesteps, batch = (first, second) if time_major else (second, first)
    rows = ops.arange(batch, dtype="int32")
    positions = ops.arange(timesteps, dtype="int32")
    last = ops.maximum(lengths, 1) - 1
    is_any = (lengths > 0)[:, None]
    if time_major:
        index = last * batch + rows
        is_last = positions[:, None] == last  # (T, B)
        inverse = ops.broadcast_to(rows, (timesteps, batch))
    else:
        index = rows * timesteps + last
        is_last = positions == last[:, None]  # (B, T)
        inverse = ops.broadcast_to(rows[:, None], (batch, timesteps))
    states = _moved(sequence, index, is_any, inverse, is_last[..., None], lead=1)
    return ops.where(is_any, states, initial)


def _moved(x, index, shown, inverse, present, lead=2):
    """Moves frames by an index, with a gradient that moves them back.

    Args:
        x: Tensor of shape (N, M, ...), or (N, ...) for an inverse of rank 1.
        index: int32 tensor, the index of the frame of each result in the flat `x`.
        shown: Boolean tensor of shape `(*index.shape, 1)`. Results are 0 where it is
            false.
        inverse: int32 tensor (N, M), the index of the result of each frame of `x`.
        present: Boolean tensor (N, M, 1), true at frames of `x` that have a result.
        lead: The rank of `index`.
    """

    def forward(x):
        return [_taken(x, index, shown, 2)], []

    def backward(arguments, kept, upstream):
        return [_taken(upstream[0], inverse, present, lead)]

    return backend.custom_gradient(lambda x: forward(x)[0], forward, backward)(x)[0]


def _moved_and_repeated(x, index, valid, inverse, present):
    """Moves frames as `_moved`; masked results repeat the valid one before them."""
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

        # Few losses depend on masked outputs, and the sum costs more than the move.
        return [ops.cond(ops.any(repeated != 0), with_repeated, lambda: gradient)]

    return backend.custom_gradient(lambda x: forward(x)[0], forward, backward)(x)[0]


def _taken(x, index, shown, lead):
    """Gathers frames of `x` at flat indices; the first `lead` axes count frames."""
    taken = ops.take(_flat(x, lead), index, axis=0)
    rank = len(taken.shape)
    while len(shown.shape) < rank:
        shown = shown[..., None]
    return ops.where(shown, taken, ops.zeros((), x.dtype))


def _flat(x, lead):
    """Merges the first `lead` axes of `x` into one."""
    return ops.reshape(x, (-1, *ops.shape(x)[2:])) if lead == 2 else x
