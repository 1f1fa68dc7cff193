"""Batch-normalised recurrent layers for Keras."""

import importlib.metadata
import typing

from keras_bnrnn.calibration import recalibrate
from keras_bnrnn.callbacks import NormalizationMonitor, Recalibrate
from keras_bnrnn.folding import fold
from keras_bnrnn.layers import (
    BNGRU,
    BNLSTM,
    BNGRUCell,
    BNLSTMCell,
    BNSimpleRNN,
    BNSimpleRNNCell,
)
from keras_bnrnn.normalizing import normalize_model
from keras_bnrnn.sequence_batch_norm import SequenceBatchNorm
from keras_bnrnn.torch_weights import from_torch

try:
    __version__ = importlib.metadata.version("keras-bnrnn")
except importlib.metadata.PackageNotFoundError:  # the package is not installed
    __version__ = "unknown"


if typing.TYPE_CHECKING:
    from keras_bnrnn.export import export_saved_model
else:

    def __getattr__(name):
        # `keras_bnrnn.export` loads parts of TensorFlow that the layers do not need.
        if name == "export_saved_model":
            from keras_bnrnn.export import export_saved_model

            return export_saved_model
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BNGRU",
    "BNLSTM",
    "BNGRUCell",
    "BNLSTMCell",
    "BNSimpleRNN",
    "BNSimpleRNNCell",
    "NormalizationMonitor",
    "Recalibrate",
    "SequenceBatchNorm",
    "export_saved_model",
    "fold",
    "from_torch",
    "normalize_model",
    "recalibrate",
]
