"""The time loops of the exported graph: for inference, on CPUs, without XLA.

A graph pays for each operation, a microsecond or so, and for each turn of a loop. So
the loop has few operations, and writes several timesteps out in a turn. One row of an
LSTM, where the products are small, runs TensorFlow's own `BlockLSTMV2`, one operation
for all timesteps. Many rows run in two slices of the batch side by side: a recurrence
cannot use a second core by itself, but rows can.
"""

import keras
import tensorflow as tf

from keras_bnrnn.layers.activations import elementwise

# Measured on 2 cores, relative to Keras' loop, T = 50: with 128 units and one row the
# loop takes 0.75 and BlockLSTMV2 0.5; with 32 rows one loop takes 1.05 and two slices
# 0.75. BlockLSTMV2 of several rows takes anything from 0.6 to 2.7, whether its products
# are split over the cores or not. Below 8 rows slices cost more than they bring, and
# more of them than cores bring nothing.
SLICED_FROM = 8
SLICES = 2

# Timesteps written out in one turn of a loop.
TURN = 4

tanh = keras.activations.tanh
sigmoid = keras.activations.sigmoid


def has_served_loop(layer):
    """Whether `served_loop` knows the equations of a recurrent layer."""
    stock = (keras.layers.SimpleRNN, keras.layers.LSTM, keras.layers.GRU)
    if type(layer) not in stock:
        return False
    gate = getattr(layer, "recurrent_activation", layer.activation)
    return elementwise(layer.activation, gate)


def joins_kernels(layer):
    """Whether `served_loop` takes `joined` weights for a layer."""
    return type(layer) is keras.layers.LSTM and has_served_loop(layer)


def served_loop(
    layer,
    sequences,
    states,
    mask,
    lengths=None,
    continues=False,
    joined=None,
    compiled=False,
    wants_states=True,
):
    """What `layer.inner_loop` gives at inference.

    Where the mask is that of lengths, the last output is that of the last valid frame,
    also with `zero_output_for_mask`: a row answers as if it were alone.

    Args:
        layer: A `keras.layers.SimpleRNN`, `LSTM` or `GRU`.
        sequences: Tensor (B, T, D).
        states: List of tensors (B, U).
        mask: Boolean tensor (B, T), or `None`.
        lengths: int32 tensor (B,), if the mask is that of lengths and nothing else.
        continues: Whether the states come from frames before. Until its first valid
            frame a sequence shows zeros, but one that continues its last output.
        joined: For an LSTM: kernel and recurrent kernel as one tensor, (D + U, 4U).
        compiled: Whether XLA compiles the loop, which knows no `BlockLSTMV2`.
        wants_states: Whether the states are used. If not, only the first is right.

    Returns:
        The last output (B, U), outputs (B, T, U) in the order of processing, and the
        list of states.
    """
    recurrence = _Recurrence(layer, sequences.dtype, joined)
    if lengths is not None:
        lengths = tf.clip_by_value(lengths, 0, tf.shape(sequences)[1])
    if layer.go_backwards:
        # With lengths: padding stays behind, where nothing needs to step over it.
        sequences = _reversed_frames(sequences, lengths)
        if mask is not None and lengths is None:
            mask = tf.reverse(mask, [1])

    if sequences.shape[1] == 1:
        states = recurrence.one_step(sequences[:, 0], list(states), mask)
        outputs = states[0][:, None]
    else:
        rows = [sequences, mask if lengths is None else lengths, *states]

        def run(frames, valid, *states):
            of_lengths = lengths is not None
            return recurrence.run(
                frames,
                list(states),
                mask=None if of_lengths else valid,
                lengths=valid if of_lengths else None,
                wants_states=wants_states,
            )

        if compiled:
            outputs, *states = run(*rows)
        elif recurrence.has_block and (mask is None or lengths is not None):
            outputs, *states = tf.cond(
                tf.shape(sequences)[0] == 1,
                lambda: recurrence.block(sequences, list(states), lengths),
                lambda: _in_slices(run, rows),
            )
        else:
            outputs, *states = _in_slices(run, rows)

    if mask is None:
        return states[0], outputs, states
    shown, last_shown = _shown(layer, mask, lengths, continues)
    zero = tf.zeros([], outputs.dtype)
    last = tf.where(last_shown, states[0], zero)
    if lengths is not None and not layer.zero_output_for_mask:
        repeated = tf.zeros_like(last) if layer.go_backwards else last
        outputs = tf.where(shown, outputs, repeated[:, None])
    else:
        outputs = tf.where(shown, outputs, zero)
    if layer.go_backwards and lengths is not None:
        # Keras reverses padding as well: it comes first.
        outputs = tf.reverse(_reversed_frames(outputs, lengths), [1])
    return last, outputs, states


def _reversed_frames(sequences, lengths):
    if lengths is None:
        return tf.reverse(sequences, [1])
    return tf.reverse_sequence(sequences, lengths, seq_axis=1)


def _shown(layer, mask, lengths, continues):
    """Where outputs are not zeros or, past lengths, repeated: (B, T, 1) and (B, 1)."""
    if lengths is not None:
        shown = tf.sequence_mask(lengths, tf.shape(mask)[1])
        last = tf.ones_like(lengths, tf.bool) if continues else lengths > 0
        return shown[..., None], last[:, None]
    if layer.zero_output_for_mask:
        shown = mask
    elif continues:
        shown = tf.ones_like(mask)
    else:
        shown = tf.cumsum(tf.cast(mask, tf.int32), axis=1) > 0
    return shown[..., None], shown[:, -1:]


def _in_slices(function, rows):
    """Runs a function on slices of the batch, side by side.

    Args:
        function: Takes tensors (b, ...), or `None`, and returns a list of tensors
            (b, T, U) and (b, U), of the first one's dtype.
        rows: List of tensors (B, ...), or `None`; the last of them are states.
    """
    sequences, _, *states = rows
    if sequences.shape[0] == 1:
        return function(*rows)
    batch_size = tf.shape(sequences)[0]
    count = tf.where(batch_size < SLICED_FROM, 1, SLICES)
    size = -(-batch_size // count)

    def body(i, arrays):
        part = [None if x is None else x[i * size : (i + 1) * size] for x in rows]
        results = function(*part)
        return i + 1, [a.write(i, y) for a, y in zip(arrays, results, strict=True)]

    width = states[0].shape[1]
    shapes = [[None, sequences.shape[1], width], *([None, x.shape[1]] for x in states)]
    arrays = [
        tf.TensorArray(
            sequences.dtype, size=count, element_shape=shape, infer_shape=False
        )
        for shape in shapes
    ]
    _, arrays = tf.while_loop(
        lambda i, _: i < count, body, (0, arrays), parallel_iterations=SLICES
    )
    return [array.concat() for array in arrays]


class _Recurrence:
    """The equations of a stock layer, and its weights."""

    def __init__(self, layer, dtype, joined):
        cell = layer.cell
        self.activation = cell.activation
        self.gate = getattr(cell, "recurrent_activation", None)
        self.units = cell.units
        self.reset_after = getattr(cell, "reset_after", False)
        self.dtype = dtype
        self.step = {
            keras.layers.SimpleRNN: self._simple_rnn,
            keras.layers.LSTM: self._lstm,
            keras.layers.GRU: self._gru,
        }[type(layer)]

        def read(variable):
            return tf.cast(keras.ops.convert_to_tensor(variable), dtype)

        if joined is None:
            self.kernel = read(cell.kernel)
            self.recurrent_kernel = read(cell.recurrent_kernel)
            self.joined = None
        else:
            self.joined = tf.cast(joined, dtype)
            features = cell.kernel.shape[0]
            self.kernel = self.joined[:features]
            self.recurrent_kernel = self.joined[features:]
        self.bias = self.recurrent_bias = tf.zeros([self.kernel.shape[1]], dtype)
        if cell.use_bias:
            self.bias = read(cell.bias)
            if self.reset_after:
                self.bias, self.recurrent_bias = tf.unstack(self.bias)

    def one_step(self, frame, states, mask):
        """The states after a frame (B, D)."""
        if self.joined is not None:
            both = tf.matmul(tf.concat([frame, states[0]], 1), self.joined)
            new = self._gated(tf.nn.bias_add(both, self.bias), states[1])
        else:
            projected = tf.nn.bias_add(tf.matmul(frame, self.kernel), self.bias)
            new = self.step(projected, states)
        return _where_valid(mask, new, states)

    @property
    def has_block(self):
        """Whether `block` runs the layer."""
        usual = self.activation is tanh and self.gate is sigmoid
        dtypes = (tf.float32, tf.float16)
        return self.joined is not None and usual and self.dtype in dtypes

    def run(self, frames, states, mask, lengths, wants_states):
        """Outputs (B, T, U), and the states after the last valid frame."""
        timesteps = tf.shape(frames)[1]
        if lengths is not None and wants_states and len(states) > 1:
            mask, lengths = tf.sequence_mask(lengths, timesteps), None
        outputs, *after = self._loop(frames, states, mask, timesteps)
        if lengths is not None:
            # What the loop makes of padding is not looked at: no need to mask it.
            outputs_too = tf.concat([states[0][:, None], outputs], 1)
            after[0] = tf.gather(outputs_too, lengths, batch_dims=1)
        return [outputs, *after]

    def block(self, frames, states, lengths):
        """The same in one operation."""
        h, c = states
        no_peephole = tf.zeros([self.units], self.dtype)
        _, cs, _, _, _, _, hs = tf.raw_ops.BlockLSTMV2(
            seq_len_max=tf.shape(frames, tf.int64)[1],
            x=tf.transpose(frames, [1, 0, 2]),
            cs_prev=c,
            h_prev=h,
            w=self.joined,
            wci=no_peephole,
            wcf=no_peephole,
            wco=no_peephole,
            b=self.bias,
        )
        # The states after 0, 1, ..., T frames.
        hs, cs = (tf.concat([s[None], y], 0) for s, y in ((h, hs), (c, cs)))
        if lengths is None:
            states = [hs[-1], cs[-1]]
        else:
            rows = tf.range(tf.shape(lengths)[0])
            where = tf.stack([lengths, rows], axis=1)
            states = [tf.gather_nd(hs, where), tf.gather_nd(cs, where)]
        outputs = tf.transpose(hs[1:], [1, 0, 2])
        return [outputs, *states]

    def _loop(self, frames, states, mask, timesteps):
        frames = tf.transpose(frames, [1, 0, 2])
        projected = tf.matmul(tf.reshape(frames, [-1, frames.shape[2]]), self.kernel)
        projected = tf.reshape(
            tf.nn.bias_add(projected, self.bias),
            [timesteps, -1, self.kernel.shape[1]],
        )
        projected.set_shape([None, frames.shape[1], self.kernel.shape[1]])
        if mask is not None:
            mask = tf.transpose(mask)[..., None]  # (T, B, 1)

        def turn(width):
            def body(t, states, outputs):
                for _ in range(width):
                    valid = None if mask is None else tf.gather(mask, t)
                    new = self.step(tf.gather(projected, t), states)
                    states = _where_valid(valid, new, states)
                    outputs = outputs.write(t, states[0])
                    t += 1
                return t, states, outputs

            return body

        outputs = tf.TensorArray(
            self.dtype,
            size=tf.maximum(timesteps, 1),
            element_shape=states[0].shape,
            infer_shape=False,
        )
        # An array of nothing cannot be stacked.
        loop = (0, states, outputs.write(0, states[0]))
        whole = timesteps // TURN * TURN
        loop = tf.while_loop(lambda t, *_: t < whole, turn(TURN), loop)
        loop = tf.while_loop(lambda t, *_: t < timesteps, turn(1), loop)
        _, states, outputs = loop
        outputs = tf.transpose(outputs.stack()[:timesteps], [1, 0, 2])
        return [outputs, *states]

    def _simple_rnn(self, projected, states):
        return [
            self.activation(projected + tf.matmul(states[0], self.recurrent_kernel))
        ]

    def _lstm(self, projected, states):
        h, c = states
        return self._gated(projected + tf.matmul(h, self.recurrent_kernel), c)

    def _gated(self, a, c):
        i, f, candidate, o = tf.split(a, 4, axis=-1)  # (B, U) each
        c = self.gate(f) * c + self.gate(i) * self.activation(candidate)
        return [self.gate(o) * self.activation(c), c]

    def _gru(self, projected, states):
        (h,) = states
        units = self.units
        x_zr, x_h = tf.split(projected, [2 * units, units], axis=-1)  # z, r; h
        if self.reset_after:
            recurrent = tf.nn.bias_add(
                tf.matmul(h, self.recurrent_kernel), self.recurrent_bias
            )
            r_zr, r_h = tf.split(recurrent, [2 * units, units], axis=-1)
            z, r = tf.split(self.gate(x_zr + r_zr), 2, axis=-1)
            candidate = self.activation(x_h + r * r_h)
        else:
            of_zr, of_h = (
                self.recurrent_kernel[:, : 2 * units],
                self.recurrent_kernel[:, 2 * units :],
            )
            z, r = tf.split(self.gate(x_zr + tf.matmul(h, of_zr)), 2, axis=-1)
            candidate = self.activation(x_h + tf.matmul(r * h, of_h))
        return [z * h + (1 - z) * candidate]


def _where_valid(valid, new, old):
    if valid is None:
        return new
    return [tf.where(valid, a, b) for a, b in zip(new, old, strict=True)]
