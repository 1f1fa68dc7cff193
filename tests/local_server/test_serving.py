"""The local server, over real HTTP, against NumPy and TensorFlow Serving's rules."""

import base64
import concurrent.futures
import doctest
import gzip
import importlib
import json
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("tensorflow_serving")
pytest.importorskip("prometheus_client")

from serving_backends import embedded_only, is_embedded, served  # noqa: E402

from keras_bnrnn.local_server import ModelServer  # noqa: E402
from keras_bnrnn.local_server import server as server_module  # noqa: E402

F, U = 3, 2
MAX_BYTES = 100_000


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here is Keras', so that no session needs to be cleared."""


def spec(shape, dtype, name):
    return tf.TensorSpec(shape, getattr(tf, dtype), name=name)


class Frames(tf.Module):
    """[B, T, F] frames and lengths; several inputs and several outputs."""

    def __init__(self, scale=1.0, seed=0):
        super().__init__()
        kernel = np.random.default_rng(seed).normal(size=(F, U))
        self.kernel = tf.Variable(kernel.astype("float32") * scale)

    @tf.function(
        input_signature=[
            spec([None, None, F], "float32", "features"),
            spec([None], "int32", "lengths"),
        ]
    )
    def serve(self, features, lengths):
        mask = tf.sequence_mask(lengths, tf.shape(features)[1], tf.float32)
        scores = tf.einsum("btf,fu->btu", features, self.kernel) * mask[..., None]
        return {"scores": scores, "frames": tf.cast(lengths, tf.int64) * 2}

    @tf.function(input_signature=[spec([None, F], "float32", "x")])
    def project(self, x):
        return {"y": tf.matmul(x, self.kernel)}

    @tf.function(input_signature=[spec([None], "float32", "x")])
    def total(self, x):
        return {"total": tf.reduce_sum(x)}

    @tf.function(input_signature=[spec([None], "float32", "x")])
    def uneven(self, x):
        return {"whole": x, "half": x[::2]}


class Types(tf.Module):
    """One signature for each dtype, and the ones that cannot be answered."""

    @tf.function(input_signature=[spec([None], "string", "text")])
    def text(self, text):
        joined = tf.strings.join([text, text])
        return {"twice": joined, "raw_bytes": joined}

    @tf.function(input_signature=[spec([None], "string", "text")])
    def plain(self, text):
        return {"same": text}

    @tf.function(
        input_signature=[
            spec([None], "bool", "flag"),
            spec([None], "int64", "long"),
            spec([None], "uint8", "byte"),
            spec([None], "float64", "double"),
        ]
    )
    def kinds(self, flag, long, byte, double):
        return {"flag": ~flag, "long": long, "byte": byte, "double": double}

    @tf.function(input_signature=[spec([None], "float32", "x")])
    def same(self, x):
        return {"y": x}

    @tf.function(input_signature=[spec(None, "float32", "x")])
    def any_rank(self, x):
        return {"y": 2.0 * x}

    @tf.function(input_signature=[spec([None], "float32", "x")])
    def half(self, x):
        return {"y": tf.cast(x, tf.float16)}

    @tf.function(input_signature=[spec([None], "float32", "x")])
    def bfloat16(self, x):
        return {"y": tf.cast(x, tf.bfloat16)}

    @tf.function(input_signature=[spec([None], "float16", "x")])
    def takes_half(self, x):
        return {"y": tf.cast(x, tf.float32)}

    @tf.function(input_signature=[spec([None], "float32", "x")])
    def positive(self, x):
        with tf.control_dependencies([tf.debugging.assert_positive(x)]):
            return {"y": tf.sqrt(x)}

    @tf.function(input_signature=[spec([None], "int32", "steps")])
    def slow(self, steps):
        count = tf.while_loop(lambda i: i < steps[0], lambda i: (i + 1,), [0])[0]
        return {"count": steps - steps + count}


def save_frames(directory, **kwargs):
    module = Frames(**kwargs)
    signatures = {
        "serving_default": module.serve,
        "project": module.project,
        "total": module.total,
        "uneven": module.uneven,
    }
    tf.saved_model.save(module, str(directory), signatures)


def save_types(directory):
    module = Types()
    names = ["text", "plain", "kinds", "same", "any_rank", "half", "bfloat16"]
    names += ["takes_half", "positive", "slow"]
    signatures = {name: getattr(module, name) for name in names}
    tf.saved_model.save(module, str(directory), signatures)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_frames(root / "frames" / "2", scale=100.0, seed=1)
    save_frames(root / "frames" / "10")
    # None is a version: TensorFlow Serving ignores them, too.
    (root / "frames" / "latest").mkdir()
    (root / "frames" / str(2**63)).mkdir()
    if is_embedded:
        # TensorFlow Serving takes a file for the highest version and opens no port.
        (root / "frames" / "99").write_text("a file")
    save_types(root / "types" / "1")
    return {"frames": root / "frames", "types": root / "types"}


@pytest.fixture(scope="module")
def backend(models):
    with served(models, max_request_bytes=MAX_BYTES) as backend:
        yield backend


@pytest.fixture(scope="module")
def server(backend):
    """The embedded server, for the tests that are marked so."""
    return backend.server


@pytest.fixture
def client(backend):
    with httpx.Client(base_url=backend.rest_url, timeout=30) as client:
        yield client


@pytest.fixture
def rng():
    return np.random.default_rng(1234)


KERNEL = np.random.default_rng(0).normal(size=(F, U)).astype("float32")


def frames_request(rng, batch, timesteps):
    features = rng.normal(size=(batch, timesteps, F)).astype("float32")
    lengths = rng.integers(0, timesteps + 1, batch).astype("int32")
    return features, lengths


def frames_expected(features, lengths):
    mask = np.arange(features.shape[1]) < lengths[:, None]
    return (features @ KERNEL) * mask[..., None]


def predict(client, model="frames", expected_status=200, content=None, **body):
    url = f"/v1/models/{model}:predict"
    response = client.post(url, content=content or json.dumps(body))
    assert response.status_code == expected_status, response.text
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    if expected_status == 200:
        return answer
    assert list(answer) == ["error"]
    return answer["error"]


def predict_types(client, signature_name, **kwargs):
    return predict(client, "types", signature_name=signature_name, **kwargs)


class TestPredict:
    def test_rows_with_several_inputs_and_outputs(self, client, rng):
        features, lengths = frames_request(rng, batch=4, timesteps=7)
        instances = [
            {"features": x.tolist(), "lengths": int(n)}
            for x, n in zip(features, lengths, strict=True)
        ]
        answer = predict(client, instances=instances)
        assert list(answer) == ["predictions"]
        rows = answer["predictions"]
        assert all(set(row) == {"scores", "frames"} for row in rows)
        np.testing.assert_allclose(
            [row["scores"] for row in rows],
            frames_expected(features, lengths),
            atol=1e-5,
        )
        assert [row["frames"] for row in rows] == (lengths * 2).tolist()

    def test_columns_with_several_inputs_and_outputs(self, client, rng):
        features, lengths = frames_request(rng, batch=3, timesteps=5)
        inputs = {"features": features.tolist(), "lengths": lengths.tolist()}
        answer = predict(client, inputs=inputs)
        assert list(answer) == ["outputs"]
        assert set(answer["outputs"]) == {"scores", "frames"}
        np.testing.assert_allclose(
            answer["outputs"]["scores"], frames_expected(features, lengths), atol=1e-5
        )
        assert answer["outputs"]["frames"] == (lengths * 2).tolist()

    @pytest.mark.parametrize("named", [False, True])
    @pytest.mark.parametrize("form", ["instances", "inputs"])
    def test_one_input_and_one_output(self, client, rng, form, named):
        x = rng.normal(size=(5, F)).astype("float32")
        values = x.tolist()
        if named and form == "inputs":
            values = {"x": values}
        elif named:
            values = [{"x": row} for row in values]
        answer = predict(client, signature_name="project", **{form: values})
        key = {"instances": "predictions", "inputs": "outputs"}[form]
        assert list(answer) == [key]
        np.testing.assert_allclose(answer[key], x @ KERNEL, atol=1e-5)

    def test_empty_signature_name_is_the_default_one(self, client):
        instances = [{"features": [[1, 2, 3]], "lengths": 1}]
        answer = predict(client, instances=instances, signature_name="")
        scores = answer["predictions"][0]["scores"]
        np.testing.assert_allclose(scores, [[1, 2, 3]] @ KERNEL, atol=1e-5)

    def test_columns_may_answer_a_scalar_and_take_an_empty_batch(self, client):
        answer = predict(client, signature_name="total", inputs=[1.5, 2])
        assert answer == {"outputs": 3.5}
        assert predict(client, signature_name="total", inputs=[]) == {"outputs": 0.0}
        empty = predict_types(client, "any_rank", inputs=[[], []])
        assert empty == {"outputs": [[], []]}
        assert predict_types(client, "any_rank", inputs=3) == {"outputs": 6.0}

    def test_highest_version_is_served_and_can_be_named(self, client):
        body = {"signature_name": "project", "instances": [[1.0, 0.0, 0.0]]}
        latest = predict(client, **body)
        np.testing.assert_allclose(latest["predictions"], KERNEL[:1], atol=1e-6)
        assert predict(client, "frames/versions/10", **body) == latest

    def test_strings_as_text_and_as_base64(self, client):
        encoded = {"b64": base64.b64encode("né".encode()).decode()}
        texts = ["né", encoded, {"b64": "QQ"}]
        answer = predict_types(client, "text", instances=texts)
        assert answer["predictions"] == [
            {
                "twice": text * 2,
                "raw_bytes": {"b64": base64.b64encode((text * 2).encode()).decode()},
            }
            for text in ("né", "né", "A")
        ]
        answer = predict_types(client, "plain", inputs=["a", "", "日本"])
        assert answer == {"outputs": ["a", "", "日本"]}

    @embedded_only
    def test_binary_strings_go_in_and_out_as_base64(self, client):
        answer = predict_types(
            client, "text", expected_status=400, instances=[{"b64": "/w=="}]
        )
        assert "`twice` must be UTF-8" in answer
        assert r"b'\xff\xff'" in answer

    def test_dtypes_keep_their_range(self, client):
        inputs = {
            "flag": [True, False],
            "long": [2**63 - 1, -(2**63)],
            "byte": [0, 255],
            "double": [0.1, 2**53 - 1],
        }
        answer = predict_types(client, "kinds", inputs=inputs)["outputs"]
        assert answer == inputs | {"flag": [False, True]}
        assert all(type(value) is int for value in answer["long"])

    @embedded_only
    def test_float32_is_written_short_and_exact(self, client, rng):
        values = np.concatenate([[0.2, 1, 3e-5, 16777215], rng.normal(size=200)])
        values = values.astype("float32")
        response = client.post(
            "/v1/models/types:predict",
            json={"signature_name": "same", "instances": values.tolist()},
        )
        assert response.text.startswith('{"predictions":[0.2,1.0,3e-05,16777215.0,')
        answer = np.array(response.json()["predictions"], "float32")
        np.testing.assert_array_equal(answer, values)

    def test_no_frames(self, client):
        inputs = {"features": [[]], "lengths": [0]}
        assert predict(client, inputs=inputs)["outputs"] == {
            "scores": [[]],
            "frames": [0],
        }
        rows = [{"features": [], "lengths": 0}] * 2
        answer = predict(client, instances=rows)
        assert answer["predictions"] == [{"scores": [], "frames": 0}] * 2

    def test_extra_column_is_ignored(self, client):
        inputs = {"features": [[[1, 2, 3]]], "lengths": [1]}
        expected = predict(client, inputs=inputs)
        assert predict(client, inputs={**inputs, "speed": "x"}) == expected
        answer = predict_types(client, "same", inputs={"x": [1.5], "speed": 1})
        assert answer == {"outputs": [1.5]}

    def test_numbers_beyond_float32_are_rounded(self, client):
        values = [2**24 + 1, -(2**24) - 1, 2**64 - 1, 10**39, 1e39, -1e39, 1e-400]
        answer = predict_types(client, "same", inputs=values)["outputs"]
        expected = [2.0**24, -(2.0**24), 2.0**64, np.inf, np.inf, -np.inf, 0.0]
        np.testing.assert_array_equal(np.float32(answer), np.float32(expected))

    @pytest.mark.parametrize(
        "content",
        [
            b'{"signature_name": "same", "signature_name": "no", "inputs": [1]}',
            b'{"signature_name": "same", "inputs": [1], "inputs": [2, 3]}',
            b'{"signature_name": "same", "inputs": {"x": [1], "x": [2, 3]}}',
        ],
    )
    def test_the_first_of_a_repeated_key_wins(self, client, content):
        assert predict(client, "types", content=content) == {"outputs": [1.0]}

    def test_gzip_body(self, client):
        body = json.dumps({"signature_name": "same", "inputs": [1.5] * 1000})
        response = client.post(
            "/v1/models/types:predict",
            content=gzip.compress(body.encode()),
            headers={"Content-Encoding": "gzip"},
        )
        assert response.status_code == 200, response.text
        assert response.json() == {"outputs": [1.5] * 1000}

    def test_nan_and_infinity_are_tokens(self, client):
        body = '{"signature_name": "same", "instances": [NaN, Infinity, -Infinity]}'
        response = client.post("/v1/models/types:predict", content=body)
        # TensorFlow Serving writes spaces and ends of lines.
        text = "".join(response.text.split())
        assert text == '{"predictions":[NaN,Infinity,-Infinity]}'


ROW = {"features": [[1.0, 2.0, 3.0]], "lengths": 1}

# Body and what the message says: the argument, then the value.
BAD_FRAMES = {
    "neither form": ({}, ["Missing 'inputs' or 'instances'"]),
    "both forms": (
        {"instances": [ROW], "inputs": ROW},
        ["only one of 'inputs' or 'instances'"],
    ),
    "instances not a list": ({"instances": ROW}, ["'instances'", '"lengths": 1']),
    "no instances": ({"instances": []}, ["'instances'", "Received: []"]),
    "signature unknown": (
        {"instances": [ROW], "signature_name": "nope"},
        ['"nope" not found in signature def'],
    ),
    "signature not a string": (
        {"instances": [ROW], "signature_name": 7},
        ["'signature_name'", "Received: 7"],
    ),
    "values for several inputs": (
        {"instances": [[1.0]]},
        ["list of objects", "features, lengths"],
    ),
    "columns for several inputs": (
        {"inputs": [[1.0]]},
        ["expecting an object", "features, lengths"],
    ),
    "mixed rows": ({"instances": [ROW, 3.5]}, ["instances[1]=3.5"]),
    "row lacks an input": (
        {"instances": [ROW, {"lengths": 1}]},
        ["instances[1] must have the keys: features, lengths", "Received: lengths"],
    ),
    "row with an unknown input": (
        {"instances": [ROW | {"speed": 1}]},
        ["instances[0]", "Received: features, lengths, speed"],
    ),
    "column missing": (
        {"inputs": {"features": [[[1, 2, 3]]]}},
        ["'inputs' must have the keys: features, lengths", "Received: features"],
    ),
    "ragged over instances": (
        {"instances": [ROW, {"features": [[1, 2, 3]] * 2, "lengths": 2}]},
        ["`features` must not be ragged", "features[1]", "Received: a list of 2"],
    ),
    "ragged within an instance": (
        {"instances": [{"features": [[1, 2, 3], [4, 5]], "lengths": 2}]},
        ["features[0][1] must be a list of 3", "Received: a list of 2"],
    ),
    "value among lists": (
        {"instances": [{"features": [[1, 2, 3], 4.5], "lengths": 2}]},
        ["features[0][1] must be a list of 3", "Received: 4.5"],
    ),
    "list among values": (
        {"instances": [{"features": [[1, 2, [3]]], "lengths": 1}]},
        ["features[0][0][2] must be a value", "Received: a list of 1"],
    ),
    "wrong rank": (
        {"instances": [{"features": [1, 2, 3], "lengths": 1}]},
        ["`features` must have the shape (None, None, 3)", "shape=[1, 3]"],
    ),
    "wrong size": (
        {"instances": [{"features": [[1, 2]], "lengths": 1}]},
        ["`features` must have the shape (None, None, 3)", "shape=[1, 1, 2]"],
    ),
    "float for int32": (
        {"instances": [ROW, ROW | {"lengths": 1.5}]},
        ["`lengths[1]` must be int32", "Received: 1.5"],
    ),
    "whole float for int32": (
        {"instances": [ROW | {"lengths": 1.0}]},
        ["`lengths[0]` must be int32", "Received: 1.0"],
    ),
    "bool for int32": (
        {"instances": [ROW | {"lengths": True}]},
        ["`lengths[0]` must be int32", "Received: true"],
    ),
    "too large for int32": (
        {"instances": [ROW | {"lengths": 2**31}]},
        ["`lengths[0]` must be int32", "Received: 2147483648"],
    ),
    "null for float": (
        {"instances": [ROW | {"features": [[1, None, 3]]}]},
        ["`features[0][0][1]` must be float32", "Received: null"],
    ),
    "string for float": (
        {"instances": [ROW | {"features": [[1, "two", 3]]}]},
        ["`features[0][0][1]` must be float32", 'Received: "two"'],
    ),
    "bool for float": (
        {"instances": [ROW | {"features": [[1, True, 3]]}]},
        ["`features[0][0][1]` must be float32", "Received: true"],
    ),
    "integer beyond every float": (
        {"instances": [ROW | {"features": [[1, 10**400, 3]]}]},
        ["JSON Parse error: the number", "1000000", "too big for a double"],
    ),
    "integer beyond 64 bits for int32": (
        {"instances": [ROW | {"lengths": 10**30}]},
        ["`lengths[0]` must be int32", "Received: 1e+30"],
    ),
    "no frames, and ragged": (
        {"inputs": {"features": [[], [[1, 2, 3]]], "lengths": [0, 1]}},
        ["`features` must not be ragged", "features[1]", "Received: a list of 1"],
    ),
    "scalar output of instances": (
        {"instances": [1.0], "signature_name": "total"},
        ["total has no shape information"],
    ),
    "outputs of different batch sizes": (
        {"instances": [1.0, 2.0, 3.0], "signature_name": "uneven"},
        ["inconsistent batch size", "3", "2"],
    ),
}

BAD_TYPES = {
    "number as text": (
        {"signature_name": "plain", "instances": ["a", 5]},
        ["`text[1]` must be string", "Received: 5"],
    ),
    "malformed base64": (
        {"signature_name": "plain", "instances": [{"b64": "a*b"}]},
        ["`text[0]` must be UTF-8 text or base64", 'Received: {"b64": "a*b"}'],
    ),
    "base64 that is no string": (
        {"signature_name": "plain", "inputs": {"text": ["a", {"b64": 1}]}},
        ["`text[1]` must be UTF-8 text or base64", 'Received: {"b64": 1}'],
    ),
    "half of a surrogate pair": (
        {"signature_name": "plain", "instances": ["\ud800"]},
        ["`text[0]` must be UTF-8 text", r"Received: "],
    ),
    "base64 for a number": (
        {"signature_name": "same", "instances": [{"b64": "QQ=="}]},
        ["`x[0]` must be float32", 'Received: {"b64": "QQ=="}'],
    ),
    "number as bool": (
        {
            "signature_name": "kinds",
            "inputs": {"flag": [1], "long": [1], "byte": [1], "double": [1]},
        },
        ["`flag[0]` must be bool", "Received: 1"],
    ),
    "negative for uint8": (
        {
            "signature_name": "kinds",
            "inputs": {"flag": [True], "long": [1], "byte": [-1], "double": [1]},
        },
        ["`byte[0]` must be uint8", "Received: -1"],
    ),
    "nested too deeply": (
        {"signature_name": "any_rank", "inputs": json.loads("[" * 70 + "]" * 70)},
        ["`x` must have the shape <unknown>", "shape=[1, 1,"],
    ),
    "half output": (
        {"signature_name": "half", "instances": [1.0]},
        ["Failed to write JSON value for tensor type: float16", "`y`"],
    ),
    "bfloat16 output": (
        {"signature_name": "bfloat16", "instances": [1.0]},
        ["Failed to write JSON value for tensor type: bfloat16", "`y`"],
    ),
    "failing op": (
        {"signature_name": "positive", "instances": [4.0, -2.0]},
        ["assert", "-2"],
    ),
}

BAD_BODIES = {
    "empty": (b"", "JSON Parse error"),
    "truncated": (b'{"instances": [1', "JSON Parse error"),
    "not UTF-8": (b'{"instances": ["\xff"]}', "JSON Parse error"),
    "nested": (b'{"instances": ' + b"[" * 50_000, "JSON Parse error"),
    "not an object": (b"[1, 2]", "Received: [1, 2]"),
    "beyond a double": (
        b'{"signature_name": "total", "inputs": [1e400]}',
        'JSON Parse error: the number "1e400" is too big for a double',
    ),
    "below every double": (
        b'{"signature_name": "total", "inputs": [-1e400]}',
        'JSON Parse error: the number "-1e400" is too big for a double',
    ),
}


# What TensorFlow Serving lets pass, or answers in its own way.
OWN_REFUSALS = {
    "wrong rank",
    "negative for uint8",
    "nested too deeply",
}


class TestRefusals:
    @pytest.mark.parametrize("case", BAD_FRAMES)
    def test_frames(self, client, case):
        self.check(client, "frames", case, *BAD_FRAMES[case])

    @pytest.mark.parametrize("case", BAD_TYPES)
    def test_types(self, client, case):
        self.check(client, "types", case, *BAD_TYPES[case])

    def check(self, client, model, case, body, words):
        if not is_embedded and case in OWN_REFUSALS:
            pytest.skip("TensorFlow Serving lets it pass")
        error = predict(client, model, expected_status=400, **body)
        missing = [word for word in words if word not in error]
        # Another server has words of its own.
        assert error if not is_embedded else not missing, error

    @pytest.mark.parametrize("case", BAD_BODIES)
    def test_bodies(self, client, case):
        content, word = BAD_BODIES[case]
        url = "/v1/models/frames:predict"
        response = client.post(url, content=content)
        assert response.status_code == 400
        assert not is_embedded or word in response.json()["error"]

    @embedded_only
    def test_dtype_that_json_cannot_carry(self, client):
        error = predict_types(
            client, "takes_half", expected_status=501, instances=[1.0]
        )
        assert "`x`" in error
        assert "Received: float16" in error

    def test_unknown_model_or_version(self, client):
        row = {"instances": [ROW]}
        assert predict(client, "nope", 404, **row) == (
            "Servable not found for request: Latest(nope)"
        )
        # Version 2 is on disk, and not loaded.
        assert predict(client, "frames/versions/2", 404, **row) == (
            "Servable not found for request: Specific(frames, 2)"
        )
        for path in ("nope", "frames/versions/2"):
            for suffix in ("", "/metadata"):
                response = client.get(f"/v1/models/{path}{suffix}")
                assert response.status_code == 404
                words = "Servable not found" if suffix else "Could not find"
                assert words in response.json()["error"]

    @embedded_only
    @pytest.mark.parametrize("chunked", [False, True])
    def test_body_that_is_too_large(self, client, chunked):
        body = b" " * (MAX_BYTES + 1)
        content = iter([body[:50_000], body[50_000:]]) if chunked else body
        response = client.post("/v1/models/frames:predict", content=content)
        assert response.status_code == 413
        error = response.json()["error"]
        assert f"at most {MAX_BYTES} bytes" in error
        assert f"Received: {MAX_BYTES + 1} bytes" in error

    @embedded_only
    def test_body_of_just_the_limit_is_read(self, client):
        body = b'{"signature_name": "same", "instances": [1.5]}'.ljust(MAX_BYTES)
        response = client.post("/v1/models/types:predict", content=body)
        assert response.json() == {"predictions": [1.5]}

    @embedded_only
    def test_paths_that_are_not_the_api(self, client):
        for method, path, status in [
            ("POST", "/v1/models/frames:classify", 400),
            ("POST", "/v1/models/frames:x:predict", 400),
            ("GET", "/v1/models/frames:x/metadata", 400),
            ("GET", "/v1/models/frames/labels/a:x", 400),
            ("POST", "/v1/models/frames", 400),
            ("GET", "/v1/models/frames/", 400),
            ("GET", "/v1/models/frames/versions/x", 400),
            ("GET", "/", 404),
        ]:
            response = client.request(method, path)
            assert response.status_code == status, (method, path, response.text)
            error = response.json()["error"]
            assert path.rsplit("/", 1)[-1] in error
            if status == 400:
                assert error == f"Malformed request: {method} {path}"

    @pytest.mark.parametrize("which", ["", "/versions/10", "/labels/stable"])
    def test_get_of_predict(self, client, which):
        path = f"/v1/models/frames{which}:predict"
        response = client.get(path)
        assert response.status_code == 400
        assert response.json() == {"error": f"Malformed request: GET {path}"}

    def test_head_options_and_a_version_beyond_int64_have_empty_answers(self, client):
        beyond = f"/v1/models/frames/versions/{2**70}"
        for method, path in [
            ("HEAD", "/v1/models/frames"),
            ("HEAD", "/v1/models/frames/metadata"),
            ("OPTIONS", "/v1/models/frames"),
            ("OPTIONS", "/v1/models/frames:predict"),
            ("GET", beyond),
            ("GET", f"{beyond}/metadata"),
            ("POST", f"{beyond}:predict"),
        ]:
            content = json.dumps({"instances": [ROW]}) if method == "POST" else None
            response = client.request(method, path, content=content)
            assert response.status_code == 400, (method, path)
            assert response.content == b"", (method, path)

    @embedded_only
    @pytest.mark.parametrize(
        "body, status, words",
        [
            (b'{"instances": []}', 400, ["must be gzip", "which fails with"]),
            (gzip.compress(b" " * 99)[:-4], 400, ["must be gzip", "end too early"]),
            (gzip.compress(b" " * (MAX_BYTES + 1)), 413, [f"at most {MAX_BYTES}"]),
        ],
        ids=["plain", "truncated", "too large"],
    )
    def test_bad_gzip(self, client, body, status, words):
        response = client.post(
            "/v1/models/frames:predict",
            content=body,
            headers={"Content-Encoding": "gzip"},
        )
        assert response.status_code == status
        for word in words:
            assert word in response.json()["error"]

    @embedded_only
    def test_server_goes_on_after_a_failure_of_its_own(
        self, client, server, monkeypatch, caplog
    ):
        def fail(*args):
            raise RuntimeError("broken on purpose")

        monkeypatch.setattr(server.servables["frames"], "predict", fail)
        error = predict(client, expected_status=500, instances=[ROW])
        assert error == "RuntimeError: broken on purpose"
        assert "broken on purpose" in caplog.text
        monkeypatch.undo()
        predict(client, instances=[ROW])


class TestStatusAndMetadata:
    @pytest.mark.parametrize("suffix", ["", "/versions/10"])
    def test_status(self, client, suffix):
        assert client.get(f"/v1/models/frames{suffix}").json() == {
            "model_version_status": [
                {
                    "version": "10",
                    "state": "AVAILABLE",
                    "status": {"error_code": "OK", "error_message": ""},
                }
            ]
        }

    @pytest.mark.parametrize("suffix", ["", "/versions/10"])
    def test_metadata(self, client, suffix):
        answer = client.get(f"/v1/models/frames{suffix}/metadata").json()
        assert answer["model_spec"] == {
            "name": "frames",
            "signature_name": "",
            "version": "10",
        }
        assert list(answer["metadata"]) == ["signature_def"]
        assert list(answer["metadata"]["signature_def"]) == ["signature_def"]
        signatures = answer["metadata"]["signature_def"]["signature_def"]
        default = signatures["serving_default"]
        assert default["method_name"] == "tensorflow/serving/predict"
        assert set(default["inputs"]) == {"features", "lengths"}
        features = default["inputs"]["features"]
        assert features["dtype"] == "DT_FLOAT"
        assert features["tensor_shape"] == {
            "dim": [{"size": str(size), "name": ""} for size in (-1, -1, F)],
            "unknown_rank": False,
        }
        assert default["inputs"]["lengths"]["dtype"] == "DT_INT32"
        assert set(default["outputs"]) == {"scores", "frames"}
        assert {"project", "total", "uneven"} < set(signatures)


class TestServer:
    def test_concurrent_requests_get_their_own_answers(self, backend):
        def run(seed):
            rng = np.random.default_rng(seed)
            with httpx.Client(base_url=backend.rest_url, timeout=30) as client:
                for _ in range(8):
                    batch, timesteps = rng.integers(1, 6, 2)
                    features, lengths = frames_request(rng, batch, timesteps)
                    inputs = {
                        "features": features.tolist(),
                        "lengths": lengths.tolist(),
                    }
                    outputs = predict(client, inputs=inputs)["outputs"]
                    expected = frames_expected(features, lengths)
                    np.testing.assert_allclose(outputs["scores"], expected, atol=1e-5)
                    assert outputs["frames"] == (lengths * 2).tolist()
            return seed

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert list(pool.map(run, range(16))) == list(range(16))

    def test_stop_finishes_the_request_in_flight(self, models):
        server = ModelServer({"types": models["types"]}, port=0, grpc_port=0).start()
        url, answers, steps = server.url, [], 50_000
        entered = threading.Event()
        servable = server.servables["types"]
        original = servable.predict

        def predict_and_tell(*args):
            entered.set()
            return original(*args)

        servable.predict = predict_and_tell

        def ask():
            body = {"signature_name": "slow", "instances": [steps]}
            response = httpx.post(
                f"{url}/v1/models/types:predict", json=body, timeout=60
            )
            answers.append((response.status_code, response.json()))

        thread = threading.Thread(target=ask)
        thread.start()
        assert entered.wait(30)
        server.stop()
        thread.join(30)
        assert answers == [(200, {"predictions": [steps]})]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/v1/models/types")

    def test_start_twice_stop_twice_and_start_again(self, models):
        server = ModelServer({"types": models["types"]}, port=0, grpc_port=0)
        with server:
            port = server.port
            with pytest.raises(RuntimeError, match=f"already started.*:{port}"):
                server.start()
        server.stop()
        with server:
            assert server.port == port
            assert httpx.get(f"{server.url}/v1/models/types").status_code == 200

    @embedded_only
    def test_port_in_use(self, server, models):
        other = ModelServer({"types": models["types"]}, port=server.port, grpc_port=0)
        with pytest.raises(OSError, match=r"[Aa]ddress already in use"):
            other.start()

    def test_arguments(self, models, tmp_path):
        for kwargs, message in [
            ({"models": {}}, r"`models` must be.*models=\{\}"),
            ({"models": [1]}, r"`models` must be.*models=\[1\]"),
            ({"models": {"a:b": tmp_path}}, "`models` must have names.*name='a:b'"),
            ({"models": {"": tmp_path}}, "`models` must have names.*name=''"),
            ({"port": 70000}, r"`port` must be in \[0, 65535\].*port=70000"),
            ({"port": True}, r"`port` must be in \[0, 65535\].*port=True"),
            ({"grpc_port": -1}, r"`grpc_port` must be in \[0, 65535\].*grpc_port=-1"),
            ({"max_request_bytes": 0}, "`max_request_bytes`.*max_request_bytes=0"),
        ]:
            with pytest.raises(ValueError, match=message):
                ModelServer(**({"models": models} | kwargs))

    def test_directories(self, models, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "broken" / "1").mkdir(parents=True)
        for directory, message in [
            (tmp_path / "nowhere", "must exist.*nowhere"),
            (tmp_path / "empty", "named by version.*empty"),
            (tmp_path / "broken", "`m` cannot be loaded.*broken"),
            (models["types"] / "1", "named by version.*a SavedModel itself"),
        ]:
            with pytest.raises(ValueError, match=message):
                ModelServer({"m": directory})

    def test_missing_package_is_named_with_the_cure(self, monkeypatch):
        for name in [
            name for name in sys.modules if "keras_bnrnn.local_server" in name
        ]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        with pytest.raises(
            ImportError, match=r"ModelServer.*uvicorn.*keras-bnrnn\[serving\]"
        ):
            importlib.import_module("keras_bnrnn.local_server.server")

    def test_docstring_example(self):
        runner = doctest.DocTestRunner()
        for test in doctest.DocTestFinder().find(ModelServer, "ModelServer"):
            # Saving prints nothing to standard output, so the output is exact.
            runner.run(test)
        assert runner.tries > 5
        assert runner.failures == 0


class TestCommand:
    def test_bad_directory(self, tmp_path, capsys):
        assert server_main([f"m={tmp_path / 'nowhere'}"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert str(tmp_path / "nowhere") in error

    def test_bad_arguments_and_help(self, capsys):
        for args, message in [
            (["nodirectory"], "must be NAME=DIR. Received: nodirectory"),
            (["m=a", "m=b"], "once. Received: m twice"),
            ([], "NAME=DIR"),
            (["m=a", "--grpc-port", "x"], "must be a port or `none`. Received: x"),
            (["m=a", "--versions", "-1"], "or a number. Received: -1"),
            (["m=a", "--label", "m/s=x"], "must be NAME/LABEL=N. Received: m/s=x"),
        ]:
            with pytest.raises(SystemExit) as exit_info:
                server_main(args)
            assert exit_info.value.code == 2
            assert message in capsys.readouterr().err
        with pytest.raises(SystemExit) as exit_info:
            server_main(["--help"])
        assert exit_info.value.code == 0
        assert "production is TensorFlow Serving" in " ".join(
            capsys.readouterr().out.split()
        )


def server_main(args):
    return importlib.import_module("keras_bnrnn.local_server.__main__").main(args)


def test_status_of_every_tensorflow_error_is_known():
    codes = set(range(1, 17))
    assert set(server_module._HTTP_STATUS) == codes
