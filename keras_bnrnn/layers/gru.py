"""Defines the batch-normalised gated recurrent unit: cell and layer."""

from typing import Unpack

import keras
import numpy as np
from keras import ops
from keras.activations import sigmoid, tanh

from keras_bnrnn import backend, types
from keras_bnrnn.backend import value_and_slope
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
class BNGRUCell(BNCell, keras.layers.GRUCell):
    """One timestep of `BNGRU`.

    With `a = BN(W x_t)` and `b = U h_{t-1} + recurrent_bias`, both split into the
    gates z, r, h:

    `z = sigmoid(a_z + b_z)`, `r = sigmoid(a_r + b_r)`
    `h_t = z * h_{t-1} + (1 - z) * tanh(a_h + r * b_h)`

    With `reset_after=False` the last product is `U_h (r * h_{t-1})`, and there is no
    recurrent bias. `normalize="joint"` normalises the three sums.

    Args:
        {normalization}

    All other arguments, the call arguments and the return values are those of
    `keras.layers.GRUCell`. `beta` is the bias of the input projection, the first row of
    the stock cell's bias. `recurrent_bias` is the second row. The arguments `use_bias`
    and `bias_*` apply to both. `dropout` and `recurrent_dropout` must be in [0, 1). All
    gates share one dropout mask.

    Inside `keras.layers.RNN` a cell is called on one timestep at a time. Its training
    statistics are then frame-wise and include padding. Training on several replicas
    raises an error.

    Weights: `kernel` (D, 3U), `recurrent_kernel` (U, 3U), gate order z, r, h;
    `recurrent_bias` (3U,) with `reset_after` and `use_bias`; `input_norm`, a
    `SequenceBatchNorm` of 3U features.

    Call arguments:
        inputs: Tensor of shape (B, D).
        states: [(B, U)].
        training: Whether to normalise by batch statistics and to update the population
            statistics. Default: `False`.

    Returns:
        The output (B, U) and the list of new states.

    Raises:
        ValueError: If an argument is out of range, or in training with a static batch
            size of 1 or with several replicas.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(32, 10, 8)).astype("float32")
    >>> keras.layers.RNN(BNGRUCell(4))(x).shape
    TensorShape([32, 4])

    Reference: [Laurent et al., 2016](https://arxiv.org/abs/1510.01378), section 3.
    """

    gates = 3
    stock_cell = keras.layers.GRUCell
    fused = "gru"
    more_weights = scaled_with_recurrent = ("recurrent_bias",)
    reads_ahead = True
    gate_activations = (
        ("z", "recurrent_activation"),
        ("r", "recurrent_activation"),
        ("h", "activation"),
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
        kernel_regularizer: types.Regularizer = None,
        recurrent_regularizer: types.Regularizer = None,
        bias_regularizer: types.Regularizer = None,
        kernel_constraint: types.Constraint = None,
        recurrent_constraint: types.Constraint = None,
        bias_constraint: types.Constraint = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        reset_after: bool = True,
        seed: types.Seed = None,
        **normalization: Unpack[NormalizationArguments],
    ) -> None:
        super().__init__(**given(locals()))

    def build(self, input_shape: types.Shape) -> None:
        super().build(input_shape)
        if self.reset_after and self.use_bias:
            self.recurrent_bias = self.add_weight(
                shape=(3 * self.units,),
                name="recurrent_bias",
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )

    def loop_kernel(self, weights: Weights) -> types.Tensor:
        if self.reset_after:
            return weights.recurrent_kernel
        return weights.recurrent_kernel[:, : 2 * self.units]

    def step(
        self,
        projected: types.Tensor,
        recurrent: types.Tensor,
        states: list[types.Tensor],
        weights: Weights,
        norm: types.Norm,
    ) -> list[types.Tensor]:
        (h_before,) = states
        units = self.units
        gates, candidate = slice(0, 2 * units), slice(2 * units, 3 * units)
        recurrent_bias = weights.more["recurrent_bias"]
        if recurrent_bias is not None:
            recurrent = backend.plus_bias(recurrent, recurrent_bias)
        x_gates, x_candidate = backend.split(projected, [2 * units, units], -1)
        h_gates = recurrent
        if self.reset_after:
            h_gates, h_candidate = backend.split(recurrent, [2 * units, units], -1)

        a = norm("joint", x_gates + h_gates, gates)
        z, r = ops.split(self.recurrent_activation(a), 2, axis=-1)  # (B, 2U): z, r
        if self.reset_after:
            b = r * h_candidate
        else:
            h = weights.dropped(h_before)
            b = ops.matmul(r * h, weights.recurrent_kernel[:, candidate])
        a = norm("joint", x_candidate + b, candidate)
        candidate = self.activation(a)
        return [candidate + z * (h_before - candidate)]

    def derivative(self) -> StepDerivative | None:
        closed = self.reset_after and elementwise(
            self.activation, self.recurrent_activation
        )
        return GRUDerivative(self) if closed else None

    def is_bounded(self) -> bool:
        return bounded(self.activation, self.recurrent_activation)

    def has_stock_equations(self) -> bool:
        usual = self.activation is tanh and self.recurrent_activation is sigmoid
        return usual and self.reset_after

    def stock_weights(self, weights: Weights) -> list[types.Tensor]:
        kernel, recurrent_kernel, bias = super().stock_weights(weights)
        if self.reset_after:
            recurrent_bias = weights.more["recurrent_bias"]
            if recurrent_bias is None:
                recurrent_bias = ops.zeros_like(bias)
            bias = ops.stack([bias, recurrent_bias])  # (2, 3U)
        return [kernel, recurrent_kernel, bias]

    def set_stock_weights(
        self,
        kernel: types.Tensor,
        recurrent_kernel: types.Tensor,
        bias: types.Tensor = None,
    ) -> None:
        if self.reset_after:
            if bias is None:
                bias = np.zeros((2, 3 * self.units))
            bias, recurrent_bias = bias  # (2, 3U)
            self.recurrent_bias.assign(recurrent_bias)
        super().set_stock_weights(kernel, recurrent_kernel, bias)


class GRUDerivative(StepDerivative):
    """The derivative of `BNGRUCell.step` with `reset_after`.

    It keeps z and r (..., 2U), the candidate and b_h (..., U); with other activations
    than the usual ones, the pre-activations of the first three. Its gradient (..., 4U)
    is that of a_h, a_z + b_z, a_r + b_r, b_h. The two parts of the candidate are at the
    ends, so the gradient of the recurrent product is one slice.
    """

    def __init__(self, cell):
        self.activation = cell.activation
        self.recurrent_activation = cell.recurrent_activation
        self._is_usual = (
            cell.activation is tanh and cell.recurrent_activation is sigmoid
        )

    def by_gate(self, weights):
        is_usual = self._is_usual and backend.in_plain_graph()
        return GRUGates(self) if is_usual else None

    def widths(self, units):
        return [2 * units, units, units]

    def width(self, units):
        return 4 * units

    def keep(self, projected, recurrent, states, weights):
        units = projected.shape[-1] // 3
        recurrent_bias = weights.more["recurrent_bias"]
        if recurrent_bias is not None:
            recurrent = backend.plus_bias(recurrent, recurrent_bias)
        x_gates, x_h = backend.split(projected, [2 * units, units], -1)
        b_gates, b_h = backend.split(recurrent, [2 * units, units], -1)
        a = x_gates + b_gates
        gates = self.recurrent_activation(a)
        a_h = x_h + gates[..., units:] * b_h
        if self._is_usual:
            return [gates, self.activation(a_h), b_h]
        return [a, a_h, b_h]

    def advance(self, kept, states, weights):
        gates, candidate, _ = kept
        z = gates[..., : gates.shape[-1] // 2]
        if not self._is_usual:
            z, candidate = self.recurrent_activation(z), self.activation(candidate)
        return [candidate + z * (states[0] - candidate)]

    def factors(self, kept, before, after, weights):
        gates, candidate, b_h = kept
        if self._is_usual:
            gate_slopes = gates * (1 - gates)
            slope = 1 - candidate * candidate
        else:
            gates, gate_slopes = value_and_slope(self.recurrent_activation, gates)
            candidate, slope = value_and_slope(self.activation, candidate)
        z, r = ops.split(gates, 2, axis=-1)
        z_slope, r_slope = ops.split(gate_slopes, 2, axis=-1)
        d_h = (1 - z) * slope
        d_z = (before[0] - candidate) * z_slope
        d_r = d_h * b_h * r_slope
        return [ops.concatenate([d_h, d_z, d_r, d_h * r], axis=-1), z]

    def pull_back(self, gradients, factors):
        (dh,), (factor, z) = gradients, factors
        return ops.concatenate([dh] * 4, axis=-1) * factor, [dh * z]

    def parts(self, units, width):
        return Parts([2 * units, units, units], (0, 1), (0, 2))

    def step_back(self, gradients, kept, before, after, weights):
        if not self._is_usual:
            factors = self.factors(kept, before, after, weights)
            gradient, others = self.pull_back(gradients, factors)
            units = gradient.shape[-1] // 4
            d_h, d_gates, d_b_h = backend.split(gradient, [units, 2 * units, units], -1)
            return [d_gates, d_h, d_b_h], others
        gates, candidate, b_h = kept
        z, r = ops.split(gates, 2, axis=-1)
        (dh,) = gradients
        dh_before = dh * z
        d_h = (dh - dh_before) * (1 - candidate * candidate)
        d_z = dh * (before[0] - candidate)
        d_gates = ops.concatenate([d_z, d_h * b_h], axis=-1) * (gates * (1 - gates))
        return [d_gates, d_h, d_h * r], [dh_before]

    def of_recurrent(self, gradient):
        return gradient[..., gradient.shape[-1] // 4 :]

    def of_projected(self, gradient):
        units = gradient.shape[-1] // 4
        return ops.concatenate(
            [gradient[..., units : 3 * units], gradient[..., :units]], axis=-1
        )

    def of_weights(self, parts, before, after, weights):
        if weights.more["recurrent_bias"] is None:
            return {}
        return {"recurrent_bias": joined([backend.column_sums(p) for p in parts])}


class GRUGates(StepDerivative):
    """The derivative of `BNGRUCell.step` with usual activations, without factors.

    It gets the projection gate by gate, and keeps z, r, the candidate and b_h.

    Args:
        derivative: `GRUDerivative`.
    """

    gates = 3

    def __init__(self, derivative):
        self.of_weights = derivative.of_weights
        self.parts = derivative.parts

    def widths(self, units):
        return [units] * 4

    def keep(self, projected, recurrent, states, weights):
        x_z, x_r, x_h = projected
        recurrent_bias = weights.more["recurrent_bias"]
        if recurrent_bias is not None:
            recurrent = backend.plus_bias(recurrent, recurrent_bias)
        units = x_z.shape[-1]
        b_z, b_r, b_h = backend.split(recurrent, [units] * 3, -1)
        r = ops.sigmoid(x_r + b_r)
        return [ops.sigmoid(x_z + b_z), r, ops.tanh(x_h + r * b_h), b_h]

    def advance(self, kept, states, weights):
        z, _, candidate, _ = kept
        return [candidate + z * (states[0] - candidate)]

    def step_back(self, gradients, kept, before, after, weights):
        (z, r, candidate, b_h), (dh,) = kept, gradients
        dh_before = dh * z
        d_h = backend.tanh_gradient(candidate, dh - dh_before)
        d_gates = [
            backend.sigmoid_gradient(z, dh * (before[0] - candidate)),
            backend.sigmoid_gradient(r, d_h * b_h),
        ]
        return [joined(d_gates), d_h, d_h * r], [dh_before]


@keras.saving.register_keras_serializable(package="keras_bnrnn")
@with_normalization_arguments
class BNGRU(BNRNN):
    """Batch-normalised gated recurrent unit.

    With `a = BN(W x_t)`, BN as in `SequenceBatchNorm`, and
    `b = U h_{t-1} + recurrent_bias`, both split into the gates z, r, h:

    `z = sigmoid(a_z + b_z)`, `r = sigmoid(a_r + b_r)`
    `h_t = z * h_{t-1} + (1 - z) * tanh(a_h + r * b_h)`

    With `reset_after=False` the last product is `U_h (r * h_{t-1})`, and there is no
    recurrent bias. `normalize="joint"` normalises the three sums.

    Args:
        {normalization}

    All other arguments, the call arguments and the return values are those of
    `keras.layers.GRU`, with the same defaults. `beta` replaces the bias of the input
    projection. `recurrent_bias` is the second row of the stock layer's bias. The
    arguments `use_bias` and `bias_*` apply to both. `dropout` and `recurrent_dropout`
    must be in [0, 1). All gates share one dropout mask. See below for `use_cudnn`.

    On a GPU the fused cuDNN kernel runs the recurrence with the folded weights of the
    batch, or of the population, whatever the mask. It needs sequence-wise training
    statistics, and arguments with which Keras' own layer uses the kernel. In other
    cases `use_cudnn="auto"` (default) runs the time loop, and `True` raises an error.
    `False` always runs the time loop. XLA has no such kernel: on a GPU compile models
    with `jit_compile=False`, or pass `use_cudnn=False`.

    Call arguments:
        sequences: Tensor of shape (B, T, D).
        mask: Boolean tensor of shape (B, T), true at valid frames, any pattern. Masked
            frames, NaN included, have no effect. Timesteps count the valid frames of
            each sequence. Default: `None`, all frames are valid.
        training: Whether to normalise by batch statistics and to update the population
            statistics. Default: `False`.
        initial_state: List of one tensor of shape (B, U). Default: zeros.

    Returns:
        The output: a tensor of shape (B, U), or (B, T, U) with `return_sequences`. With
        `return_state`, the output and the state (B, U).

    Raises:
        ValueError: If an argument is out of range, if the mask has another shape, or in
            frame-wise training with a static batch size of 1.
        NotImplementedError: On a Keras backend other than TensorFlow.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(32, 10, 8)).astype("float32")
    >>> outputs, state = BNGRU(4, return_sequences=True, return_state=True)(x)
    >>> outputs.shape, state.shape
    (TensorShape([32, 10, 4]), TensorShape([32, 4]))

    Reference: [Laurent et al., 2016](https://arxiv.org/abs/1510.01378), section 3.
    The paper has no population statistics for inference; see `SequenceBatchNorm`.
    """

    cell_class = BNGRUCell
    stock_layer = keras.layers.GRU

    def __init__(
        self,
        units: int,
        activation: types.Activation = "tanh",
        recurrent_activation: types.Activation = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: types.Initializer = "glorot_uniform",
        recurrent_initializer: types.Initializer = "orthogonal",
        bias_initializer: types.Initializer = "zeros",
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
        reset_after: bool = True,
        use_cudnn: types.UseCudnn = "auto",
        **normalization: Unpack[NormalizationArguments],
    ) -> None:
        super().__init__(**given(locals()))
