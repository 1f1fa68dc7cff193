"""Exports a folded model as a LiteRT file."""

import os
import pathlib
from typing import Literal

import keras
import tensorflow as tf

from keras_bnrnn.checks import check_flag, check_positive_integer
from keras_bnrnn.export.arguments import check_quantize
from keras_bnrnn.export.directory import publish_file
from keras_bnrnn.export.formats.arguments import (
    checked_path,
    checked_tolerance,
    require_float32_graph,
)
from keras_bnrnn.export.formats.conversion import (
    NamedModel,
    explaining,
    prepared_copy,
    without_warnings_of_libraries,
)
from keras_bnrnn.export.formats.fused_lstm import run_fused
from keras_bnrnn.export.formats.verification import compare
from keras_bnrnn.export.interface import interface_of
from keras_bnrnn.extras import require_extra
from keras_bnrnn.folding import fold
from keras_bnrnn.traversal import sublayers


@without_warnings_of_libraries()
def export_litert(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    batch_size: int | None = None,
    fused_lstm: bool = True,
    quantize: Literal["float16"] | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Folds a model and writes it as a `.tflite` file, for LiteRT (TensorFlow Lite).

    The file has one signature. The names of its inputs and outputs are those of
    `export_saved_model`. The file uses only LiteRT's built-in operations, so an
    interpreter without the TensorFlow ("Flex") operations can load it. T is free if it
    is free in the model. The batch size is fixed, because the converter does not
    support a loop over a free batch size.

    The signature has no input `lengths`: every frame is valid. In a batch, pass
    sequences of equal length, or use a model that masks by value (`Masking`,
    `Embedding(mask_zero=True)`).

    With `fused_lstm`, each LSTM becomes one operation of the runtime,
    `UNIDIRECTIONAL_SEQUENCE_LSTM`, which delegates and microcontrollers support. By
    default, this operation keeps its state from one call to the next and clips cell
    states at 10. The exported file does neither: an additional frame before each
    sequence clears the state, and clipping is off. If a sequence contains a value that
    is not finite or exceeds 1e18, its outputs are NaN in all frames. The following
    layers run as a loop instead: GRUs, SimpleRNNs, and LSTMs with a mask, an initial
    state, `return_state` or other than the default activations.

    Before the file is published, LiteRT loads it and its outputs are compared with
    `model(x, training=False)` on random sequences of several T.

    Args:
        model: A built Sequential or Functional model that computes in float32, with an
            input of shape (B, T, ...). The model is not changed.
        path: Path of the file. Must end in `.tflite`; the parent directory must exist.
        batch_size: Positive int. `None` (default): the model's batch size, or 1 if it
            is free.
        fused_lstm: Whether each LSTM becomes one operation. With 128 units, 50
            timesteps and one thread of an x86 CPU, the operation takes a fifth less
            time than the loop at batch size 1, and half as much time again at batch
            size 32.
        quantize: `"float16"`: store weights in half the space and compute in float32.
            `None` (default): store weights as float32.
        tolerance: The largest difference that passes, relative to the largest output if
            that output exceeds 1. `None` (default): 1e-4, or 1e-2 with `quantize`.
        overwrite: Whether to replace an existing file.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ImportError: If the `litert` extra is not installed.
        FileExistsError: If the file exists and `overwrite` is `False`.
        ExportMismatchError: If the outputs of the file differ from the model's. This
            error is a `ValueError`. Nothing is written.
        ValueError: If `model` is not built, subclassed, stateful or not in float32, has
            no input with timesteps, or uses an operation that LiteRT lacks; for an
            invalid `path`, `batch_size`, `quantize` or `tolerance`.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((None, 8), name="x"), BNLSTM(4, name="state")]
    ... )
    >>> path = export_litert(model, f"{tmp}/digits.tflite")
    >>> from ai_edge_litert.interpreter import Interpreter
    >>> run = Interpreter(str(path)).get_signature_runner()
    >>> run(x=np.ones((1, 5, 8), "float32"))["state"].shape
    (1, 4)
    """
    require_extra("export_litert", "litert", ["ai_edge_litert.interpreter"])
    require_float32_graph(model, "`export_litert`")
    path = checked_path(path, ".tflite", overwrite)
    check_flag("fused_lstm", fused_lstm)
    check_quantize(quantize)
    tolerance = checked_tolerance(tolerance, 1e-4 if quantize is None else 1e-2)

    folded = fold(model)
    interface = interface_of(folded)
    batch_size = _checked_batch_size(batch_size, interface)
    copy = _with_fused_lstm if fused_lstm else prepared_copy
    exported = NamedModel(folded, interface, batch_size, copy)
    target = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    options = {"target_spec": target}
    if quantize == "float16":
        target["supported_types"] = [tf.float16]
        options["optimizations"] = [tf.lite.Optimize.DEFAULT]

    def write(file):
        exported.export(file, format="litert", **options)
        _stop_clipping(file)
        answers = _answers(file)
        compare(model, interface, answers, tolerance, [batch_size] * 4)

    with explaining("LiteRT"):
        return publish_file(path, overwrite, write)


def _checked_batch_size(batch_size, interface):
    fixed = interface.batch_size
    if batch_size is None:
        return 1 if fixed is None else fixed
    check_positive_integer("batch_size", batch_size, optional=True)
    if fixed not in (None, batch_size):
        raise ValueError(
            f"`batch_size` must be {fixed}, the batch size of the model's inputs. "
            f"Received: batch_size={batch_size}"
        )
    return batch_size


def _with_fused_lstm(layer):
    """Copies a layer for the converter; each LSTM becomes one operation."""
    clone = prepared_copy(layer)
    if isinstance(clone, keras.layers.Layer):
        for part in sublayers(clone):
            if type(part) is keras.layers.LSTM:
                run_fused(part)
    return clone


def _stop_clipping(file):
    """Removes the clipping of cell states at 10 that the converter adds."""
    from ai_edge_litert.tools import flatbuffer_utils

    content = flatbuffer_utils.read_model(os.fspath(file))
    fused = [
        operator.builtinOptions
        for graph in content.subgraphs
        for operator in graph.operators
        if getattr(operator.builtinOptions, "cellClip", 0.0)
    ]
    for options in fused:
        options.cellClip = 0.0
    if fused:
        flatbuffer_utils.write_model(content, os.fspath(file))


def _answers(file):
    """Loads a file as a function from named inputs to named outputs."""
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(os.fspath(file)).get_signature_runner()
    return lambda inputs: run(**inputs)
