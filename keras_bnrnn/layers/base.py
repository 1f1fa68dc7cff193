"""What the batch-normalised cells and layers share.

A cell (`BNCell` and a stock Keras cell) is its equations and its weights. A layer
(`BNRNN`, a `keras.layers.RNN`) projects the whole sequence at once, normalises it and
leaves the rest to the time loop.
"""

import contextlib
import inspect
import numbers
import typing

import keras
from keras import ops

from keras_bnrnn import statistics as stats
from keras_bnrnn.distribution import replica_count
from keras_bnrnn.layers.fused import FusedKernel, gpu_is_visible
from keras_bnrnn.projection import folded_projection, normalized_projection
from keras_bnrnn.recurrence import (
    require_backend,
    require_timesteps,
    time_loop,
)
from keras_bnrnn.sequence_batch_norm import (
    SequenceBatchNorm,
    check_flag,
    check_mask,
    is_number,
)

NORMALIZATION_ARGUMENTS = """normalize: Where to normalise. `"input"` (default):
            `BN(W x_t) + U h`, the method of the paper. `"joint"`:
            `BN(W x_t + U h)`, its negative result; that sum exists one timestep
            at a time, so its statistics are frame-wise whatever `statistics`.
            (`"recurrent"` is not available yet.)
        statistics: Over what a training step takes mean and variance:
            `"sequence"` (default), all valid frames of the batch together, or
            `"frame"`, each timestep alone. Sequence-wise statistics see later
            frames of the training batch: use `"frame"` to predict the next one.
        population: `"pooled"` (default), see `SequenceBatchNorm`.
        max_timesteps: See `SequenceBatchNorm`. Default: `None`.
        momentum: Float in [0, 1), weight of the past in the population
            statistics. Default: 0.99.
        epsilon: Float > 0, added to the variance. Default: 1e-3.
        gamma_initializer: Initializer of `gamma`. Default: `"ones"`.
        synchronized: Whether batch statistics are taken over all replicas;
            `normalize="input"` only. Default: `False`."""


def with_normalization_arguments(cls):
    """Fills `{normalization}` in a class docstring; the text is told once."""
    cls.__doc__ = cls.__doc__.replace("{normalization}", NORMALIZATION_ARGUMENTS)
    return cls


class CellWeights(typing.NamedTuple):
    """The tensors of one recurrence: a cell's own weights, or its folded ones."""

    kernel: typing.Any  # (D, G*U)
    bias: typing.Any  # (G*U,) or None
    recurrent_kernel: typing.Any  # (U, G*U)
    recurrent_bias: typing.Any  # (G*U,) or None
    peephole_kernel: typing.Any = None  # (3, U): i, f, o, or None
    # (B, U), multiplies the output on its way to a recurrent product; or None
    recurrent_dropout_mask: typing.Any = None


def identity(a, columns=None):
    """The `normalize` of a step in which nothing is left to normalise."""
    return a


class BatchNormalizer:
    """Normalises pre-activations of one timestep by the moments of its valid rows."""

    def __init__(self, norm, affine, valid=None):
        self._norm = norm
        self._affine = affine
        self._valid = valid
        self._moments = []

    def __call__(self, a, columns=slice(None)):
        norm = self._norm
        x = ops.cast(a, norm.moving_mean.dtype)
        if self._valid is not None:
            x = ops.where(self._valid, x, 0.0)
        mean, variance, count = norm.batch_moments(x, self._valid, (0,))
        self._moments.append((columns, (mean[0], variance[0], count[0])))
        gamma, beta = (None if p is None else p[columns] for p in self._affine)
        y = stats.normalize(x, mean, variance, gamma, beta, norm.epsilon)
        return ops.cast(y, a.dtype)

    def moments(self):
        """Mean (G*U,), variance (G*U,) and count (1,) of all that was normalised."""
        width = self._norm.moving_mean.shape[0]
        moments = in_order_of_columns(self._moments, width)
        means, variances, counts = zip(*moments, strict=True)
        return ops.concatenate(means), ops.concatenate(variances), counts[0]


class PopulationNormalizer:
    """Normalises pre-activations by the population statistics, and keeps them."""

    def __init__(self, norm):
        self._affine = norm.scale_and_shift()
        self._seen = []

    def __call__(self, a, columns=slice(None)):
        self._seen.append((columns, a))
        scale, shift = (p[columns] for p in self._affine)
        return ops.cast(ops.cast(a, scale.dtype) * scale + shift, a.dtype)

    def pre_activations(self):
        """What was normalised, (B, G*U)."""
        width = self._affine[0].shape[0]
        return ops.concatenate(in_order_of_columns(self._seen, width), axis=-1)


def in_order_of_columns(parts, width):
    """The values of a cell's calls of `normalize`, by the columns that they are.

    Args:
        parts: List of `(columns, value)`, `columns` a slice of the G*U columns.
        width: G*U.

    Raises:
        ValueError: If a step normalises a column twice or not at all.
    """
    spans = sorted(
        ((columns.indices(width), value) for columns, value in parts),
        key=lambda part: part[0][0],
    )
    expected = 0
    for (start, stop, stride), _ in spans:
        if start != expected or stride != 1:
            break
        expected = stop
    if expected != width or not spans:
        received = [(start, stop) for (start, stop, _), _ in spans]
        raise ValueError(
            "A step must normalise each of its columns once: `columns` must be slices "
            f"that make up [0, {width}). Received: columns={received}"
        )
    return [value for _, value in spans]


class TrialStep:
    """What a cell learnt in a first timestep that Keras only tries.

    A plain object, in which Keras does not look for variables to track.
    """

    def __init__(self):
        self.end()

    def begin(self):
        """A layer starts on a sequence."""
        self._in_sequence, self._state, self._values = True, None, None

    def end(self):
        """The sequence is over; a cell called by itself has no trial steps."""
        self._in_sequence, self._state, self._values = False, None, None

    def forget(self, norm, state):
        """Restores the statistics of before if this is the first timestep once more.

        It is where the state is that of the first call, or where the body of a loop
        is being traced, which has a graph of its own.
        """
        if self._in_sequence and not is_inside_rnn_call():
            self.end()  # that call raised an error and never said that it was over
        if not self._in_sequence:
            return
        variables = norm.statistics_variables
        values = [ops.copy(v) for v in variables]
        if self._values is None:
            self._state, self._values = state, values
            return
        graph, first_graph = (
            getattr(v[0], "graph", None) for v in (values, self._values)
        )
        in_body = first_graph is not None and graph is not first_graph
        if in_body or self._is_first_state(state):
            with first_graph.as_default() if in_body else contextlib.nullcontext():
                for variable, value in zip(variables, self._values, strict=True):
                    variable.assign(value)
        if in_body:
            self.end()  # traced once, it stands for all timesteps

    def _is_first_state(self, state):
        if isinstance(self._state, keras.Variable) and state is not self._state:
            # An eager loop hands on the value of a stateful layer's variable.
            return bool(ops.all(ops.equal(state, self._state)))
        return state is self._state


def is_inside_rnn_call():
    """Whether `keras.layers.RNN.call` is on the stack."""
    code = inspect.unwrap(keras.layers.RNN.call).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def refuse_replicas(cell):
    """A loop that is not ours cannot learn statistics on several replicas."""
    if replica_count() > 1:
        raise ValueError(
            "A cell in `keras.layers.RNN` cannot train on several replicas: use the "
            f"layer of the cell, such as `BNLSTM`. Received: {type(cell).__name__} "
            f"{cell.name!r} on {replica_count()} replicas"
        )


class BNCell:
    """Normalisation for a stock Keras cell: mixed in before it.

    A concrete cell gives `gates` and `step`. It inherits the stock cell's
    arguments, config, states and dropout.
    """

    gates = None  # G
    reads_ahead = False  # see `time_loop`

    def _init_normalization(
        self,
        normalize,
        statistics,
        population,
        max_timesteps,
        momentum,
        epsilon,
        gamma_initializer,
        synchronized,
        dropout,
        recurrent_dropout,
    ):
        """Called by a cell after the stock `__init__`."""
        if normalize == "recurrent":
            raise ValueError(
                "`normalize='recurrent'` is not available yet: use 'input' or "
                f"'joint'. Received: normalize={normalize!r}"
            )
        if normalize not in ("input", "joint"):
            raise ValueError(
                "`normalize` must be 'input' or 'joint'. "
                f"Received: normalize={normalize!r}"
            )
        check_flag("synchronized", synchronized)
        if synchronized and normalize == "joint":
            raise ValueError(
                "`synchronized=True` needs `normalize='input'`: replicas cannot "
                "exchange sums inside the time loop. "
                f"Received: synchronized={synchronized!r}, normalize={normalize!r}"
            )
        for name, rate in (
            ("dropout", dropout),
            ("recurrent_dropout", recurrent_dropout),
        ):
            if (
                not is_number(rate) or not 0.0 <= rate < 1.0
            ):  # the stock cell would clamp it
                raise ValueError(
                    f"`{name}` must be in [0, 1). Received: {name}={rate!r}"
                )
        self.normalize = normalize
        self._trial = TrialStep()
        self._drops_nothing = False
        # One mask for all gates: the recurrent product stays one product.
        self.dropout_mask_count = None
        self.input_norm = SequenceBatchNorm(
            statistics=statistics,
            population=population,
            max_timesteps=max_timesteps,
            momentum=momentum,
            epsilon=epsilon,
            center=self.use_bias,
            synchronized=synchronized,
            gamma_initializer=gamma_initializer,
            beta_initializer=self._beta_initializer(),
            beta_regularizer=self.bias_regularizer,
            beta_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            trainable=self.trainable,
            name="input_norm",
        )

    def _beta_initializer(self):
        return self.bias_initializer

    def build(self, input_shape):
        width = self.gates * self.units
        self.kernel = self.add_weight(
            shape=(input_shape[-1], width),
            name="kernel",
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        self.recurrent_kernel = self.add_weight(
            shape=(self.units, width),
            name="recurrent_kernel",
            initializer=self.recurrent_initializer,
            regularizer=self.recurrent_regularizer,
            constraint=self.recurrent_constraint,
        )
        self.recurrent_bias = self.peephole_kernel = None
        self.input_norm.build((None, None, width))
        self.built = True

    def step(self, projected, recurrent, states, weights, normalize):
        """The cell's equations: elementwise, in one timestep.

        Args:
            projected: Tensor (B, G*U), the input projection (with its bias, and
                normalised, for `normalize="input"`).
            recurrent: Tensor (B, ...), the output of the step before times
                `loop_kernel(weights)`.
            states: List of tensors (B, U).
            weights: `CellWeights`.
            normalize: Function of a pre-activation and the slice of the G*U
                columns that it is.

        Returns:
            The list of new states; the first one is the output.
        """
        raise NotImplementedError

    def loop_kernel(self, weights):
        """What the time loop multiplies the output by: (U, ...)."""
        return weights.recurrent_kernel

    def step_derivative(self):
        """`StepDerivative` of `step` with nothing left to normalise.

        `None` where there is no closed form of it, as for an activation that is
        not elementwise: the backend then differentiates the time loop. So it does for
        a subclass that overrides `step` and not this.
        """
        return None

    def call(self, inputs, states, training=False):
        """One timestep, as in `keras.layers.RNN(cell)`: frame-wise statistics.

        That layer tells a cell nothing of the mask: in training, padded rows
        count here. The layer of the cell leaves them out.
        """
        nested = isinstance(states, (list, tuple))
        states = list(states) if nested else [states]
        output = states[0]
        if training and self.dropout:
            inputs = inputs * super().get_dropout_mask(inputs)
        dropout_mask = None
        if training and self.recurrent_dropout:
            dropout_mask = self.get_recurrent_dropout_mask(output)

        norm = self.input_norm
        learns = norm.uses_batch_statistics(training)
        if learns:
            norm.require_group_size(inputs.shape, (0,), "a cell")
            refuse_replicas(self)
            self._trial.forget(self.input_norm, states[0])
            normalizer = BatchNormalizer(norm, norm.affine())
        else:
            normalizer = PopulationNormalizer(norm)
        weights = self.own_weights()._replace(recurrent_dropout_mask=dropout_mask)
        projected = ops.matmul(inputs, weights.kernel)
        if dropout_mask is not None:
            output = output * dropout_mask
        normalize = normalizer
        if self.normalize == "input":
            projected = normalizer(projected)
            normalize = identity
        states = self.step(
            projected,
            ops.matmul(output, self.loop_kernel(weights)),
            states,
            weights,
            normalize,
        )
        if learns:
            norm.update_statistics(
                *normalizer.moments(), frame_wise=True, across_steps=True
            )
        return states[0], states if nested else states[0]

    # `keras.layers.RNN` tries the first timestep once before its loop, to learn the
    # shapes, and does it over in the loop. It asks for the dropout mask before all
    # that and resets it at the end: by this a cell knows where a sequence starts, and
    # takes back what it learnt in the trial.

    def get_dropout_mask(self, step_input):
        self._trial.begin()
        return None if self._drops_nothing else super().get_dropout_mask(step_input)

    def get_recurrent_dropout_mask(self, step_input):
        if self._drops_nothing:
            return None
        return super().get_recurrent_dropout_mask(step_input)

    def reset_dropout_mask(self):
        self._trial.end()
        super().reset_dropout_mask()

    def own_weights(self):
        """The weights as they are trained."""

        def read(variable):
            # Here and now: a variable read inside a loop is kept for each timestep.
            if variable is None:
                return None
            # In a wrapper of another policy a variable is read in its dtype.
            return ops.cast(ops.copy(variable), self.compute_dtype)

        return CellWeights(
            kernel=read(self.kernel),
            bias=None,
            recurrent_kernel=read(self.recurrent_kernel),
            recurrent_bias=read(self.recurrent_bias),
            peephole_kernel=read(self.peephole_kernel),
        )

    def folded_weights(self):
        """Weights of the same recurrence without normalisation, at inference.

        With the population statistics, BN is affine: columns of the kernel (and
        for `"joint"` of the recurrent kernel) are scaled, and the shift is a bias.
        """
        scale, shift = self.input_norm.scale_and_shift()
        own = self.own_weights()

        def scaled(tensor):
            return ops.cast(ops.cast(tensor, scale.dtype) * scale, tensor.dtype)

        folded = own._replace(
            kernel=scaled(own.kernel), bias=ops.cast(shift, own.kernel.dtype)
        )
        if self.normalize == "joint":
            folded = folded._replace(recurrent_kernel=scaled(own.recurrent_kernel))
            if own.recurrent_bias is not None:
                folded = folded._replace(recurrent_bias=scaled(own.recurrent_bias))
        return folded

    def get_config(self):
        norm = self.input_norm
        return {
            **super().get_config(),
            "normalize": self.normalize,
            "statistics": norm.statistics,
            "population": norm.population,
            "max_timesteps": norm.max_timesteps,
            "momentum": norm.momentum,
            "epsilon": norm.epsilon,
            "gamma_initializer": keras.initializers.serialize(norm.gamma_initializer),
            "synchronized": norm.synchronized,
        }


# What makes up a cell's or a layer's function of its inputs.
FUNCTION = ("step", "call", "inner_loop", "build", "own_weights", "folded_weights")


def changes_function(layer, base):
    """Names of the methods of `FUNCTION` that `type(layer)` overrides.

    Args:
        layer: A `BNCell`, `BNRNN` or `SequenceBatchNorm`, of a subclass of `base`.
        base: A class of this package.

    Returns:
        List of `"Class.method"`. The cell of a layer is not looked at.
    """
    cls = type(layer)
    return [
        f"{cls.__name__}.{name}"
        for name in FUNCTION
        if getattr(cls, name, None) is not getattr(base, name, None)
    ]


def derivative_of(cell):
    """The `StepDerivative` of a cell's step, or `None` where there is none.

    A subclass that overrides `step` inherits a derivative of other equations.
    """
    classes = type(cell).__mro__

    def depth(name):
        return next(i for i, cls in enumerate(classes) if name in vars(cls))

    if depth("step") < depth("step_derivative"):
        return None
    return cell.step_derivative()


def of_cell(name):
    """A read-only attribute of a layer that stands in its cell."""
    return property(lambda layer: getattr(layer.cell, name))


def of_norm(name):
    """The same for what stands in the cell's `SequenceBatchNorm`."""
    return property(lambda layer: getattr(layer.cell.input_norm, name))


class BNRNN(keras.layers.RNN):
    """A layer of one `BNCell`, whose input projection is one product for all T."""

    units = of_cell("units")
    activation = of_cell("activation")
    use_bias = of_cell("use_bias")
    kernel_initializer = of_cell("kernel_initializer")
    recurrent_initializer = of_cell("recurrent_initializer")
    bias_initializer = of_cell("bias_initializer")
    kernel_regularizer = of_cell("kernel_regularizer")
    recurrent_regularizer = of_cell("recurrent_regularizer")
    bias_regularizer = of_cell("bias_regularizer")
    kernel_constraint = of_cell("kernel_constraint")
    recurrent_constraint = of_cell("recurrent_constraint")
    bias_constraint = of_cell("bias_constraint")
    dropout = of_cell("dropout")
    recurrent_dropout = of_cell("recurrent_dropout")
    seed = of_cell("seed")
    normalize = of_cell("normalize")
    input_norm = of_cell("input_norm")
    statistics = of_norm("statistics")
    population = of_norm("population")
    max_timesteps = of_norm("max_timesteps")
    momentum = of_norm("momentum")
    epsilon = of_norm("epsilon")
    gamma_initializer = of_norm("gamma_initializer")
    synchronized = of_norm("synchronized")
    nonfinite_batches = of_norm("nonfinite_batches")

    use_cudnn = False
    _fused = None

    def __init__(self, cell, activity_regularizer=None, **kwargs):
        super().__init__(cell, activity_regularizer=activity_regularizer, **kwargs)
        self.input_spec = keras.layers.InputSpec(ndim=3)
        # Keras 3.16 sets it to False in `RNN`: the layer above would count padding.
        self.supports_masking = True

    def call(self, sequences, initial_state=None, mask=None, training=False):
        require_timesteps(sequences, self.name)
        # Not every caller casts: `TimeDistributed` calls `call` itself.
        sequences = ops.cast(sequences, self.compute_dtype)
        # Keras draws dropout masks at inference too, which changes the seed's state.
        self.cell._drops_nothing = not training
        try:
            return super().call(
                sequences, initial_state=initial_state, mask=mask, training=training
            )
        finally:
            self.cell._drops_nothing = False

    def inner_loop(self, sequences, initial_state, mask, training=False):
        require_backend()
        cell = self.cell
        norm = cell.input_norm
        sequences, mask = self._clean(sequences, mask)
        if training and cell.dropout:
            dropout_mask = cell.get_dropout_mask(sequences[:, 0, :])
            sequences = sequences * dropout_mask[:, None, :]
        learns = norm.uses_batch_statistics(training)
        weights = cell.own_weights() if learns else cell.folded_weights()
        if training and cell.recurrent_dropout:
            dropout_mask = cell.get_recurrent_dropout_mask(initial_state[0])
            weights = weights._replace(recurrent_dropout_mask=dropout_mask)

        kernel = self._fused_kernel(training, mask)
        if kernel is None:
            outputs, states = self._time_loop(
                sequences, initial_state, mask, weights, learns, training
            )
            return self._masked_outputs(outputs, states, mask)

        if learns:
            valid = None if mask is None else mask[..., None]
            sequences, folded, bias = folded_projection(
                norm, sequences, weights.kernel, valid
            )
            weights = weights._replace(kernel=folded, bias=bias)

        outputs, states = kernel(
            sequences, initial_state, mask, weights, self.zero_output_for_mask
        )
        if not self.return_sequences:
            outputs = None
        return self._masked_outputs(outputs, states, mask)

    def _time_loop(
        self,
        sequences,
        initial_state,
        mask,
        weights,
        learns,
        training,
    ):
        """Projects, normalises where the layer learns, and runs the time loop.

        Returns:
            Outputs (B, T, U) in the order of processing, or `None`, and the states.
        """
        cell = self.cell
        norm = cell.input_norm
        in_loop = learns and cell.normalize == "joint"
        frames, valid = self._frames(sequences, mask)
        if learns and not in_loop:
            projected, bias = normalized_projection(norm, frames, weights.kernel, valid)
            weights = weights._replace(bias=bias)
        else:
            if in_loop:
                cause = "`normalize='joint'`"
                norm.require_group_size(sequences.shape, (0,), cause)
            projected = ops.matmul(frames, weights.kernel)  # (T, B, G*U)

        affine = norm.affine()

        def step(projected_t, recurrent_t, states, weights, valid_t):
            normalize = identity
            if in_loop:
                normalize = BatchNormalizer(norm, affine, valid_t)
            states = cell.step(projected_t, recurrent_t, states, weights, normalize)
            return states, normalize.moments() if in_loop else ()

        width = projected.shape[-1]
        dtype = norm.moving_mean.dtype
        moments = [((width,), dtype), ((width,), dtype), ((1,), dtype)]
        outputs, states, collected = time_loop(
            step,
            projected,
            initial_state,
            weights,
            valid=valid,
            unroll=self.unroll,
            return_sequences=self.return_sequences,
            recurrent_kernel=cell.loop_kernel(weights),
            collected=moments if in_loop else (),
            derivative=None if in_loop else derivative_of(cell),
            keeps=training,
            reads_ahead=cell.reads_ahead,
        )
        if in_loop:
            norm.update_statistics(*collected, frame_wise=True)
        if outputs is not None:
            outputs = ops.transpose(outputs, (1, 0, 2))  # (B, T, U)
        return outputs, states

    def build(self, sequences_shape, initial_state_shape=None):
        super().build(sequences_shape, initial_state_shape)
        if self._why_not_fused() is None:
            self._fused = FusedKernel(self._stock_layer())
            self._fused.build(sequences_shape)

    def _use_cudnn(self, use_cudnn):
        """Called by a layer at the end of its `__init__`."""
        self.use_cudnn = use_cudnn
        if self._why_not_fused(training=True) is None:
            self.supports_jit = False  # as in the stock layer: XLA has no such kernel

    def _stock_layer(self):
        """The stock layer whose kernel may run this one; `None` where there is none."""
        return None

    def _fused_kernel(self, training, mask):
        """The kernel of this call, or `None` for the time loop."""
        reason = self._why_not_fused(training, mask)
        if reason is None and self._fused is not None:
            return self._fused
        if self.use_cudnn is True:
            reason = reason or "the layer was built where there was no GPU"
            raise ValueError(
                f"`use_cudnn=True` cannot be met: {reason}. Pass `use_cudnn='auto'` "
                f"to use the time loop instead. Received: {type(self).__name__} "
                f"{self.name!r} with training={training!r}"
            )
        return None

    def _why_not_fused(self, training=False, mask=None):
        """Why no fused kernel runs a call, or `None` where one does."""
        cell = self.cell
        if self.use_cudnn is False:
            return "`use_cudnn` is False"
        if not self._has_stock_equations():
            return "only the usual activations, without peepholes, have a kernel"
        if self.unroll:
            return "`unroll` is True"
        if training and cell.recurrent_dropout:
            return "there is recurrent dropout"
        if cell.input_norm.uses_batch_statistics(training):
            if cell.normalize == "joint":
                return "`normalize='joint'` normalises inside the time loop"
            if self.statistics == "frame":
                return "statistics are frame-wise"
        if mask is not None and self.use_cudnn is not True:
            # Which of the two runs cannot be left to the mask's values: TensorFlow
            # 2.21 gives wrong gradients of a `tf.cond` between them.
            return "the mask may have any pattern"
        if not gpu_is_visible():
            return "there is no GPU"
        return None

    def _has_stock_equations(self):
        return False

    def _frames(self, sequences, mask):
        """Sequences and mask as the time loop has them.

        Args:
            sequences: Tensor of shape (B, T, D).
            mask: Boolean tensor of shape (B, T), or `None`.

        Returns:
            Tensor (T, B, D) and boolean tensor (T, B, 1) or `None`, in the order of
            processing.
        """
        frames = ops.transpose(sequences, (1, 0, 2))
        valid = None if mask is None else ops.transpose(mask)[..., None]
        if self.go_backwards:
            frames = ops.flip(frames, axis=0)
            valid = None if valid is None else ops.flip(valid, axis=0)
        return frames, valid

    def pre_activations(self, sequences, initial_state=None, mask=None):
        """What `input_norm` normalises at inference, in float64.

        Args:
            sequences: Tensor of shape (B, T, D).
            initial_state: List of tensors of shape (B, U). Default: zeros.
            mask: Boolean tensor of shape (B, T), or `None`.

        Returns:
            Tensor of shape (B, T, G*U), in the order of the sequences.
        """
        cell = self.cell
        sequences, mask = self._clean(sequences, mask)
        weights = cell.own_weights()
        kernel = weights.kernel
        if cell.normalize == "input":
            sequences = ops.cast(sequences, "float64")
            return ops.matmul(sequences, ops.cast(kernel, "float64"))

        def step(projected_t, recurrent_t, states, weights, valid_t):
            normalize = PopulationNormalizer(cell.input_norm)
            states = cell.step(projected_t, recurrent_t, states, weights, normalize)
            return states, [normalize.pre_activations()]

        if initial_state is None:
            initial_state = self.get_initial_state(ops.shape(sequences)[0])
        dtype = cell.compute_dtype
        shape = (sequences.shape[0], kernel.shape[-1])
        frames, valid = self._frames(sequences, mask)
        _, _, (seen,) = time_loop(
            step,
            ops.matmul(ops.cast(frames, dtype), ops.cast(kernel, dtype)),
            [ops.cast(state, dtype) for state in keras.tree.flatten(initial_state)],
            weights,
            valid=valid,
            return_sequences=False,
            recurrent_kernel=cell.loop_kernel(weights),
            collected=[(shape, dtype)],
        )
        seen = ops.transpose(ops.cast(seen, "float64"), (1, 0, 2))  # (B, T, G*U)
        return ops.flip(seen, axis=1) if self.go_backwards else seen

    def _clean(self, sequences, mask):
        """The mask as booleans, and sequences with nothing where it is false.

        What stands in padding, NaN included, must not reach a product.
        """
        if mask is None:
            return sequences, None
        mask = keras.tree.flatten(mask)[0]
        check_mask(mask, sequences.shape)
        mask = ops.cast(mask, "bool")
        zero = ops.zeros((), sequences.dtype)
        return ops.where(mask[..., None], sequences, zero), mask

    def _masked_outputs(self, outputs, states, mask):
        """Outputs where a frame is not valid, as `keras.layers.RNN` has them.

        Zeros with `zero_output_for_mask`, else the output before, and zeros while
        there is none. The states already repeat themselves there: only an initial
        state that shows before the first valid frame is left to hide.
        """
        last = states[0]
        if mask is not None:
            if self.go_backwards:
                mask = ops.flip(mask, axis=1)
            if self.zero_output_for_mask:
                shown = mask
            else:
                shown = ops.cumsum(ops.cast(mask, "int32"), axis=1) > 0
            zero = ops.zeros((), last.dtype)
            last = ops.where(shown[:, -1:], last, zero)
            if outputs is not None:
                outputs = ops.where(shown[..., None], outputs, zero)
        if outputs is None:
            outputs = last[:, None, :]
        return last, outputs, states

    def get_config(self):
        config = super().get_config()
        del config["cell"]
        cell_config = self.cell.get_config()
        for shared in ("name", "trainable", "dtype"):
            del cell_config[shared]
        regularizer = keras.regularizers.serialize(self.activity_regularizer)
        return {**config, "activity_regularizer": regularizer, **cell_config}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


ELEMENTWISE = frozenset(
    [
        keras.activations.celu,
        keras.activations.elu,
        keras.activations.exponential,
        keras.activations.gelu,
        keras.activations.hard_shrink,
        keras.activations.hard_sigmoid,
        keras.activations.hard_silu,
        keras.activations.hard_tanh,
        keras.activations.leaky_relu,
        keras.activations.linear,
        keras.activations.log_sigmoid,
        keras.activations.mish,
        keras.activations.relu,
        keras.activations.relu6,
        keras.activations.selu,
        keras.activations.sigmoid,
        keras.activations.silu,
        keras.activations.soft_shrink,
        keras.activations.softplus,
        keras.activations.softsign,
        keras.activations.sparse_plus,
        keras.activations.sparse_sigmoid,
        keras.activations.squareplus,
        keras.activations.tanh,
        keras.activations.tanh_shrink,
    ]
)


def elementwise(*activations):
    """Whether each is known to map an element to an element, as softmax does not."""
    return all(any(a is known for known in ELEMENTWISE) for a in activations)


def check_units(units):
    if isinstance(units, bool) or not isinstance(units, numbers.Integral) or units < 1:
        raise ValueError(
            f"`units` must be a positive integer. Received: units={units!r}"
        )


def check_use_cudnn(use_cudnn):
    if not isinstance(use_cudnn, bool) and use_cudnn != "auto":
        raise ValueError(
            "`use_cudnn` must be 'auto', True or False. "
            f"Received: use_cudnn={use_cudnn!r}"
        )
