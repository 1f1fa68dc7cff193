"""What `layers/keras_rnn.py` relies on in Keras, and that no cell learns twice."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bnrnn import BNLSTMCell, BNSimpleRNNCell
from keras_bnrnn.layers.keras_rnn import is_inside_rnn_call

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
