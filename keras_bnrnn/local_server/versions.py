"""Which versions of the models are served: found, loaded, replaced and dropped."""

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
    """The models of a server, each with the versions that are served.

    Args:
        models: dict of model name -> base directory.
        versions: `"latest"`, `"all"`, or a positive int, the number of latest ones.
        version_labels: dict of model name -> dict of label -> version.
        metrics: `Metrics`.

    Raises:
        ValueError: for a model none of whose versions can be loaded.
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
        """Finds the servable that a request names.

        Args:
            spec: `ModelSpec`; without version and label, the latest version is meant.
            record: `Record`, which learns the model and the version.

        Returns:
            A `Servable`.

        Raises:
            tf.errors.InvalidArgumentError: for an empty name or an unknown label.
            tf.errors.NotFoundError: for a model or a version that is not served.
        """
        if not spec.name:
            raise predict.invalid_argument("ModelSpec has no name specified.")
        version, wanted = None, f"Latest({spec.name})"
        if spec.WhichOneof("version_choice"):
            version = self._version(spec)
            wanted = f"Specific({spec.name}, {version})"
        model = self._models.get(spec.name)
        # Taken once: another thread may replace it.
        available = model.available if model else {}
        if version is None and available:
            version = max(available)
        if version not in available:
            raise _not_found(f"Servable not found for request: {wanted}")
        record.model, record.version = spec.name, str(version)
        return available[version]

    def latest(self):
        """The latest version of each model that has one.

        Returns:
            Dict of model name -> `Servable`.
        """
        return {
            name: model.available[max(model.available)]
            for name, model in self._models.items()
            if model.available
        }

    def status(self, spec, record):
        """The states of the versions of a model, the highest first.

        Args:
            spec: `ModelSpec`; with a version, only that one is meant. A label is
                ignored, as in TensorFlow Serving.
            record: `Record`, which learns the model and the version.

        Returns:
            A `GetModelStatusResponse`.

        Raises:
            tf.errors.NotFoundError: for a model or a version that was never seen.
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
            # An OK status is printed with its code and an empty message.
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
                # TensorFlow Serving, too, serves on when the directory is away.
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
    """What is known of a version: TensorFlow Serving's state and error."""

    version: int
    state: str = "START"
    error_code: int = 0
    error_message: str = ""
    # What the directory held when it failed to load.
    failed_content: object = None


class _Model:
    """A model with its versions.

    `available` is what requests read, without a lock: a dict of version -> `Servable`
    that is replaced and never changed.
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
            # The latest first: it is the one that most requests want.
            for version in sorted(wanted, reverse=True):
                if version not in self.available:
                    self._load(version, wanted[version])
            # Not before what takes their place is there: no request is to be lost.
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
                # It may be there again, in answer to a new directory.
                if self._states[version].state == "UNLOADING":
                    self._states[version].state = "END"


def _content(directory):
    """Names, sizes and times of the files, which tell whether they changed."""
    content = []
    for root, _, files in os.walk(directory):
        for name in files:
            path = os.path.join(root, name)
            try:
                stat = os.stat(path)
            except OSError:
                continue  # removed since it was listed
            content.append((path, stat.st_size, stat.st_mtime_ns))
    return sorted(content)


def _error_code(error):
    if isinstance(error, tf.errors.OpError):
        return error.error_code
    return tf.errors.NOT_FOUND if isinstance(error, OSError) else tf.errors.UNKNOWN


def _not_found(message):
    return tf.errors.NotFoundError(None, None, message)
