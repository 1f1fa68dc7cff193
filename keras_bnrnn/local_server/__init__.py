"""A local model server for development; production is TensorFlow Serving."""

from keras_bnrnn.local_server.server import ModelServer

__all__ = ["ModelServer"]
