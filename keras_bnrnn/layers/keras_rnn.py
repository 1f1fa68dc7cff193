"""What `keras.layers.RNN(cell)` needs of a cell that learns statistics.

`keras.layers.RNN` tries the first timestep once before its loop, to learn the shapes,
and repeats it in the loop. It asks for the dropout mask before that, and resets the
mask at the end. A cell takes these two calls as the start and the end of a sequence,
and undoes the update that it made in the trial. Keras documents none of this:
`tests/layers/test_keras_rnn.py` fails if Keras changes it.
"""

import contextlib
import inspect

import keras
from keras import ops

from keras_bnrnn import backend


class TrialStep:
    """Undoes the update of the statistics that Keras' trial of a timestep made.

    A plain object, in which Keras does not look for variables to track.
    """

    def __init__(self):
        self.end()

    def begin(self):
        """Notes that a layer starts on a sequence."""
        self._in_sequence, self._state, self._values = True, None, None

    def end(self):
        """Notes the end of a sequence. A cell that is called alone has no trial."""
        self._in_sequence, self._state, self._values = False, None, None

    def forget(self, norms, state):
        """Undoes the update if this call repeats the first timestep.

        It does if the state is that of the first call, or if the body of a loop is
        being traced, which has a graph of its own.

        Args:
            norms: The `SequenceBatchNorm` layers of the cell.
            state: The first state that the cell is called with.
        """
        if self._in_sequence and not is_inside_rnn_call():
            self.end()  # that call raised an error and never reached its end
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
            # An eager loop passes the value of a stateful layer's variable on.
            return bool(ops.all(ops.equal(state, self._state)))
        return state is self._state


class TriedCell:
    """Mixed in before a stock cell: finds the sequences, and drops nothing on demand.

    Attributes:
        trial: `TrialStep`.
        drops_nothing: Whether dropout masks are `None`. Keras draws them at inference
            too, which changes the state of the seed.
    """

    trial = None
    drops_nothing = False

    def get_dropout_mask(self, step_input):
        self.trial.begin()
        return None if self.drops_nothing else super().get_dropout_mask(step_input)

    def get_recurrent_dropout_mask(self, step_input):
        if self.drops_nothing:
            return None
        return super().get_recurrent_dropout_mask(step_input)

    def dropout_mask_of_step(self, step_input):
        """`get_dropout_mask` of a cell itself, in a timestep."""
        return super().get_dropout_mask(step_input)

    def reset_dropout_mask(self):
        self.trial.end()
        super().reset_dropout_mask()


def is_inside_rnn_call():
    """Whether `keras.layers.RNN.call` is on the stack."""
    code = inspect.unwrap(keras.layers.RNN.call).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def refuse_replicas(cell):
    """Refuses replicas: a loop of Keras cannot learn statistics over them."""
    count = backend.replica_count()
    if count > 1:
        raise ValueError(
            "A cell in `keras.layers.RNN` cannot train on several replicas: use the "
            f"layer of the cell, such as `BNLSTM`. Received: {type(cell).__name__} "
            f"{cell.name!r} on {count} replicas"
        )
