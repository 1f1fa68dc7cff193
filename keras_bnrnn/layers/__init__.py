from keras_bnrnn.layers.cell import BNCell
from keras_bnrnn.layers.gru import BNGRU, BNGRUCell
from keras_bnrnn.layers.lstm import BNLSTM, BNLSTMCell
from keras_bnrnn.layers.rnn import BNRNN
from keras_bnrnn.layers.simple_rnn import BNSimpleRNN, BNSimpleRNNCell

# The kinds of layers: tests, benchmarks and documentation take the list from here.
KINDS = {"simple_rnn": BNSimpleRNN, "lstm": BNLSTM, "gru": BNGRU}

__all__ = [
    "BNGRU",
    "BNLSTM",
    "BNRNN",
    "KINDS",
    "BNCell",
    "BNGRUCell",
    "BNLSTMCell",
    "BNSimpleRNN",
    "BNSimpleRNNCell",
]
