"""Defines `BNRNN`, the base of all batch-normalised layers."""

import re
from typing import Any, Self

import keras
from keras import ops

from keras_bnrnn import backend, types
from keras_bnrnn.config import explained, names_of
from keras_bnrnn.frames import Frames, at_end
from keras_bnrnn.layers.arguments import check_use_cudnn
from keras_bnrnn.layers.cell import (
    BNCell,
    GatesError,
    changed_methods,
    derivative_of,
    gates_of,
    is_bounded,
)
from keras_bnrnn.layers.keras_rnn import LoopLayer, is_a_direction
from keras_bnrnn.layers.normalizers import (
    BatchNormalizer,
    PopulationNormalizer,
    Recorder,
    affine_of,
)
from keras_bnrnn.projection import folded_projection, normalized_projection
from keras_bnrnn.recurrence import Loop, Schedule, time_loop
from keras_bnrnn.sequence_batch_norm import SequenceBatchNorm, check_mask


class BNRNN(LoopLayer):
    """A layer of one `BNCell` that projects all timesteps in one product.

    A new kind of layer declares its cell:

    >>> class Layer(BNRNN):
    ...     cell_class = BNSimpleRNNCell
    ...
    ...     def __init__(self, units, **arguments):
    ...         super().__init__(units=units, **arguments)

    Attributes:
        cell_class: The class of the cell. Each argument of the cell is a read-only
            attribute of the layer.
        stock_layer: The Keras layer with the same equations. `fold` replaces the layer
            by it. `None` (default): there is no such Keras layer.

    Args:
        cell: A `BNCell`, for a layer without `cell_class`. Default: `None`.
        use_cudnn: `"auto"`, `True` or `False`, see `BNLSTM`. Default: `False`.
        **arguments: The arguments of `cell_class` and of `keras.layers.RNN`.
    """

    cell_class: type[BNCell] | None = None
    stock_layer: Any = None
    _fused = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.cell_class is not None:
            for name in names_of(cls.cell_class):
                if not hasattr(cls, name):
                    setattr(cls, name, _of_cell(name))

    def __init__(
        self,
        cell: BNCell | None = None,
        use_cudnn: types.UseCudnn = False,
        **arguments: Any,
    ) -> None:
        check_use_cudnn(use_cudnn)
        if cell is None and self.cell_class is not None:
            cell, arguments = self._make_cell(arguments)
        if not isinstance(cell, BNCell):
            raise ValueError(f"`cell` must be a `BNCell`. Received: cell={cell!r}")
        if use_cudnn is not False and cell.fused is None:
            raise ValueError(
                "`use_cudnn` must be False: no fused kernel has the equations of "
                f"{type(cell).__name__}. Received: use_cudnn={use_cudnn!r}"
            )
        super().__init__(cell, **arguments)
        self.use_cudnn = use_cudnn
        if self._why_not_fused(training=True) is None:
            self.supports_jit = False  # as in Keras' layer: XLA has no fused kernel

    def _make_cell(self, arguments):
        """Returns the cell and the remaining arguments, those of `keras.layers.RNN`."""
        cls = self.cell_class
        shared = ("dtype", "trainable")
        # The stock layers accept `implementation`. It has no effect here.
        known = {*names_of(cls), "implementation"} - {"name"}
        of_cell = {name: value for name, value in arguments.items() if name in known}
        rest = {
            name: value
            for name, value in arguments.items()
            if name not in known or name in shared
        }
        of_cell |= {name: rest[name] for name in shared if name in rest}
        words = "(?<=^BN)(?=[A-Z])|(?<=[a-z])(?=[A-Z])|(?<!^)(?=[A-Z][a-z])"
        name = re.sub(words, "_", cls.__name__).lower()
        return cls(**of_cell, name=name), rest

    @property
    def input_norm(self) -> SequenceBatchNorm:
        """The `SequenceBatchNorm` of the input projection, or of the sum if joint."""
        return self.cell.input_norm

    @property
    def nonfinite_batches(self) -> int:
        """See `SequenceBatchNorm`."""
        return self.cell.input_norm.nonfinite_batches

    def build(
        self, sequences_shape: types.Shape, initial_state_shape: Any = None
    ) -> None:
        super().build(sequences_shape, initial_state_shape)
        if self._why_not_fused() is None:
            self._fused = backend.FusedKernel(
                self.cell.fused, self.cell.units, self.dtype_policy
            )
            self._fused.build(sequences_shape)

    def inner_loop(
        self,
        sequences: types.Tensor,
        initial_state: list[types.Tensor],
        mask: types.Tensor | None,
        training: bool | None = False,
    ) -> tuple[types.Tensor, types.Tensor, list[types.Tensor]]:
        backend.require_time_loop()
        cell = self.cell
        fused = self._fused_kernel(training)
        # The states of a stateful layer are variables, which this call changes before
        # an eager gradient would read them.
        initial_state = [ops.copy(state) for state in initial_state]
        dropout_mask, recurrent_dropout_mask = self._take_dropout_masks(
            sequences, initial_state, training
        )
        frames = self._frames(sequences, mask, time_major=fused is None)
        x = frames.arrange(sequences)
        if dropout_mask is not None:
            x = x * ops.expand_dims(dropout_mask, 1 if fused else 0)
        learns = cell.learns(training)
        weights = cell.own_weights() if learns else cell.folded_weights()
        weights = weights._replace(recurrent_dropout_mask=recurrent_dropout_mask)

        run = self._run_loop if fused is None else self._run_fused
        outputs, states = run(frames, x, initial_state, weights, learns, training)
        repeat = not self.zero_output_for_mask
        last = frames.last_output(states[0], repeat)
        if self.return_sequences:
            return last, frames.restore(outputs, repeat), states
        return last, last[:, None, :], states

    def _take_dropout_masks(self, sequences, initial_state, training):
        """Returns the dropout masks (B, D) and (B, U), or `None` without dropout.

        The cell forgets them at once. The replicas of a strategy share the cell, and
        the next one runs as soon as this one sums over replicas. A call that fails
        must not leave a mask to the next call.
        """
        cell = self.cell
        masks = [None, None]
        if training and cell.dropout:
            masks[0] = cell.get_dropout_mask(sequences[:, 0, :])
        if training and cell.recurrent_dropout:
            masks[1] = cell.get_recurrent_dropout_mask(initial_state[0])
        cell.reset_dropout_mask()
        cell.reset_recurrent_dropout_mask()
        return masks

    def _run_loop(self, frames, x, initial_state, weights, learns, training):
        """Computes the input projection and runs the time loop.

        If the layer learns, this normalises by batch statistics and updates the
        population statistics.

        Args:
            frames: `Frames`.
            x: Tensor (T, B, D), the arranged frames.
            initial_state: List of tensors (B, U).
            weights: `Weights`: trained ones if the layer learns, folded ones otherwise.
            learns: Whether the layer normalises by the moments of the batch.
            training: Whether the forward loop keeps values for a gradient.

        Returns:
            Outputs (T, B, U), or `None`, and the states at the end of each row.
        """
        cell = self.cell
        norms = cell.norms
        in_loop = cell.norms_in_loop if learns else {}
        if learns and "input" in norms:
            x, kernel, bias = normalized_projection(
                norms["input"], x, weights.kernel, frames.valid
            )
            weights = weights._replace(kernel=kernel, bias=bias)
        for norm in in_loop.values():
            batch, timesteps = x.shape[1], x.shape[0]
            cause = f"`normalize={cell.normalize!r}`"
            norm.require_group_size((batch, timesteps, x.shape[2]), (0,), cause)

        affine = affine_of(in_loop)

        def step(projected_t, recurrent_t, states, weights, valid_t):
            norm = BatchNormalizer(in_loop, affine, valid_t)
            states = cell.step(projected_t, recurrent_t, states, weights, norm)
            return states, norm.moments()

        collected = []
        for norm in in_loop.values():
            (width,) = norm.moving_mean.shape
            shapes = (width,), (width,), (1,)
            collected += [(shape, norm.statistics_dtype) for shape in shapes]
        outputs, states, moments = time_loop(
            Loop(
                step,
                cell.loop_kernel,
                valid=frames.valid,
                step_reads_valid=bool(in_loop),
                bounded=is_bounded(cell),
                collected=collected,
                schedule=Schedule(
                    self.unroll,
                    training,
                    cell.reads_ahead,
                    has_company=is_a_direction(self),
                ),
            ),
            x,
            initial_state,
            weights,
            lengths=frames.lengths,
            return_sequences=self.return_sequences,
            wants_states=not self.drops_states,
            derivative=None if in_loop else derivative_of(cell),
        )
        cell.learn(moments, in_loop)
        return outputs, states

    def _run_fused(self, frames, x, initial_state, weights, learns, training):
        """Does the same as `_run_loop` with the fused kernel of the backend.

        All sequences, the outputs included, have the shape (B, T, ...).
        """
        cell = self.cell
        if learns:
            x, kernel, bias = folded_projection(
                cell.input_norm, x, weights.kernel, frames.valid
            )
            weights = weights._replace(kernel=kernel, bias=bias)
        lengths, states = frames.lengths, initial_state
        # The kernel returns the output of each frame, but other states only at the end
        # of the lengths that it receives. These lengths must not be 0.
        tells_lengths = (
            lengths is not None and len(states) > 1 and not self.drops_states
        )
        outputs, last = self._fused(
            x,
            states,
            cell.stock_weights(weights),
            ops.maximum(lengths, 1) if tells_lengths else None,
        )
        if tells_lengths:
            empty = (lengths == 0)[:, None]
            last = [
                ops.where(empty, old, new)
                for old, new in zip(states, last, strict=True)
            ]
        elif lengths is not None:
            last[0] = at_end(outputs, states[0], lengths, time_major=False)
        return outputs, last

    def _fused_kernel(self, training):
        """Returns the kernel for a call, or `None` for the time loop."""
        reason = self._why_not_fused(training)
        if reason is None and backend.compiled_by_xla():
            reason = "XLA compiles the call, and has no such kernel"
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

    def _why_not_fused(self, training=False):
        """Returns why no fused kernel runs a call, or `None` if one does."""
        cell = self.cell
        if self.use_cudnn is False:
            return "`use_cudnn` is False"
        if (
            cell.fused is None
            or changed_methods(cell, "fused")
            or not cell.has_stock_equations()
        ):
            return "only the usual activations, without peepholes, have a kernel"
        if self.unroll:
            return "`unroll` is True"
        if training and cell.recurrent_dropout:
            return "there is recurrent dropout"
        if cell.learns(training):
            if cell.norms_in_loop:
                return f"`normalize={cell.normalize!r}` normalises inside the time loop"
            if cell.input_norm.statistics == "frame":
                return "statistics are frame-wise"
        if not backend.has_fused_kernels():
            return "there is no GPU"
        return None

    def _frames(self, sequences, mask, time_major=True):
        if mask is not None:
            mask = keras.tree.flatten(mask)[0]
            check_mask(mask, sequences.shape)
            mask = ops.cast(mask, "bool")
        return Frames(mask, self.go_backwards, time_major)

    def pre_activations(
        self,
        site: str,
        sequences: types.Tensor,
        initial_state: list[types.Tensor] | None = None,
        mask: types.Tensor | None = None,
    ) -> tuple[types.Tensor, types.Tensor | None]:
        """Computes the pre-activations at a site at inference, in float64.

        Args:
            site: The name of the site.
            sequences: Tensor of shape (B, T, D).
            initial_state: List of tensors of shape (B, U). Default: zeros.
            mask: Boolean tensor of shape (B, T), or `None`.

        Returns:
            The pre-activations, a tensor of shape (T, B, width), and a boolean tensor
            (T, B, 1), true at valid frames. It is `None` without a mask.
        """
        cell = self.cell
        frames = self._frames(sequences, mask)
        weights = cell.own_weights()
        if site == "input":
            x = ops.cast(frames.arrange(sequences), "float64")
            x = ops.matmul(x, ops.cast(weights.kernel, "float64"))
            return x, frames.valid
        norms = cell.norms

        def step(projected_t, recurrent_t, states, weights, valid_t):
            norm = PopulationNormalizer(norms)
            states = cell.step(projected_t, recurrent_t, states, weights, norm)
            return states, [norm.pre_activations(site)]

        (width,) = norms[site].moving_mean.shape
        seen = self._collect(step, width, frames, sequences, initial_state, weights)
        return ops.cast(seen, "float64"), frames.valid

    def gate_values(
        self,
        sequences: types.Tensor,
        initial_state: list[types.Tensor] | None = None,
        mask: types.Tensor | None = None,
    ) -> tuple[dict[str, types.Tensor], types.Tensor | None]:
        """Computes the values of the gates at inference.

        Args:
            sequences: Tensor of shape (B, T, D).
            initial_state: List of tensors of shape (B, U). Default: zeros.
            mask: Boolean tensor of shape (B, T), or `None`.

        Returns:
            A dict from the name of each gate to its values, a tensor of shape
            (T, B, U), and a boolean tensor (T, B, 1), true at valid frames. It is
            `None` without a mask.

        Raises:
            GatesError: If the cell does not declare its gates, or if its `step` does
                not pass the pre-activation of each gate to `norm`.
        """
        cell = self.cell
        activations = gates_of(cell)
        frames = self._frames(sequences, mask)
        width = cell.gates * cell.units

        def step(projected_t, recurrent_t, before, weights, valid_t):
            norm = Recorder("joint", width)
            after = cell.step(projected_t, recurrent_t, before, weights, norm)
            try:
                a = norm.pre_activations()
            except ValueError as error:
                raise GatesError(
                    f"`step` of {type(cell).__name__} does not pass the pre-activation "
                    f"of each gate to `norm('joint', a, columns)`: {error}"
                ) from error
            return after, [cell.gate_pre_activations(a, before, after, weights)]

        # Folded weights need no normalisation, so `a` is what the gates receive.
        weights = cell.folded_weights()
        seen = self._collect(step, width, frames, sequences, initial_state, weights)
        parts = ops.split(seen, cell.gates, axis=-1)
        values = {
            name: activation(part)
            for (name, activation), part in zip(activations.items(), parts, strict=True)
        }
        return values, frames.valid

    def _collect(self, step, width, frames, sequences, initial_state, weights):
        """Runs the time loop at inference, and returns what each step collects.

        Args:
            step: As in `Loop`. It collects one tensor (B, width).
            width: Int.
            frames: `Frames`.
            sequences, initial_state: As in `gate_values`.
            weights: `Weights`.

        Returns:
            Tensor of shape (T, B, width).
        """
        cell = self.cell
        dtype = cell.compute_dtype
        if initial_state is None:
            initial_state = self.get_initial_state(ops.shape(sequences)[0])
        _, _, (seen,) = time_loop(
            Loop(
                step,
                cell.loop_kernel,
                valid=frames.valid,
                bounded=is_bounded(cell),
                collected=[((sequences.shape[0], width), dtype)],
            ),
            ops.cast(frames.arrange(sequences), dtype),
            [ops.cast(state, dtype) for state in keras.tree.flatten(initial_state)],
            weights,
            return_sequences=False,
        )
        return seen

    def get_config(self) -> types.Config:
        config = super().get_config()
        if self.cell_class is None:
            return {**config, "use_cudnn": self.use_cudnn}
        del config["cell"]
        cell_config = self.cell.get_config()
        for shared in ("name", "trainable", "dtype"):
            del cell_config[shared]
        regularizer = keras.regularizers.serialize(self.activity_regularizer)
        config = {**config, "activity_regularizer": regularizer, **cell_config}
        if self.cell.fused is not None:
            config["use_cudnn"] = self.use_cudnn
        return config

    @classmethod
    def from_config(cls, config: types.Config) -> Self:
        with explained(cls, config):
            if cls.cell_class is None:
                return super().from_config(config)
            return cls(**config)


def _of_cell(name):
    """Returns a property that reads an attribute of the layer's cell."""
    return property(lambda layer: getattr(layer.cell, name))
