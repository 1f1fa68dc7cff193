"""What `layers/keras_rnn.py` relies on in Keras, and that no cell learns twice."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bnrnn import BNGRU, BNLSTM, BNLSTMCell, BNSimpleRNN, BNSimpleRNNCell
from keras_bnrnn.layers.keras_rnn import is_a_direction, is_inside_rnn_call

T = 3


class Listener(keras.layers.SimpleRNNCell):
    """Notes what Keras calls, in order."""

    def __init__(self, units):
        super().__init__(units)
        self.heard = []

    def get_dropout_mask(self, step_input):
        self.heard.append("start")
        return super().get_dropout_mask(step_input)

    def reset_dropout_mask(self):
        self.heard.append("end")
        super().reset_dropout_mask()

    def call(self, sequence, states, training=False):
        assert is_inside_rnn_call()
        self.heard.append("step")
        return super().call(sequence, states, training)


def test_the_names_of_directions():
    layer = keras.layers.Bidirectional(BNGRU(2, name="mine"))
    copy = keras.layers.Bidirectional.from_config(layer.get_config())
    for wrapper in (layer, copy):
        assert is_a_direction(wrapper.forward_layer)
        assert is_a_direction(wrapper.backward_layer)
    assert not is_a_direction(BNGRU(2)) and not is_a_direction(BNGRU(2, name="mine"))


@pytest.mark.parametrize("graph", [False, True])
def test_what_keras_calls_around_a_sequence(graph):
    """One start before the first step, a trial of that step, one end after the last.

    An eager loop calls T steps, a graph traces one for all of them.
    """
    cell = Listener(2)
    layer = keras.layers.RNN(cell)
    x = tf.zeros((1, T, 4))
    layer(x)  # builds the cell
    cell.heard.clear()
    (tf.function(layer, autograph=False) if graph else layer)(x)
    heard = cell.heard
    assert heard[0] == "start"
    assert heard[-1] == "end"
    assert heard.count("step") == 1 + (1 if graph else T)
    assert heard.index("start") < heard.index("step")
    assert not is_inside_rnn_call()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("cls", [BNSimpleRNNCell, BNLSTMCell])
def test_a_cell_learns_each_timestep_once(cls, graph, rng):
    cell = cls(2)
    layer = keras.layers.RNN(cell)
    x = tf.constant(rng.normal(size=(8, T, 4)), "float32")
    layer.build(x.shape)

    def train(x):
        return layer(x, training=True)

    train = tf.function(train, autograph=False) if graph else train
    for updates in (T, 2 * T):
        train(x)
        assert float(cell.input_norm.update_count) == updates
    seen = np.asarray(x).reshape(-1, 4) @ np.asarray(cell.kernel)
    np.testing.assert_allclose(cell.input_norm.moving_mean, seen.mean(0), atol=1e-5)


def test_keras_leaves_the_loop_to_inner_loop(rng):
    """`call` gives it sequences, states, mask and training, and uses its results."""
    given = []

    class Layer(keras.layers.RNN):
        def inner_loop(self, sequences, initial_state, mask, training=False):
            given.append((sequences, initial_state, mask, training))
            last = initial_state[0] + 1.0
            return last, tf.stack([last] * T, axis=1), [initial_state[0] + 2.0]

    x, mask = tf.zeros((2, T, 4)), np.array([[True] * T, [False] * T])
    options = {"return_sequences": True, "return_state": True}
    layer = Layer(keras.layers.SimpleRNNCell(5), stateful=True, **options)
    layer.build(x.shape)
    outputs, state = layer(x, mask=mask, training=True)
    sequences, states, seen, training = given.pop()
    assert sequences.shape == x.shape and training is True
    assert [s.shape for s in states] == [(2, 5)]
    np.testing.assert_array_equal(keras.tree.flatten(seen)[0], mask)
    np.testing.assert_array_equal(outputs, np.ones((2, T, 5)))
    np.testing.assert_array_equal(state, np.full((2, 5), 2.0))
    np.testing.assert_array_equal(layer.states[0], np.full((2, 5), 2.0))


@pytest.mark.parametrize("cls", [BNSimpleRNN, BNLSTM, BNGRU])
def test_masks_reach_the_next_layer(cls, rng):
    """Whatever the base class of the installed Keras says of `supports_masking`."""
    x = rng.normal(size=(2, T, 4)).astype("float32")
    x[0, 1:] = 0.0
    seen = []

    class Next(keras.layers.Layer):
        supports_masking = True

        def call(self, inputs, mask=None):
            seen.append(mask)
            return inputs

    layer = cls(5, return_sequences=True)
    assert layer.supports_masking
    Next()(layer(keras.layers.Masking()(x)))
    np.testing.assert_array_equal(seen[-1], [[True, False, False], [True] * 3])
