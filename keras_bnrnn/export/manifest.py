"""Writes `keras_bnrnn.json`, which describes a version and its origin."""

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


def describe(version_directory):
    """Reads the signatures, operations and sizes of any SavedModel."""
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
            "dtype": tf.as_dtype(info.dtype).name,
            "shape": None
            if info.tensor_shape.unknown_rank
            else [None if d.size < 0 else d.size for d in info.tensor_shape.dim],
        }
        for name, info in sorted(infos.items())
    }


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
