"""The pages of the documentation: their text, blocks of code and commands."""

import contextlib
import io
import pathlib
import re
import socket

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "serving/README.md"] + sorted(
    str(path.relative_to(ROOT))
    for folder in ("docs", "benchmarks")
    for path in (ROOT / folder).rglob("*.md")
)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    """The fenced blocks of a page: pairs of language and text, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.M | re.S)


def commands(block):
    """The commands of a block, with continued lines joined."""
    return re.sub(r"\s*\\\n\s*", " ", block).splitlines()


def without_blocks(page):
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)


def run_python(block, page, names):
    """Runs a block in a session, and returns what it printed.

    Args:
        block: str, the code.
        page: str, the name of the page for error messages.
        names: dict, the variables of the session.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, page, "exec"), names)
    return printed.getvalue()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def anchors(text):
    """The anchors of a page: headings as GitHub names them, and documented names."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    found = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
    return found | set(documented(text))


def documented(text):
    """The dotted names whose docstrings a page of the reference shows."""
    return re.findall(r"^::: (\S+)$", text, re.M)
