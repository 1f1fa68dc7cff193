"""The guides: the example runs as it is printed, and links lead somewhere."""

import concurrent.futures
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import keras
import numpy as np
import pytest
import tensorflow as tf

pytest.importorskip("grpc")
pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("yaml")

import grpc
import httpx
from model_service import Models, models_config
from pages import (
    PAGES,
    ROOT,
    anchors,
    blocks,
    commands,
    free_port,
    run_python,
    text_of,
    without_blocks,
)
from tensorflow_serving.apis import model_service_pb2_grpc

import keras_bnrnn
import keras_bnrnn_cli

# The second guide goes on with the example of the first one.
GUIDES = ["docs/index.md", "docs/serving.md"]
SCRIPT = pathlib.Path(sys.executable).with_name("keras-bnrnn")

# The commands of the guides that no test runs as they are printed, and why.
CLONE = re.search("^git clone .*$", (ROOT / "README.md").read_text("utf-8"), re.M)[0]
NOT_RUN = {
    CLONE: "needs the published repository",
    "pip install .": "release/check.py runs it in an empty environment",
    "make demo": "takes minutes; test_examples.py runs its program with --smoke",
    "make test": "runs this test",
    "docker run --rm -p 8500:8500 -p 8501:8501 -e MODEL_NAME=speech "
    '-v "$PWD/models:/models:ro" tensorflow/serving:2.19.1 '
    "--grpc_max_threads=256": "needs Docker",
    "python -m keras_bnrnn_client.front --target 127.0.0.1:8500 "
    "--listen 0.0.0.0:8510": "runs until it is stopped; test_front.py runs the front",
}


class Reader:
    """Does what the guides say, in one folder and one Python session.

    Free ports replace those of the guides.

    Attributes:
        names: dict, the variables of the Python session.
        done: list of str, the commands that ran.
        answers: list of bytes, what `curl` printed.
        labels: dict, the labels of the server that `rollback.py` configured.
    """

    def __init__(self, folder):
        self.folder = folder
        self.rest, self.grpc = free_port(), free_port()
        self.names, self.labels = {}, {}
        self.done, self.answers, self.printed = [], [], None
        self.server = None

    def read(self, page):
        for language, block in blocks(page):
            if language == "python":
                self.printed = run_python(self.ported(block), page, self.names)
                print(self.printed, end="")
                continue
            if language == "text":
                assert block == self.printed
                continue
            assert language == "sh", f"{page}: no language is given for: {block}"
            for command in commands(block):
                if command not in NOT_RUN:
                    self.run(command)
                    self.done.append(command)

    def ported(self, text):
        return text.replace(":8501", f":{self.rest}").replace(":8500", f":{self.grpc}")

    def run(self, command):
        program, *arguments = shlex.split(self.ported(command))
        if program == "python":
            program, *arguments = arguments
        known = {
            "keras-bnrnn": self.keras_bnrnn,
            "curl": self.curl,
            "serving/load_test.py": self.load_test,
            "serving/rollback.py": self.rollback,
        }
        known[program](arguments)

    def keras_bnrnn(self, arguments):
        if arguments[0] != "serve":
            assert keras_bnrnn_cli.main(arguments) == 0
            return
        if self.server is None:
            ports = ["--port", str(self.rest), "--grpc-port", str(self.grpc)]
            environment = dict(os.environ)
            environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
            with open("stdout", "w") as stdout, open("stderr", "w") as stderr:
                self.server = subprocess.Popen(
                    [SCRIPT, *arguments, *ports],
                    stdout=stdout,
                    stderr=stderr,
                    env=environment,
                )
        # The server of the first guide is still there: it loads the new version.
        self.wait_for(max(os.listdir("models/speech"), key=int))

    def wait_for(self, version):
        deadline = time.monotonic() + 120
        while True:
            try:
                url = f"http://127.0.0.1:{self.rest}/v1/models/speech"
                states = httpx.get(url).json()["model_version_status"]
            except httpx.TransportError:
                states = []
            if (version, "AVAILABLE") in [(s["version"], s["state"]) for s in states]:
                return
            assert self.server.poll() is None, (self.folder / "stderr").read_text()
            assert time.monotonic() < deadline, states
            time.sleep(0.1)

    def curl(self, arguments):
        command = ["curl", "--silent", "--show-error", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60)
        self.answers.append(done.stdout)

    def load_test(self, arguments):
        # Shorter than in the guide.
        arguments = replaced(arguments, {"--clients": "2", "--seconds": "0.5"})
        assert importlib.import_module("load_test").main(arguments) == 0

    def rollback(self, arguments):
        # The local server reads no configuration: a stand-in takes its place.
        config = shutil.copy(ROOT / arguments[0], self.folder)
        (model,) = models_config().model_config_list.config
        service = Models(model, {1, 2})
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        arguments = replaced(arguments, {"--grpc": f"127.0.0.1:{port}"})
        try:
            status = importlib.import_module("rollback").main([config, *arguments[1:]])
        finally:
            server.stop(None).wait(10)
        assert status == 0
        self.labels = service.labels


def replaced(arguments, values):
    for name, value in values.items():
        arguments[arguments.index(name) + 1] = value
    return arguments


@pytest.fixture
def reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "serving"))
    reader = Reader(tmp_path)
    yield reader
    if reader.server is not None:
        reader.server.kill()
        reader.server.wait(10)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_example_runs_from_end_to_end(reader, capfd):
    reader.read("docs/index.md")
    names = reader.names
    frames = names["frames"]
    expected = names["model"].predict(frames, verbose=0)
    # Folded and float32: 1e-5.
    folded = names["folded"].predict(frames, verbose=0)
    np.testing.assert_allclose(folded, expected, atol=1e-5)
    assert all(type(a).__module__.startswith("keras.") for a in names["folded"].layers)
    loaded = tf.saved_model.load("models/speech/1").signatures["serving_default"]
    lengths = tf.fill([len(frames)], frames.shape[1])
    logits = loaded(features=tf.constant(frames), lengths=lengths)["logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)

    capfd.readouterr()
    reader.read("docs/serving.md")
    output, _errors = capfd.readouterr()
    assert sorted(os.listdir("models/speech")) == ["1", "2"]
    assert "models/speech/2\n" in output  # of `inspect`
    assert "Stock TensorFlow Serving has every operation." in output
    assert "(1, 40, 2)\n" in output  # of the client
    expected = names["model"].predict(names["x"], verbose=0)
    np.testing.assert_allclose(names["outputs"]["logits"], expected[:, 19], atol=1e-5)
    np.testing.assert_allclose(names["rest"]["logits"], expected[:, 20:], atol=1e-5)
    assert reader.labels == {"stable": 1, "canary": 2}

    # Both guides send one request, to version 1 and to version 2.
    (request,) = {c for c in reader.done if c.startswith("curl")}
    (row,) = json.loads(shlex.split(request)[2])["instances"]
    expected = names["model"].predict(np.array([row["features"]], "float32"), verbose=0)
    assert len(reader.answers) == 2
    for answer in reader.answers:
        (found,) = json.loads(answer)["predictions"]
        np.testing.assert_allclose(found, expected[0], atol=1e-5)

    # The server says what it serves, and TensorFlow's log is not there.
    reader.server.send_signal(signal.SIGTERM)
    assert reader.server.wait(60) == 0
    url = f"http://127.0.0.1:{reader.rest}"
    assert pathlib.Path("stdout").read_text() == (
        f"serving speech version 1 at {url}/v1/models/speech\n"
        f"serving gRPC at 127.0.0.1:{reader.grpc}\n"
        f"serving metrics at {url}/metrics\n"
    )
    log = pathlib.Path("stderr").read_text().splitlines()
    assert {"speech version 1: loaded", "speech version 2: loaded"} <= set(log)
    assert all(re.match(r"speech version [12]: ", line) for line in log), log

    # No command is left out but those of the list.
    printed = [
        command
        for page in ["README.md", *GUIDES]
        for language, block in blocks(page)
        if language == "sh"
        for command in commands(block)
    ]
    assert set(printed) == set(reader.done) | set(NOT_RUN)


def test_loading_needs_the_import(tmp_path, monkeypatch):
    """`import keras_bnrnn` registers the layers: the guides say so."""
    layer = keras_bnrnn.BNLSTM(2, return_sequences=True)
    keras.Sequential([keras.Input((None, 3)), layer]).save(tmp_path / "m.keras")
    # As in a program without the import.
    registered = keras.saving.get_custom_objects()
    for name in [name for name in registered if name.startswith("keras_bnrnn>")]:
        monkeypatch.delitem(registered, name)
    with pytest.raises(TypeError, match="Could not locate class 'BNLSTM'"):
        keras.saving.load_model(tmp_path / "m.keras")
    monkeypatch.undo()
    model = keras.saving.load_model(tmp_path / "m.keras")
    assert type(model.layers[0]) is keras_bnrnn.BNLSTM
    for page in PAGES:
        for _, block in blocks(page):
            if "load_model" in block:
                assert re.search(r"^(import|from) keras_bnrnn\b", block, re.M)
    for page in GUIDES:
        text = " ".join(text_of(page).split())
        assert re.search(r"import.{,30} `?keras_bnrnn.{,80}regist", text), page


def test_commands_within_sentences_exist():
    makefile = text_of("Makefile")
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]
    extras = extras["optional-dependencies"]
    found = set()
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", without_blocks(page)):
            program, *arguments = code.split() or [""]
            if not arguments:
                continue
            found.add(program)
            if program == "make":
                assert re.search(rf"^{arguments[0]}:", makefile, re.M), code
            elif program == "python" and arguments[0] == "-m":
                assert importlib.util.find_spec(arguments[1]), code
            elif program == "python" and arguments[0].endswith(".py"):
                assert (ROOT / arguments[0]).exists(), code
            elif program == "pip" and arguments != ["freeze"]:
                (extra,) = re.findall(r"\[(\w+)\]", code) or ["client"]
                assert arguments[0] == "install" and extra in extras, code
            elif program == "keras-bnrnn" and not arguments[0].startswith("-"):
                assert arguments[0] in keras_bnrnn_cli._COMMANDS, code
    assert found >= {"make", "python", "pip", "keras-bnrnn"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page, monkeypatch):
    text = without_blocks(page)
    if page == "README.md":  # its links may be absolute: see release/address.py
        monkeypatch.syspath_prepend(str(ROOT / "release"))
        text = importlib.import_module("address").relative(text)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    missing = []
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        path = (ROOT / page).parent / path if path else ROOT / page
        if not path.exists() or (
            anchor and anchor not in anchors(path.read_text(encoding="utf-8"))
        ):
            missing.append(target)
    assert not missing


def test_no_page_has_an_address_that_is_not_set():
    """A placeholder is the owner in `Repository`; a page with it has a dead link."""
    for page in PAGES:
        text = text_of(page)
        assert "OWNER/" not in text, page
        assert "colab.research.google.com" not in text, page
