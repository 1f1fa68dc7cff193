"""Batch-normalised gated recurrent unit: cell and layer."""

import keras
from keras import ops
from keras.activations import sigmoid, tanh

from keras_bnrnn.gradients import value_and_slope
from keras_bnrnn.layers.base import (
    BNRNN,
    BNCell,
    changes_function,
    check_units,
    check_use_cudnn,
    elementwise,
    of_cell,
    with_normalization_arguments,
)
from keras_bnrnn.recurrence import StepDerivative


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

    All other arguments, the call arguments and what is returned are those of
    `keras.layers.GRUCell`. `beta` is the bias of the input projection: the first
    row of the stock cell's bias. It takes `use_bias` and the `bias_*` arguments,
    as `recurrent_bias`, the second row, does. `dropout` and `recurrent_dropout` must
    be in [0, 1); all gates share one mask.

    Inside `keras.layers.RNN` a cell sees one timestep at a time: training
    statistics are frame-wise, padding is not left out, and several replicas are
    refused.

    Weights: `kernel` (D, 3U), `recurrent_kernel` (U, 3U), gate order z, r, h;
    `recurrent_bias` (3U,) with `reset_after` and `use_bias`; `input_norm`, a
    `SequenceBatchNorm` of 3U features.

    Call arguments:
        inputs: Tensor of shape (B, D).
        states: [(B, U)].
        training: Whether to use, and learn from, the batch's statistics.

    Returns:
        The output (B, U) and the list of new states.

    Raises:
        ValueError: For an argument out of range, and in training for a static
            batch of 1 or several replicas.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(32, 10, 8)).astype("float32")
    >>> keras.layers.RNN(BNGRUCell(4))(x).shape
    TensorShape([32, 4])

    Reference: [Laurent et al., 2016](https://arxiv.org/abs/1510.01378), section 3.
    """

    gates = 3
    reads_ahead = True

    def __init__(
        self,
        units,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="orthogonal",
        bias_initializer="zeros",
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        recurrent_dropout=0.0,
        reset_after=True,
        seed=None,
        *,
        normalize="input",
        statistics="sequence",
        population="pooled",
        max_timesteps=None,
        momentum=0.99,
        epsilon=1e-3,
        gamma_initializer="ones",
        synchronized=False,
        **kwargs,
    ):
        check_units(units)
        super().__init__(
            units=units,
            activation=activation,
            recurrent_activation=recurrent_activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            recurrent_initializer=recurrent_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            recurrent_regularizer=recurrent_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            recurrent_constraint=recurrent_constraint,
            bias_constraint=bias_constraint,
            dropout=dropout,
            recurrent_dropout=recurrent_dropout,
            reset_after=reset_after,
            seed=seed,
            **kwargs,
        )
        self._init_normalization(
            normalize=normalize,
            statistics=statistics,
            population=population,
            max_timesteps=max_timesteps,
            momentum=momentum,
            epsilon=epsilon,
            gamma_initializer=gamma_initializer,
            synchronized=synchronized,
            dropout=dropout,
            recurrent_dropout=recurrent_dropout,
        )

    def build(self, input_shape):
        super().build(input_shape)
        if self.reset_after and self.use_bias:
            self.recurrent_bias = self.add_weight(
                shape=(3 * self.units,),
                name="recurrent_bias",
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )

    def loop_kernel(self, weights):
        if self.reset_after:
            return weights.recurrent_kernel
        return weights.recurrent_kernel[:, : 2 * self.units]

    def step(self, projected, recurrent, states, weights, normalize):
        (h_before,) = states
        units = self.units
        gates, candidate = slice(0, 2 * units), slice(2 * units, 3 * units)
        if weights.recurrent_bias is not None:
            recurrent = recurrent + weights.recurrent_bias

        a = normalize(projected[:, gates] + recurrent[:, gates], gates)
        z, r = ops.split(self.recurrent_activation(a), 2, axis=-1)  # (B, 2U): z, r
        if self.reset_after:
            b = r * recurrent[:, candidate]
        else:
            h = h_before
            if weights.recurrent_dropout_mask is not None:
                h = h * weights.recurrent_dropout_mask
            b = ops.matmul(r * h, weights.recurrent_kernel[:, candidate])
        a = normalize(projected[:, candidate] + b, candidate)
        return [z * h_before + (1 - z) * self.activation(a)]

    def step_derivative(self):
        closed = self.reset_after and elementwise(
            self.activation, self.recurrent_activation
        )
        return GRUDerivative(self) if closed else None


class GRUDerivative(StepDerivative):
    """The derivative of `BNGRUCell.step` with `reset_after`.

    Pre-activations (..., 4U): a_h, a_z + b_z, a_r + b_r, b_h. The candidate's two
    parts stand at the ends, so that what the recurrent product sees is one slice.
    """

    def __init__(self, cell):
        self.activation = cell.activation
        self.recurrent_activation = cell.recurrent_activation

    def width(self, units):
        return 4 * units

    def pre_activations(self, projected, recurrent, weights):
        gates = 2 * projected.shape[-1] // 3
        if weights.recurrent_bias is not None:
            recurrent = recurrent + weights.recurrent_bias
        return ops.concatenate(
            [
                projected[..., gates:],
                projected[..., :gates] + recurrent[..., :gates],
                recurrent[..., gates:],
            ],
            axis=-1,
        )

    def factors(self, pre_activations, before, after, weights):
        a_h, a_z, a_r, b_h = ops.split(pre_activations, 4, axis=-1)
        z, z_slope = value_and_slope(self.recurrent_activation, a_z)
        r, r_slope = value_and_slope(self.recurrent_activation, a_r)
        candidate, slope = value_and_slope(self.activation, a_h + r * b_h)
        d_h = (1 - z) * slope
        d_z = (before[0] - candidate) * z_slope
        d_r = d_h * b_h * r_slope
        return [ops.concatenate([d_h, d_z, d_r, d_h * r], axis=-1), z]

    def pull_back(self, gradients, factors):
        (dh,), (factor, z) = gradients, factors
        return ops.concatenate([dh] * 4, axis=-1) * factor, [dh * z]

    def of_recurrent(self, gradient):
        return gradient[..., gradient.shape[-1] // 4 :]

    def of_projected(self, gradient):
        units = gradient.shape[-1] // 4
        return ops.concatenate(
            [gradient[..., units : 3 * units], gradient[..., :units]], axis=-1
        )

    def of_weights(self, gradient, before, after, weights):
        if weights.recurrent_bias is None:
            return {}
        return {"recurrent_bias": ops.sum(self.of_recurrent(gradient), axis=(0, 1))}


@keras.saving.register_keras_serializable(package="keras_bnrnn")
@with_normalization_arguments
class BNGRU(BNRNN):
    """Gated recurrent unit, batch-normalised.

    With `a = BN(W x_t)`, BN as in `SequenceBatchNorm`, and
    `b = U h_{t-1} + recurrent_bias`, both split into the gates z, r, h:

    `z = sigmoid(a_z + b_z)`, `r = sigmoid(a_r + b_r)`
    `h_t = z * h_{t-1} + (1 - z) * tanh(a_h + r * b_h)`

    With `reset_after=False` the last product is `U_h (r * h_{t-1})`, and there is no
    recurrent bias. `normalize="joint"` normalises the three sums.

    Args:
        {normalization}

    All other arguments, the call arguments and what is returned are those of
    `keras.layers.GRU`, with the same defaults. `beta` takes the place of the bias of
    the input projection; `recurrent_bias` is the second row of the stock layer's
    bias. `use_bias` and the `bias_*` arguments hold for both. `dropout` and
    `recurrent_dropout` must be in [0, 1); all gates share one mask.
    See below for `use_cudnn`.

    On a GPU the fused cuDNN kernel runs the recurrence with the folded weights of the
    batch, or of the population, where Keras' own layer would take it,
    training statistics are sequence-wise and there is no mask. `use_cudnn=True` takes
    it with a mask too, all padding on the right and no row empty, fails for another
    one, and raises an error where there is no such kernel. `"auto"` (default) then
    runs the time loop, `False` always. TensorFlow's XLA has no such kernel: on a GPU
    compile models with `jit_compile=False`, or pass `use_cudnn=False`.

    Call arguments:
        sequences: Tensor of shape (B, T, D).
        mask: Boolean tensor of shape (B, T), any pattern. What stands where it is
            false has no effect. Default: `None`.
        training: Whether to use, and learn from, the batch's statistics.
        initial_state: List of one tensor of shape (B, U). Default: zeros.

    Returns:
        (B, U), or (B, T, U) with `return_sequences`; then the state (B, U) with
        `return_state`.

    Raises:
        ValueError: For an argument out of range, a mask of another shape,
            frame-wise training with a static batch of 1.
        NotImplementedError: On a Keras backend other than TensorFlow.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(32, 10, 8)).astype("float32")
    >>> outputs, state = BNGRU(4, return_sequences=True, return_state=True)(x)
    >>> outputs.shape, state.shape
    (TensorShape([32, 10, 4]), TensorShape([32, 4]))

    Reference: [Laurent et al., 2016](https://arxiv.org/abs/1510.01378), section 3.
    It has no population statistics for inference; they are `SequenceBatchNorm`'s.
    """

    def __init__(
        self,
        units,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="orthogonal",
        bias_initializer="zeros",
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        recurrent_dropout=0.0,
        seed=None,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        unroll=False,
        reset_after=True,
        use_cudnn="auto",
        *,
        normalize="input",
        statistics="sequence",
        population="pooled",
        max_timesteps=None,
        momentum=0.99,
        epsilon=1e-3,
        gamma_initializer="ones",
        synchronized=False,
        **kwargs,
    ):
        check_use_cudnn(use_cudnn)
        cell = BNGRUCell(
            units=units,
            activation=activation,
            recurrent_activation=recurrent_activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            recurrent_initializer=recurrent_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            recurrent_regularizer=recurrent_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            recurrent_constraint=recurrent_constraint,
            bias_constraint=bias_constraint,
            dropout=dropout,
            recurrent_dropout=recurrent_dropout,
            reset_after=reset_after,
            seed=seed,
            normalize=normalize,
            statistics=statistics,
            population=population,
            max_timesteps=max_timesteps,
            momentum=momentum,
            epsilon=epsilon,
            gamma_initializer=gamma_initializer,
            synchronized=synchronized,
            # Accepted as the stock layer does; it changes nothing here.
            implementation=kwargs.pop("implementation", 2),
            dtype=kwargs.get("dtype"),
            trainable=kwargs.get("trainable", True),
            name="bn_gru_cell",
        )
        super().__init__(
            cell,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            stateful=stateful,
            unroll=unroll,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self._use_cudnn(use_cudnn)

    def _has_stock_equations(self):
        return (
            not changes_function(self.cell, BNGRUCell)
            and self.activation is tanh
            and self.recurrent_activation is sigmoid
            and self.reset_after
        )

    def _stock_layer(self):
        return keras.layers.GRU(
            self.units,
            return_sequences=True,
            return_state=True,
            go_backwards=self.go_backwards,
            use_cudnn="auto",
            # Nothing random is drawn for weights that are never used.
            kernel_initializer="zeros",
            recurrent_initializer="zeros",
            seed=0,
            dtype=self.dtype_policy,
        )

    recurrent_activation = of_cell("recurrent_activation")
    reset_after = of_cell("reset_after")

    def get_config(self):
        return {**super().get_config(), "use_cudnn": self.use_cudnn}
