"""Annotations of the public API: every parameter and every returned value has one."""

import inspect
import typing

import pytest

import keras_bnrnn
import keras_bnrnn.export
import keras_bnrnn.layers
import keras_bnrnn_cli

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import keras_bnrnn_client

import keras_bnrnn.local_server
import keras_bnrnn.plots

MODULES = [
    keras_bnrnn,
    keras_bnrnn.layers,
    keras_bnrnn.export,
    keras_bnrnn.local_server,
    keras_bnrnn.plots,
    keras_bnrnn_client,
]


def public_functions():
    """The functions and methods behind the names in `__all__`, each once."""
    found = {keras_bnrnn_cli.main: None}
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                found[value] = None
            if inspect.isclass(value):
                found |= dict.fromkeys(methods(value))
    return list(found)


def methods(cls):
    """Public methods, properties and the constructor, also those of base classes."""
    for base in cls.__mro__:
        if not base.__module__.startswith("keras_bnrnn"):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") and name != "__init__":
                continue
            value = getattr(value, "fget", value)  # of a property
            value = getattr(value, "__func__", value)  # of a class method
            # Others are made by a decorator or by a helper, such as `_of_cell`.
            if inspect.isfunction(value) and value.__name__ == name:
                yield value


FUNCTIONS = public_functions()


def test_the_public_functions_are_found():
    names = {function.__qualname__ for function in FUNCTIONS}
    assert {
        "BNLSTM.__init__",
        "BNGRUCell.step",
        "BNRNN.pre_activations",
        "BNRNN.from_config",
        "SequenceBatchNorm.call",
        "SequenceBatchNorm.nonfinite_batches",
        "export_onnx",
        "export_saved_model",
        "fold",
        "ModelServer.start",
        "recalibrate",
        "ServingClient.predict",
        "TextFrontEnd.end_id",
    } <= names
    assert len(names) > 100


def test_each_is_annotated():
    missing = []
    for function in FUNCTIONS:
        function = inspect.unwrap(function)
        parameters = function.__code__.co_varnames
        count = function.__code__.co_argcount + function.__code__.co_kwonlyargcount
        count += bool(function.__code__.co_flags & inspect.CO_VARARGS)
        count += bool(function.__code__.co_flags & inspect.CO_VARKEYWORDS)
        wanted = {*parameters[:count], "return"} - {"self", "cls"}
        if lacking := wanted - set(function.__annotations__):
            missing.append((function.__qualname__, sorted(lacking)))
    assert missing == []


@pytest.mark.parametrize("cls", [keras_bnrnn.BNLSTM, keras_bnrnn.BNLSTMCell])
def test_annotations_can_be_evaluated(cls):
    hints = typing.get_type_hints(cls.__init__)
    assert hints["units"] is int
    assert hints["return"] is type(None)
    shown = inspect.signature(cls).parameters["normalize"].annotation
    assert typing.get_args(shown) == ("input", "joint")
