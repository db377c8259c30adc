"""A page of HTML that needs nothing beside itself: elements, tables, pictures, style, sorting."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_VOID = {"img", "meta"}
# What HTML cannot hold, beside surrogates.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
# Pictures are drawn with this many dots for each of CSS's 96 pixels to the inch.
_DENSITY = 150 / 96


class Markup(str):
    """Text that is HTML already; all other text is escaped where it enters an element."""

    __slots__ = ()


def escape(value: Any) -> Markup:
    """What is no Markup as text: escaped, without control characters; None is empty."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup("")
    if isinstance(value, list | tuple):
        return Markup("".join(map(escape, value)))
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return Markup(html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)))


def element(tag: str, *content: Any, **attributes: Any) -> Markup:
    """An element; `class_` is the attribute class, `data_key` is data-key, True one without a value."""
    shown = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _VOID:
        return Markup(f"<{tag}{shown}>")
    return Markup(f"<{tag}{shown}>{escape(content)}</{tag}>")


@dataclass(frozen=True)
class Column:
    """A column: `key` names what it holds, `kind` is "number", "text", "words" (long text) or "prompt" (of
    strangers)."""

    key: str
    title: str
    kind: str = "number"


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number that it stands for and is sorted by."""

    shown: Any
    value: float | int | None = None


def table(
    key: str, caption: Any, columns: Sequence[Column], rows: Iterable[Sequence[Any]], *, sortable: bool = True
) -> Markup:
    """A table in a box of its own that scrolls sideways; the first column heads the rows."""
    heads = [element("th", c.title, scope="col", data_key=c.key, class_=c.kind) for c in columns]
    body = [
        element("tr", *(_cell(column, cell, first=not i) for i, (column, cell) in enumerate(paired)))
        for paired in (zip(columns, row, strict=True) for row in rows)
    ]
    content = element(
        "table",
        element("caption", element("span", caption), id=f"{key}-caption"),
        element("thead", element("tr", *heads)),
        element("tbody", *(Markup(f"\n{row}") for row in body)),
        id=key,
        class_="sortable" if sortable else None,
    )
    # A box that scrolls has to be reached with the keyboard.
    return element(
        "div", content, class_="scroll", role="region", aria_labelledby=f"{key}-caption", tabindex=0
    )


def _cell(column: Column, cell: Any, *, first: bool) -> Markup:
    shown, value = (cell.shown, cell.value) if isinstance(cell, Cell) else (cell, None)
    return element(
        "th" if first else "td",
        shown,
        scope="row" if first else None,
        class_=column.kind,
        # The writing decides on its direction, and does not reach beyond its cell.
        dir="auto" if column.kind == "prompt" else None,
        data_value=None if value is None else repr(value),
    )


def count_cell(value: float | int | None) -> Cell | None:
    """A count, as it is."""
    return None if value is None else Cell(f"{value:g}" if isinstance(value, float) else str(value), value)


def number_cell(value: float | None, form: str = ".4g") -> Cell | None:
    """A number, rounded."""
    return None if value is None else Cell(f"{value:{form}}", value)


def interval_cell(interval: Sequence[float] | None, form: str = ".3f") -> Cell | None:
    """Both ends of an interval."""
    if interval is None:
        return None
    low, high = interval
    return Cell(f"{low:{form}} to {high:{form}}", low)


def value_cell(value: float, interval: Sequence[float] | None, form: str = ".3f") -> Cell:
    """A number with its interval in brackets, where there is one."""
    if interval is None:
        return Cell(f"{value:{form}}", value)
    low, high = interval
    return Cell([f"{value:{form}} ", element("small", f"({low:{form}} to {high:{form}})")], value)


def facts(pairs: Iterable[tuple[str, Any]]) -> Markup:
    """Names and what they are, as a list of definitions; pairs without a value are left out."""
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value))
            for name, value in pairs
            if value not in (None, "")
        ),
    )


def bullets(items: Iterable[Any]) -> Markup:
    """A list."""
    return element("ul", *(element("li", item) for item in items))


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading, that the contents link to."""

    key: str
    title: str
    content: Sequence[Any]
    kind: str | None = None

    def markup(self) -> Markup:
        """As an element."""
        heading = element("h2", self.title)
        return element("section", heading, *self.content, id=self.key, class_=self.kind)


def is_picture(content: bytes) -> bool:
    """Whether these bytes begin as a PNG or JPEG file does."""
    return content.startswith((_PNG, _JPEG))


def picture(
    content: bytes, alt: str, caption: Any = None, *, prompt: str | None = None, name: str | None = None
) -> Markup:
    """A PNG or JPEG inside the page, with the text that stands for it and a caption under it.

    One with a `name` has a box of that name, in which a wide picture scrolls on a narrow screen.
    """
    size: dict[str, int] = {}
    if content.startswith(_PNG):
        width, height = struct.unpack(">II", content[16:24])
        size = {"width": round(width / _DENSITY), "height": round(height / _DENSITY)}
    kind = "png" if content.startswith(_PNG) else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    below = [] if caption is None else [element("p", caption)]
    below += [] if prompt is None else [element("p", prompt, dir="auto", class_="prompt")]
    image = element("img", src=source, alt=alt, **size)
    if name is not None:
        image = element("div", image, class_="scroll", role="region", aria_label=name, tabindex=0)
    return element(
        "figure",
        image,
        element("figcaption", *below) if below else None,
    )


def interval_bar(value: float, interval: Sequence[float] | None) -> Markup:
    """A number between 0 and 1 and its interval on an axis with a mark at one half."""
    low, high = interval or (value, value)

    def x(place: float) -> str:
        return f"{4 + 120 * min(max(place, 0.0), 1.0):.1f}"

    return element(
        "svg",
        element("line", x1=x(0), x2=x(1), y1=8, y2=8, class_="axis"),
        element("line", x1=x(0.5), x2=x(0.5), y1=2, y2=14, class_="axis"),
        element("line", x1=x(low), x2=x(high), y1=8, y2=8, class_="interval"),
        element("circle", cx=x(value), cy=8, r=3.5),
        class_="bar", viewBox="0 0 128 16", width=128, height=16, aria_hidden="true",
    )  # fmt: skip


def page(title: str, header: Any, sections: Sequence[Section], footer: Any) -> str:
    """The whole document. What is in it may run no script but the page's own, and fetch nothing."""
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(_STYLE)}'; script-src '{_hash(_SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    contents = element(
        "nav",
        element("ul", *(element("li", element("a", part.title, href=f"#{part.key}")) for part in sections)),
        aria_label="Contents",
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(_STYLE)),
    )
    body = element(
        "body",
        element("header", element("h1", title), header, contents),
        element("main", *(Markup(f"\n{part.markup()}") for part in sections)),
        element("footer", footer),
        element("script", Markup(_SCRIPT)),
    )
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n{body}</html>\n'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --raised: #f5f6f8; --text: #1d2228; --quiet: #56606b; --line: #d5dae0;
  --accent: #1f5f99; --caution: #fff3dc; --caution-line: #a85c00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15181c; --raised: #1f242a; --text: #e4e8ec; --quiet: #a3adb8; --line: #3a424b;
    --accent: #7fb8ea; --caution: #3a2c12; --caution-line: #f0a73c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 76rem; background: var(--ground);
  color: var(--text); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 {
  font-size: 1.3rem; line-height: 1.3; margin: 2.75rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p, ul, dl { margin: .6rem 0; }
p, li { max-width: 50rem; }
a { color: var(--accent); }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre {
  background: var(--raised); padding: .75rem 1rem; border-radius: .4rem; margin: .6rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.lead, .quiet, caption, figcaption, footer { color: var(--quiet); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; margin: 1rem 0 0; list-style: none; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .5rem 1.5rem;
}
dt { color: var(--quiet); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.warnings {
  background: var(--caution); border-left: .3rem solid var(--caution-line); border-radius: .3rem;
  padding: .9rem 1.1rem; margin-top: 1.25rem;
}
.warnings h2 { border: 0; margin: 0 0 .4rem; padding: 0; }
.warnings ul { margin: 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .75rem 0 1.25rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: start; padding: 0 0 .4rem; }
/* As wide as the box and not as the table, and it stays where the table scrolls. */
caption span {
  display: block; position: sticky; left: 0; width: max-content;
  max-width: min(50rem, calc(100vw - 2.5rem));
}
th, td { padding: .3rem 1rem .3rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; }
thead th, thead .number { vertical-align: bottom; white-space: normal; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 400; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody tr:hover { background: var(--raised); }
.number { text-align: right; white-space: nowrap; }
.number small { display: block; color: var(--quiet); font-size: .8rem; }
th.prompt, td.prompt { text-align: start; }
tbody .prompt, tbody .words { min-width: 14rem; max-width: 30rem; overflow-wrap: anywhere; }
thead button {
  all: unset; box-sizing: border-box; cursor: pointer; font-weight: 600; color: inherit;
}
thead button::after { content: "\\a0\\2195"; color: var(--quiet); }
th[aria-sort="ascending"] button::after { content: "\\a0\\2191"; color: var(--accent); }
th[aria-sort="descending"] button::after { content: "\\a0\\2193"; color: var(--accent); }
thead button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.bar .axis { stroke: var(--line); stroke-width: 1.5; }
.bar .interval { stroke: var(--accent); stroke-width: 3; }
.bar circle { fill: var(--accent); }
figure { margin: 1rem 0; }
.gallery {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
}
.gallery figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
figure .scroll img { max-width: max(100%, 44rem); }
figcaption p { margin: .3rem 0 0; font-size: .9rem; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 3rem; font-size: .875rem; }
@media (prefers-color-scheme: dark) { figure img { padding: .25rem; } }
@media print {
  :root { --ground: #fff; --raised: #fff; --text: #000; --quiet: #333; --line: #999; --accent: #000;
    --caution: #fff; --caution-line: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, thead button::after { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  .number, .number small { white-space: normal; }
  tbody .prompt, tbody .words { min-width: 0; }
  tr, figure { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const numbers = head.classList.contains("number");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numbers;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => {
        const cell = row.cells[column];
        return numbers ? parseFloat(cell.dataset.value ?? cell.textContent) : cell.textContent.trim();
      };
      const empty = value => value === "" || Number.isNaN(value);
      const order = (a, b) => numbers ? a - b : a.localeCompare(b);
      [...table.tBodies[0].rows]
        .map(row => [key(row), row])
        .sort(([a], [b]) => empty(a) - empty(b) || (down ? -order(a, b) : order(a, b)))
        .forEach(([, row]) => table.tBodies[0].append(row));
    });
  });
}
"""
