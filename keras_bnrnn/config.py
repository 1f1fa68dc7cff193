"""Lists the arguments of layers and explains configurations of newer versions."""

import contextlib
import inspect

import keras


def names_of(cls):
    """Lists the names of the arguments of a class.

    The arguments that it passes on to its base classes are included, except those of
    `keras.layers.Layer`.
    """
    names = []
    for base in cls.__mro__:
        if base is keras.layers.Layer:
            break
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(base.__init__).parameters.values()
        passes_on = False
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                passes_on = True
            elif (
                parameter.kind is not inspect.Parameter.VAR_POSITIONAL
                and parameter.name not in names
            ):
                names.append(parameter.name)
        if not passes_on:
            break
    return names


@contextlib.contextmanager
def explained(cls, config):
    """Explains an error of `from_config` if the configuration has unknown arguments.

    Args:
        cls: The class of the layer.
        config: Dict of the arguments.

    Raises:
        ValueError: If making the layer fails and an argument is unknown.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        known = {*names_of(cls), *names_of(getattr(cls, "cell_class", None) or cls)}
        known |= set(inspect.signature(keras.layers.Layer.__init__).parameters)
        unknown = {name: config[name] for name in config if name not in known}
        if not unknown:
            raise
        raise ValueError(
            f"The config of `{cls.__name__}` must have arguments that this version of "
            f"keras_bnrnn knows. Received: {unknown}. A newer version has probably "
            "saved the model: install it, `pip install --upgrade keras-bnrnn`"
        ) from error
