import pytest
import tensorflow as tf
from client_models import Types, save_recurrent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for version in (1, 2):
        save_recurrent(root / "rnn", version)
    module = Types()
    names = ["kinds", "single", "half"]
    signatures = {name: getattr(module, name) for name in names}
    tf.saved_model.save(module, str(root / "types" / "1"), signatures)
    return {"rnn": root / "rnn", "types": root / "types"}


@pytest.fixture(scope="module")
def server(models):
    # Imported here: the tests skip themselves if its packages are missing.
    from keras_bnrnn.local_server import ModelServer

    labels = {"rnn": {"stable": 1, "canary": 2}}
    with ModelServer(
        models, port=0, grpc_port=0, versions="all", version_labels=labels
    ) as started:
        yield started
