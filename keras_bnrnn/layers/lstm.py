"""Defines the batch-normalised long short-term memory: cell and layer."""

from typing import Unpack

import keras
import numpy as np
from keras import ops
from keras.activations import sigmoid, tanh
from keras.backend import standardize_dtype

from keras_bnrnn import backend, types
from keras_bnrnn.backend import value_and_slope
from keras_bnrnn.checks import check_flag
from keras_bnrnn.layers.activations import bounded, elementwise
from keras_bnrnn.layers.arguments import (
    NormalizationArguments,
    given,
    with_normalization_arguments,
)
from keras_bnrnn.layers.cell import BNCell
from keras_bnrnn.layers.rnn import BNRNN
from keras_bnrnn.recurrence import StepDerivative, Weights
from keras_bnrnn.recurrence.derivative import Parts, joined


@keras.saving.register_keras_serializable(package="keras_bnrnn")
@with_normalization_arguments
class BNLSTMCell(BNCell, keras.layers.LSTMCell):
    """One timestep of `BNLSTM`.

    With `a = BN(W x_t) + U h_{t-1}`, split into the gates i, f, c, o:

    `c_t = sigmoid(a_f) * c_{t-1} + sigmoid(a_i) * tanh(a_c)`
    `h_t = sigmoid(a_o) * tanh(c_t)`

    Args:
        {normalization}
        peephole: Whether the gates see the cell state: `p_i * c_{t-1}` is added to
            a_i, `p_f * c_{t-1}` to a_f and `p_o * c_t` to a_o, after
            normalisation. Default: `False`.

    All other arguments, the call arguments and the return values are those of
    `keras.layers.LSTMCell`. `beta` is the bias of the input projection. The arguments
    `use_bias`, `unit_forget_bias` and `bias_*` apply to it. `dropout` and
    `recurrent_dropout` must be in [0, 1). All gates share one dropout mask.

    Inside `keras.layers.RNN` a cell is called on one timestep at a time. Its training
    statistics are then frame-wise and include padding. Training on several replicas
    raises an error.

    Weights: `kernel` (D, 4U), `recurrent_kernel` (U, 4U), gate order i, f, c, o;
    `input_norm`, a `SequenceBatchNorm` of 4U features; with `peephole`,
    `peephole_kernel` (3, U): p_i, p_f, p_o, initially zeros.

    Call arguments:
        inputs: Tensor of shape (B, D).
        states: [(B, U), (B, U)]: h and c.
        training: Whether to normalise by batch statistics and to update the population
            statistics. Default: `False`.

    Returns:
        The output (B, U) and the list of new states.

    Raises:
        ValueError: If an argument is out of range, or in training with a static batch
            size of 1 or with several replicas.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(32, 10, 8)).astype("float32")
    >>> keras.layers.RNN(BNLSTMCell(4))(x).shape
    TensorShape([32, 4])

    Reference: [Laurent et al., 2016](https://arxiv.org/abs/1510.01378), section 3.
    """

    gates = 4
    stock_cell = keras.layers.LSTMCell
    fused = "lstm"
    more_weights = ("peephole_kernel",)
    gate_activations = (
        ("i", "recurrent_activation"),
        ("f", "recurrent_activation"),
        ("c", "activation"),
        ("o", "recurrent_activation"),
    )

    def __init__(
        self,
        units: int,
        activation: types.Activation = "tanh",
        recurrent_activation: types.Activation = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: types.Initializer = "glorot_uniform",
        recurrent_initializer: types.Initializer = "orthogonal",
        bias_initializer: types.Initializer = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: types.Regularizer = None,
        recurrent_regularizer: types.Regularizer = None,
        bias_regularizer: types.Regularizer = None,
        kernel_constraint: types.Constraint = None,
        recurrent_constraint: types.Constraint = None,
        bias_constraint: types.Constraint = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: types.Seed = None,
        *,
        peephole: bool = False,
        **normalization: Unpack[NormalizationArguments],
    ) -> None:
        arguments = given(locals())
        check_flag("peephole", arguments.pop("peephole"))
        super().__init__(**arguments)
        self.peephole = peephole

    def beta_initializer(self) -> types.Initializer:
        if self.unit_forget_bias:
            return UnitForgetBias(self.bias_initializer)
        return self.bias_initializer

    def build(self, input_shape: types.Shape) -> None:
        super().build(input_shape)
        if self.peephole:
            self.peephole_kernel = self.add_weight(
                shape=(3, self.units), name="peephole_kernel", initializer="zeros"
            )

    def step(
        self,
        projected: types.Tensor,
        recurrent: types.Tensor,
        states: list[types.Tensor],
        weights: Weights,
        norm: types.Norm,
    ) -> list[types.Tensor]:
        a = norm("joint", projected + recurrent)  # (B, 4U): i, f, c, o
        return advance(self, a, states, weights.more["peephole_kernel"])

    def gate_pre_activations(
        self,
        a: types.Tensor,
        before: list[types.Tensor],
        after: list[types.Tensor],
        weights: Weights,
    ) -> types.Tensor:
        peephole = weights.more["peephole_kernel"]
        return a if peephole is None else a + seen_by_gates(peephole, before, after)

    def derivative(self) -> StepDerivative | None:
        closed = elementwise(self.activation, self.recurrent_activation)
        return LSTMDerivative(self) if closed else None

    def is_bounded(self) -> bool:
        return bounded(self.activation, self.recurrent_activation)

    def has_stock_equations(self) -> bool:
        usual = self.activation is tanh and self.recurrent_activation is sigmoid
        return usual and not self.peephole

    def why_not_stock(self) -> str | None:
        return "a stock LSTM has no peepholes" if self.peephole else None

    def get_config(self) -> types.Config:
        return {**super().get_config(), "peephole": self.peephole}


def are_by_tanh(activations, a):
    """Returns whether `gates_by_tanh` computes the gates.

    In half precision it would round gates and slopes to 0 for a < -7.
    """
    usual = (
        activations.activation is tanh and activations.recurrent_activation is sigmoid
    )
    return usual and standardize_dtype(a.dtype) in ("float32", "float64")


def advance(activations, a, states, peephole):
    """Computes the new states h and c from pre-activations.

    Args:
        activations: Has the attributes `activation` and `recurrent_activation`.
        a: Tensor (B, 4U), the pre-activations of i, f, c, o without the peepholes.
        states: h and c before the step.
        peephole: Tensor (3, U), or `None`.
    """
    by_tanh = peephole is None and are_by_tanh(activations, a)
    # In a graph the arithmetic that makes gates of the tanh costs more than it saves.
    if by_tanh and not backend.in_plain_graph():
        return advance_by_tanh(tanh_of_gates(a), states)
    _, c_before = states
    gate = activations.recurrent_activation
    a_i, a_f, a_c, a_o = ops.split(a, 4, axis=-1)
    if peephole is not None:
        p_i, p_f, p_o = ops.unstack(peephole, axis=0)
        a_i, a_f = a_i + p_i * c_before, a_f + p_f * c_before
    c = gate(a_f) * c_before + gate(a_i) * activations.activation(a_c)
    if peephole is not None:
        a_o = a_o + p_o * c
    return [gate(a_o) * activations.activation(c), c]


def seen_by_gates(peephole, before, after):
    """Computes the terms (..., 4U) that peepholes add to the pre-activations.

    Args:
        peephole: Tensor (3, U).
        before, after: Lists of the states h and c before and after the step.
    """
    p_i, p_f, p_o = ops.unstack(peephole, axis=0)
    (_, c_before), (_, c) = before, after
    seen = [p_i * c_before, p_f * c_before, ops.zeros_like(c), p_o * c]
    return ops.concatenate(seen, axis=-1)


def tanh_of_gates(a):
    """Computes the tanh (..., 4U) that the gates of usual activations are made of.

    `sigmoid(a) = tanh(a / 2) / 2 + 1 / 2`. Under XLA one tanh of all gates together
    costs less than three sigmoids and one tanh of slices.
    """
    return ops.tanh(a * _halves(a))


def gates_by_tanh(t):
    """Returns the gates i, f, c, o of `tanh_of_gates`."""
    i, f, candidate, o = ops.split(t, 4, axis=-1)
    return 0.5 * i + 0.5, 0.5 * f + 0.5, candidate, 0.5 * o + 0.5


def advance_by_tanh(t, states):
    """Computes the new states h and c from `tanh_of_gates`."""
    i, f, candidate, o = gates_by_tanh(t)
    c = f * states[1] + i * candidate
    return [o * ops.tanh(c), c]


def slopes_by_tanh(t):
    """Computes the derivative (..., 4U) of the gates of `gates_by_tanh`."""
    halves = _halves(t)
    return (1 - t * t) * (halves * halves)


def _halves(a):
    halves = np.repeat([0.5, 0.5, 1.0, 0.5], a.shape[-1] // 4)
    return ops.convert_to_tensor(halves, dtype=a.dtype)


class LSTMDerivative(StepDerivative):
    """The derivative of `BNLSTMCell.step`.

    It keeps `tanh_of_gates` (..., 4U) if the step uses it. Otherwise it keeps the
    pre-activations a_i, a_f, a_c, a_o, without the peepholes.
    """

    def __init__(self, cell):
        self.activation = cell.activation
        self.recurrent_activation = cell.recurrent_activation

    def block_of(self, weights):
        is_usual = self._is_by_tanh(weights.recurrent_kernel, weights)
        is_float32 = standardize_dtype(weights.recurrent_kernel.dtype) == "float32"
        return "lstm" if is_usual and is_float32 else None

    def by_operation(self, weights):
        is_block = backend.has_block(self.block_of(weights))
        return LSTMOperation() if is_block else None

    def by_gate(self, weights):
        is_usual = self._is_by_tanh(weights.recurrent_kernel, weights)
        return LSTMGates(self) if is_usual and backend.in_plain_graph() else None

    def widths(self, units):
        return [4 * units]

    def width(self, units):
        return 4 * units

    def keep(self, projected, recurrent, states, weights):
        a = projected + recurrent
        return [tanh_of_gates(a) if self._is_by_tanh(a, weights) else a]

    def advance(self, kept, states, weights):
        if self._is_by_tanh(kept[0], weights):
            return advance_by_tanh(kept[0], states)
        return advance(self, kept[0], states, weights.more["peephole_kernel"])

    def _is_by_tanh(self, a, weights):
        return weights.more["peephole_kernel"] is None and are_by_tanh(self, a)

    def factors(self, kept, before, after, weights):
        (_, c_before), (_, c) = before, after
        if self._is_by_tanh(kept[0], weights):
            (t,) = kept
            i, f, candidate, o = gates_by_tanh(t)
            tanh_c = ops.tanh(c)
            of_gates = ops.concatenate([candidate, c_before, i, tanh_c], axis=-1)
            return [of_gates * slopes_by_tanh(t), o * (1 - tanh_c * tanh_c), f]
        a, peephole = kept[0], weights.more["peephole_kernel"]
        if peephole is not None:
            p_i, p_f, p_o = ops.unstack(peephole, axis=0)
            a = a + seen_by_gates(peephole, before, after)
        (i, f, candidate, o), slopes = self._gates_and_slopes(a)
        tanh_c, tanh_slope = value_and_slope(self.activation, c)

        d_a = ops.concatenate([candidate, c_before, i, tanh_c], axis=-1) * slopes
        d_c, d_c_before = o * tanh_slope, f
        if peephole is not None:
            d_i, d_f, _, d_o = ops.split(d_a, 4, axis=-1)
            d_c = d_c + p_o * d_o
            d_c_before = d_c_before + p_i * d_i + p_f * d_f
        return [d_a, d_c, d_c_before]

    def _gates_and_slopes(self, a):
        gate = self.recurrent_activation
        a_i, a_f, a_c, a_o = ops.split(a, 4, axis=-1)
        pairs = [
            value_and_slope(gate, a_i),
            value_and_slope(gate, a_f),
            value_and_slope(self.activation, a_c),
            value_and_slope(gate, a_o),
        ]
        gates, slopes = zip(*pairs, strict=True)
        return gates, ops.concatenate(slopes, axis=-1)

    def pull_back(self, gradients, factors):
        (dh, dc), (d_a, d_c, d_c_before) = gradients, factors
        dc = dc + dh * d_c
        return ops.concatenate([dc, dc, dc, dh], axis=-1) * d_a, [None, dc * d_c_before]

    def of_weights(self, parts, before, after, weights):
        if weights.more["peephole_kernel"] is None:
            return {}
        c_before, c = before[1], after[1]
        d_i, d_f, _, d_o = ops.split(joined(parts), 4, axis=-1)
        products = [d_i * c_before, d_f * c_before, d_o * c]
        d_peephole = ops.stack([backend.column_sums(p) for p in products])
        return {"peephole_kernel": d_peephole}


class LSTMByStep(StepDerivative):
    """The derivative of `BNLSTMCell.step` with the usual activations, without factors.

    It keeps the gates i, f, o and the candidate.
    """

    def widths(self, units):
        return [units] * 4

    def values(self, terms):
        """Returns what `keep` does, of the pre-activations of i, f, c and o."""
        i, f, candidate, o = terms
        return [ops.sigmoid(i), ops.sigmoid(f), ops.sigmoid(o), ops.tanh(candidate)]

    def advance(self, kept, states, weights):
        i, f, o, candidate = kept
        c = f * states[1] + i * candidate
        return [o * ops.tanh(c), c]


class LSTMOperation(LSTMByStep):
    """`LSTMByStep` by TensorFlow's operation for one timestep.

    The gradient has the order i, c, f, o.
    """

    def keep(self, projected, recurrent, states, weights):
        return self.values(ops.split(projected + recurrent, 4, axis=-1))

    def arranged(self, columns):
        return backend.lstm_swapped(columns)

    def step_back(self, gradients, kept, before, after, weights):
        (_, c_before), (_, c) = before, after
        d_gates, d_c_before = backend.lstm_step_gradient(
            weights.recurrent_kernel, *kept, c, c_before, *gradients
        )
        return [d_gates], [None, d_c_before]


class LSTMGates(LSTMByStep):
    """`LSTMByStep` gate by gate.

    Args:
        derivative: `LSTMDerivative`.
    """

    gates = products = 4

    def __init__(self, derivative):
        self._derivative = derivative

    def of_slices(self):
        return self._derivative

    def keep(self, projected, recurrent, states, weights):
        pairs = zip(projected, recurrent, strict=True)
        return self.values([x + h for x, h in pairs])

    def parts(self, units, width):
        return Parts([units] * 4, (0, 1, 2, 3), (0, 1, 2, 3))

    def step_back(self, gradients, kept, before, after, weights):
        (i, f, o, candidate), (dh, dc) = kept, gradients
        (_, c_before), (_, c) = before, after
        tanh_c = ops.tanh(c)
        dc = dc + backend.tanh_gradient(tanh_c, dh * o)
        d_gates = [
            backend.sigmoid_gradient(i, dc * candidate),
            backend.sigmoid_gradient(f, dc * c_before),
            backend.tanh_gradient(candidate, dc * i),
            backend.sigmoid_gradient(o, dh * tanh_c),
        ]
        return d_gates, [None, dc * f]


@keras.saving.register_keras_serializable(package="keras_bnrnn")
@with_normalization_arguments
class BNLSTM(BNRNN):
    """Batch-normalised long short-term memory.

    With `a = BN(W x_t) + U h_{t-1}`, BN as in `SequenceBatchNorm`, split into the
    gates i, f, c, o:

    `c_t = sigmoid(a_f) * c_{t-1} + sigmoid(a_i) * tanh(a_c)`
    `h_t = sigmoid(a_o) * tanh(c_t)`

    Args:
        {normalization}
        peephole: Whether the gates see the cell state: `p_i * c_{t-1}` is added to
            a_i, `p_f * c_{t-1}` to a_f and `p_o * c_t` to a_o, after
            normalisation. Default: `False`.

    All other arguments, the call arguments and the return values are those of
    `keras.layers.LSTM`, with the same defaults. `beta` replaces the bias. The arguments
    `use_bias`, `unit_forget_bias` and `bias_*` apply to it. `dropout` and
    `recurrent_dropout` must be in [0, 1). All gates share one dropout mask. See below
    for `use_cudnn`.

    On a GPU the fused cuDNN kernel runs the recurrence with the folded weights of the
    batch, or of the population, whatever the mask. It needs sequence-wise training
    statistics, and arguments with which Keras' own layer uses the kernel, without
    `peephole`. In other cases `use_cudnn="auto"` (default) runs the time loop, and
    `True` raises an error. `False` always runs the time loop. XLA has no such kernel:
    on a GPU compile models with `jit_compile=False`, or pass `use_cudnn=False`.

    Call arguments:
        sequences: Tensor of shape (B, T, D).
        mask: Boolean tensor of shape (B, T), true at valid frames, any pattern. Masked
            frames, NaN included, have no effect. Timesteps count the valid frames of
            each sequence. Default: `None`, all frames are valid.
        training: Whether to normalise by batch statistics and to update the population
            statistics. Default: `False`.
        initial_state: List of two tensors of shape (B, U), h and c. Default: zeros.

    Returns:
        The output: a tensor of shape (B, U), or (B, T, U) with `return_sequences`. With
        `return_state`, the output and the states h and c, each (B, U).

    Raises:
        ValueError: If an argument is out of range, if the mask has another shape, or in
            frame-wise training with a static batch size of 1.
        NotImplementedError: On a Keras backend other than TensorFlow.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((None, 8)),
    ...     BNLSTM(16, return_sequences=True),
    ...     BNLSTM(16),
    ...     keras.layers.Dense(1),
    ... ])
    >>> model(np.ones((4, 10, 8), "float32")).shape
    TensorShape([4, 1])

    Reference: [Laurent et al., 2016](https://arxiv.org/abs/1510.01378), section 3.
    The paper has no population statistics for inference; see `SequenceBatchNorm`.
    """

    cell_class = BNLSTMCell
    stock_layer = keras.layers.LSTM

    def __init__(
        self,
        units: int,
        activation: types.Activation = "tanh",
        recurrent_activation: types.Activation = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: types.Initializer = "glorot_uniform",
        recurrent_initializer: types.Initializer = "orthogonal",
        bias_initializer: types.Initializer = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: types.Regularizer = None,
        recurrent_regularizer: types.Regularizer = None,
        bias_regularizer: types.Regularizer = None,
        activity_regularizer: types.Regularizer = None,
        kernel_constraint: types.Constraint = None,
        recurrent_constraint: types.Constraint = None,
        bias_constraint: types.Constraint = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: types.Seed = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        use_cudnn: types.UseCudnn = "auto",
        *,
        peephole: bool = False,
        **normalization: Unpack[NormalizationArguments],
    ) -> None:
        super().__init__(**given(locals()))


@keras.saving.register_keras_serializable(package="keras_bnrnn")
class UnitForgetBias(keras.initializers.Initializer):
    """Initializes the forget quarter of an LSTM's bias to 1, for `unit_forget_bias`.

    Args:
        initializer: Initializer of the other quarters. Default: `"zeros"`.
    """

    def __init__(self, initializer: types.Initializer = "zeros") -> None:
        self.initializer = keras.initializers.get(initializer)

    def __call__(self, shape: types.Shape, dtype: str | None = None) -> types.Tensor:
        (width,) = shape
        units = width // 4
        return ops.concatenate(  # (4U,): i, f, c, o
            [
                self.initializer((units,), dtype=dtype),
                ops.ones((units,), dtype=dtype),
                self.initializer((2 * units,), dtype=dtype),
            ]
        )

    def get_config(self) -> types.Config:
        return {"initializer": keras.initializers.serialize(self.initializer)}
