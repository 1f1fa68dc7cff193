"""Writes and reads `keras_bnrnn.json`, which describes a version and its origin."""

import datetime
import importlib.metadata
import json
import pathlib

import keras
import tensorflow as tf

from keras_bnrnn.export.operations import (
    TEXT_OPERATIONS,
    operations,
    saved_model_proto,
    xla_functions,
)
from keras_bnrnn.traversal import sublayers

MANIFEST = "keras_bnrnn.json"

# The number of the format. It rises when a reader of the old format would misread the
# new one; further entries do not raise it.
FORMAT = 1

INTERNAL = ("NoOp", "__saved_model")


def write_manifest(
    version_directory,
    model,
    tokenizer,
    layers,
    lengths,
    streaming,
    quantize,
    xla_buckets,
    checks,
    provenance,
):
    """Writes the manifest of a version.

    Args:
        version_directory: Path of the SavedModel.
        model: The model that was exported.
        tokenizer: The tokenizer in the graph, or `None`.
        layers: List of `FoldedLayer`.
        lengths: Whether `serve` takes `lengths`.
        streaming: Dict with `causal`, whether the model is causal, and `because`, the
            reason if it is not streamed.
        quantize: Dict from dtype to the names of the weights stored in it, or `None`.
        xla_buckets: List of `(B, T)`.
        checks: Dict of the results of the checks before publishing.
        provenance: Dict that the user gave, or `None`.
    """
    version_directory = pathlib.Path(version_directory)
    found = describe(version_directory)
    manifest = {
        "format": FORMAT,
        "model": model.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(found["operations"], [*sublayers(model), tokenizer]),
        **found,
        "layers": [layer._asdict() for layer in layers],
        "lengths": lengths,
        "streaming": streaming,
        "quantize": quantize,
        "xla_buckets": xla_buckets,
        "training": _training(model, provenance),
        "checks": checks,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (version_directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(version_directory):
    """Reads the manifest of a version.

    Args:
        version_directory: Path of the SavedModel.

    Returns:
        Dict of the entries that `write_manifest` wrote; empty if there is no manifest.

    Raises:
        ValueError: If the manifest is damaged, or has a newer format.
    """
    path = pathlib.Path(version_directory) / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, "be JSON", f"a file that fails with: {error}") from error
    if not isinstance(manifest, dict):
        raise _damaged(path, "be a JSON object", f"a {type(manifest).__name__}")
    # The first manifests have no number.
    number = manifest.setdefault("format", FORMAT)
    _check_entry(path, "format", number, int)
    if number > FORMAT:
        raise ValueError(
            f"`{MANIFEST}` must have the format {FORMAT} at most. Received: format "
            f"{number} in {str(path)!r}. A newer version of keras_bnrnn wrote it: "
            "install that version, `pip install --upgrade keras-bnrnn`"
        )
    _check_entry(path, "", manifest, _ENTRIES)
    return manifest


_NAME = (str, None)

# The entries that every manifest has, and their types; `(type, None)` may be `None`.
_ENTRIES = {
    "model": str,
    "created": str,
    "versions": dict,
    "layers": [
        {"name": str, "layer": str, "folded_into": _NAME, "kept_because": _NAME}
    ],
    "lengths": bool,
    "streaming": {"causal": bool, "because": _NAME},
    "quantize": ({"float16": list, "float32": list}, None),
    "xla_buckets": list,
    "training": dict,
    "checks": {"largest_difference": float, "warmup_requests": int},
}


def _check_entry(path, place, value, expected):
    """Raises ValueError if a value of a manifest does not have the expected type."""
    if isinstance(expected, tuple):
        expected, _ = expected  # or `None`
        if value is None:
            return
    kind = expected if isinstance(expected, type) else type(expected)
    if kind is float and isinstance(value, int):
        return  # JSON does not tell them apart
    if not isinstance(value, kind):
        received = json.dumps(value)[:80]
        raise _damaged(path, f"have a {kind.__name__} as `{place}`", received)
    if isinstance(expected, list):
        for index, item in enumerate(value):
            _check_entry(path, f"{place}[{index}]", item, expected[0])
    if isinstance(expected, dict):
        for key, inner in expected.items():
            inside = f"{place}.{key}" if place else key
            if key not in value:
                raise _damaged(path, f"have `{inside}`", f"the keys {list(value)}")
            _check_entry(path, inside, value[key], inner)


def _damaged(path, wanted, received):
    return ValueError(
        f"`{MANIFEST}` must {wanted}. Received: {received} in {str(path)!r}. The file "
        "is damaged: export or copy the version again"
    )


def describe(version_directory):
    """Reads the signatures, operations and sizes of any SavedModel.

    Raises:
        ValueError: If the directory holds no SavedModel, or a damaged one.
    """
    version_directory = pathlib.Path(version_directory)
    proto = saved_model_proto(version_directory)
    signatures = {
        name: {
            "inputs": _tensors(signature.inputs),
            "outputs": _tensors(signature.outputs),
        }
        for name, signature in sorted(proto.meta_graphs[0].signature_def.items())
        if name not in INTERNAL and not name.startswith("__")
    }
    counts = operations(proto)
    return {
        "signatures": signatures,
        "operations": dict(sorted(counts.items())),
        "xla_functions": len(xla_functions(proto)),
        "bytes": {
            part: _size(version_directory / part)
            for part in ("saved_model.pb", "variables", "assets", "assets.extra")
        },
    }


def _tensors(infos):
    return {
        name: {
            "dtype": _dtype_name(info.dtype),
            "shape": None
            if info.tensor_shape.unknown_rank
            else [None if d.size < 0 else d.size for d in info.tensor_shape.dim],
        }
        for name, info in sorted(infos.items())
    }


def _dtype_name(number):
    try:
        return tf.as_dtype(number).name
    except TypeError:
        return f"dtype {number}"  # of a newer TensorFlow, or of a damaged file


def _size(path):
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.exists() else 0


def _versions(operations, parts):
    """Returns the versions of the packages that an export uses, a dict by name.

    Args:
        operations: The names of the operations of the SavedModel.
        parts: The layers of the model, and the tokenizer or `None`.
    """
    names = ["keras-bnrnn", "tensorflow", "keras"]
    if not TEXT_OPERATIONS.isdisjoint(operations):
        names.append("tensorflow-text")
    classes = {cls for part in parts for cls in type(part).__mro__}
    if any(cls.__module__.partition(".")[0] == "keras_hub" for cls in classes):
        names.append("keras-hub")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # TensorFlow may have another name, such as tensorflow-cpu
    return versions


def _training(model, provenance):
    training = {"parameters": model.count_params()}
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        training["optimizer"] = type(optimizer).__name__
        training["steps"] = int(keras.ops.convert_to_numpy(optimizer.iterations))
        training["learning_rate"] = float(
            keras.ops.convert_to_numpy(optimizer.learning_rate)
        )
    return {**training, **({"provenance": provenance} if provenance else {})}
