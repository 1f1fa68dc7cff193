"""What starts TensorFlow Serving for the tests, tried on a stand-in for it."""

import stat
import sys

import grpc
import httpx
import pytest
import tensorflow as tf

pytest.importorskip("tensorflow_serving")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from serving_backends import (
    MODEL_NAMES,
    copy_version,
    served,
    states,
    wait_for,
    write_config,
)
from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc

from keras_bnrnn.local_server import ModelServer

# It reads the flags of `tensorflow_model_server` that the tests use.
STAND_IN = """#!{python}
import argparse, signal, threading
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2
from keras_bnrnn.local_server import ModelServer

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--rest_api_port", type=int)
parser.add_argument("--model_config_file")
parser.add_argument("--file_system_poll_wait_seconds", type=float)
parser.add_argument("--grpc_max_threads", type=int)
args = parser.parse_args()
assert args.grpc_max_threads >= 256
with open(args.model_config_file) as file:
    config = text_format.Parse(
        file.read(), model_server_config_pb2.ModelServerConfig()
    )
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
with ModelServer(
    {{c.name: c.base_path for c in config.model_config_list.config}},
    port=args.rest_api_port,
    grpc_port=args.port,
    poll_seconds=args.file_system_poll_wait_seconds,
):
    stop.wait()
"""


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Nothing here is Keras', so that no session needs to be cleared."""
    for name in ("BINARY", "REST_URL", "GRPC_URL", "MODEL_DIR"):
        monkeypatch.delenv(f"TF_SERVING_{name}", raising=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    for version in (1, 2):
        save_double(root / "double" / str(version), 2.0 * version)
    return root / "double"


def save_double(directory, scale):
    class Double(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def __call__(self, x):
            return {"y": scale * x}

    tf.saved_model.save(Double(), str(directory))


def assert_serves(backend, scale, version):
    url = f"{backend.rest_url}/v1/models/double:predict"
    answer = httpx.post(url, json={"instances": [1.5]}, timeout=30).json()
    assert answer == {"predictions": [1.5 * scale]}
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "double"
    with grpc.insecure_channel(backend.grpc_target) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        response = stub.GetModelStatus(request, timeout=30)
    assert response.model_version_status[0].version == version


@pytest.mark.slow
def test_binary_is_started_on_free_ports_and_ended(exported, tmp_path, monkeypatch):
    binary = tmp_path / "model_server"
    binary.write_text(STAND_IN.format(python=sys.executable))
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    base = tmp_path / "double"
    base.mkdir()
    copy_version(exported / "1", base)
    monkeypatch.setenv("TF_SERVING_BINARY", str(binary))
    with served({"double": base}, max_request_bytes=1) as backend:
        assert backend.server is None
        assert_serves(backend, 2.0, 1)
        copy_version(exported / "2", backend.models["double"])
        wait_for(lambda: states(backend, "double") == {2: "AVAILABLE", 1: "END"})
        assert_serves(backend, 4.0, 2)
    with pytest.raises(httpx.ConnectError):
        httpx.get(backend.rest_url)


def test_binary_that_fails_is_quoted(exported, tmp_path, monkeypatch):
    binary = tmp_path / "model_server"
    binary.write_text("#!/bin/sh\necho no such flag\nexit 3\n")
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("TF_SERVING_BINARY", str(binary))
    with (
        pytest.raises(AssertionError, match="no such flag"),
        served({"double": exported}),
    ):
        pass


def test_running_server_reads_copies(exported, tmp_path, monkeypatch):
    base = tmp_path / "double"
    base.mkdir()
    copy_version(exported / "1", base)
    assert "double" in write_config(tmp_path).read_text()
    # TensorFlow Serving would open no port while a model has no version.
    for name in MODEL_NAMES:
        assert (tmp_path / name / "1" / "saved_model.pb").is_file()
    server = ModelServer({"double": base}, port=0, grpc_port=0, poll_seconds=0.05)
    with server:
        monkeypatch.setenv("TF_SERVING_REST_URL", server.url)
        monkeypatch.setenv("TF_SERVING_GRPC_URL", server.grpc_target)
        monkeypatch.setenv("TF_SERVING_MODEL_DIR", str(tmp_path))
        for _ in range(2):
            with served({"double": exported}) as backend:
                assert backend.server is None
                assert backend.models == {"double": base}
                # The server may have looked between the copies of the two versions.
                wait_for(lambda b=backend: states(b, "double").get(2) == "AVAILABLE")
                assert_serves(backend, 4.0, 2)
            assert not list(base.glob("[0-9]*"))
    assert sorted(path.name for path in exported.iterdir()) == ["1", "2"]
