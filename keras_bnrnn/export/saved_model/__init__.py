"""Exports models as SavedModels, for TensorFlow Serving."""

from keras_bnrnn.export.saved_model.exporter import export_saved_model

__all__ = ["export_saved_model"]
