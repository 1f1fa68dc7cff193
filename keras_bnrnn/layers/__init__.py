from keras_bnrnn.layers.gru import BNGRU, BNGRUCell
from keras_bnrnn.layers.lstm import BNLSTM, BNLSTMCell
from keras_bnrnn.layers.simple_rnn import BNSimpleRNN, BNSimpleRNNCell

__all__ = [
    "BNGRU",
    "BNLSTM",
    "BNGRUCell",
    "BNLSTMCell",
    "BNSimpleRNN",
    "BNSimpleRNNCell",
]
