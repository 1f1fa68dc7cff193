"""Defines the batch-normalised simple (Elman) recurrent network: cell and layer."""

from typing import Unpack

import keras
from keras.activations import tanh

from keras_bnrnn import types
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


@keras.saving.register_keras_serializable(package="keras_bnrnn")
@with_normalization_arguments
class BNSimpleRNNCell(BNCell, keras.layers.SimpleRNNCell):
    """One timestep of `BNSimpleRNN`.

    `h_t = activation(BN(W x_t) + U h_{t-1})`

    Args:
        {normalization}

    All other arguments, the call arguments and the return values are those of
    `keras.layers.SimpleRNNCell`. `beta` is the bias of the input projection. The
    arguments `use_bias` and `bias_*` apply to it. `dropout` and `recurrent_dropout`
    must be in [0, 1).

    Inside `keras.layers.RNN` a cell is called on one timestep at a time. Its training
    statistics are then frame-wise and include padding. Training on several replicas
    raises an error.

    Weights: `kernel` (D, U), `recurrent_kernel` (U, U) and `input_norm`, a
    `SequenceBatchNorm` of U features.

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
    >>> keras.layers.RNN(BNSimpleRNNCell(4))(x).shape
    TensorShape([32, 4])

    Reference: [Laurent et al., 2016](https://arxiv.org/abs/1510.01378), section 3.
    """

    gates = 1
    stock_cell = keras.layers.SimpleRNNCell
    gate_activations = (("h", "activation"),)

    def __init__(
        self,
        units: int,
        activation: types.Activation = "tanh",
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
        seed: types.Seed = None,
        **normalization: Unpack[NormalizationArguments],
    ) -> None:
        super().__init__(**given(locals()))

    def step(
        self,
        projected: types.Tensor,
        recurrent: types.Tensor,
        states: list[types.Tensor],
        weights: Weights,
        norm: types.Norm,
    ) -> list[types.Tensor]:
        return [self.activation(norm("joint", projected + recurrent))]

    def derivative(self) -> StepDerivative | None:
        return SimpleRNNDerivative(self) if elementwise(self.activation) else None

    def is_bounded(self) -> bool:
        return bounded(self.activation)


class SimpleRNNDerivative(StepDerivative):
    """The derivative of `BNSimpleRNNCell.step`; keeps the pre-activation."""

    def __init__(self, cell):
        self.activation = cell.activation

    def widths(self, units):
        return [units]

    def width(self, units):
        return units

    def keep(self, projected, recurrent, states, weights):
        return [projected + recurrent]

    def advance(self, kept, states, weights):
        return [self.activation(kept[0])]

    def factors(self, kept, before, after, weights):
        if self.activation is tanh:
            return [1 - after[0] * after[0]]
        return [value_and_slope(self.activation, kept[0])[1]]

    def pull_back(self, gradients, factors):
        (dh,), (slope,) = gradients, factors
        return dh * slope, [None]


@keras.saving.register_keras_serializable(package="keras_bnrnn")
@with_normalization_arguments
class BNSimpleRNN(BNRNN):
    """Batch-normalised simple recurrent network.

    `h_t = activation(BN(W x_t) + U h_{t-1})`, BN as in `SequenceBatchNorm`.

    Args:
        {normalization}

    All other arguments, the call arguments and the return values are those of
    `keras.layers.SimpleRNN`, with the same defaults. `beta` replaces the bias. The
    arguments `use_bias` and `bias_*` apply to it. `dropout` and `recurrent_dropout`
    must be in [0, 1).

    Call arguments:
        sequences: Tensor of shape (B, T, D).
        mask: Boolean tensor of shape (B, T), true at valid frames, any pattern. Masked
            frames, NaN included, have no effect. Timesteps count the valid frames of
            each sequence. Default: `None`, all frames are valid.
        training: Whether to normalise by batch statistics and to update the population
            statistics. Default: `False`.
        initial_state: List of one tensor of shape (B, U). Default: zeros.

    Returns:
        (B, U), or (B, T, U) with `return_sequences`; then the state (B, U) with
        `return_state`.

    Raises:
        ValueError: If an argument is out of range, if the mask has another shape, or in
            frame-wise training with a static batch size of 1.
        NotImplementedError: On a Keras backend other than TensorFlow.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(32, 10, 8)).astype("float32")
    >>> BNSimpleRNN(4, return_sequences=True)(x).shape
    TensorShape([32, 10, 4])

    Reference: [Laurent et al., 2016](https://arxiv.org/abs/1510.01378), section 3.
    The paper has no population statistics for inference; see `SequenceBatchNorm`.
    """

    cell_class = BNSimpleRNNCell
    stock_layer = keras.layers.SimpleRNN

    def __init__(
        self,
        units: int,
        activation: types.Activation = "tanh",
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
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        seed: types.Seed = None,
        **normalization: Unpack[NormalizationArguments],
    ) -> None:
        super().__init__(**given(locals()))
