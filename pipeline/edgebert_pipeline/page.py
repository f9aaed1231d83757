"""HTML pages: one file that holds all it needs and fetches nothing.

Every text is escaped, wherever it comes from; what is meant as HTML is ``Markup``. A page brings
its scripts with it and forbids the browser everything else (a content security policy with the
hashes of these scripts): a mistake in escaping would run no script and load nothing, though it
could still show a link or lead to another page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from edgebert_pipeline.parts import Part, Section
from edgebert_pipeline.vega import vega_script

__all__ = ["render_page", "render_part", "to_script_json"]

_INLINE = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*|\*([^*]+)\*")


def render_page(
    *, title: str, kind: str, lead: Sequence[Part], sections: Sequence[Section], footer: str = ""
) -> str:
    """Returns a page as one HTML document.

    Args:
        title: Of the page.
        kind: What kind of page it is, in a word or two above the title.
        lead: What is to be known first.
        sections: The rest.
        footer: Last line.
    """
    scripts = [Markup(vega_script()), Markup(_read("page.js"))]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            kind=kind,
            lead=lead,
            sections=sections,
            footer=footer,
            style=Markup(_read("page.css")),
            scripts=scripts,
            hashes=[_hash(script) for script in scripts],
        )
    )


def render_part(template: str, **values: object) -> Markup:
    """Returns a part that no other kind of part can show, from a template of its own."""
    return Markup(_environment().get_template(template).render(**values))


def to_script_json(value: object) -> Markup:
    """Returns JSON that can stand in a script element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # What could end the element or open a comment, and what older JavaScript takes for line ends.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _inline(text: str) -> Markup:
    """Shows code, strong and emphasis as Markdown would."""

    def element(match: re.Match[str]) -> Markup:
        tag = {1: "code", 2: "strong", 3: "em"}[match.lastindex or 1]
        return Markup("<{0}>{1}</{0}>").format(Markup(tag), match.group(match.lastindex or 1))

    parts, end = [], 0
    for match in _INLINE.finditer(text):
        parts += [escape(text[end : match.start()]), element(match)]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgebert_pipeline"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"script_json": to_script_json, "inline": _inline}
    environment.tests["kind"] = lambda part, name: type(part).__name__ == name
    return environment


@cache
def _read(name: str) -> str:
    return (resources.files("edgebert_pipeline") / "templates" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
