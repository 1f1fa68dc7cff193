"""`serving/config/models.config`, and a stand-in for the servers that read it."""

import pathlib
import time

from google.protobuf import text_format
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

CONFIG = pathlib.Path(__file__).parents[1] / "serving/config/models.config"


def models_config(text=None):
    config = model_server_config_pb2.ModelServerConfig()
    return text_format.Parse(text or CONFIG.read_text(), config)


class Models(model_service_pb2_grpc.ModelServiceServicer):
    """TensorFlow Serving's rules: what is loaded, and when a label may move."""

    def __init__(self, config, loadable):
        self.loadable = loadable
        self.versions = {}
        self.labels = dict(config.version_labels)
        self.history = []
        self.apply(config)

    def apply(self, model):
        for version in set(model.model_version_policy.specific.versions):
            # Loading takes a while.
            self.versions.setdefault(version, time.monotonic() + 0.3)
        for version in set(self.versions):
            if version not in model.model_version_policy.specific.versions:
                del self.versions[version]

    def available(self, version):
        return (
            version in self.loadable
            and self.versions.get(version, float("inf")) < time.monotonic()
        )

    def HandleReloadConfigRequest(self, request, context):
        (model,) = request.config.model_config_list.config
        self.history.append(model)
        response = model_management_pb2.ReloadConfigResponse()
        self.apply(model)
        for label, version in model.version_labels.items():
            if self.labels.get(label) != version and not self.available(version):
                response.status.error_code = 9
                response.status.error_message = f"{label} is not available"
                return response
        self.labels = dict(model.version_labels)
        return response

    def GetModelStatus(self, request, context):
        assert request.model_spec.name == "speech"
        response = get_model_status_pb2.GetModelStatusResponse()
        for version in self.versions:
            state = 30 if self.available(version) else 20
            response.model_version_status.add(version=version, state=state)
        return response
