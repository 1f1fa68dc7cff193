"""Finds, loads, replaces and unloads the served versions of models."""

import dataclasses
import logging
import os
import pathlib
import threading

import tensorflow as tf
from tensorflow_serving.apis import get_model_status_pb2

from keras_bnrnn.export.directory import find_versions
from keras_bnrnn.local_server import predict
from keras_bnrnn.local_server.servable import Servable

_logger = logging.getLogger(__name__)


class Models:
    """The models of a server and their served versions.

    Args:
        models: Dict from model name to base directory.
        versions: `"latest"`, `"all"`, or a positive int, the number of latest versions.
        version_labels: Dict from model name to a dict from label to version.
        metrics: `Metrics`.

    Raises:
        ValueError: If no version of a model can be loaded.
    """

    def __init__(self, models, versions, version_labels, metrics):
        self._labels = version_labels
        self._models = {
            name: _Model(name, directory, versions, metrics)
            for name, directory in models.items()
        }
        for model in self._models.values():
            model.load_first()

    def find(self, spec, record):
        """Finds the servable of a request.

        Args:
            spec: `ModelSpec`. Without version and label, it means the latest version.
            record: `Record`; this method sets its model and version.

        Returns:
            A `Servable`.

        Raises:
            tf.errors.InvalidArgumentError: If the name is empty or the label unknown.
            tf.errors.NotFoundError: If the model or the version is not served.
        """
        if not spec.name:
            raise predict.invalid_argument("ModelSpec has no name specified.")
        version, wanted = None, f"Latest({spec.name})"
        if spec.WhichOneof("version_choice"):
            version = self._version(spec)
            wanted = f"Specific({spec.name}, {version})"
        model = self._models.get(spec.name)
        # Read once, since another thread may replace `available`.
        available = model.available if model else {}
        if version is None and available:
            version = max(available)
        if version not in available:
            raise _not_found(f"Servable not found for request: {wanted}")
        record.model, record.version = spec.name, str(version)
        return available[version]

    def latest(self):
        """Returns the latest served version of each model.

        Returns:
            Dict from model name to `Servable`, without models that have none.
        """
        return {
            name: model.available[max(model.available)]
            for name, model in self._models.items()
            if model.available
        }

    def status(self, spec, record):
        """Returns the states of the versions of a model, the highest version first.

        Args:
            spec: `ModelSpec`. With a version, the result has only the state of this
                version. A label is ignored, as in TensorFlow Serving.
            record: `Record`; this method sets its model and version.

        Returns:
            A `GetModelStatusResponse`.

        Raises:
            tf.errors.NotFoundError: If the model or the version was never found.
        """
        model = self._models.get(spec.name)
        states = model.states() if model else []
        if not states:
            raise _not_found(f"Could not find any versions of model {spec.name}")
        record.model = spec.name
        if spec.WhichOneof("version_choice") == "version":
            version = spec.version.value
            states = [state for state in states if state.version == version]
            if not states:
                raise _not_found(
                    f"Could not find version {version} of model {spec.name}"
                )
            record.version = str(version)
        response = get_model_status_pb2.GetModelStatusResponse()
        for state in states:
            status = response.model_version_status.add(
                version=state.version, state=state.state
            )
            # Makes JSON show the code and empty message of an OK status.
            status.status.SetInParent()
            status.status.error_code = state.error_code
            status.status.error_message = state.error_message
        return response

    def poll(self):
        """Looks for new and removed versions of every model."""
        for model in self._models.values():
            try:
                model.poll()
            except OSError as error:
                # Keeps serving without the directory, as TensorFlow Serving does.
                _logger.warning("%s: %s", model.name, error)

    def _version(self, spec):
        if spec.WhichOneof("version_choice") == "version":
            return spec.version.value
        labels = self._labels.get(spec.name, {})
        if spec.version_label not in labels:
            raise predict.invalid_argument(
                f"Unrecognized servable version label: {spec.version_label}"
            )
        return labels[spec.version_label]


@dataclasses.dataclass
class _State:
    """The state and error of a version, in TensorFlow Serving's terms."""

    version: int
    state: str = "START"
    error_code: int = 0
    error_message: str = ""
    # The `_content` of the directory when loading failed.
    failed_content: object = None


class _Model:
    """A model with its versions.

    Requests read `available`, a dict from version to `Servable`, without a lock. The
    dict is replaced as a whole and never changed.
    """

    def __init__(self, name, base_directory, policy, metrics):
        self.name = name
        self.available = {}
        self._base_directory = pathlib.Path(base_directory)
        self._policy = policy
        self._metrics = metrics
        self._states = {}
        self._unloading = {}
        self._lock = threading.Lock()

    def load_first(self):
        if not self._base_directory.is_dir():
            raise ValueError(
                "A model's base directory must exist. "
                f"Received: directory={str(self._base_directory)!r}"
            )
        if not find_versions(self._base_directory):
            found = "none of them"
            if (self._base_directory / "saved_model.pb").exists():
                found = "a SavedModel itself; move it into a sub-directory named `1`"
            raise ValueError(
                "A model's base directory must have sub-directories named by version "
                f"(1, 2, ...). Received: directory={str(self._base_directory)!r}, "
                f"which holds {found}"
            )
        self.poll()
        if not self.available:
            raise ValueError(self.states()[0].error_message)

    def states(self):
        states = list(self._states.values())
        return sorted(states, key=lambda state: state.version, reverse=True)

    def poll(self):
        with self._lock:
            wanted = self._wanted(find_versions(self._base_directory))
            for version in wanted:
                if version not in self.available:
                    self._states.setdefault(version, _State(version))
            # Loads the latest version first, since most requests use it.
            for version in sorted(wanted, reverse=True):
                if version not in self.available:
                    self._load(version, wanted[version])
            # Unloads versions only after a new version is available.
            if not wanted or any(version in self.available for version in wanted):
                for version in set(self.available) - set(wanted):
                    self._unload(version)
            self._end_unloading()

    def _wanted(self, found):
        if self._policy == "all":
            return found
        number = 1 if self._policy == "latest" else self._policy
        return dict(list(found.items())[-number:])

    def _load(self, version, directory):
        content = _content(directory)
        state = self._states[version]
        if state.failed_content is not None and state.failed_content == content:
            return
        self._states[version] = state = _State(version, "LOADING")
        try:
            servable = Servable(self.name, version, directory)
        except ValueError as error:
            _logger.warning("%s", error)
            self._states[version] = _State(
                version, "END", _error_code(error.__cause__), str(error), content
            )
            self._metrics.load_failed(self.name)
            return
        self.available = self.available | {version: servable}
        state.state = "AVAILABLE"
        self._metrics.loaded(self.name, version)
        _logger.info("%s version %s: loaded", self.name, version)

    def _unload(self, version):
        self._unloading[version] = self.available[version]
        self.available = {
            other: servable
            for other, servable in self.available.items()
            if other != version
        }
        self._states[version].state = "UNLOADING"
        self._metrics.unloaded(self.name, version)
        _logger.info("%s version %s: unloaded", self.name, version)

    def _end_unloading(self):
        for version, servable in list(self._unloading.items()):
            if not servable.in_flight:
                del self._unloading[version]
                # The version may be loaded again if its directory reappeared.
                if self._states[version].state == "UNLOADING":
                    self._states[version].state = "END"


def _content(directory):
    """Returns paths, sizes and times of the files, to detect changes."""
    content = []
    for root, _, files in os.walk(directory):
        for name in files:
            path = os.path.join(root, name)
            try:
                stat = os.stat(path)
            except OSError:
                continue  # removed after it was listed
            content.append((path, stat.st_size, stat.st_mtime_ns))
    return sorted(content)


def _error_code(error):
    if isinstance(error, tf.errors.OpError):
        return error.error_code
    return tf.errors.NOT_FOUND if isinstance(error, OSError) else tf.errors.UNKNOWN


def _not_found(message):
    return tf.errors.NotFoundError(None, None, message)
