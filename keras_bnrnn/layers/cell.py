"""`BNCell`: the part that all batch-normalised cells share."""

import keras
from keras import ops

from keras_bnrnn.layers.arguments import (
    DEFAULTS,
    check_normalize,
    check_rate,
    check_units,
    with_normalization_arguments,
)
from keras_bnrnn.layers.keras_rnn import TrialStep, TriedCell, refuse_replicas
from keras_bnrnn.layers.normalizers import BatchNormalizer, PopulationNormalizer
from keras_bnrnn.recurrence import Weights
from keras_bnrnn.sequence_batch_norm import SequenceBatchNorm


@with_normalization_arguments
class BNCell(TriedCell):
    """Normalisation for a stock Keras cell: mixed in before it.

    A cell of a new kind is mixed into the stock cell whose arguments, states and
    dropout it takes, declares the attributes below that apply to it, and implements
    `step`:

    >>> class Cell(BNCell, keras.layers.SimpleRNNCell):
    ...     gates = 1
    ...
    ...     def step(self, projected, recurrent, states, weights, norm):
    ...         return [self.activation(norm("joint", projected + recurrent))]

    Attributes:
        gates: G, the number of gates.
        stock_cell: The Keras cell of the same equations, which `fold` puts in its
            place. `None` (default): there is none.
        fused: The kind of the backend's fused kernel with the same equations: `"lstm"`,
            `"gru"` or `None` (default).
        more_weights: Names of the attributes that hold weights other than kernel and
            recurrent kernel, which `step` finds in `weights.more`. Default: none.
        scaled_with_recurrent: Names of those of them that belong to the recurrent
            product: folding scales their columns with those of the recurrent kernel.
        reads_ahead: See `recurrence.schedule.Schedule`. Default: `False`.

    Args:
        units: U, a positive integer.
        {normalization}
        **arguments: Those of the stock cell.
    """

    gates = None
    stock_cell = None
    fused = None
    more_weights = ()
    scaled_with_recurrent = ()
    reads_ahead = False

    def __init__(self, units, **arguments):
        check_units(units)
        normalization = {
            name: arguments.pop(name, default) for name, default in DEFAULTS.items()
        }
        super().__init__(units=units, **arguments)
        self.normalize = normalization.pop("normalize")
        check_normalize(self.normalize, normalization["synchronized"])
        for name in ("dropout", "recurrent_dropout"):
            check_rate(name, arguments.get(name, 0.0))
        self.trial = TrialStep()
        # One mask for all gates: the recurrent product stays one product.
        self.dropout_mask_count = None
        for site in self.sites(self.normalize):
            norm = SequenceBatchNorm(
                center=self.use_bias,
                beta_initializer=self.beta_initializer(),
                beta_regularizer=self.bias_regularizer,
                beta_constraint=self.bias_constraint,
                dtype=self.dtype_policy,
                trainable=self.trainable,
                name=NORM_OF_SITE[site],
                **normalization,
            )
            setattr(self, NORM_OF_SITE[site], norm)

    def sites(self, normalize):
        """The places where the cell normalises.

        Args:
            normalize: The argument of that name.

        Returns:
            Dict from the name of each site to its width.
        """
        return {normalize: self.gates * self.units}

    @property
    def norms(self):
        """Dict from the name of each site to its `SequenceBatchNorm`."""
        return {
            site: getattr(self, NORM_OF_SITE[site])
            for site in self.sites(self.normalize)
        }

    @property
    def norms_in_loop(self):
        """Those of `norms` whose pre-activations exist one timestep at a time."""
        return {site: norm for site, norm in self.norms.items() if site != "input"}

    def beta_initializer(self):
        """The initializer of beta, which takes the place of the bias."""
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
        for name in self.more_weights:
            setattr(self, name, None)
        for site, width in self.sites(self.normalize).items():
            self.norms[site].build((None, None, width))
        self.built = True

    def step(self, projected, recurrent, states, weights, norm):
        """The cell's equations: elementwise, in one timestep.

        Args:
            projected: Tensor (B, G*U), the input projection, with its bias, and
                normalised if there is an input site.
            recurrent: Tensor (B, ...), the last output times `loop_kernel(weights)`.
            states: List of tensors (B, U).
            weights: `Weights`.
            norm: Function `norm(site, a, columns)` that normalises the pre-activation
                `a`, which is these columns of a site. At a site that the cell does not
                have, it returns `a`.

        Returns:
            The list of new states; the first one is the output.
        """
        raise NotImplementedError

    def loop_kernel(self, weights):
        """The tensor (U, ...) that the time loop multiplies the output by."""
        return weights.recurrent_kernel

    def derivative(self):
        """`StepDerivative` of `step` without normalisation.

        `None` (default): the backend differentiates the time loop. It does so too for a
        subclass that overrides `step` and not this method.
        """
        return None

    def is_bounded(self):
        """Whether the states stay finite however long the cell runs on.

        Default: `False`, which costs time if there is a mask.
        """
        return False

    def has_stock_equations(self):
        """Whether the equations are those of `fused`, with these arguments."""
        return True

    def why_not_stock(self):
        """The reason why these arguments have no stock cell, or `None`."""
        return None

    def call(self, inputs, states, training=False):
        """One timestep, as in `keras.layers.RNN(cell)`: frame-wise statistics.

        That layer does not pass the mask to its cell: in training, padded rows count
        here. The layer of the cell leaves them out.
        """
        nested = isinstance(states, (list, tuple))
        states = list(states) if nested else [states]
        if training and self.dropout:
            inputs = inputs * self.dropout_mask_of_step(inputs)
        dropout_mask = None
        if training and self.recurrent_dropout:
            dropout_mask = self.get_recurrent_dropout_mask(states[0])

        norms = self.norms
        learns = self.learns(training)
        if learns:
            for norm in norms.values():
                norm.require_group_size(inputs.shape, (0,), "a cell")
            refuse_replicas(self)
            self.trial.forget(norms.values(), states[0])
        normalizer = (BatchNormalizer if learns else PopulationNormalizer)(norms)
        weights = self.own_weights()._replace(recurrent_dropout_mask=dropout_mask)
        projected = normalizer("input", ops.matmul(inputs, weights.kernel))
        recurrent = ops.matmul(weights.dropped(states[0]), self.loop_kernel(weights))
        states = self.step(projected, recurrent, states, weights, normalizer)
        if learns:
            self.learn(normalizer.moments(), norms, across_steps=True)
        return states[0], states if nested else states[0]

    def learns(self, training):
        """Whether a call with this `training` normalises by the batch's moments."""
        return next(iter(self.norms.values())).uses_batch_statistics(training)

    def learn(self, moments, norms, across_steps=False):
        """Updates population statistics by the moments of timesteps.

        Args:
            moments: List of mean, variance and count of each site in turn.
            norms: Dict of the `SequenceBatchNorm` of each site.
            across_steps: As in `SequenceBatchNorm.update_statistics`.
        """
        for i, norm in enumerate(norms.values()):
            norm.update_statistics(
                *moments[3 * i : 3 * i + 3], frame_wise=True, across_steps=across_steps
            )

    def own_weights(self):
        """The weights as they are trained."""

        def read(variable):
            # Read here and now: the gradient of a loop would keep a variable that is
            # read inside it for each timestep.
            if variable is None:
                return None
            # In a wrapper of another policy a variable is read in its dtype.
            return ops.cast(ops.copy(variable), self.compute_dtype)

        return Weights(
            kernel=read(self.kernel),
            recurrent_kernel=read(self.recurrent_kernel),
            more={name: read(getattr(self, name)) for name in self.more_weights},
        )

    def folded_weights(self):
        """Weights of the same recurrence without normalisation, at inference.

        With the population statistics, batch normalisation is affine: it scales the
        columns of the kernel (under `"joint"` those of the recurrent kernel too), and
        its shift is a bias.
        """
        scale, shift = self.input_norm.scale_and_shift()
        own = self.own_weights()

        def scaled(tensor):
            if tensor is None:
                return None
            return ops.cast(ops.cast(tensor, scale.dtype) * scale, tensor.dtype)

        folded = own._replace(
            kernel=scaled(own.kernel), bias=ops.cast(shift, own.kernel.dtype)
        )
        if self.normalize == "joint":
            names = self.scaled_with_recurrent
            folded = folded._replace(
                recurrent_kernel=scaled(own.recurrent_kernel),
                more={**own.more, **{name: scaled(own.more[name]) for name in names}},
            )
        return folded

    def stock_weights(self, weights):
        """Folded `Weights` as the list of the weights of `stock_cell`."""
        bias = weights.bias
        if bias is None:
            bias = ops.zeros_like(weights.kernel[0])
        return [weights.kernel, weights.recurrent_kernel, bias]

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


# The attribute of a cell that holds the `SequenceBatchNorm` of a site.
NORM_OF_SITE = {"input": "input_norm", "joint": "input_norm"}

# The methods that make up a cell's or a layer's function of its inputs.
FUNCTION = ("step", "call", "inner_loop", "build", "own_weights", "folded_weights")


def changed_methods(layer, declaration):
    """The methods of its function that a class overrides below a declaration.

    Args:
        layer: A cell or layer of this package, or of a subclass.
        declaration: The name of a class attribute, such as `"stock_cell"`. The methods
            of the class that sets it are the ones that it speaks of.

    Returns:
        List of `"Class.method"`.
    """
    cls = type(layer)
    base = next(c for c in cls.__mro__ if declaration in vars(c))
    return [
        f"{cls.__name__}.{name}"
        for name in FUNCTION
        if getattr(cls, name, None) is not getattr(base, name, None)
    ]


def derivative_of(cell):
    """The `StepDerivative` of a cell's step, or `None` if there is none.

    A subclass that overrides `step` inherits a derivative of other equations.
    """
    classes = type(cell).__mro__

    def depth(name):
        return next(i for i, cls in enumerate(classes) if name in vars(cls))

    return None if depth("step") < depth("derivative") else cell.derivative()
