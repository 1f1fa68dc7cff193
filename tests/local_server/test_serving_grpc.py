"""gRPC on TensorFlow Serving's own services, against the loaded functions."""

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf

pytest.importorskip("tensorflow_serving")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from serving_backends import (
    Backend,
    embedded_only,
    is_embedded,
    served,
)
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from keras_bnrnn.local_server import ModelServer

F, U = 3, 2
MAX_BYTES = 200_000
Code = grpc.StatusCode


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here is Keras', so that no session needs to be cleared."""


def spec(shape, dtype, name):
    return tf.TensorSpec(shape, getattr(tf, dtype), name=name)


class Frames(tf.Module):
    """[B, T, F] frames and lengths; several inputs and several outputs."""

    def __init__(self, scale):
        super().__init__()
        kernel = np.random.default_rng(7).normal(size=(F, U)).astype("float32")
        self.kernel = tf.Variable(kernel * scale)

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


class Types(tf.Module):
    """A signature for the dtypes that REST carries, and one for those it cannot."""

    @tf.function(
        input_signature=[
            spec([None], "string", "text"),
            spec([None], "bool", "flag"),
            spec([None], "int32", "short"),
            spec([None], "int64", "long"),
            spec([None], "uint8", "byte"),
            spec([None], "float64", "double"),
        ]
    )
    def kinds(self, text, flag, short, long, byte, double):
        return {
            "text": tf.strings.join([text, text]),
            "flag": ~flag,
            "short": short - 1,
            "long": long - 1,
            "byte": byte + tf.constant(1, tf.uint8),
            "double": double / 3,
        }

    @tf.function(
        input_signature=[
            spec([None], "float16", "half"),
            spec([None], "bfloat16", "brain"),
            spec([], "complex64", "complex"),
        ]
    )
    def narrow(self, half, brain, complex):
        return {"half": half * 2, "brain": brain * 2, "complex": complex * 1j}

    @tf.function(input_signature=[spec([None], "float32", "x")])
    def positive(self, x):
        with tf.control_dependencies([tf.debugging.assert_positive(x)]):
            return {"y": tf.sqrt(x)}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for version, scale in [(3, 100.0), (12, 1.0)]:
        module = Frames(scale)
        path = root / "frames" / str(version)
        tf.saved_model.save(module, str(path), {"serving_default": module.serve})
    module = Types()
    signatures = {name: getattr(module, name) for name in ("kinds", "narrow")}
    signatures["positive"] = module.positive
    tf.saved_model.save(module, str(root / "types" / "1"), signatures)
    return {"frames": root / "frames", "types": root / "types"}


@pytest.fixture(scope="module")
def backend(directories):
    with served(directories, max_request_bytes=MAX_BYTES) as backend:
        yield backend


@pytest.fixture(scope="module")
def channel(backend):
    with grpc.insecure_channel(backend.grpc_target) as channel:
        yield channel


@pytest.fixture(scope="module")
def service(channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


@pytest.fixture(scope="module")
def model_service(channel):
    return model_service_pb2_grpc.ModelServiceStub(channel)


@pytest.fixture
def rng():
    return np.random.default_rng(4321)


def predict_request(model="frames", signature="", inputs=None, **spec):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    if "version" in spec:
        request.model_spec.version.value = spec["version"]
    if "label" in spec:
        request.model_spec.version_label = spec["label"]
    for name, value in (inputs or {}).items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def frames_inputs(rng, batch=4, timesteps=6):
    return {
        "features": rng.normal(size=(batch, timesteps, F)).astype("float32"),
        "lengths": rng.integers(0, timesteps + 1, batch).astype("int32"),
    }


def arrays(response):
    return {name: tf.make_ndarray(proto) for name, proto in response.outputs.items()}


def assert_refused(call, request, code, *words):
    with pytest.raises(grpc.RpcError) as error_info:
        call(request, timeout=30)
    assert error_info.value.code() == code, error_info.value.details()
    for word in words:
        assert word in error_info.value.details()


class TestPredict:
    def test_same_numbers_as_the_loaded_function_and_as_rest(
        self, service, backend, directories, rng
    ):
        inputs = frames_inputs(rng)
        loaded = tf.saved_model.load(str(directories["frames"] / "12"))
        tensors = {name: tf.constant(value) for name, value in inputs.items()}
        expected = loaded.signatures["serving_default"](**tensors)
        response = service.Predict(predict_request(inputs=inputs), timeout=30)
        outputs = arrays(response)
        body = {"inputs": {name: value.tolist() for name, value in inputs.items()}}
        url = f"{backend.rest_url}/v1/models/frames:predict"
        over_rest = httpx.post(url, json=body, timeout=30).json()["outputs"]
        assert set(outputs) == set(expected) == set(over_rest)
        for name, tensor in expected.items():
            assert outputs[name].dtype == tensor.dtype
            np.testing.assert_allclose(outputs[name], tensor, rtol=1e-6)
            np.testing.assert_allclose(over_rest[name], tensor, rtol=1e-6)

    def test_model_spec_of_the_answer(self, service, rng):
        request = predict_request(inputs=frames_inputs(rng))
        answered = service.Predict(request, timeout=30).model_spec
        assert answered.name == "frames"
        assert answered.version.value == 12
        assert answered.signature_name == "serving_default"

    def test_dtypes(self, service):
        inputs = {
            "text": np.array([b"a", b"\xff\x00"], object),
            "flag": np.array([True, False]),
            "short": np.array([2**31 - 1, -5], "int32"),
            "long": np.array([2**63 - 1, -(2**63) + 1]),
            "byte": np.array([7, 255], "uint8"),
            "double": np.array([0.1, 1e300]),
        }
        response = service.Predict(
            predict_request("types", "kinds", inputs), timeout=30
        )
        outputs = arrays(response)
        assert outputs["text"].tolist() == [b"aa", b"\xff\x00\xff\x00"]
        assert outputs["flag"].tolist() == [False, True]
        assert outputs["short"].tolist() == [2**31 - 2, -6]
        assert outputs["long"].tolist() == [2**63 - 2, -(2**63)]
        assert outputs["byte"].tolist() == [8, 0]
        np.testing.assert_array_equal(outputs["double"], inputs["double"] / 3)
        assert {name: array.dtype for name, array in outputs.items()} == {
            name: array.dtype for name, array in inputs.items()
        }
        # Clients in many languages read these fields, as TensorFlow Serving fills them.
        assert list(response.outputs["double"].double_val) == list(outputs["double"])
        assert list(response.outputs["byte"].int_val) == [8, 0]
        assert response.outputs["text"].string_val[0] == b"aa"

    def test_dtypes_that_rest_cannot_carry(self, service):
        inputs = {
            "half": np.array([0.5, -65504.0], "float16"),
            "brain": np.array([0.5, 3e38], tf.bfloat16.as_numpy_dtype),
            "complex": np.array(2 + 3j, "complex64"),
        }
        outputs = arrays(
            service.Predict(predict_request("types", "narrow", inputs), timeout=30)
        )
        assert outputs["half"].tolist() == [1.0, -np.inf]
        assert outputs["half"].dtype == np.float16
        assert outputs["brain"].dtype == tf.bfloat16.as_numpy_dtype
        assert outputs["brain"].astype("float32").tolist() == [1.0, np.inf]
        assert outputs["complex"] == -3 + 2j
        assert outputs["complex"].shape == ()

    def test_values_in_place_of_content(self, service):
        request = predict_request("types", "positive")
        x = request.inputs["x"]
        x.dtype = tf.float32.as_datatype_enum
        x.tensor_shape.dim.add(size=3)
        # The last value stands for the rest, as in all of TensorFlow.
        x.float_val.extend([4.0, 9.0])
        assert arrays(service.Predict(request, timeout=30))["y"].tolist() == [2, 3, 3]

    def test_output_filter(self, service, rng):
        inputs = frames_inputs(rng)
        request = predict_request(inputs=inputs)
        request.output_filter.append("frames")
        outputs = arrays(service.Predict(request, timeout=30))
        assert list(outputs) == ["frames"]
        assert outputs["frames"].tolist() == (inputs["lengths"] * 2).tolist()

    def test_version_by_number(self, service, rng):
        inputs = frames_inputs(rng)
        latest = service.Predict(predict_request(inputs=inputs), timeout=30)
        named = service.Predict(predict_request(inputs=inputs, version=12), timeout=30)
        assert named == latest

    def test_nan_is_a_float(self, service, rng):
        inputs = frames_inputs(rng)
        inputs["features"][:] = np.nan
        inputs["lengths"][:] = 6
        outputs = arrays(service.Predict(predict_request(inputs=inputs), timeout=30))
        assert np.isnan(outputs["scores"]).all()


class TestRefusals:
    def test_model_version_and_signature(self, service, rng):
        inputs = frames_inputs(rng)
        for kwargs, code, words in [
            ({"model": "nope"}, Code.NOT_FOUND, "request: Latest(nope)"),
            ({"model": ""}, Code.INVALID_ARGUMENT, "ModelSpec has no name specified."),
            # Version 3 is on disk, and not loaded.
            ({"version": 3}, Code.NOT_FOUND, "request: Specific(frames, 3)"),
            ({"label": "nope"}, Code.INVALID_ARGUMENT, "label"),
            (
                {"signature": "nope"},
                Code.FAILED_PRECONDITION,
                'Serving signature key "nope" not found.',
            ),
        ]:
            request = predict_request(inputs=inputs, **kwargs)
            assert_refused(service.Predict, request, code, words)
        empty = predict_pb2.PredictRequest()
        assert_refused(
            service.Predict, empty, Code.INVALID_ARGUMENT, "Missing ModelSpec"
        )

    def test_names_of_inputs_and_outputs(self, service, rng):
        inputs = frames_inputs(rng)
        lengths = inputs.pop("lengths")
        assert_refused(
            service.Predict,
            predict_request(inputs=inputs),
            Code.INVALID_ARGUMENT,
            "input size does not match signature: 1!=2",
            "Sent extra: {}. Missing but required: {lengths}.",
        )
        assert_refused(
            service.Predict,
            predict_request(inputs=inputs | {"speed": lengths}),
            Code.INVALID_ARGUMENT,
            "lengths",
            "{features,speed}",
        )
        for names, words in [
            (["nope"], "output tensor alias not found in signature: nope"),
            (["frames", "frames"], "duplicate output tensor alias: frames"),
        ]:
            request = predict_request(inputs=inputs | {"lengths": lengths})
            request.output_filter.extend(names)
            assert_refused(service.Predict, request, Code.INVALID_ARGUMENT, words)

    def test_dtype(self, service, rng):
        inputs = frames_inputs(rng)
        inputs["features"] = inputs["features"].astype("float64")
        assert_refused(
            service.Predict,
            predict_request(inputs=inputs),
            Code.INVALID_ARGUMENT,
            "to be float",
            "but",
            "double",
        )

    @embedded_only
    def test_shape(self, service, rng):
        for features in (np.ones((2, F)), np.ones((2, 5, F + 1))):
            inputs = {
                "features": features.astype("float32"),
                "lengths": np.ones(2, "int32"),
            }
            assert_refused(
                service.Predict,
                predict_request(inputs=inputs),
                Code.INVALID_ARGUMENT,
                "`features` must have the shape (None, None, 3)",
                f"shape={list(features.shape)}",
            )

    def test_truncated_and_impossible_tensors(self, service, rng):
        def truncate(proto):
            proto.tensor_content = proto.tensor_content[:-3]

        def make_negative(proto):
            proto.tensor_shape.dim[1].size = -6

        for spoil in (truncate, make_negative):
            request = predict_request(inputs=frames_inputs(rng))
            spoil(request.inputs["features"])
            assert_refused(
                service.Predict,
                request,
                Code.INVALID_ARGUMENT,
                "tensor parsing error: features",
            )

    @embedded_only
    def test_tensor_larger_than_the_limit(self, service, rng):
        request = predict_request(inputs=frames_inputs(rng))
        features = request.inputs["features"]
        # A few bytes that claim to be many.
        features.ClearField("tensor_content")
        features.float_val.append(1.0)
        features.tensor_shape.dim[1].size = 2**40
        assert_refused(
            service.Predict,
            request,
            Code.RESOURCE_EXHAUSTED,
            f"`features` must take at most {MAX_BYTES} bytes",
            "1099511627776",
        )

    @embedded_only
    def test_request_larger_than_the_limit(self, service):
        features = np.zeros((1, MAX_BYTES // 4 // F + 1, F), "float32")
        inputs = {"features": features, "lengths": np.ones(1, "int32")}
        request = predict_request(inputs=inputs)
        assert_refused(service.Predict, request, Code.RESOURCE_EXHAUSTED, "larger")

    def test_bytes_that_are_no_request(self, channel, rng):
        content = predict_request(inputs=frames_inputs(rng)).SerializeToString()
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        with pytest.raises(grpc.RpcError) as error_info:
            call(content[:-5], timeout=30)
        if is_embedded:
            assert error_info.value.code() == Code.INVALID_ARGUMENT
            assert "cannot be parsed" in error_info.value.details()

    def test_failing_op(self, service):
        request = predict_request("types", "positive", {"x": np.float32([1, -2])})
        assert_refused(
            service.Predict, request, Code.INVALID_ARGUMENT, "assertion failed"
        )

    @embedded_only
    def test_long_error_is_cut(self, service, rng):
        request = predict_request(inputs={"n" * 3000: np.float32(1)})
        assert_refused(service.Predict, request, Code.INVALID_ARGUMENT, "n...TRUNCATED")

    @embedded_only
    def test_failure_of_the_servers_own(
        self, service, backend, rng, monkeypatch, caplog
    ):
        def fail(*args):
            raise RuntimeError("broken on purpose")

        request = predict_request(inputs=frames_inputs(rng))
        monkeypatch.setattr(backend.server.servables["frames"], "predict", fail)
        words = "RuntimeError: broken on purpose"
        assert_refused(service.Predict, request, Code.INTERNAL, words)
        assert "broken on purpose" in caplog.text
        monkeypatch.undo()
        service.Predict(request, timeout=30)

    @embedded_only
    def test_methods_that_are_left_out(self, service, model_service):
        for call, request in [
            (service.Classify, classification_pb2.ClassificationRequest()),
            (service.Regress, regression_pb2.RegressionRequest()),
            (service.MultiInference, inference_pb2.MultiInferenceRequest()),
            (
                model_service.HandleReloadConfigRequest,
                model_management_pb2.ReloadConfigRequest(),
            ),
        ]:
            assert_refused(call, request, Code.UNIMPLEMENTED, "TensorFlow Serving")


class TestMetadataAndStatus:
    @pytest.mark.parametrize("version", [None, 12])
    def test_metadata(self, service, version):
        request = get_model_metadata_pb2.GetModelMetadataRequest()
        request.model_spec.name = "frames"
        if version:
            request.model_spec.version.value = version
        request.metadata_field.append("signature_def")
        response = service.GetModelMetadata(request, timeout=30)
        assert response.model_spec.name == "frames"
        assert response.model_spec.version.value == 12
        signatures = get_model_metadata_pb2.SignatureDefMap()
        assert response.metadata["signature_def"].Unpack(signatures)
        signature = signatures.signature_def["serving_default"]
        assert signature.method_name == "tensorflow/serving/predict"
        assert set(signature.outputs) == {"scores", "frames"}
        features = signature.inputs["features"]
        assert features.dtype == tf.float32.as_datatype_enum
        assert [dim.size for dim in features.tensor_shape.dim] == [-1, -1, F]

    def test_metadata_refusals(self, service):
        request = get_model_metadata_pb2.GetModelMetadataRequest()
        assert_refused(
            service.GetModelMetadata,
            request,
            Code.INVALID_ARGUMENT,
            "Missing ModelSpec",
        )
        request.model_spec.name = "frames"
        assert_refused(
            service.GetModelMetadata,
            request,
            Code.INVALID_ARGUMENT,
            "must specify at least one metadata_field",
        )
        request.metadata_field.append("weights")
        assert_refused(
            service.GetModelMetadata, request, Code.INVALID_ARGUMENT, "weights"
        )
        request.metadata_field[0] = "signature_def"
        request.model_spec.name = "nope"
        assert_refused(
            service.GetModelMetadata, request, Code.NOT_FOUND, "Latest(nope)"
        )

    @pytest.mark.parametrize("version", [None, 12])
    def test_status(self, model_service, version):
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = "frames"
        if version:
            request.model_spec.version.value = version
        (status,) = model_service.GetModelStatus(
            request, timeout=30
        ).model_version_status
        assert status.version == 12
        assert status.state == get_model_status_pb2.ModelVersionStatus.AVAILABLE
        assert status.status.error_code == 0
        assert status.status.error_message == ""

    def test_status_refusals(self, model_service):
        request = get_model_status_pb2.GetModelStatusRequest()
        call = model_service.GetModelStatus
        assert_refused(call, request, Code.INVALID_ARGUMENT, "Missing ModelSpec")
        request.model_spec.name = "nope"
        assert_refused(
            call, request, Code.NOT_FOUND, "Could not find any versions of model nope"
        )
        request.model_spec.name = "frames"
        request.model_spec.version.value = 4
        assert_refused(
            call, request, Code.NOT_FOUND, "Could not find version 4 of model frames"
        )


@embedded_only
class TestServer:
    def test_without_grpc(self, directories):
        models = {"types": directories["types"]}
        with ModelServer(models, port=0, grpc_port=None) as server:
            assert server.grpc_port is None
            assert httpx.get(f"{server.url}/v1/models/types").status_code == 200

    def test_port_in_use_frees_the_other(self, directories, backend):
        port = backend.server.grpc_port
        models = {"types": directories["types"]}
        server = ModelServer(models, port=0, grpc_port=port)
        with pytest.raises(OSError, match=f"gRPC cannot listen at .*:{port}"):
            server.start()
        server.grpc_port = 0
        with server:
            assert server.grpc_port not in (0, port)

    def test_start_again_on_the_same_port(self, directories, rng):
        server = ModelServer({"frames": directories["frames"]}, port=0, grpc_port=0)
        request = predict_request(inputs=frames_inputs(rng))
        targets = []
        for _ in range(2):
            with server, grpc.insecure_channel(server.grpc_target) as channel:
                stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
                stub.Predict(request, timeout=30, wait_for_ready=True)
                targets.append(server.grpc_target)
        assert targets[0] == targets[1]

    def test_arguments(self, directories):
        for grpc_port in (-1, 65536, "8500", True):
            with pytest.raises(
                ValueError,
                match=rf"`grpc_port` must be in \[0, 65535\].*{grpc_port!r}",
            ):
                ModelServer(directories, grpc_port=grpc_port)


def test_backend_is_what_the_environment_says(backend):
    assert isinstance(backend, Backend)
    assert (backend.server is not None) == is_embedded
