"""Exports a folded model as an ONNX file."""

import os
import pathlib

import keras

from keras_bnrnn.checks import is_integer
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
from keras_bnrnn.export.formats.verification import compare
from keras_bnrnn.export.interface import interface_of
from keras_bnrnn.extras import require_extra
from keras_bnrnn.folding import fold


@without_warnings_of_libraries()
def export_onnx(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    opset_version: int | None = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> pathlib.Path:
    """Folds a model and writes it as an `.onnx` file, for ONNX Runtime and others.

    The names of inputs and outputs are those of `export_saved_model`. The batch size
    and T are free if they are free in the model. An LSTM with the default activations
    and without a mask becomes the `LSTM` operation of ONNX. A GRU or a SimpleRNN
    becomes a `Loop`.

    The file has no input `lengths`: every frame is valid. Pass sequences of equal
    length, or use a model that masks by value (`Masking`,
    `Embedding(mask_zero=True)`).

    Before the file is published, ONNX Runtime loads it and its outputs are compared
    with `model(x, training=False)` on random sequences of several B and T.

    Args:
        model: A built Sequential or Functional model that computes in float32, with an
            input of shape (B, T, ...). The model is not changed.
        path: Path of the file. Must end in `.onnx`; the parent directory must exist.
        opset_version: Int from 7 to the last version that the converter knows (18 in
            tf2onnx 1.17), the version of the ONNX operator set. `None` (default): the
            default of the converter, 15.
        tolerance: The largest difference that passes, relative to the largest output if
            that output exceeds 1. Default: 1e-4.
        overwrite: Whether to replace an existing file.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ImportError: If the `onnx` extra is not installed.
        FileExistsError: If the file exists and `overwrite` is `False`.
        ExportMismatchError: If the outputs of the file differ from the model's. This
            error is a `ValueError`. Nothing is written.
        ValueError: If `model` is not built, subclassed, stateful or not in float32, has
            no input with timesteps, or uses an operation that ONNX lacks; for an
            invalid `path`, `opset_version` or `tolerance`.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((None, 8), name="x"), BNLSTM(4, name="state")]
    ... )
    >>> path = export_onnx(model, f"{tmp}/digits.onnx")
    >>> import onnxruntime
    >>> session = onnxruntime.InferenceSession(path)
    >>> (state,) = session.run(["state"], {"x": np.ones((2, 5, 8), "float32")})
    >>> state.shape
    (2, 4)
    """
    require_extra("export_onnx", "onnx", ["tf2onnx", "onnx", "onnxruntime"])
    require_float32_graph(model, "`export_onnx`")
    path = checked_path(path, ".onnx", overwrite)
    _check_opset_version(opset_version)
    tolerance = checked_tolerance(tolerance, 1e-4)

    folded = fold(model)
    interface = interface_of(folded)
    fixed = interface.batch_size
    exported = NamedModel(folded, interface, fixed, prepared_copy)
    batches = [1, 3, 2, 1] if fixed is None else [fixed] * 4

    def write(file):
        exported.export(file, format="onnx", opset_version=opset_version)
        _name_free_sizes(file, interface)
        compare(model, interface, _answers(file), tolerance, batches)

    with explaining("ONNX"):
        return publish_file(path, overwrite, write)


def _check_opset_version(opset_version):
    from tf2onnx.constants import OPSET_TO_IR_VERSION

    # The operator `LSTM` has its present form since version 7.
    first, last = 7, max(OPSET_TO_IR_VERSION)
    fits = is_integer(opset_version) and first <= opset_version <= last
    if opset_version is not None and not fits:
        raise ValueError(
            f"`opset_version` must be an integer from {first} to {last}, or None. "
            f"Received: opset_version={opset_version!r}"
        )


def _name_free_sizes(file, interface):
    """Names the free sizes of an ONNX file `batch` and `timesteps`."""
    import onnx

    content = onnx.load(file)
    # Several sequences may differ in T: leave the size of T unnamed.
    timesteps = len(interface.sequences) == 1
    names = dict.fromkeys(interface.sequences, timesteps)
    names |= {
        name: timesteps and per_step for name, per_step in interface.per_step.items()
    }
    for value in [*content.graph.input, *content.graph.output]:
        sizes = value.type.tensor_type.shape.dim
        for size, name in zip(sizes, ("batch", "timesteps"), strict=False):
            named = name == "batch" or names.get(value.name, False)
            if named and size.HasField("dim_param"):
                size.dim_param = name
    onnx.save(content, file)


def _answers(file):
    """Loads a file as a function from named inputs to named outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))
