"""Measures the normalisation of a model in one batch."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_bnrnn import backend
from keras_bnrnn import statistics as stats
from keras_bnrnn.layers.activations import bounds
from keras_bnrnn.layers.cell import GatesError, gates_of
from keras_bnrnn.targets import (
    find_targets,
    inputs_of,
    listening,
    state_variables,
    unchanged_states,
)
from keras_bnrnn.traversal import numbered, sublayers


class Probe:
    """Measures the normalisation of a model in one batch, any number of times.

    The first measurement is made at once, and is not returned. It finds what cannot be
    measured. The model computes `model(x, training=False)` in a graph of its own.

    Args:
        model: A built `keras.Model`. It is not changed.
        batch: As for `NormalizationMonitor`.
        margin: As for `NormalizationMonitor`.

    Attributes:
        unmeasured: Dict from the name of a layer to the reason why some or all of its
            gates are not measured.
        silent: List of the names of the layers that are never called on the batch.

    Raises:
        ValueError: If the model has no normalised layer, or if a layer receives no
            valid frame, a value that is not finite, or, with frame-wise statistics, a
            single row at each timestep.
    """

    def __init__(self, model, batch, margin):
        self._model = model
        self._x = inputs_of(model, batch)
        self._targets = find_targets(model)
        if not self._targets:
            raise ValueError(
                "`model` has no batch-normalised layer to monitor. "
                f"Received: model={model.name!r}"
            )
        # A layer that was never built is never called.
        names = numbered(target.name for target in self._targets)
        self._sums = {
            id(target): _Sums(name, target, margin)
            for name, target in zip(names, self._targets, strict=True)
            if target.norm.built
        }
        self._called = []  # in the order of the first calls

        def run(x):
            # Returns nothing, so the layers above the targets are not computed.
            model(x, training=False)

        with self._unchanged(), self._listening():
            self._run = backend.compiled(run, self._x, lambda rank: ())
            self._run(self._x)
        self.silent = [n for n in names if n not in {s.name for s in self._called}]
        self.unmeasured = {s.name: s.reason for s in self._called if s.reason}
        for one in self._called:
            one.require_usable()

    def __call__(self):
        """Returns a dict from the name of each layer to its measurements.

        The measurements are those of `NormalizationMonitor.history`.
        """
        for one in self._called:
            one.reset()
        with self._unchanged(), self._listening():
            self._run(self._x)
        return {one.name: one.measurements() for one in self._called}

    def gammas(self):
        """Returns a dict from the name of each layer with a gamma to its array (F,)."""
        return {
            one.name: one.gamma() for one in self._called if one.norm.gamma is not None
        }

    def _listening(self):
        def heard(target, inputs, initial_state, mask):
            one = self._sums[id(target)]
            if one not in self._called:
                self._called.append(one)
            one.add(inputs, initial_state, mask)

        return listening(self._targets, heard)

    @contextlib.contextmanager
    def _unchanged(self):
        """Restores every variable that an inference pass may change.

        Stateful layers start from states of 0. Stock recurrent layers with dropout draw
        masks at inference too, which moves the states of their seed generators.
        """
        variables = {
            id(v): v
            for layer in sublayers(self._model)
            for v in layer.variables
            if not v.trainable
        }
        values = [ops.copy(v) for v in variables.values()]
        with unchanged_states(self._model):
            for state in state_variables(self._model):
                state.assign(ops.zeros_like(state))
            try:
                yield
            finally:
                for variable, value in zip(variables.values(), values, strict=True):
                    variable.assign(value)


class _Sums:
    """The sums over frames that the measurements of one target are made of.

    They are float64 variables, which calls inside loops of a graph can also add to.

    Args:
        name: The name of the target in measurements.
        target: `Target`.
        margin: As for `NormalizationMonitor`.

    Attributes:
        name: As given.
        norm: The `SequenceBatchNorm`.
        reason: str, why gates are not measured. `None` (default): all are.
    """

    def __init__(self, name, target, margin):
        self.name = name
        self.norm = target.norm
        self.reason = None
        self._target = target
        self._margin = margin
        self._bounds = self._find_bounds(target.cell)
        (features,) = self.norm.moving_mean.shape
        shapes = {
            "mean_gap": features,
            "variance_gap": features,
            "frames": 1,
            "largest_group": 1,
            "low": len(self._bounds),
            "high": len(self._bounds),
            "gate_values": 1,
        }
        self._variables = {
            name: keras.Variable(np.zeros(size), dtype="float64", autocast=False)
            for name, size in shapes.items()
        }

    def _find_bounds(self, cell):
        """Returns a dict from each gate that can be measured to its bounds."""
        if cell is None:
            return {}
        try:
            found = {name: (a, bounds(a)) for name, a in gates_of(cell).items()}
        except GatesError as error:
            self.reason = str(error)
            return {}
        unknown = [
            f"gate {name!r} with the activation {getattr(a, '__name__', a)!r}"
            for name, (a, ends) in found.items()
            if ends is None
        ]
        if unknown:
            self.reason = f"no bounds are known of {', '.join(unknown)}"
        return {name: ends for name, (_, ends) in found.items() if ends is not None}

    def reset(self):
        for variable in self._variables.values():
            variable.assign(ops.zeros_like(variable))

    def add(self, inputs, initial_state, mask):
        """Adds a call of the layer."""
        target = self._target
        self._add_gaps(*target.pre_activations(inputs, initial_state, mask))
        if self._bounds:
            try:
                values, valid = target.gate_values(inputs, initial_state, mask)
            except GatesError as error:
                self.reason = str(error)
                self._bounds = {}
            else:
                self._add_gates(values, valid)

    def _add_gaps(self, x, valid):
        axes = tuple(range(len(x.shape) - 1))
        if self._target.frame_wise:
            axes = axes[1:]
        features = x.shape[-1]
        mean, variance, count = stats.masked_moments(x, valid, axes)
        mean = ops.reshape(mean, (-1, features))  # a row for each group of frames
        variance = ops.reshape(variance, (-1, features))
        count = ops.reshape(count, (-1, 1))
        population_mean, population_variance = (
            ops.cast(ops.copy(v), "float64")
            for v in (self.norm.moving_mean, self.norm.moving_variance)
        )
        spread = population_variance + self.norm.epsilon
        mean_gap = ops.abs(mean - population_mean) / ops.sqrt(spread)
        variance_gap = ops.abs(ops.log((variance + self.norm.epsilon) / spread))
        self._accumulate("mean_gap", ops.sum(count * mean_gap, axis=0))
        self._accumulate("variance_gap", ops.sum(count * variance_gap, axis=0))
        self._accumulate("frames", ops.sum(count, axis=0))
        largest = self._variables["largest_group"]
        largest.assign(ops.maximum(largest, ops.max(count, axis=0)))

    def _add_gates(self, values, valid):
        measured = [ops.cast(values[name], "float64") for name in self._bounds]
        values = ops.stack(measured, axis=-2)  # (T, B, gates, U)
        ends = np.array(list(self._bounds.values()))[..., None]  # (gates, 2, 1)
        outside = {
            "low": values < ends[:, 0] + self._margin,
            "high": values > ends[:, 1] - self._margin,
        }
        weights = ops.ones_like(values)
        if valid is not None:
            weights = weights * ops.cast(valid, "float64")[..., None]
        for name, is_outside in outside.items():
            # If a value is NaN, so is the share.
            counted = ops.cast(is_outside, "float64")
            counted = ops.where(ops.isnan(values), values, counted)
            counted = ops.where(weights > 0, counted, 0.0)
            self._accumulate(name, ops.sum(counted, axis=(0, 1, 3)))
        self._accumulate("gate_values", ops.sum(weights[:, :, :1], axis=(0, 1, 3)))

    def _accumulate(self, name, value):
        self._variables[name].assign_add(value)

    def _value(self, name):
        return ops.convert_to_numpy(self._variables[name])

    def gamma(self):
        """Returns gamma, an array (F,)."""
        return ops.convert_to_numpy(self.norm.gamma).astype("float64")

    def measurements(self):
        found = {}
        for name in ("mean_gap", "variance_gap"):
            gap = self._value(name) / self._value("frames")
            found[f"{name}/mean"] = float(gap.mean())
            found[f"{name}/max"] = float(gap.max())
        if self.norm.gamma is not None:
            gamma = self.gamma()
            found["gamma/mean"] = float(gamma.mean())
            found["gamma/min"] = float(gamma.min())
            found["gamma/max"] = float(gamma.max())
        if self._bounds:
            low, high = (
                self._value(name) / self._value("gate_values")
                for name in ("low", "high")
            )
            for gate, of_low, of_high in zip(self._bounds, low, high, strict=True):
                found[f"saturated/{gate}"] = float(of_low + of_high)
                found[f"saturated/{gate}/low"] = float(of_low)
                found[f"saturated/{gate}/high"] = float(of_high)
        return found

    def require_usable(self):
        """Raises an error if the batch tells nothing of the layer."""
        if self._value("frames") == 0:
            raise ValueError(
                f"`batch` must have a valid frame for layer {self.name!r}. "
                "Received: a batch that is masked throughout"
            )
        if self._target.frame_wise and self._value("largest_group") < 2:
            raise ValueError(
                "`batch` must have more than one row: the statistics of layer "
                f"{self.name!r} are frame-wise, over the rows at each timestep. "
                "Received: a batch with a single row at each timestep"
            )
        gaps = [self._value("mean_gap"), self._value("variance_gap")]
        if not np.isfinite(gaps).all():
            raise ValueError(
                "`batch` must be finite in its valid frames, and so must what the "
                "layers make of it. Received: a batch for which layer "
                f"{self.name!r} is given NaN, infinity or numbers too large to be "
                "squared"
            )
