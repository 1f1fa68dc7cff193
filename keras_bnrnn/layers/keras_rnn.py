"""Adapts cells that learn statistics to `keras.layers.RNN(cell)`.

`keras.layers.RNN` runs the first timestep once before its loop, to probe the shapes,
and runs it again in the loop. It requests the dropout mask before the probe, and resets
the mask at the end. A cell treats these two calls as the start and the end of a
sequence, and undoes the update of the probe, called the trial here. Keras documents
none of this: `tests/layers/test_keras_rnn.py` fails if Keras changes it.

`is_a_direction` relies on the names that `keras.layers.Bidirectional` gives.
"""

import contextlib
import inspect
from typing import Any

import keras
from keras import ops

from keras_bnrnn import backend, types
from keras_bnrnn.checks import (
    check_flag,
    check_numeric,
    check_states,
    check_training,
    naming_arguments,
)


def is_a_direction(layer):
    """Returns whether a layer is one of the two of a `keras.layers.Bidirectional`.

    Not for a `backward_layer` that the user gives another name. It affects speed only.
    """
    return layer.name.startswith(("forward_", "backward_"))


class TrialStep:
    """Undoes the update of the statistics made by Keras' shape-probing call.

    This is a plain object: Keras does not track variables in it.
    """

    def __init__(self):
        self.end()

    def begin(self):
        """Marks the start of a sequence."""
        self._in_sequence, self._state, self._values = True, None, None

    def end(self):
        """Marks the end of a sequence. A cell outside a sequence has no trial."""
        self._in_sequence, self._state, self._values = False, None, None

    def forget(self, norms, state):
        """Undoes the update if this call repeats the first timestep.

        The call repeats it if the state is that of the first call, or if Keras traces
        the body of a loop, which has its own graph.

        Args:
            norms: The `SequenceBatchNorm` layers of the cell.
            state: The first state that the cell is called with.
        """
        if self._in_sequence and not is_inside_rnn_call():
            self.end()  # an earlier call raised an error before its end
        if not self._in_sequence:
            return
        variables = [v for norm in norms for v in norm.statistics_variables]
        values = [ops.copy(v) for v in variables]
        if self._values is None:
            self._state, self._values = state, values
            return
        graph, first_graph = (backend.graph_of(v[0]) for v in (values, self._values))
        in_body = first_graph is not None and graph is not first_graph
        if in_body or self._is_first_state(state):
            with first_graph.as_default() if in_body else contextlib.nullcontext():
                for variable, value in zip(variables, self._values, strict=True):
                    variable.assign(value)
        if in_body:
            self.end()  # the body is traced once, for all timesteps

    def _is_first_state(self, state):
        if isinstance(self._state, keras.Variable) and state is not self._state:
            # An eager loop passes the value of a stateful layer's variable, not the
            # variable.
            return bool(ops.all(ops.equal(state, self._state)))
        return state is self._state


class TriedCell:
    """Mixin for a stock cell that marks sequences and can disable dropout.

    Attributes:
        trial: `TrialStep`.
        drops_nothing: Whether dropout masks are `None`. Keras draws masks at inference
            too, and thereby changes the state of the seed generator. Default: `False`.
    """

    trial: Any = None
    drops_nothing: bool = False

    def get_dropout_mask(self, step_input: types.Tensor) -> types.Tensor | None:
        self.trial.begin()
        return None if self.drops_nothing else super().get_dropout_mask(step_input)

    def get_recurrent_dropout_mask(
        self, step_input: types.Tensor
    ) -> types.Tensor | None:
        if self.drops_nothing:
            return None
        return super().get_recurrent_dropout_mask(step_input)

    def dropout_mask_of_step(self, step_input: types.Tensor) -> types.Tensor:
        """Returns the dropout mask in a timestep, without starting a sequence."""
        return super().get_dropout_mask(step_input)

    def reset_dropout_mask(self) -> None:
        self.trial.end()
        super().reset_dropout_mask()


class LoopLayer(keras.layers.RNN):
    """`keras.layers.RNN` with a time loop of its own, `inner_loop`.

    `keras.layers.RNN.call` prepares the initial states, calls `inner_loop` once,
    assigns the states of a stateful layer, and returns what the arguments ask for.

    Attributes:
        drops_states: Whether the caller of `inner_loop` uses none of the states but the
            first one.
    """

    drops_states: bool = False

    def __init__(self, cell: Any, **arguments: Any) -> None:
        for name in FLAGS:
            check_flag(name, arguments.get(name, False))
        with naming_arguments(arguments):
            super().__init__(cell, **arguments)
        self.input_spec = keras.layers.InputSpec(ndim=3)
        # Keras 3.16 sets it to False in `RNN`. The next layer would then count padding.
        self.supports_masking = True

    def build(
        self, sequences_shape: types.Shape, initial_state_shape: Any = None
    ) -> None:
        super().build(sequences_shape, initial_state_shape)
        axes = {-1: sequences_shape[-1]}
        self.input_spec = keras.layers.InputSpec(ndim=3, axes=axes)

    def call(
        self,
        sequences: types.Tensor,
        initial_state: Any = None,
        mask: types.Tensor | None = None,
        training: bool | None = False,
    ) -> Any:
        check_training(training)
        check_numeric("sequences", sequences)
        require_timesteps(sequences, self.name)
        if initial_state is not None:
            sizes = keras.tree.flatten(self.cell.state_size)
            check_states("initial_state", initial_state, sizes, sequences.shape[0])
        if isinstance(mask, (list, tuple)) and len(mask) == 1:
            (mask,) = mask  # as in `keras.layers.RNN`
        if mask is not None:
            check_numeric("mask", mask)
        # `TimeDistributed` calls `call` itself, without the cast of `__call__`.
        sequences = ops.cast(sequences, self.compute_dtype)
        self.cell.drops_nothing = not training
        self.drops_states = training and not (self.return_state or self.stateful)
        try:
            return super().call(
                sequences, initial_state=initial_state, mask=mask, training=training
            )
        finally:
            self.cell.drops_nothing = self.drops_states = False

    def inner_loop(
        self,
        sequences: types.Tensor,
        initial_state: list[types.Tensor],
        mask: types.Tensor | None,
        training: bool | None = False,
    ) -> tuple[types.Tensor, types.Tensor, list[types.Tensor]]:
        """Runs the time loop.

        Args:
            sequences: Tensor (B, T, D).
            initial_state: List of tensors (B, U).
            mask: Boolean tensor (B, T), a list of one, or `None`.
            training: Boolean.

        Returns:
            The last output (B, U), the outputs (B, T, U) in the order of processing,
            or (B, 1, U) without `return_sequences`, and the list of states.
        """
        raise NotImplementedError


FLAGS = (
    "return_sequences",
    "return_state",
    "go_backwards",
    "stateful",
    "unroll",
    "zero_output_for_mask",
)


def is_inside_rnn_call():
    """Returns whether `keras.layers.RNN.call` is on the call stack."""
    code = inspect.unwrap(keras.layers.RNN.call).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def refuse_replicas(cell):
    """Raises an error on several replicas: Keras' loop cannot exchange their sums."""
    count = backend.replica_count()
    if count > 1:
        raise ValueError(
            "A cell in `keras.layers.RNN` cannot train on several replicas: use the "
            f"layer of the cell, such as `BNLSTM`. Received: {type(cell).__name__} "
            f"{cell.name!r} on {count} replicas"
        )


def require_timesteps(sequences, name):
    """Raises an error for sequences without a timestep, as the stock layers do.

    Args:
        sequences: Tensor of shape (B, T, D). If T is not static, the graph checks it
            when it runs, but not under XLA.
        name: Name of the layer.
    """
    timesteps = sequences.shape[1]
    message = (
        "`sequences` must have at least one timestep. "
        f"Received: sequences of shape (batch, 0, features) in layer {name!r}"
    )
    if timesteps == 0:
        raise ValueError(message)
    if timesteps is None and not keras.utils.is_keras_tensor(sequences):
        backend.require_positive(ops.shape(sequences)[1], message)
