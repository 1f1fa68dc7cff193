"""`export_onnx` writes a folded model as a file for ONNX Runtime."""

from keras_bnrnn.export.directory import publish_file
from keras_bnrnn.export.formats.arguments import (
    checked_path,
    checked_tolerance,
    require_extra,
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
from keras_bnrnn.folding import fold


@without_warnings_of_libraries()
def export_onnx(model, path, *, opset_version=None, tolerance=1e-4, overwrite=False):
    """Folds a model and writes it as an `.onnx` file, for ONNX Runtime and others.

    Inputs and outputs are named as those of `export_saved_model`. The batch size and T
    are as free as the model has them. An LSTM becomes the `LSTM` operation of ONNX,
    if it has the usual activations and no mask; a GRU and a SimpleRNN become a `Loop`.

    There are no `lengths`: every frame counts. Give sequences of one length, or let the
    model mask by value (`Masking`, `Embedding(mask_zero=True)`).

    Before the file is put in its place, it is loaded in ONNX Runtime and compared with
    `model(x, training=False)` on random sequences of several B and T.

    Args:
        model: A built Sequential or Functional model that computes in float32, with an
            input of shape (B, T, ...). It is not changed.
        path: Path of the file, which ends in `.onnx`, in a directory that is there.
        opset_version: Int, the version of ONNX's operations. `None` (default): that of
            the converter, 15.
        tolerance: The largest difference to pass, relative to the largest output where
            that exceeds 1.
        overwrite: Whether to replace a file that is there.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ImportError: Without the `onnx` extra.
        FileExistsError: If the file is there and `overwrite` is `False`.
        ExportMismatchError: If the file answers otherwise than the model; a
            `ValueError`. Nothing is written.
        ValueError: If `model` is not built, subclassed, stateful or not in float32, has
            no input with timesteps, or something in it that ONNX has no operation for;
            for a bad `path`, `opset_version` or `tolerance`.

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
    if opset_version is not None and (
        isinstance(opset_version, bool) or not isinstance(opset_version, int)
    ):
        raise ValueError(
            "`opset_version` must be an integer or None. "
            f"Received: opset_version={opset_version!r}"
        )
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


def _name_free_sizes(file, interface):
    """Names the free sizes of an ONNX file `batch` and `timesteps`."""
    import onnx

    content = onnx.load(file)
    # Sequences of one model may differ in T.
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
    """The function from named inputs to named outputs that a file holds."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))
