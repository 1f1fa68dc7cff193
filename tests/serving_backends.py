"""The servers that the serving tests run against.

By default that is the embedded server, in the process of the tests. Two sets of
environment variables choose TensorFlow Serving in its place:

`TF_SERVING_BINARY`
    Path of a `tensorflow_model_server`, which is started on free ports of this machine
    for each set of models.

`TF_SERVING_REST_URL`, `TF_SERVING_GRPC_URL`, `TF_SERVING_MODEL_DIR`
    A server that runs already: `http://host:port`, `host:port`, and a directory that
    this machine and the server see under the same path. The tests copy their models
    into `TF_SERVING_MODEL_DIR/NAME`, where NAME is one of `MODEL_NAMES`, and take them
    away after. Call `write_config(TF_SERVING_MODEL_DIR)` before each start of the
    server: it writes the configuration that the server needs, and a version 1 for each
    model that has none. TensorFlow Serving opens no port while a model of its
    configuration has no version. Start it with `--file_system_poll_wait_seconds=1`
    and `--grpc_max_threads=256`.

A test that asks for what only the embedded server has, or for its own words, is marked
`@embedded_only`.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time

import httpx
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

# The names that tests give their models, which a server that runs already must know.
MODEL_NAMES = ("frames", "types", "double", "scale", "fault")

_SECONDS = 120  # a test server that is not ready by then never will be

is_embedded = not {"TF_SERVING_BINARY", "TF_SERVING_REST_URL"} & set(os.environ)

embedded_only = pytest.mark.skipif(
    not is_embedded, reason="only the embedded server has it"
)


@dataclasses.dataclass
class Backend:
    """A server that is ready.

    Attributes:
        rest_url: str, `http://host:port`.
        grpc_target: str, `host:port`.
        models: dict of model name -> path of the base directory that it reads: where
            a test puts a further version.
        server: the `ModelServer`; None if it is TensorFlow Serving.
    """

    rest_url: str
    grpc_target: str
    models: dict
    server: object = None


@contextlib.contextmanager
def served(models, **kwargs):
    """Serves models on the server that the environment chooses.

    Args:
        models: dict of model name -> base directory.
        **kwargs: further arguments of `ModelServer`; they are left out for TensorFlow
            Serving.

    Yields:
        A `Backend`, all of whose models are served.
    """
    models = {name: pathlib.Path(directory) for name, directory in models.items()}
    if "TF_SERVING_BINARY" in os.environ:
        backend = _binary(os.environ["TF_SERVING_BINARY"], models)
    elif "TF_SERVING_REST_URL" in os.environ:
        backend = _running(models)
    else:
        backend = _embedded(models, kwargs)
    with backend as ready:
        yield ready


def write_config(directory, names=MODEL_NAMES, path=None):
    """Writes the `--model_config_file` of a TensorFlow Serving.

    Args:
        directory: path that holds the base directory of each model under its name;
            a model without a version gets one. Or a dict of model name -> base
            directory, which are left as they are.
        names: the models' names.
        path: path of the file; None: `directory/models.config`.

    Returns:
        The path of the file.
    """
    if not isinstance(directory, dict):
        path = path or pathlib.Path(directory) / "models.config"
        directory = {name: pathlib.Path(directory) / name for name in names}
        for base in directory.values():
            _seed(base)
    config = model_server_config_pb2.ModelServerConfig()
    for name, base in directory.items():
        config.model_config_list.config.add(
            name=name, base_path=str(base), model_platform="tensorflow"
        )
    pathlib.Path(path).write_text(text_format.MessageToString(config))
    return path


def _seed(base_directory):
    """Saves a version 1, unless there is a version."""
    if any(base_directory.glob("[0-9]*")):
        return
    module = tf.Module()
    module.run = tf.function(
        lambda x: {"y": x}, input_signature=[tf.TensorSpec([None], tf.float32, "x")]
    )
    tf.saved_model.save(module, str(base_directory / "1"), module.run)


@contextlib.contextmanager
def _embedded(models, kwargs):
    from keras_bnrnn.local_server import ModelServer

    kwargs = {"port": 0, "grpc_port": 0, "poll_seconds": 0.1} | kwargs
    with ModelServer(models, **kwargs) as server:
        yield Backend(server.url, server.grpc_target, models, server)


@contextlib.contextmanager
def _binary(binary, models):
    port, rest_port = _free_port(), _free_port()
    with tempfile.TemporaryDirectory() as directory:
        config = pathlib.Path(directory, "models.config")
        command = [
            binary,
            f"--port={port}",
            f"--rest_api_port={rest_port}",
            f"--model_config_file={write_config(models, path=config)}",
            "--file_system_poll_wait_seconds=1",
            # The default refuses most of the concurrent requests of the load tests.
            "--grpc_max_threads=256",
        ]
        log = pathlib.Path(directory, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        backend = Backend(f"http://127.0.0.1:{rest_port}", f"127.0.0.1:{port}", models)
        try:
            for name in models:
                _wait_for_model(backend, name, process, log)
            yield backend
            process.terminate()
            process.wait(60)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _running(models):
    root = pathlib.Path(os.environ["TF_SERVING_MODEL_DIR"])
    backend = Backend(
        os.environ["TF_SERVING_REST_URL"].rstrip("/"),
        os.environ.get("TF_SERVING_GRPC_URL", ""),
        {name: root / name for name in models},
    )
    try:
        for name, directory in models.items():
            _remove_versions(backend, name)
            backend.models[name].mkdir(exist_ok=True)
            for version in sorted(directory.iterdir()):
                if version.name.isdigit() and version.is_dir():
                    copy_version(version, backend.models[name])
            _wait_for_model(backend, name)
        yield backend
    finally:
        for name in models:
            _remove_versions(backend, name)


def copy_version(version, base_directory):
    """Copies a version's directory into a model's, all at once for the server."""
    beside = base_directory / f".copy-of-{version.name}"
    shutil.copytree(version, beside)
    return beside.rename(base_directory / version.name)


def _remove_versions(backend, name):
    base = backend.models[name]
    if not base.is_dir():
        return
    for path in base.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    # A version of the same number would be taken for the one that was there.
    wait_for(lambda: "AVAILABLE" not in states(backend, name).values())


def states(backend, name):
    """The states of a model's versions.

    Args:
        backend: `Backend`.
        name: str, the model's name.

    Returns:
        Dict of version, an int -> state; empty if the server knows none.
    """
    response = httpx.get(f"{backend.rest_url}/v1/models/{name}", timeout=30)
    statuses = response.json().get("model_version_status", [])
    return {int(status["version"]): status["state"] for status in statuses}


def wait_for(condition, seconds=_SECONDS):
    """Waits until `condition()` holds, and fails the test if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in {seconds} s"
        time.sleep(0.02)


def _wait_for_model(backend, name, process=None, log=None):
    def available():
        if process is not None:
            assert process.poll() is None, log.read_text(errors="replace")
        with contextlib.suppress(httpx.TransportError):
            return "AVAILABLE" in states(backend, name).values()

    wait_for(available)


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
