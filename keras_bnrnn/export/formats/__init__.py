"""Exports models as single files, for LiteRT and ONNX Runtime."""

from keras_bnrnn.export.formats.litert import export_litert
from keras_bnrnn.export.formats.onnx import export_onnx

__all__ = ["export_litert", "export_onnx"]
