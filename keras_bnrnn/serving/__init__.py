"""A local model server for development; production is TensorFlow Serving."""

from keras_bnrnn.serving.server import ModelServer

__all__ = ["ModelServer"]
