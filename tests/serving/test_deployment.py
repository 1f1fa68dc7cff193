"""The files of `serving/`: parsed by what reads them, run where they can be."""

import concurrent.futures
import http.server
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import pytest
import tensorflow as tf

pytest.importorskip("grpc")
pytest.importorskip("starlette")
pytest.importorskip("tensorflow_serving")
pytest.importorskip("yaml")

import grpc
import yaml
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
    wrappers_pb2,
)
from model_service import Models, models_config
from tensorflow_serving.apis import model_service_pb2_grpc

from keras_bnrnn.local_server import ModelServer

ROOT = pathlib.Path(__file__).parents[2]
SERVING = ROOT / "serving"
CONFIG = SERVING / "config"

# Flags of tensorflow_model_server, as its main.cc defines them.
FLAGS = {
    "allow_version_labels_for_unavailable_models",
    "batching_parameters_file",
    "enable_batching",
    "enable_model_warmup",
    "file_system_poll_wait_seconds",
    "grpc_channel_arguments",
    "grpc_max_threads",
    "load_retry_interval_micros",
    "max_num_load_retries",
    "model_base_path",
    "model_config_file",
    "model_config_file_poll_wait_seconds",
    "model_name",
    "monitoring_config_file",
    "num_load_threads",
    "num_unload_threads",
    "per_process_gpu_memory_fraction",
    "port",
    "rest_api_num_threads",
    "rest_api_port",
    "rest_api_timeout_in_ms",
    "ssl_config_file",
    "tensorflow_inter_op_parallelism",
    "tensorflow_intra_op_parallelism",
    "xla_cpu_compilation_enabled",
}

# Metrics of TensorFlow Serving 2.19 and their labels, from its source: util.cc,
# batching_session.cc and TensorFlow's loader.cc. Prometheus adds `up`, and to each
# histogram `le`.
HISTOGRAMS = {
    ":tensorflow:serving:request_latency": {"model_name", "API", "entrypoint"},
    ":tensorflow:serving:runtime_latency": {"model_name", "API", "runtime"},
    ":tensorflow:serving:batching_session:queuing_latency": {"thread_pool_name"},
    ":tensorflow:serving:model_warmup_latency": {"model_path", "status"},
}
METRICS = {
    ":tensorflow:serving:request_count": {"model_name", "status"},
    ":tensorflow:serving:batching_session:wrapped_run_count": set(),
    ":tensorflow:cc:saved_model:load_attempt_count": {"model_path", "status"},
    "up": {"job", "instance"},
    **{
        name + suffix: labels | ({"le"} if suffix == "_bucket" else set())
        for name, labels in HISTOGRAMS.items()
        for suffix in ("_bucket", "_sum", "_count")
    },
}


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here is Keras', so that no session needs to be cleared."""


def messages():
    """BatchingParameters and MonitoringConfig.

    The pip package leaves these two of TensorFlow Serving's protos out; here they are
    from session_bundle_config.proto and monitoring_config.proto.
    """
    file = descriptor_pb2.FileDescriptorProto(
        name="keras_bnrnn_tests/serving.proto",
        package="keras_bnrnn_tests",
        syntax="proto3",
        dependency=["google/protobuf/wrappers.proto"],
    )
    field = descriptor_pb2.FieldDescriptorProto
    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED

    def add(message, name, number, label, kind, type_name=None):
        message.field.add(
            name=name, number=number, label=label, type=kind, type_name=type_name
        )

    batching = file.message_type.add(name="BatchingParameters")
    numbers = [
        "max_batch_size",
        "batch_timeout_micros",
        "max_enqueued_batches",
        "num_batch_threads",
    ]
    value, string = ".google.protobuf.Int64Value", ".google.protobuf.StringValue"
    for number, name in enumerate(numbers, 1):
        add(batching, name, number, one, field.TYPE_MESSAGE, value)
    add(batching, "thread_pool_name", 5, one, field.TYPE_MESSAGE, string)
    add(batching, "allowed_batch_sizes", 6, many, field.TYPE_INT64)
    add(batching, "pad_variable_length_inputs", 7, one, field.TYPE_BOOL)
    prometheus = file.message_type.add(name="PrometheusConfig")
    add(prometheus, "enable", 1, one, field.TYPE_BOOL)
    add(prometheus, "path", 2, one, field.TYPE_STRING)
    monitoring = file.message_type.add(name="MonitoringConfig")
    kind = ".keras_bnrnn_tests.PrometheusConfig"
    add(monitoring, "prometheus_config", 1, one, field.TYPE_MESSAGE, kind)

    pool = descriptor_pool.DescriptorPool()
    wrappers = descriptor_pb2.FileDescriptorProto()
    wrappers_pb2.DESCRIPTOR.CopyToProto(wrappers)
    pool.Add(wrappers)
    pool.Add(file)
    return [
        message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"keras_bnrnn_tests.{name}")
        )
        for name in ("BatchingParameters", "MonitoringConfig")
    ]


BatchingParameters, MonitoringConfig = messages()


def read(name):
    return (SERVING / name).read_text()


class TestConfig:
    def test_models(self):
        (model,) = models_config().model_config_list.config
        assert model.name == "speech"
        assert model.base_path == "/models/speech"
        assert model.model_platform == "tensorflow"
        versions = model.model_version_policy.specific.versions
        assert set(model.version_labels) == {"stable", "canary"}
        assert set(model.version_labels.values()) <= set(versions)

    def test_batching(self):
        config = text_format.Parse(read("config/batching.config"), BatchingParameters())
        # With it, a request of the wrong rank ends the server.
        assert not config.pad_variable_length_inputs
        sizes = list(config.allowed_batch_sizes)
        assert sizes == sorted(set(sizes))
        assert sizes[0] == 1
        assert sizes[-1] == config.max_batch_size.value
        assert 0 < config.batch_timeout_micros.value < 10_000
        assert config.num_batch_threads.value > 0
        assert config.max_enqueued_batches.value > 0

    def test_monitoring(self):
        config = text_format.Parse(read("config/monitoring.config"), MonitoringConfig())
        assert config.prometheus_config.enable
        assert config.prometheus_config.path == "/monitoring/prometheus/metrics"


def flags(arguments):
    """The flags of a server's arguments, each of which must exist."""
    found = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    assert len(found) == len(arguments)
    assert set(found) <= FLAGS
    return found


def check_flags(found, with_models=True):
    assert found["enable_batching"] == "true"
    # The default, 4 for each core, refuses most requests of 32 clients on 2 cores.
    assert int(found["grpc_max_threads"]) >= 256
    files = ["batching_parameters_file", "monitoring_config_file"]
    if with_models:
        files.append("model_config_file")
        assert found["allow_version_labels_for_unavailable_models"] == "true"
        assert (found["port"], found["rest_api_port"]) == ("8500", "8501")
    for name in files:
        path = pathlib.PurePosixPath(found[name])
        assert path.parent == pathlib.PurePosixPath("/config")
        assert (CONFIG / path.name).is_file()


def image_version(image):
    """The version of an image; it must be pinned to a release."""
    name, _, tag = image.partition(":")
    assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag), image
    return name, tag


class TestCompose:
    @pytest.fixture
    def compose(self):
        return yaml.safe_load(read("docker-compose.yml"))

    def test_server(self, compose):
        service = compose["services"]["tensorflow-serving"]
        default = re.fullmatch(r"\$\{TF_SERVING_IMAGE:-(.+)\}", service["image"])[1]
        assert image_version(default)[0] == "tensorflow/serving"
        assert service["entrypoint"] == ["/usr/bin/tensorflow_model_server"]
        assert service["init"] is True
        check_flags(flags(service["command"]))
        # Only this machine reaches it.
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert "./models:/models:ro" in service["volumes"]
        assert "./config:/config:ro" in service["volumes"]
        assert service["healthcheck"]["test"][-3:] == [
            "/config/probe.sh",
            "8501",
            models_config().model_config_list.config[0].name,
        ]

    def test_others(self, compose):
        for name, service in compose["services"].items():
            if name not in ("tensorflow-serving", "front"):
                image_version(service["image"])
            for volume in service.get("volumes", []):
                source = volume.split(":")[0]
                if source not in ("./models", *compose["volumes"]):
                    assert (SERVING / source).is_dir(), volume

    def test_front(self, compose):
        service = compose["services"]["front"]
        # Not started unless it is asked for.
        assert service["profiles"] == ["front"]
        dockerfile = service["build"]["dockerfile_inline"]
        (package,) = re.findall(r"pip install --no-cache-dir (\S+)\n", dockerfile)
        assert package in (ROOT / "requirements.txt").read_text().split()
        (python,) = re.findall(r"FROM python:(\S+)-slim\n", dockerfile)
        assert (
            f'requires-python = ">={python}"' in (ROOT / "pyproject.toml").read_text()
        )
        python, option, module, *arguments = service["command"]
        assert (python, option) == ("python", "-m")
        folder, _, name = module.partition(".")
        assert (folder, name) == ("keras_bnrnn_client", "front")
        assert (SERVING / service["build"]["context"] / folder / "front.py").is_file()
        assert f"COPY {folder} /srv/{folder}\nWORKDIR /srv\n" in dockerfile
        found = dict(argument.removeprefix("--").split("=") for argument in arguments)
        host, port = found["target"].split(":")
        assert flags(compose["services"][host]["command"])["port"] == port
        address, port = found["listen"].split(":")
        assert address == "0.0.0.0"
        assert service["ports"] == [f"127.0.0.1:{port}:{port}"]

    def test_prometheus(self, compose):
        config = yaml.safe_load(read("prometheus/prometheus.yml"))
        (job,) = config["scrape_configs"]
        assert job["metrics_path"] == "/monitoring/prometheus/metrics"
        ((target,),) = [c["targets"] for c in job["static_configs"]]
        host, port = target.split(":")
        command = flags(compose["services"][host]["command"])
        assert command["rest_api_port"] == port

    def test_grafana_provisioning(self, compose):
        path = "grafana/provisioning"
        (source,) = yaml.safe_load(read(f"{path}/datasources/prometheus.yml"))[
            "datasources"
        ]
        assert source["uid"] == "prometheus"
        assert source["url"].split("//")[1].split(":")[0] in compose["services"]
        (provider,) = yaml.safe_load(read(f"{path}/dashboards/dashboards.yml"))[
            "providers"
        ]
        mounts = compose["services"]["grafana"]["volumes"]
        assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


class TestDashboard:
    @pytest.fixture
    def dashboard(self):
        return json.loads(read("grafana/dashboards/tensorflow_serving.json"))

    def test_panels(self, dashboard):
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels) >= 6
        places = [tuple(panel["gridPos"].values()) for panel in panels]
        assert len(set(places)) == len(places)
        for panel in panels:
            assert panel["title"]
            assert panel["description"]
            assert panel["targets"]
            sources = [
                panel["datasource"],
                *(t["datasource"] for t in panel["targets"]),
            ]
            assert {source["uid"] for source in sources} == {"prometheus"}

    def test_queries(self, dashboard):
        queries = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
        used = set()
        for query in queries:
            used |= check_query(query)
        assert {name for name in used if name.endswith("_latency_bucket")}
        assert ":tensorflow:serving:request_count" in used
        assert ":tensorflow:serving:batching_session:wrapped_run_count" in used
        (variable,) = dashboard["templating"]["list"]
        metric, label = re.fullmatch(
            r"label_values\((\S+), (\w+)\)", variable["query"]["query"]
        ).groups()
        assert label in METRICS[metric]
        assert f'{label}=~"${variable["name"]}"' in queries[0]

    def test_the_check_finds_mistakes(self):
        for query in [
            "rate(:tensorflow:serving:request_counts[1m])",
            'rate(:tensorflow:serving:request_count{model="a"}[1m])',
            "sum by (entrypoint) (rate(:tensorflow:serving:request_count[1m]))",
            "sum(rate(:tensorflow:serving:request_count[1m])",
        ]:
            with pytest.raises(AssertionError):
                check_query(query)


def check_query(query):
    """The metrics of a query in PromQL; it must use them, and their labels, rightly."""
    assert query.count("(") == query.count(")")
    selectors = re.findall(r"(:?[a-z]\w*(?::\w+)*)\s*(\{[^}]*\})?\[", query)
    selectors += re.findall(r"\((up)(\{[^}]*\})", query)
    assert selectors, query
    labels = set()
    for metric, selector in selectors:
        assert metric in METRICS, metric
        for label in re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector):
            assert label in METRICS[metric], (metric, label)
        labels |= METRICS[metric]
    for names in re.findall(r"by \(([^)]*)\)", query):
        assert {name.strip() for name in names.split(",")} <= labels, query
    return {metric for metric, _ in selectors}


class TestKubernetes:
    @pytest.fixture
    def objects(self):
        found = list(yaml.safe_load_all(read("kubernetes.yaml")))
        objects = {item["kind"]: item for item in found}
        assert set(objects) == {"ConfigMap", "Deployment", "Service"}
        assert len(found) == 3
        return objects

    def test_config_map_has_the_files(self, objects):
        files = {path.name: path.read_text() for path in CONFIG.iterdir()}
        assert objects["ConfigMap"]["data"] == files

    def test_deployment(self, objects):
        spec = objects["Deployment"]["spec"]
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        compose = yaml.safe_load(read("docker-compose.yml"))
        service = compose["services"]["tensorflow-serving"]
        assert f":-{container['image']}}}" in service["image"]
        assert container["command"] == service["entrypoint"]
        assert flags(container["args"]) == flags(service["command"])
        check_flags(flags(container["args"]))
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        assert objects["Service"]["spec"]["selector"].items() <= labels.items()
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        name = volumes[mounts["/config"]]["configMap"]["name"]
        assert name == objects["ConfigMap"]["metadata"]["name"]

    def test_service(self, objects):
        (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
        names = {port["name"]: port["containerPort"] for port in container["ports"]}
        ports = objects["Service"]["spec"]["ports"]
        assert {p["targetPort"]: p["port"] for p in ports} == names
        assert names == {"grpc": 8500, "rest": 8501}

    def test_probes_and_shutdown(self, objects):
        pod = objects["Deployment"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        check_probes(container, "8501")
        assert "tcpSocket" in container["livenessProbe"]
        timeout = int(flags(container["args"])["rest_api_timeout_in_ms"]) / 1e3
        drain = float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
        # Seconds until the endpoint is gone, and a request that came last.
        assert 10 <= drain < drain + timeout <= pod["terminationGracePeriodSeconds"]
        assert pod["shareProcessNamespace"] is True

    def test_kserve(self, objects):
        service = yaml.safe_load(read("kserve.yaml"))
        assert service["apiVersion"] == "serving.kserve.io/v1beta1"
        assert service["kind"] == "InferenceService"
        predictor = service["spec"]["predictor"]
        model = predictor["model"]
        assert model["modelFormat"]["name"] == "tensorflow"
        assert model["storageUri"].endswith("/" + service["metadata"]["name"])
        check_flags(flags(model["args"]), with_models=False)
        check_probes(model, "8080", service["metadata"]["name"])
        name = predictor["volumes"][0]["configMap"]["name"]
        assert name == objects["ConfigMap"]["metadata"]["name"]
        (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
        assert image_version(container["image"])[1] == model["runtimeVersion"]


def check_probes(container, port, model="speech"):
    for name in ("startupProbe", "readinessProbe"):
        command = container[name]["exec"]["command"]
        assert command == ["/bin/bash", "/config/probe.sh", port, model]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The base directory of a model with version 1, and one that cannot be loaded."""
    directory = tmp_path_factory.mktemp("models") / "speech"
    module = tf.Module()
    module.run = tf.function(
        lambda x: {"y": x}, input_signature=[tf.TensorSpec([None], tf.float32, "x")]
    )
    tf.saved_model.save(module, str(directory / "1"), module.run)
    return directory


class TestProbe:
    def probe(self, port, *models):
        command = ["timeout", "10", "/bin/bash", str(CONFIG / "probe.sh"), str(port)]
        return subprocess.run([*command, *models], capture_output=True).returncode

    def test_states(self, model, tmp_path):
        shutil.copytree(model, tmp_path / "speech")
        with ModelServer(
            {"speech": tmp_path / "speech"}, port=0, grpc_port=None, poll_seconds=0
        ) as server:
            (tmp_path / "speech" / "2").mkdir()
            (tmp_path / "speech" / "2" / "saved_model.pb").write_bytes(b"nothing")
            server.poll()
            assert self.probe(server.port, "speech") == 0
            assert self.probe(server.port, "speech/versions/1") == 0
            # HTTP answers 200 for it.
            assert self.probe(server.port, "speech/versions/2") == 1
            assert self.probe(server.port, "speech/versions/3") == 1
            assert self.probe(server.port, "nowhere") == 1
            assert self.probe(server.port, "speech", "nowhere") == 1
            assert self.probe(server.port, "speech", "speech/versions/1") == 0
            port = server.port
        assert self.probe(port, "speech") == 1

    @pytest.mark.parametrize("state", ["AVAILABLE", "LOADING", "END"])
    def test_words_of_tensorflow_serving(self, state):
        body = (
            '{\n "model_version_status": [\n  {\n   "version": "1",\n   "state": "'
            + state
            + '",\n   "status": {\n    "error_code": "OK",\n    "error_message": ""\n'
            "   }\n  }\n ]\n}\n"
        )
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.handle_request, daemon=True)
            thread.start()
            expected = 0 if state == "AVAILABLE" else 1
            assert self.probe(server.server_address[1], "speech") == expected
            thread.join(10)
        assert requests == ["/v1/models/speech"]


class TestRollback:
    @pytest.fixture
    def main(self):
        if str(SERVING) not in sys.path:
            sys.path.insert(0, str(SERVING))
        return importlib.import_module("rollback").main

    @pytest.fixture
    def config(self, tmp_path):
        return shutil.copy(CONFIG / "models.config", tmp_path)

    @pytest.fixture
    def serve(self, config):
        servers = []

        def start(loadable):
            (model,) = models_config().model_config_list.config
            service = Models(model, loadable)
            server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
            model_service_pb2_grpc.add_ModelServiceServicer_to_server(service, server)
            service.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            server.start()
            servers.append(server)
            return service

        yield start
        for server in servers:
            server.stop(None).wait(10)

    def state(self, config):
        (model,) = models_config(
            pathlib.Path(config).read_text()
        ).model_config_list.config
        versions = list(model.model_version_policy.specific.versions)
        return versions, dict(model.version_labels)

    def test_out_and_back(self, main, config, serve, capsys):
        replicas = [serve({1, 2}), serve({1, 2})]
        targets = [part for r in replicas for part in ("--grpc", r.target)]
        arguments = [config, "--model", "speech", *targets, "--timeout", "10"]
        assert main([*arguments, "--label", "canary=2"]) == 0
        assert self.state(config) == ([1, 2], {"stable": 1, "canary": 2})
        assert main([*arguments, "--label", "stable=2"]) == 0
        # Back: nothing to load.
        assert main([*arguments, "--label", "stable=1"]) == 0
        assert main([*arguments, "--label", "canary=1", "--unload", "2"]) == 0
        assert self.state(config) == ([1], {"stable": 1, "canary": 1})
        for replica in replicas:
            assert replica.labels == {"stable": 1, "canary": 1}
            labels = [dict(model.version_labels) for model in replica.history]
            assert labels == [
                {"stable": 1, "canary": 1},
                {"stable": 1, "canary": 2},
                {"stable": 1, "canary": 2},
                {"stable": 2, "canary": 2},
                {"stable": 2, "canary": 2},
                {"stable": 1, "canary": 2},
                {"stable": 1, "canary": 2},
                {"stable": 1, "canary": 1},
            ]
            versions = [
                list(m.model_version_policy.specific.versions) for m in replica.history
            ]
            assert versions == [[1, 2]] * 7 + [[1]]
        out = capsys.readouterr().out
        assert "speech: versions [1, 2], labels canary=2, stable=1" in out
        # What the file says of itself stays.
        head = read("config/models.config").split("model_config_list")[0]
        assert pathlib.Path(config).read_text().startswith(head)

    def test_a_version_that_does_not_load(self, main, config, serve, capsys):
        good, bad = serve({1, 3}), serve({1})
        arguments = ["--model", "speech", "--label", "stable=3", "--timeout", "1"]
        targets = ["--grpc", good.target, "--grpc", bad.target]
        assert main([config, *arguments, *targets]) == 1
        error = capsys.readouterr().err
        assert f"{bad.target}: versions [3] of 'speech' are not AVAILABLE" in error
        assert "LOADING" in error
        assert self.state(config) == ([1], {"stable": 1, "canary": 1})
        for replica in (good, bad):
            assert replica.labels == {"stable": 1, "canary": 1}
            assert set(replica.versions) == {1}
        assert not list(pathlib.Path(config).parent.glob(".*"))

    def test_no_server(self, main, config, capsys):
        assert main([config, "--model", "speech", "--load", "4"]) == 0
        assert "no server was told" in capsys.readouterr().out
        assert self.state(config) == ([1, 4], {"stable": 1, "canary": 1})
        before = pathlib.Path(config).read_text()
        arguments = [config, "--model", "speech", "--label", "new=5", "--dry-run"]
        assert main(arguments) == 0
        assert pathlib.Path(config).read_text() == before
        (model,) = models_config(capsys.readouterr().out).model_config_list.config
        assert dict(model.version_labels) == {"stable": 1, "canary": 1, "new": 5}

    def test_server_that_is_away(self, main, config, serve, capsys):
        arguments = ["--model", "speech", "--label", "stable=1", "--timeout", "2"]
        assert main([config, *arguments, "--grpc", "127.0.0.1:1"]) == 1
        assert "127.0.0.1:1: UNAVAILABLE" in capsys.readouterr().err
        assert self.state(config) == ([1], {"stable": 1, "canary": 1})

    def test_errors(self, main, config, tmp_path, capsys):
        before = pathlib.Path(config).read_text()
        for arguments, message in [
            ([config, "--model", "text", "--load", "2"], "Received: model='text'"),
            ([config, "--model", "speech", "--unload", "1"], "Received: canary=1"),
            ([str(tmp_path / "none"), "--model", "m", "--load", "2"], "No such file"),
        ]:
            assert main(arguments) == 1
            assert message in capsys.readouterr().err
        assert pathlib.Path(config).read_text() == before
        latest = before.replace("specific {\n        versions: 1\n      }", "latest {}")
        assert latest != before
        for text, message in [(latest, "Received: latest"), ("models: 1", "must be a")]:
            pathlib.Path(config).write_text(text)
            assert main([config, "--model", "speech", "--load", "2"]) == 1
            assert message in capsys.readouterr().err
        for arguments, message in [
            ([config, "--model", "speech"], "give --label, --load or --unload"),
            ([config, "--model", "m", "--label", "stable"], "Received: stable"),
        ]:
            with pytest.raises(SystemExit):
                main(arguments)
            assert message in capsys.readouterr().err


GUIDES = ["docs/serving.md", "serving/README.md"]


@pytest.mark.parametrize("name", GUIDES)
def test_guides_name_what_there_is(name, capsys):
    text = (ROOT / name).read_text()
    paths = set(re.findall(r"(?<![\w/])(?:\.\./)?serving/[\w./-]*\w", text))
    paths = {p.removeprefix("../") for p in paths} - {"serving/models/speech"}
    assert paths
    for path in paths:
        assert (ROOT / path).exists() or path.startswith("serving/models"), path
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        heading = anchor.replace("-", "[ -]")
        assert re.search(rf"^#+ {heading}$", text, re.M | re.I), anchor
    if str(SERVING) not in sys.path:
        sys.path.insert(0, str(SERVING))
    known = {"rm", "gpus", "file", "profile"}  # of Docker
    for module in ("rollback", "load_test", "keras_bnrnn_client.front"):
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(["--help"])
        known |= set(re.findall(r"--([\w-]+)", capsys.readouterr().out))
    used = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", text))
    assert used <= known | FLAGS, used - known - FLAGS


def test_docker_run_of_the_guide_has_threads_for_the_clients():
    text = (ROOT / "docs/serving.md").read_text()
    (command,) = re.findall(r"```sh\n(docker run .*?)```", text, re.S)
    arguments = command.split("tensorflow/serving:")[1].split()[1:]
    assert int(flags(arguments)["grpc_max_threads"]) >= 256


def test_metrics_of_the_guide():
    text = (ROOT / "docs/serving.md").read_text()
    rows = re.findall(r"^\| `(:tensorflow:\S+)` \| ([^|]*)\|", text, re.M)
    assert len(rows) >= 6
    for metric, labels in rows:
        names = set(re.findall(r"`(\w+)`", labels))
        assert names == (HISTOGRAMS.get(metric) or METRICS[metric]), metric
