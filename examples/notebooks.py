"""Runs the notebooks of examples/ and keeps their outputs: `make notebooks`.

Each runs from top to bottom in a kernel of its own. Parameters, those of its cell with
the tag `parameters` (papermill's convention), can be set for a trial; the values set
are not kept in the notebook.
"""

import argparse
import ast
import pathlib
import sys

import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent
TIMEOUT_S = 1800  # of one cell


def main(argv=None):
    arguments = parse_arguments(argv)
    for path in arguments.paths:
        notebook = execute(path, arguments.set)
        if not arguments.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {'runs' if arguments.check else 'run and written'}")
    return 0


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", help="of notebooks, without .ipynb (default: all)")
    add(
        "--check", action="store_true", help="run them, and leave the files as they are"
    )
    add(
        "--set",
        nargs="*",
        type=assignment,
        default=[],
        metavar="NAME=VALUE",
        help="parameters, Python literals or else strings",
    )
    arguments = parser.parse_args(argv)
    arguments.set = dict(arguments.set)
    there = {path.stem: path for path in sorted(HERE.glob("*.ipynb"))}
    for name in arguments.names:
        if name not in there:
            parser.error(f"names must be of {', '.join(there)}. Received: {name}")
    arguments.paths = [there[name] for name in arguments.names or there]
    return arguments


def assignment(text):
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE. Received: {text}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def execute(path, parameters=None):
    """A notebook with the outputs of a run.

    Args:
        path: Of the .ipynb file.
        parameters: Dict from the names of its parameters to values.

    Returns:
        The notebook, its cells as in the file.

    Raises:
        ValueError: If it has no such parameter.
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    path = pathlib.Path(path)
    notebook = nbformat.read(path, as_version=4)
    injected = inject(notebook, parameters or {}, path.name)
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
    )
    client.execute()
    if injected is not None:
        notebook.cells.remove(injected)
    number = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            number += 1
            tidy(cell, number)
    # What the kernel says of itself; the file says what it takes.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def inject(notebook, parameters, name):
    """A cell that sets parameters, after the one that gives them their defaults."""
    if not parameters:
        return None
    (place,) = (
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    )
    known = {
        target.id
        for statement in ast.parse(notebook.cells[place].source).body
        for target in statement.targets
    }
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(
                f"{name} has the parameters {', '.join(sorted(known))}. "
                f"Received: {parameter}"
            )
    lines = (f"{key} = {value!r}" for key, value in parameters.items())
    cell = nbformat.v4.new_code_cell("\n".join(lines))
    notebook.cells.insert(place + 1, cell)
    return cell


def tidy(cell, number):
    """Numbers a cell as if nothing had been injected; drops what went to stderr."""
    cell.execution_count = number
    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    for output in cell.outputs:
        if "execution_count" in output:
            output.execution_count = number


if __name__ == "__main__":
    sys.exit(main())
