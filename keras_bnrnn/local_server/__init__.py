"""Serves SavedModels locally for development. Use TensorFlow Serving in production."""

from keras_bnrnn.local_server.server import ModelServer

__all__ = ["ModelServer"]
