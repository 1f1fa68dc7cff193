"""Defines `BNCell`, the base of all batch-normalised cells."""

from typing import Any, Self

import keras
from keras import ops

from keras_bnrnn import types
from keras_bnrnn.checks import (
    check_dtype,
    check_flag,
    check_numeric,
    check_positive_integer,
    check_states,
    check_training,
    naming_arguments,
)
from keras_bnrnn.config import explained
from keras_bnrnn.layers.arguments import (
    DEFAULTS,
    check_normalize,
    check_rate,
    check_seed,
    with_normalization_arguments,
)
from keras_bnrnn.layers.keras_rnn import TrialStep, TriedCell, refuse_replicas
from keras_bnrnn.layers.normalizers import BatchNormalizer, PopulationNormalizer
from keras_bnrnn.recurrence import StepDerivative, Weights
from keras_bnrnn.sequence_batch_norm import SequenceBatchNorm


@with_normalization_arguments
class BNCell(TriedCell):
    """Adds batch normalisation to a stock Keras cell.

    A new kind of cell inherits from `BNCell` and from the stock cell whose arguments,
    states and dropout it uses. It sets the attributes below that apply to it, and
    implements `step`:

    >>> class Cell(BNCell, keras.layers.SimpleRNNCell):
    ...     gates = 1
    ...
    ...     def step(self, projected, recurrent, states, weights, norm):
    ...         return [self.activation(norm("joint", projected + recurrent))]

    Attributes:
        gates: G, the number of gates.
        stock_cell: The Keras cell with the same equations. `fold` replaces the cell by
            it. `None` (default): there is no such Keras cell.
        fused: The kind of the backend's fused kernel with the same equations: `"lstm"`,
            `"gru"` or `None` (default).
        more_weights: Names of the attributes that hold weights other than kernel and
            recurrent kernel. `step` reads them from `weights.more`. Default: none.
        scaled_with_recurrent: The names in `more_weights` that belong to the recurrent
            product. Folding scales their columns like those of the recurrent kernel.
            Default: none.
        reads_ahead: See `recurrence.schedule.Schedule`. Default: `False`.
        gate_activations: Tuple of pairs, one for each gate in the order of the columns
            of the kernel: the name of the gate, and the name of the attribute that
            holds its activation. `NormalizationMonitor` measures the gates with it.
            `None` (default): the gates are not measured.

    Args:
        units: U, a positive integer.
        {normalization}
        **arguments: The arguments of the stock cell.
    """

    gates: int | None = None
    stock_cell: Any = None
    fused: str | None = None
    more_weights: tuple[str, ...] = ()
    scaled_with_recurrent: tuple[str, ...] = ()
    reads_ahead: bool = False
    gate_activations: tuple[tuple[str, str], ...] | None = None

    def __init__(self, units: int, **arguments: Any) -> None:
        check_positive_integer("units", units)
        normalization = {
            name: arguments.pop(name, default) for name, default in DEFAULTS.items()
        }
        # Before the stock cell clamps them or fails on them.
        for name in ("dropout", "recurrent_dropout"):
            check_rate(name, arguments.get(name, 0.0))
        for name in ("use_bias", "unit_forget_bias", "reset_after"):
            check_flag(name, arguments.get(name, True))
        check_seed(arguments.get("seed"))
        # Stock cells take no integers of NumPy.
        with naming_arguments(arguments):
            super().__init__(units=int(units), **arguments)
        check_dtype(self.dtype_policy, arguments.get("dtype"))
        self.normalize = normalization.pop("normalize")
        check_normalize(self.normalize, normalization["synchronized"])
        self.trial = TrialStep()
        # All gates share one mask, so the recurrent product stays one product.
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

    def sites(self, normalize: types.Normalize) -> dict[str, int]:
        """Returns the places where the cell normalises.

        Args:
            normalize: The constructor argument.

        Returns:
            Dict from the name of each site to its width.
        """
        return {normalize: self.gates * self.units}

    @property
    def norms(self) -> dict[str, SequenceBatchNorm]:
        """Dict from the name of each site to its `SequenceBatchNorm`."""
        return {
            site: getattr(self, NORM_OF_SITE[site])
            for site in self.sites(self.normalize)
        }

    @property
    def norms_in_loop(self) -> dict[str, SequenceBatchNorm]:
        """The part of `norms` that normalises inside the time loop."""
        return {site: norm for site, norm in self.norms.items() if site != "input"}

    def beta_initializer(self) -> types.Initializer:
        """Returns the initializer of beta, which replaces the bias."""
        return self.bias_initializer

    def build(self, input_shape: types.Shape) -> None:
        features = input_shape[-1]
        if not features:
            raise ValueError(
                "The last dimension of `inputs` must be known, and not 0. "
                f"Received: inputs of shape {tuple(input_shape)}"
            )
        width = self.gates * self.units
        self.kernel = self.add_weight(
            shape=(features, width),
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
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: features})
        self.built = True

    def step(
        self,
        projected: types.Tensor,
        recurrent: types.Tensor,
        states: list[types.Tensor],
        weights: Weights,
        norm: types.Norm,
    ) -> list[types.Tensor]:
        """Computes the cell's equations in one timestep, elementwise.

        Args:
            projected: Tensor (B, G*U), the input projection with its bias. It is
                normalised if the cell has an input site.
            recurrent: Tensor (B, ...), the product of the last output and
                `loop_kernel(weights)`.
            states: List of tensors (B, U).
            weights: `Weights`.
            norm: Function `norm(site, a, columns)` that normalises the pre-activation
                `a`. `columns` is a slice, the columns of the site that `a` consists of;
                by default all. If the cell does not have the site, it returns `a`.

        Returns:
            The list of new states; the first one is the output.
        """
        raise NotImplementedError

    def gate_pre_activations(
        self,
        a: types.Tensor,
        before: list[types.Tensor],
        after: list[types.Tensor],
        weights: Weights,
    ) -> types.Tensor:
        """Returns what the activations of `gate_activations` receive, (B, G*U).

        Default: `a`. Override it in a cell that adds terms after normalisation.

        Args:
            a: Tensor (B, G*U), the results of `norm("joint", ...)` in `step`, in the
                order of the columns.
            before, after: Lists of the states (B, U) before and after the step.
            weights: `Weights`.
        """
        return a

    def loop_kernel(self, weights: Weights) -> types.Tensor:
        """Returns the tensor (U, ...) by which the time loop multiplies the output."""
        return weights.recurrent_kernel

    def derivative(self) -> StepDerivative | None:
        """Returns the `StepDerivative` of `step` without normalisation.

        `None` (default): the backend differentiates the time loop. The backend does so
        too if a subclass overrides `step` but not this method.
        """
        return None

    def is_bounded(self) -> bool:
        """Returns whether the states stay finite for any number of timesteps.

        Default: `False`. The time loop then takes longer if there is a mask.
        """
        return False

    def has_stock_equations(self) -> bool:
        """Returns whether the cell's arguments give the equations of `fused`."""
        return True

    def why_not_stock(self) -> str | None:
        """Returns why no stock cell has these arguments, or `None` if one has."""
        return None

    def call(
        self, inputs: types.Tensor, states: Any, training: bool | None = False
    ) -> tuple[types.Tensor, Any]:
        """Runs one timestep, as in `keras.layers.RNN(cell)`.

        Training statistics are frame-wise. `keras.layers.RNN` does not pass the mask to
        its cell, so the statistics include padding. The layer of the cell, such as
        `BNLSTM`, leaves padding out.
        """
        check_training(training)
        check_numeric("inputs", inputs)
        sizes = keras.tree.flatten(self.state_size)
        check_states("states", states, sizes, inputs.shape[0])
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

    def learns(self, training: bool | None) -> bool:
        """Returns whether a call normalises by the moments of the batch."""
        return next(iter(self.norms.values())).uses_batch_statistics(training)

    def learn(
        self,
        moments: list[types.Tensor],
        norms: dict[str, SequenceBatchNorm],
        across_steps: bool = False,
    ) -> None:
        """Updates the population statistics by the moments of timesteps.

        Args:
            moments: List of tensors: mean, variance and count of each site in turn.
            norms: Dict from the name of each site to its `SequenceBatchNorm`.
            across_steps: As in `SequenceBatchNorm.update_statistics`. Default: `False`.
        """
        for i, norm in enumerate(norms.values()):
            norm.update_statistics(
                *moments[3 * i : 3 * i + 3], frame_wise=True, across_steps=across_steps
            )

    def own_weights(self) -> Weights:
        """Returns the trained weights, as `Weights` in the compute dtype."""

        def read(variable):
            # Read outside the loop: the gradient of a loop would store a variable that
            # is read inside it once for each timestep.
            if variable is None:
                return None
            # In a wrapper with another dtype policy, Keras reads variables in that of
            # the wrapper.
            return ops.cast(ops.copy(variable), self.compute_dtype)

        return Weights(
            kernel=read(self.kernel),
            recurrent_kernel=read(self.recurrent_kernel),
            more={name: read(getattr(self, name)) for name in self.more_weights},
        )

    def folded_weights(self) -> Weights:
        """Returns `Weights` that compute inference without normalisation.

        With the population statistics, batch normalisation is affine. Its scale
        multiplies the columns of the kernel, with `normalize="joint"` those of the
        recurrent kernel too. Its shift is a bias.
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

    def stock_weights(self, weights: Weights) -> list[types.Tensor]:
        """Returns folded `Weights` as the list of the weights of `stock_cell`."""
        bias = weights.bias
        if bias is None:
            bias = ops.zeros_like(weights.kernel[0])
        return [weights.kernel, weights.recurrent_kernel, bias]

    def set_stock_weights(
        self,
        kernel: types.Tensor,
        recurrent_kernel: types.Tensor,
        bias: types.Tensor = None,
    ) -> None:
        """Sets the weights so that inference equals a stock cell's.

        gamma and beta undo the current population statistics. Needs `use_bias=True`.

        Args:
            kernel, recurrent_kernel, bias: Arrays, the weights of `stock_cell`. `bias`
                is `None` for a stock cell without a bias.
        """
        self.kernel.assign(kernel)
        self.recurrent_kernel.assign(recurrent_kernel)
        self.input_norm.set_scale_and_shift(1.0, 0.0 if bias is None else bias)

    def get_config(self) -> types.Config:
        config = {**super().get_config(), "normalize": self.normalize}
        config |= {name: getattr(self, name) for name in ARGUMENTS_OF_NORM}
        initializer = keras.initializers.serialize(self.gamma_initializer)
        return {**config, "gamma_initializer": initializer}

    @classmethod
    def from_config(cls, config: types.Config) -> Self:
        with explained(cls, config):
            return super().from_config(config)


def _of_norm(name):
    """Returns a read-only attribute that the cell's `SequenceBatchNorm` has."""
    return property(lambda cell: getattr(cell.input_norm, name))


ARGUMENTS_OF_NORM = [name for name in DEFAULTS if name != "normalize"]
for _name in ARGUMENTS_OF_NORM:
    setattr(BNCell, _name, _of_norm(_name))

# The attribute of a cell that holds the `SequenceBatchNorm` of a site.
NORM_OF_SITE = {"input": "input_norm", "joint": "input_norm"}

# The methods that determine the outputs of a cell or layer.
FUNCTION = (
    "step",
    "loop_kernel",
    "call",
    "inner_loop",
    "build",
    "own_weights",
    "folded_weights",
)


def changed_methods(layer, declaration):
    """Lists the methods of `FUNCTION` that a subclass overrides.

    Args:
        layer: A cell or layer of this package or of a subclass.
        declaration: The name of a class attribute, such as `"stock_cell"`. It describes
            the methods of the class that sets it. Overrides in subclasses of that class
            are listed.

    Returns:
        List of strings `"Class.method"`.
    """
    cls = type(layer)
    base = next(c for c in cls.__mro__ if declaration in vars(c))
    return [
        f"{cls.__name__}.{name}"
        for name in FUNCTION
        if getattr(cls, name, None) is not getattr(base, name, None)
    ]


def derivative_of(cell):
    """Returns the `StepDerivative` of a cell's step, or `None` if there is none.

    A subclass that overrides `step` or `loop_kernel` but not `derivative` has none: the
    inherited one is the derivative of other equations.
    """
    return cell.derivative() if _describes_the_step(cell, "derivative") else None


def is_bounded(cell):
    """Returns `cell.is_bounded()`, or `False` if a subclass overrides the equations."""
    return _describes_the_step(cell, "is_bounded") and cell.is_bounded()


class GatesError(ValueError):
    """A cell's declarations do not say how its gates are computed."""


def gates_of(cell):
    """Returns the dict from the name of each gate of a cell to its activation.

    Raises:
        GatesError: If the cell does not declare its gates, if a subclass overrides
            `step` or `loop_kernel` but does not declare the gates anew, or if the
            declaration does not fit the cell.
    """
    name = type(cell).__name__
    declared = cell.gate_activations
    if declared is None:
        raise GatesError(f"{name} does not declare `gate_activations`")
    if not _describes_the_step(cell, "gate_activations"):
        raise GatesError(
            f"{name} overrides `step` or `loop_kernel`, but not `gate_activations`"
        )
    absent = [a for _, a in declared if not callable(getattr(cell, a, None))]
    if len(dict(declared)) != cell.gates or absent:
        raise GatesError(
            f"`gate_activations` of {name} must name {cell.gates} gates, each with an "
            f"attribute that holds its activation. Received: {declared}"
        )
    return {gate: getattr(cell, attribute) for gate, attribute in declared}


def _describes_the_step(cell, method):
    """Returns whether no subclass overrides the equations below `method`."""
    classes = type(cell).__mro__

    def depth(name):
        return next(i for i, cls in enumerate(classes) if name in vars(cls))

    return depth(method) <= min(depth("step"), depth("loop_kernel"))
