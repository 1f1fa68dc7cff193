"""Hooks of the site: pages and files of other folders, and equations.

A link of a page to a file outside `docs/` would lead nowhere in the site. The hooks add
the pages of `PAGES` to the site. They copy any other file that a page links to into the
folder `source/` of the site.
"""

import html
import pathlib
import posixpath
import re
import tomllib

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
# Pages of the site that are not in docs/.
PAGES = (
    "CHANGELOG.md",
    "benchmarks/NOTES.md",
    "benchmarks/RESULTS.md",
    "benchmarks/SERVING.md",
)
# The README is the front page of the repository; that of the site is another one.
HOME = {"README.md": "index.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


def on_config(config):
    """Takes the address of the repository from pyproject.toml, if it is set."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    address = project["project"]["urls"]["Repository"]
    if "OWNER" not in address:
        config.repo_url = address
    return config


def on_files(files, config):
    """Adds the pages and files that lie outside `docs/`."""
    wanted = set(PAGES)
    for page in [f for f in files if f.is_documentation_page()]:
        wanted |= outside(place_of(page.src_uri), pathlib.Path(page.abs_src_path))
    for page in PAGES:
        wanted |= outside(page, ROOT / page)
    for path in sorted(wanted):
        name = path if path in PAGES or is_image(path) else f"source/{path}"
        files.append(
            File.generated(config, name, abs_src_path=str((ROOT / path).resolve()))
        )
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links to files outside `docs/` at their copies in the site."""
    place = place_of(page.file.src_uri)

    def moved(match):
        target = resolved(place, match[1])
        if target is None:
            return match[0]
        anchor = match[2] or ""
        if target.startswith("docs/"):
            name = target.removeprefix("docs/")
        elif target in HOME:
            name, anchor = HOME[target], ""
        elif target in PAGES or is_image(target):
            name = target
        else:
            name = f"source/{target}"
        here = posixpath.dirname(page.file.src_uri) or "."
        return posixpath.relpath(name, here) + anchor

    text = outside_fences(markdown, lambda part: LINK.sub(moved, part))
    return outside_fences(text, without_folders(place))


def on_page_content(content, page, config, files):
    """Makes MathML of equations, which browsers show without scripts or fonts."""

    def equation(match):
        text = html.unescape(match[2])
        display = "block" if text.startswith("\\[") else "inline"
        math = latex2mathml.converter.convert(text[2:-2].strip(), display=display)
        return f'<{match[1]} class="equation">{math}</{match[1]}>'

    pattern = r'<(span|div) class="arithmatex">(.*?)</\1>'
    return re.sub(pattern, equation, content, flags=re.S)


def place_of(src_uri):
    """Returns the path in the repository of a page of the site."""
    return src_uri if src_uri in PAGES else f"docs/{src_uri}"


def outside(place, path):
    """Lists the files outside `docs/` to which a page links.

    Args:
        place: The path of the page in the repository.
        path: The `pathlib.Path` of the page.
    """
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    targets = {resolved(place, target) for target, _ in LINK.findall(text)} - {None}
    return {
        target
        for target in targets
        if not target.startswith("docs/")
        and target not in HOME
        and (ROOT / target).is_file()
    }


def resolved(place, target):
    """Returns the path in the repository of a relative link, or `None`."""
    if "://" in target or target.startswith("mailto:"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), target))


def is_image(path):
    return path.endswith((".png", ".svg"))


def without_folders(place):
    """Returns a function that leaves only the text of a link to a folder."""

    def text_alone(match):
        target = resolved(place, match[2])
        is_folder = target is not None and (ROOT / target).is_dir()
        return match[1] if is_folder else match[0]

    return lambda part: re.sub(r"\[([^]]+)\]\(([^)\s#]+)\)", text_alone, part)


def outside_fences(text, change):
    """Applies a function to the parts of a text that are not fenced blocks."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(change(p) if i % 2 == 0 else p for i, p in enumerate(parts))
