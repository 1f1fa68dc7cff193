"""A version of a SavedModel in memory."""

import contextlib
import pathlib

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

# Only registers its ops, for the models that have some of them.
with contextlib.suppress(ImportError):
    import tensorflow_text  # noqa: F401


class Servable:
    """The highest version of a SavedModel under a base directory, loaded.

    Args:
        name: str, the model's name.
        base_directory: str or path; its sub-directories are named by version.

    Attributes:
        name: the model's name.
        version: int, the version loaded.
        signatures: dict of signature name -> `SignatureDef`.

    Raises:
        ValueError: if there is no version, or it cannot be loaded.
    """

    def __init__(self, name, base_directory):
        self.name = name
        self.version, directory = latest_version(base_directory)
        try:
            # Kept whole: the signatures do not keep the model's variables alive.
            self._model = tf.saved_model.load(
                str(directory), tags=[tf.saved_model.SERVING]
            )
            self.signatures = _read_signatures(directory)
        # The loader raises nearly anything, depending on what is broken.
        except Exception as error:
            raise ValueError(
                f"The SavedModel of `{name}` cannot be loaded. "
                f"Received: directory={str(directory)!r}, which fails with: {error}"
            ) from error

    def predict(self, signature_name, inputs):
        """Runs a signature.

        Args:
            signature_name: str, a name in `signatures` that has inputs.
            inputs: dict of input name -> array, of the signature's dtypes and shapes.

        Returns:
            Dict of output name -> array; strings are bytes in an array of objects.
        """
        infos = self.signatures[signature_name].inputs
        tensors = {
            name: tf.constant(array, infos[name].dtype)
            for name, array in inputs.items()
        }
        outputs = self._model.signatures[signature_name](**tensors)
        return {name: tensor.numpy() for name, tensor in outputs.items()}


def latest_version(base_directory):
    """Finds the highest version under a model's base directory.

    Args:
        base_directory: str or path.

    Returns:
        The version, an int, and its directory. Whatever is not a directory named by
        a non-negative integer is ignored, as in TensorFlow Serving.

    Raises:
        ValueError: if it is not a directory, or has no version.
    """
    base_directory = pathlib.Path(base_directory)
    if not base_directory.is_dir():
        raise ValueError(
            "A model's base directory must exist. "
            f"Received: directory={str(base_directory)!r}"
        )
    versions = {
        int(path.name): path
        for path in base_directory.iterdir()
        if path.name.isascii() and path.name.isdigit() and path.is_dir()
    }
    if not versions:
        found = "none of them"
        if (base_directory / "saved_model.pb").exists():
            found = "a SavedModel itself; move it into a sub-directory named `1`"
        raise ValueError(
            "A model's base directory must have sub-directories named by version "
            f"(1, 2, ...). Received: directory={str(base_directory)!r}, "
            f"which holds {found}"
        )
    version = max(versions)
    return version, versions[version]


def _read_signatures(directory):
    content = (directory / "saved_model.pb").read_bytes()
    for meta_graph in saved_model_pb2.SavedModel.FromString(content).meta_graphs:
        if tf.saved_model.SERVING in meta_graph.meta_info_def.tags:
            return dict(meta_graph.signature_def)
    raise ValueError(f"no graph is tagged `{tf.saved_model.SERVING}`")
