"""Imports packages that only some functions need."""

import importlib


def require_extra(function, extra, modules):
    """Raises ImportError if a module cannot be imported.

    Args:
        function: str, the name of the function that needs the modules.
        extra: str, the extra of this package that installs the modules.
        modules: List of str, the names of the modules.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"`{function}` needs `{module.partition('.')[0]}`, and its import "
                f"failed: {error}. Install it with "
                f"`pip install 'keras-bnrnn[{extra}]'`."
            ) from error
