"""Exports trained models: SavedModels for TensorFlow Serving, and single files."""

from keras_bnrnn.export.comparison import ExportMismatchError
from keras_bnrnn.export.directory import VersionExistsError
from keras_bnrnn.export.formats import export_litert, export_onnx
from keras_bnrnn.export.saved_model import export_saved_model
from keras_bnrnn.export.text import TextFrontEnd

__all__ = [
    "ExportMismatchError",
    "TextFrontEnd",
    "VersionExistsError",
    "export_litert",
    "export_onnx",
    "export_saved_model",
]
