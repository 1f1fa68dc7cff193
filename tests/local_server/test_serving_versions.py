"""Versions that come, go, fail and are warmed up; what the server says of them."""

import shutil
import threading
import time

import httpx
import numpy as np
import pytest
import tensorflow as tf

pytest.importorskip("tensorflow_serving")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families
from serving_backends import copy_version, embedded_only, served, states, wait_for
from tensorflow_serving.apis import prediction_log_pb2

from keras_bnrnn.local_server import ModelServer
from keras_bnrnn.local_server.servable import Servable


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here is Keras', so that no session needs to be cleared."""


class Scale(tf.Module):
    """y = scale * x; a signature that takes long, and one that counts its calls."""

    def __init__(self, scale):
        super().__init__()
        self.scale = tf.Variable(float(scale))
        self.calls = tf.Variable(0)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def serve(self, x):
        return {"y": self.scale * x}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, name="steps")])
    def slow(self, steps):
        count = tf.while_loop(lambda i: i < steps[0], lambda i: (i + 1,), [0])[0]
        return {"count": steps - steps + count}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def count(self, x):
        calls = self.calls.assign_add(1)
        return {"calls": tf.cast(calls, tf.float32) + 0.0 * x}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory that no server reads, with versions 1 to 4: y = version * x."""
    root = tmp_path_factory.mktemp("exported")
    for version in range(1, 5):
        module = Scale(version)
        signatures = {
            "serving_default": module.serve,
            "slow": module.slow,
            "count": module.count,
        }
        tf.saved_model.save(module, str(root / str(version)), signatures)
    return root


@pytest.fixture
def base(exported, tmp_path):
    """A model's base directory with version 1."""
    directory = tmp_path / "scale"
    directory.mkdir()
    copy_version(exported / "1", directory)
    return directory


def predict(url, which="", status=200, **body):
    body = body or {"instances": [[1.0, -2.0]]}
    response = httpx.post(f"{url}/v1/models/scale{which}:predict", json=body)
    assert response.status_code == status, response.text
    answer = response.json()
    return answer["predictions"] if status == 200 else answer["error"]


def scale_of(url, which=""):
    ((scale, minus_two_scales),) = predict(url, which)
    assert minus_two_scales == -2 * scale
    return scale


def write_warmup(version, requests, content=None):
    """Writes warm-up requests, `(signature, name, array)`, into a version."""
    path = version / "assets.extra" / "tf_serving_warmup_requests"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
        return
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, name, array in requests:
            log = prediction_log_pb2.PredictionLog()
            request = log.predict_log.request
            request.model_spec.name = "another name"
            request.model_spec.signature_name = signature
            request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
            writer.write(log.SerializeToString())


class TestVersions:
    def test_new_version_takes_over_and_rolls_back(self, base, exported):
        with served({"scale": base}) as backend:
            directory = backend.models["scale"]
            assert scale_of(backend.rest_url) == 1
            copy_version(exported / "3", directory)
            wait_for(lambda: scale_of(backend.rest_url) == 3)
            wait_for(lambda: states(backend, "scale") == {3: "AVAILABLE", 1: "END"})
            assert "Specific(scale, 1)" in predict(
                backend.rest_url, "/versions/1", status=404
            )
            # A version that is known and not served: 200, so that probes must read it.
            url = f"{backend.rest_url}/v1/models/scale/versions/1"
            response = httpx.get(url)
            assert response.status_code == 200
            assert response.json()["model_version_status"] == [
                {
                    "version": "1",
                    "state": "END",
                    "status": {"error_code": "OK", "error_message": ""},
                }
            ]
            shutil.rmtree(directory / "3")
            wait_for(lambda: scale_of(backend.rest_url) == 1)
            wait_for(lambda: states(backend, "scale") == {3: "END", 1: "AVAILABLE"})

    @embedded_only
    def test_latest_two(self, base, exported):
        copy_version(exported / "2", base)
        with served({"scale": base}, versions=2, poll_seconds=0) as backend:
            url, server = backend.rest_url, backend.server
            assert states(backend, "scale") == {2: "AVAILABLE", 1: "AVAILABLE"}
            assert [scale_of(url, f"/versions/{v}") for v in (1, 2)] == [1, 2]
            copy_version(exported / "4", base)
            server.poll()
            assert [scale_of(url, w) for w in ("", "/versions/2")] == [4, 2]
            assert states(backend, "scale")[1] == "END"

    @embedded_only
    def test_all_and_removal_of_all(self, base, exported):
        for version in "234":
            copy_version(exported / version, base)
        with served({"scale": base}, versions="all", poll_seconds=0) as backend:
            url, server = backend.rest_url, backend.server
            assert [scale_of(url, f"/versions/{v}") for v in range(1, 5)] == [
                1,
                2,
                3,
                4,
            ]
            shutil.rmtree(base / "2")
            server.poll()
            assert predict(url, "/versions/2", 404)
            for version in "134":
                shutil.rmtree(base / version)
            server.poll()
            assert "Latest(scale)" in predict(url, status=404)
            assert server.servables == {}
            assert set(states(backend, "scale").values()) == {"END"}

    @embedded_only
    def test_base_directory_that_goes_away(self, base, exported, caplog):
        with served({"scale": base}, poll_seconds=0) as backend:
            base.rename(base.parent / "away")
            backend.server.poll()
            assert scale_of(backend.rest_url) == 1
            assert "No such file" in caplog.text
            base.mkdir()
            copy_version(exported / "2", base)
            backend.server.poll()
            assert scale_of(backend.rest_url) == 2

    @embedded_only
    def test_poll_seconds_zero_looks_at_the_start_only(self, base, exported):
        with served({"scale": base}, poll_seconds=0) as backend:
            copy_version(exported / "2", base)
            time.sleep(0.3)
            assert scale_of(backend.rest_url) == 1

    @embedded_only
    def test_one_model_does_not_touch_another(self, base, exported, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        copy_version(exported / "2", other)
        models = {"scale": base, "other": other}
        with served(models, poll_seconds=0) as backend:
            copy_version(exported / "3", other)
            before = backend.server.servables
            backend.server.poll()
            after = backend.server.servables
            assert after["scale"] is before["scale"]
            assert (before["other"].version, after["other"].version) == (2, 3)

    @embedded_only
    def test_labels(self, base, exported):
        copy_version(exported / "2", base)
        labels = {"scale": {"stable": 1, "canary": 2, "gone": 9}}
        with served({"scale": base}, versions="all", version_labels=labels) as backend:
            url = backend.rest_url
            assert scale_of(url, "/labels/stable") == 1
            assert scale_of(url, "/labels/canary") == 2
            assert "Specific(scale, 9)" in predict(url, "/labels/gone", 404)
            assert predict(url, "/labels/nope", 400) == (
                "Unrecognized servable version label: nope"
            )
            backend.server.version_labels["scale"]["stable"] = 2
            assert scale_of(url, "/labels/stable") == 2
            metadata = httpx.get(f"{url}/v1/models/scale/labels/canary/metadata")
            assert metadata.json()["model_spec"]["version"] == "2"
            status = httpx.get(f"{url}/v1/models/scale/labels/canary").json()
            # As TensorFlow Serving does it: all the versions.
            assert [s["version"] for s in status["model_version_status"]] == ["2", "1"]

    def test_arguments(self, base):
        for kwargs, message in [
            ({"versions": 0}, "`versions` must be.*versions=0"),
            ({"versions": "newest"}, "`versions` must be.*versions='newest'"),
            ({"versions": True}, "`versions` must be.*versions=True"),
            ({"poll_seconds": -1}, "`poll_seconds` must be.*poll_seconds=-1"),
            ({"poll_seconds": True}, "`poll_seconds` must be.*poll_seconds=True"),
            (
                {"poll_seconds": float("nan")},
                "`poll_seconds` must be.*poll_seconds=nan",
            ),
            ({"version_labels": {"x": {}}}, r"`version_labels` must.*=\{'x': \{\}\}"),
            (
                {"version_labels": {"scale": {"a/b": 1}}},
                "`version_labels` must.*'a/b': 1",
            ),
            (
                {"version_labels": {"scale": {"a": "1"}}},
                "`version_labels` must.*'a': '1'",
            ),
        ]:
            with pytest.raises(ValueError, match=message):
                ModelServer({"scale": base}, **kwargs)


@embedded_only
class TestFailures:
    def test_half_copied_version_then_the_next(self, base, exported):
        with served({"scale": base}, poll_seconds=0) as backend:
            server, url = backend.server, backend.rest_url
            # What a copy has written half-way: the graph, and no variables.
            (base / "2").mkdir()
            shutil.copy(exported / "2" / "saved_model.pb", base / "2")
            server.poll()
            assert scale_of(url) == 1
            assert states(backend, "scale") == {2: "END", 1: "AVAILABLE"}
            response = httpx.get(f"{url}/v1/models/scale/versions/2")
            (status,) = response.json()["model_version_status"]
            assert status["state"] == "END"
            assert status["status"]["error_code"] != "OK"
            assert str(base / "2") in status["status"]["error_message"]
            copy_version(exported / "3", base)
            server.poll()
            assert scale_of(url) == 3

    def test_failed_load_is_tried_again_only_if_the_files_change(
        self, base, exported, monkeypatch
    ):
        loads = []

        def count(name, version, directory):
            loads.append(version)
            return Servable(name, version, directory)

        monkeypatch.setattr("keras_bnrnn.local_server.versions.Servable", count)
        with served({"scale": base}, poll_seconds=0) as backend:
            (base / "2").mkdir()
            for _ in range(3):
                backend.server.poll()
            assert loads == [1, 2]
            # The copy goes on, and ends.
            shutil.copytree(exported / "2", base / "2", dirs_exist_ok=True)
            backend.server.poll()
            assert loads == [1, 2, 2]
            assert scale_of(backend.rest_url) == 2
            assert states(backend, "scale") == {2: "AVAILABLE", 1: "END"}

    def test_broken_saved_model(self, base, exported):
        with served({"scale": base}, poll_seconds=0) as backend:
            copy_version(exported / "2", base)
            graph = base / "2" / "saved_model.pb"
            graph.write_bytes(graph.read_bytes()[:-100])
            backend.server.poll()
            assert states(backend, "scale") == {2: "END", 1: "AVAILABLE"}
            assert scale_of(backend.rest_url) == 1


class TestWarmUp:
    def test_requests_are_replayed_before_the_version_is_served(self, base, exported):
        ones = np.ones(1, "float32")
        write_warmup(base / "1", [("count", "x", ones)] * 5)
        with served({"scale": base}) as backend:
            body = {"signature_name": "count", "instances": [1.0]}
            assert predict(backend.rest_url, **body) == [6.0]

    @embedded_only
    @pytest.mark.parametrize(
        ("request_", "words"),
        [
            (("nope", "x", np.ones((1, 2), "float32")), 'key "nope" not found'),
            (("", "x", np.ones((1, 3), "float32")), "`x` must have the shape"),
            (("", "x", np.ones((1, 2))), "to be float but double"),
            (("", "y", np.ones((1, 2), "float32")), "x"),
        ],
    )
    def test_request_that_does_not_fit_fails_the_load(
        self, base, exported, request_, words
    ):
        with served({"scale": base}, poll_seconds=0) as backend:
            version = copy_version(exported / "2", base)
            good = ("", "x", np.ones((1, 2), "float32"))
            write_warmup(version, [good, request_])
            backend.server.poll()
            assert states(backend, "scale") == {2: "END", 1: "AVAILABLE"}
            url = f"{backend.rest_url}/v1/models/scale/versions/2"
            (status,) = httpx.get(url).json()["model_version_status"]
            assert words in status["status"]["error_message"]

    @embedded_only
    def test_as_many_as_allowed_and_one_more(self, base, exported):
        ones = np.ones(1, "float32")
        write_warmup(base / "1", [("count", "x", ones)] * 1000)
        with served({"scale": base}, poll_seconds=0) as backend:
            version = copy_version(exported / "2", base)
            write_warmup(version, [("count", "x", ones)] * 1001)
            backend.server.poll()
            assert states(backend, "scale") == {2: "END", 1: "AVAILABLE"}
            url = f"{backend.rest_url}/v1/models/scale/versions/2"
            (status,) = httpx.get(url).json()["model_version_status"]
            assert "exceeds the maximum (1000)" in status["status"]["error_message"]

    @embedded_only
    def test_garbage_is_accepted_with_a_warning(self, base, caplog):
        write_warmup(base / "1", [], content=b"no TFRecord" * 100)
        with served({"scale": base}) as backend:
            assert scale_of(backend.rest_url) == 1
        assert "tf_serving_warmup_requests is not a file of TFRecords" in caplog.text

    @embedded_only
    def test_record_that_is_no_log_fails_the_start(self, base):
        path = base / "1" / "assets.extra" / "tf_serving_warmup_requests"
        path.parent.mkdir()
        with tf.io.TFRecordWriter(str(path)) as writer:
            writer.write(b"\xff\xff\xff")
        with pytest.raises(ValueError, match="Failed to parse warmup record"):
            ModelServer({"scale": base})


@embedded_only
class TestMetrics:
    def samples(self, url, path="/metrics"):
        response = httpx.get(url + path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain")
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }

    def test_requests_are_counted_by_their_labels(self, base, exported):
        with served({"scale": base}, poll_seconds=0) as backend:
            url = backend.rest_url
            for _ in range(3):
                predict(url)
            predict(url, status=400, instances=[[1.0]])
            httpx.post(f"{url}/v1/models/invented:predict", json={"instances": [1]})
            httpx.get(f"{url}/v1/models/scale")
            samples = self.samples(url)
            assert samples == self.samples(url, "/monitoring/prometheus/metrics")
            requests = {
                (d["method"], d["model"], d["version"], d["signature"], d["status"]): v
                for (name, labels), v in samples.items()
                if name == "keras_bnrnn_serving_requests_total"
                and (d := dict(labels))["protocol"] == "rest"
            }
            assert requests == {
                ("Predict", "scale", "1", "serving_default", "200"): 3,
                ("Predict", "scale", "1", "", "400"): 1,
                ("Predict", "", "", "", "404"): 1,
                ("GetModelStatus", "scale", "", "", "200"): 1,
            }

    def test_histogram_and_gauges(self, base, exported):
        with served({"scale": base}, poll_seconds=0) as backend:
            url = backend.rest_url
            for _ in range(4):
                predict(url)
            copy_version(exported / "2", base)
            (base / "3").mkdir()
            backend.server.poll()
            shutil.rmtree(base / "3")
            backend.server.poll()
            samples = self.samples(url)
            labels = {"protocol": "rest", "method": "Predict", "model": "scale"}
            key = tuple(sorted(labels.items()))
            name = "keras_bnrnn_serving_request_seconds"
            assert samples[f"{name}_count", key] == 4
            assert 0 < samples[f"{name}_sum", key] < 60
            name = "keras_bnrnn_serving_loaded_version"
            loaded = {labels: v for (n, labels), v in samples.items() if n == name}
            assert loaded == {(("model", "scale"), ("version", "2")): 1}
            name = "keras_bnrnn_serving_load_failures_total"
            assert samples[name, (("model", "scale"),)] == 1
            name = "keras_bnrnn_serving_requests_in_flight"
            assert samples[name, (("protocol", "rest"),)] == 0

    def test_servers_count_apart(self, base):
        with served({"scale": base}) as one, served({"scale": base}) as two:
            predict(one.rest_url)
            assert self.samples(one.rest_url) != self.samples(two.rest_url)


@embedded_only
def test_version_in_use_is_unloading_until_it_is_answered(base, exported):
    with served({"scale": base}, poll_seconds=0) as backend:
        answers = []
        steps = 600_000

        def ask():
            response = httpx.post(
                f"{backend.rest_url}/v1/models/scale:predict",
                json={"signature_name": "slow", "instances": [steps]},
                timeout=60,
            )
            answers.append(response.json())

        servable = backend.server.servables["scale"]
        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: servable.in_flight == 1)
        copy_version(exported / "2", base)
        backend.server.poll()
        assert scale_of(backend.rest_url) == 2
        during = states(backend, "scale")
        assert not answers, "the request must take longer than the load"
        thread.join(60)
        backend.server.poll()
        assert answers == [{"predictions": [steps]}]
        assert during == {2: "AVAILABLE", 1: "UNLOADING"}
        assert states(backend, "scale") == {2: "AVAILABLE", 1: "END"}
