"""Checks the arguments of `export_litert` and `export_onnx`."""

import os
import pathlib

from keras_bnrnn.checks import check_flag, check_positive_number
from keras_bnrnn.export.arguments import check_path, refuse_stateful
from keras_bnrnn.export.directory import refuse_existing_file
from keras_bnrnn.traversal import require_built_graph, sublayers


def require_float32_graph(model, purpose):
    """Raises ValueError for a model that cannot become a LiteRT or ONNX file.

    The model must be built, Sequential or Functional, stateless, and compute in
    float32.
    """
    require_built_graph(model, purpose)
    refuse_stateful(model)
    for layer in sublayers(model):
        dtype = getattr(layer, "compute_dtype", None)
        if dtype not in (None, "float32"):
            raise ValueError(
                f"`model` must compute in float32 for {purpose}. Received: layer "
                f"{layer.name!r} with compute_dtype={dtype!r}"
            )


def checked_path(path, suffix, overwrite):
    """Checks the path of the file to write and returns it as a `pathlib.Path`."""
    check_path("path", path)
    check_flag("overwrite", overwrite)
    path = pathlib.Path(path)
    if path.suffix != suffix or path.is_dir():
        raise ValueError(
            f"`path` must be that of a file and end in {suffix!r}. "
            f"Received: path={os.fspath(path)!r}"
        )
    if not path.parent.is_dir():
        raise ValueError(
            "`path` must be in a directory that exists. "
            f"Received: path={os.fspath(path)!r}"
        )
    refuse_existing_file(path, overwrite)
    return path


def checked_tolerance(tolerance, default):
    """Checks and returns a tolerance, or returns `default` if it is `None`."""
    if tolerance is None:
        return default
    check_positive_number("tolerance", tolerance)
    return tolerance
