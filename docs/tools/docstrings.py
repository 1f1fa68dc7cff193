"""Makes Markdown of the package's docstrings, for the reference of the site.

The docstrings are read without importing the package, so building the site needs
neither Keras nor TensorFlow.
"""

import ast
import inspect
import re

import griffe

# Sections whose indented block is a list of `name: description`.
LISTS = ("Args", "Attributes", "Call arguments", "Raises")
SECTIONS = (*LISTS, "Returns", "Yields", "Example")


class Docstrings(griffe.Extension):
    """Rewrites the docstrings and signatures of a package after it was read."""

    def on_package(self, *, pkg, loader, **kwargs):
        normalization, defaults = None, {}
        if pkg.name == "keras_bnrnn":
            module = pkg["layers.arguments"]
            normalization = ast.literal_eval(str(module["DOCS"].value))
            # Indented as in the source of a class; read docstrings are not.
            normalization = normalization.replace("\n    ", "\n")
            defaults = ast.literal_eval(str(module["DEFAULTS"].value))
        for item in objects(pkg):
            if item.docstring is not None:
                text = item.docstring.value
                if normalization is not None:
                    text = text.replace("{normalization}", normalization)
                item.docstring.value = to_markdown(text)
            if item.is_function and item.name == "__init__":
                spell_out(item.parameters, defaults)


def objects(parent):
    """Yields a module or class and everything that is defined in it."""
    yield parent
    for member in parent.members.values():
        if member.is_alias:
            continue
        if member.is_module or member.is_class:
            yield from objects(member)
        else:
            yield member


def spell_out(parameters, defaults):
    """Puts the arguments of normalisation in place of `**normalization`.

    Args:
        parameters: `griffe.Parameters` of an `__init__`, changed in place.
        defaults: Dict from name to default value.
    """
    if "normalization" not in [p.name for p in parameters]:
        return
    del parameters["normalization"]
    keyword = griffe.ParameterKind.keyword_only
    for name, default in defaults.items():
        parameters.add(griffe.Parameter(name, kind=keyword, default=repr(default)))
    rest = griffe.ParameterKind.var_keyword
    parameters.add(griffe.Parameter("kwargs", kind=rest))


def to_markdown(docstring):
    """Returns a docstring as Markdown.

    Sections become bold titles, entries of `Args` and the like become list items, and
    examples become fenced blocks.
    """
    blocks = []
    lines = inspect.cleandoc(docstring).splitlines()
    while lines:
        title = lines[0].removesuffix(":")
        if lines[0].endswith(":") and title in SECTIONS:
            del lines[0]
            body = []
            while lines and (not lines[0].strip() or lines[0].startswith(" ")):
                body.append(lines.pop(0))
            body = inspect.cleandoc("\n".join(["", *body])).splitlines()
            blocks += ["", f"**{title}**", ""]
            blocks += entries(body) if title in LISTS else prose(body)
            blocks.append("")
        else:
            text = []
            while lines and lines[0].removesuffix(":") not in SECTIONS:
                text.append(lines.pop(0))
            blocks += prose(text)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(blocks)).strip()


def entries(lines):
    """Makes list items of `name: description`, with indented further lines."""
    items = []
    for line in lines:
        match = re.match(r"(\*{0,2}[\w.]+(?:, [\w.]+)*): (.*)", line)
        if match:
            name = f"`{match[1]}`"
            items.append([f"- **{name}**: {match[2]}"])
        elif items:
            items[-1].append(line)
        else:
            items.append([line])
    return [line for item in items for line in prose(item)]


def prose(lines):
    """Fences examples, and ends lines that are equations with a line break."""
    done, example = [], False
    for i, line in enumerate(lines):
        if line.lstrip().startswith(">>>") and not example:
            done += ["", "```pycon"]
            example = True
        if example and not line.strip():
            done += ["```", ""]
            example = False
            continue
        following = lines[i + 1].strip() if i + 1 < len(lines) else ""
        is_equation = line.strip().startswith("`") and line.strip().endswith("`")
        if not example and is_equation and following.startswith("`"):
            line += "  "
        done.append(line)
    return [*done, "```"] if example else done
