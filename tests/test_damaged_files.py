"""Files that are damaged, or that a newer version wrote: one clear error for each."""

import json
import pathlib
import shutil
import zipfile

import keras
import pytest
import tensorflow as tf
from helpers import KINDS

import keras_bnrnn
from keras_bnrnn.export import inspection
from keras_bnrnn.export.manifest import FORMAT


def model(layer):
    return keras.Sequential([keras.Input((None, 3)), layer, keras.layers.Dense(2)])


def rewrite(path, config=None, weights=None, without=None):
    """Changes the parts of a `.keras` file."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    if config is not None:
        content = json.loads(parts["config.json"])
        config(content["config"]["layers"][1]["config"])
        parts["config.json"] = json.dumps(content)
    if weights is not None:
        parts["model.weights.h5"] = weights(parts["model.weights.h5"])
    with zipfile.ZipFile(path, "w") as file:
        for name, part in parts.items():
            if name != without:
                file.writestr(name, part)


@pytest.mark.parametrize("kind", KINDS)
def test_model_of_a_newer_version(tmp_path, kind):
    path = tmp_path / "m.keras"
    model(KINDS[kind][0](2)).save(path)
    rewrite(path, lambda config: config.update(ghost=[1.5]))
    with pytest.raises(ValueError) as info:
        keras.saving.load_model(path)
    message = str(info.value)
    assert f"`{KINDS[kind][0].__name__}`" in message
    assert "Received: {'ghost': [1.5]}. A newer version has probably" in message
    assert "pip install --upgrade keras-bnrnn" in message
    assert len(message) < 400


@pytest.mark.parametrize("name", ["BNLSTMCell", "BNGRUCell", "SequenceBatchNorm"])
def test_config_of_a_newer_version(name):
    cls = getattr(keras_bnrnn, name)
    config = (cls() if name == "SequenceBatchNorm" else cls(2)).get_config()
    assert cls.from_config(config).get_config() == config
    with pytest.raises(ValueError, match=r"config of `.*Received: \{'ghost': None\}"):
        cls.from_config({**config, "ghost": None})
    # An error in a known argument keeps its message.
    with pytest.raises((ValueError, TypeError), match="`momentum` must be in"):
        cls.from_config({**config, "momentum": 1.5})


def test_config_of_a_user_s_layer():
    class Mine(keras_bnrnn.BNLSTM):
        def __init__(self, units, ghost=1, **kwargs):
            super().__init__(units, **kwargs)
            self.ghost = ghost

        def get_config(self):
            return {**super().get_config(), "ghost": self.ghost}

    config = Mine(2, ghost=3).get_config()
    assert Mine.from_config(config).ghost == 3
    with pytest.raises(ValueError, match=r"`Mine` must.*Received: \{'spirit': 4\}"):
        Mine.from_config({**config, "spirit": 4})


def test_damaged_models(tmp_path):
    path = tmp_path / "m.keras"
    saved = model(keras_bnrnn.BNGRU(2))
    other = model(keras_bnrnn.BNGRU(4))
    other.save(tmp_path / "other.keras")
    with zipfile.ZipFile(tmp_path / "other.keras") as file:
        others = file.read("model.weights.h5")
    for change, message in [
        ({"weights": lambda content: others}, "shape.*must match"),
        ({"weights": lambda content: content[: len(content) // 2]}, "truncated file"),
        ({"weights": lambda content: b"x" * 99}, "signature not found"),
        ({"without": "model.weights.h5"}, "model.weights.h5"),
        ({"without": "config.json"}, "config.json"),
        ({"config": lambda config: config.update(units="x")}, "`units` must be"),
        (None, str(path)),
    ]:
        saved.save(path)
        if change is None:
            path.write_bytes(path.read_bytes()[:2000])
        else:
            rewrite(path, **change)
        # Errors of Keras and h5py, which the package leaves as they are.
        with pytest.raises((ValueError, OSError, KeyError), match=f"(?s){message}"):
            keras.saving.load_model(path)


@pytest.mark.parametrize("function", [{"class_name": "__lambda__", "config": {}}])
def test_code_in_a_model_is_refused(tmp_path, function):
    # A cell's activation is a place for code in a config.
    path = tmp_path / "m.keras"
    model(keras_bnrnn.BNLSTM(2)).save(path)
    function["config"] = {"code": "4w==", "defaults": None, "closure": None}
    rewrite(path, lambda config: config.update(activation=function))
    with pytest.raises(ValueError, match=r"lambda.*safe_mode"):
        keras.saving.load_model(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    layer = keras_bnrnn.BNSimpleRNN(2, return_sequences=True)
    directory = tmp_path_factory.mktemp("exported") / "m"
    return keras_bnrnn.export_saved_model(model(layer), directory)


@pytest.fixture
def version(exported, tmp_path):
    return pathlib.Path(shutil.copytree(exported, tmp_path / "m" / "1"))


def error_of(directory, capsys):
    """Runs `keras-bnrnn inspect` and returns its only line, an error."""
    assert inspection.main([str(directory)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def changed(*keys, value="missing"):
    def change(text):
        manifest = json.loads(text)
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        if value == "missing":
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        return json.dumps(manifest)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[: len(text) // 2], "be JSON. Received"),
        (lambda text: "", "be JSON"),
        (lambda text: "\udcff", "be JSON.*utf-8"),
        (lambda text: "[" * 100_000, "be JSON.*recursion"),
        (lambda text: "[1]", "be a JSON object. Received: a list"),
        (changed("format", value=FORMAT + 1), "have the format 1 at most.*format 2"),
        (changed("format", value="2"), 'have a int as `format`. Received: "2"'),
        (changed("checks"), "have `checks`. Received: the keys"),
        (changed("checks", "largest_difference"), "have `checks.largest_difference`"),
        (changed("layers", 0, "folded_into"), r"have `layers\[0\].folded_into`"),
        (changed("layers", value={}), "have a list as `layers`. Received: {}"),
        (changed("layers", 0, value=5), r"have a dict as `layers\[0\]`. Received: 5"),
        (changed("quantize", value={"float16": []}), "have `quantize.float32`"),
        (changed("streaming", value=None), "have a dict as `streaming`.*null"),
        (changed("lengths", value=1), "have a bool as `lengths`. Received: 1"),
        (changed("versions", value=[]), r"have a dict as `versions`. Received: \[\]"),
    ],
)
def test_damaged_manifest(version, capsys, change, message):
    path = version / "keras_bnrnn.json"
    path.write_text(change(path.read_text()), errors="surrogateescape")
    error = error_of(version.parent, capsys)
    assert error.startswith("error: `keras_bnrnn.json` must ")
    assert str(path) in error
    cure = "pip install --upgrade" if "format 2" in error else "export or copy the"
    assert cure in error
    with pytest.raises(ValueError, match=message):
        inspection.inspect_version(version)


def test_manifest_of_the_first_format_and_none(version, capsys):
    path = version / "keras_bnrnn.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("format") == FORMAT
    # Entries of later versions are no error, and cannot change what is read.
    later = {**manifest, "later": 1, "path": "/elsewhere", "operations": {"None": 1}}
    path.write_text(json.dumps({**later, "model": "a\x1b[2Jb"}))
    assert inspection.main([str(version)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{version}\n")
    assert "None" not in out
    assert "model: a\ufffd[2Jb" in out
    path.unlink()
    assert inspection.main([str(version.parent)]) == 0
    out = capsys.readouterr().out
    assert "serving_default" in out
    assert "checked" not in out
    path.mkdir()
    assert str(path) in error_of(version, capsys)


def test_damaged_saved_model(version, tmp_path, capsys):
    graph = version / "saved_model.pb"
    content = graph.read_bytes()
    for damaged in (b"", content[:-100], b"\xff" * 99, b"[1]"):
        graph.write_bytes(damaged)
        error = error_of(version, capsys)
        assert str(version) in error
        assert "Export or copy the version again" in error
    graph.unlink()
    assert str(version) in error_of(version, capsys)
    for name in ("empty", "file"):
        (tmp_path / name).mkdir()
    (tmp_path / "file" / "1").write_bytes(b"")
    for name in ("empty", "file", "nowhere"):
        assert str(tmp_path / name) in error_of(tmp_path / name, capsys)


def test_dtype_of_a_newer_tensorflow(version):
    from keras_bnrnn.export.operations import saved_model_proto

    proto = saved_model_proto(version)
    signature = proto.meta_graphs[0].signature_def["serving_default"]
    next(iter(signature.inputs.values())).dtype = 99
    (version / "saved_model.pb").write_bytes(proto.SerializeToString())
    found = inspection.inspect_version(version)["signatures"]["serving_default"]
    assert "dtype 99" in {info["dtype"] for info in found["inputs"].values()}


def damage_index(version):
    (version / "variables" / "variables.index").write_bytes(b"x" * 50)


def damage_data(version):
    (path,) = version.glob("variables/variables.data*")
    path.write_bytes(path.read_bytes()[:-8])


def empty_graph(version):
    (version / "saved_model.pb").write_bytes(b"")


def remove_variables(version):
    shutil.rmtree(version / "variables")


@pytest.mark.parametrize(
    "damage", [damage_index, damage_data, empty_graph, remove_variables]
)
def test_server_refuses_damaged_versions(version, damage, capsys):
    pytest.importorskip("starlette")
    from keras_bnrnn.local_server import __main__ as command

    damage(version)
    assert command.main([f"m={version.parent}", "--port", "0"]) == 1
    printed = capsys.readouterr()
    (error,) = [line for line in printed.err.splitlines() if line.startswith("error")]
    assert error.startswith("error: The SavedModel of `m` cannot be loaded.")
    assert str(version) in error


@pytest.mark.parametrize("stage", ["save", "warm-up", "manifest", "sync"])
def test_nothing_is_left_of_an_export_that_fails(
    exported, tmp_path, monkeypatch, stage
):
    from keras_bnrnn.export import directory as directory_module
    from keras_bnrnn.export.saved_model import exporter

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    def save(root, path, **kwargs):
        pathlib.Path(path, "variables").mkdir(parents=True)
        fail()

    name, replacement = {
        "save": (tf.saved_model, "save"),
        "warm-up": (exporter, "write_warmup"),
        "manifest": (exporter, "write_manifest"),
        "sync": (directory_module, "_sync"),
    }[stage]
    directory = tmp_path / "m"
    shutil.copytree(exported, directory / "1")
    before = sorted(directory.rglob("*"))
    monkeypatch.setattr(name, replacement, save if stage == "save" else fail)
    layer = keras_bnrnn.BNSimpleRNN(2)
    # What is not needed to get to the stage takes time.
    options = {"streaming": False}
    if stage != "warm-up":
        options["warmup"] = None
    with pytest.raises(OSError, match="No space left"):
        keras_bnrnn.export_saved_model(model(layer), directory, **options)
    assert sorted(directory.rglob("*")) == before
