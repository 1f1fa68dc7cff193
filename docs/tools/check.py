"""Checks the built site: links, images, equations, examples, and no foreign files."""

import argparse
import html.parser
import pathlib
import re
import sys
import urllib.parse

ROOT = pathlib.Path(__file__).parents[2]


class Page(html.parser.HTMLParser):
    """The links, anchors and text of a page.

    Attributes:
        targets: List of the values of `href` and `src`.
        loaded: List of those of them that a browser loads with the page.
        anchors: Set of the values of `id` and `name`.
        text: str, the text outside `pre`, `code`, `script` and `style`.
        quotes: int, the number of block quotes.
    """

    def __init__(self, content):
        super().__init__()
        self.targets, self.loaded, self.anchors = [], [], set()
        self.text, self.quotes = "", 0
        self._hidden = 0
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id"), values.get("name")}
        for name in ("href", "src"):
            if values.get(name):
                self.targets.append(values[name])
                if tag != "a" and values.get("rel") != "canonical":
                    self.loaded.append(values[name])
        self.quotes += tag == "blockquote"
        self._hidden += tag in ("pre", "code", "script", "style")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        if not self._hidden:
            self.text += data


def problems_of(path, pages):
    """Yields what is wrong with a page.

    Args:
        path: The `pathlib.Path` of the page.
        pages: Dict from path to `Page`.
    """
    page = pages[path]
    for target in page.loaded:
        if urllib.parse.urlsplit(target).scheme not in ("", "data"):
            yield f"loads a file from a network: {target}"
    for target in page.targets:
        parts = urllib.parse.urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        place = path
        if parts.path:
            place = (path.parent / urllib.parse.unquote(parts.path)).resolve()
        if place.is_dir():
            place = place / "index.html"
        if not place.exists():
            yield f"a link without a target: {target}"
        elif parts.fragment and place in pages:
            anchor = urllib.parse.unquote(parts.fragment)
            if anchor not in pages[place].anchors:
                yield f"a link without an anchor: {target}"
    if page.quotes:
        yield "a block quote: an example that is not fenced?"
    for pattern in (r"\{normalization\}", r"\\\(|\\\[|\$\$", r">>>", r"\*\*", r"^:::"):
        if match := re.search(pattern, page.text, re.M):
            start = max(0, match.start() - 30)
            yield f"is not rendered: {page.text[start : match.end() + 30]!r}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "site",
        nargs="?",
        type=pathlib.Path,
        default=ROOT / "build/site",
        help="folder of the site (default %(default)s)",
    )
    site = parser.parse_args(argv).site.resolve()
    paths = [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in paths}
    count = 0
    for path in pages:
        for problem in problems_of(path, pages):
            print(f"{path.relative_to(site)}: {problem}", file=sys.stderr)
            count += 1
    print(f"{len(pages)} pages, {count} problems")
    return 1 if count or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
