"""The drawings of a page as SVG files, for papers and slides.

They are taken from ``report.html`` itself, so that a file shows what the page shows. Each one stands alone: title,
legend and style are inside it, in the colours of the light page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from preceptor.errors import DataError, StorageError
from preceptor.report.drawing import unique_name

NAMESPACE = "http://www.w3.org/2000/svg"
FONT = 'text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }'
MARGIN, HEAD, LEGEND_ROW, SWATCH = 10, 30, 18, 26
"""Of a file around the page's drawing, in its units: the page writes title and legend as text beside it."""
CHARACTER = 6.2
"""Mean width of a character of the legend."""

# Article text cannot forge these: the page escapes every "<" that is not its own.
_DRAWING = re.compile(
    r'<figure class="panel".*?</figure>|<div class="scroll"[^>]*><svg class="edits".*?</svg></div>', re.DOTALL
)
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_figures(run_dir: Path, folder: Path) -> list[Path]:
    """Writes every chart of ``run_dir / "report.html"`` into ``folder``, which is made, and returns the files.

    A file is named after its chart's title; one of the same name is replaced.

    Raises:
        DataError: there is no page.
        StorageError: the page cannot be read, or a file not be written.
    """
    page = run_dir / "report.html"
    try:
        html = page.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{run_dir} has no report.html; write it with: preceptor report {run_dir}") from None
    except OSError as error:
        raise StorageError(f"{page} could not be read: {error.strerror or error}.") from error
    written: list[Path] = []
    for name, svg in drawings(html).items():
        path = folder / f"{name}.svg"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(svg, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path} could not be written: {error.strerror or error}.") from error
        written.append(path)
    return written


def drawings(html: str) -> dict[str, str]:
    """Name and SVG text of every chart of a page, in the page's order."""
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    found: dict[str, str] = {}
    names: set[str] = set()
    for match in _DRAWING.finditer(html):
        # A figure of the page is valid XML once characters that XML forbids are gone, so a parser can be trusted here.
        figure = ElementTree.fromstring(_NO_XML.sub("\N{REPLACEMENT CHARACTER}", match[0]))
        title, unit = _title(figure)
        name = unique_name(title, names)
        svg = _standalone(figure, title, unit)
        # First of all, so that a viewer knows every colour before it draws.
        svg.insert(0, _element("style", text=f"{FONT}\n{light_style(style[1] if style else '', svg)}"))
        ElementTree.indent(svg)
        found[name] = ElementTree.tostring(svg, encoding="unicode") + "\n"
    return found


def light_style(css: str, svg: Element) -> str:
    """The rules of ``css`` that style ``svg``, with the light page's value in the place of each variable.

    >>> css = ":root { --ink: #111; } @media print { .a { fill: red; } } svg .a { fill: var(--ink); } .b { fill: red; }"
    >>> light_style(css, _element("svg", _element("path", **{"class": "a"})))
    'svg .a { fill: #111; }'
    """
    css = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", css)  # dark, print and narrow screens
    values = dict(re.findall(r"(--[\w-]+):\s*([^;]+);", css))
    used = {name for element in svg.iter() for name in element.get("class", "").split()}
    rules = []
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", css):
        wanted = [selector.strip() for selector in selectors.split(",") if _is_used(selector, used)]
        if wanted:
            declarations = re.sub(r"var\((--[\w-]+)\)", lambda name: values[name[1]], body.strip())
            rules.append(f"{', '.join(wanted)} {{ {declarations} }}")
    return "\n".join(rules)


def _is_used(selector: str, used: set[str]) -> bool:
    # Other selectors (`:root`, `:hover`, those of the page's text) would style nothing in the file.
    classes = set(re.findall(r"\.([\w-]+)", selector))
    return ":" not in selector and classes <= used and (bool(classes) or selector.split()[0] == "svg")


def _title(figure: Element) -> tuple[str, str]:
    """Title and unit that the page writes above a drawing."""
    heading = figure.find("h3")
    if heading is None:
        return figure.get("aria-label", ""), ""
    unit = heading.find("small")
    return (heading.text or "").strip(), "" if unit is None else _text(unit)


def _standalone(figure: Element, title: str, unit: str) -> Element:
    """The drawing of ``figure`` between its title and its legend, without a style."""
    drawing = figure.find("svg")
    assert drawing is not None, "a figure of the page without a drawing"
    # viewBox is "0 0 width height".
    width, height = (float(size) for size in drawing.get("viewBox", "").split()[2:])
    legend, legend_height = _legend(figure, width)
    total_width, total_height = width + 2 * MARGIN, HEAD + height + legend_height + MARGIN
    svg = _element(
        "svg",
        _element("title", text=f"{title}, {unit}" if unit else title),
        _element("rect", width="100%", height="100%", fill="#ffffff"),
        xmlns=NAMESPACE,
        width=f"{total_width:g}",
        height=f"{total_height:g}",
        viewBox=f"0 0 {total_width:g} {total_height:g}",
    )
    heading = SubElement(svg, "text", {"x": str(MARGIN), "y": "20", "style": "font-size: 13px; font-weight: 600"})
    heading.text = title
    if unit:
        small = SubElement(heading, "tspan", {"dx": "6", "style": "font-size: 11px; font-weight: 400"})
        small.text = unit
    # The classes that the style sheet knows the drawing by go along.
    kept = {"class": drawing.get("class", ""), "transform": f"translate({MARGIN} {HEAD})"}
    body = SubElement(svg, "g", {key: value for key, value in kept.items() if value})
    body.extend(part for part in drawing if part.get("class") not in ("cursor", "reader"))  # for the pointer alone
    legend.set("transform", f"translate({MARGIN} {HEAD + height + 4:g})")
    svg.append(legend)
    return svg


def _legend(figure: Element, width: float) -> tuple[Element, float]:
    """The names of the lines beside a piece of each, wrapped to ``width``, and how high they are together."""
    legend, x, y = _element("g"), 0.0, 0.0
    for key, label in _keys(figure):
        # There is no font to measure with, so a line's width is guessed from its characters.
        needed = SWATCH + 6 + CHARACTER * len(label) + 14
        if x and x + needed > width:
            x, y = 0.0, y + LEGEND_ROW
        line = {"class": key, "d": f"M{x:.1f} {y + 8:.1f}h{SWATCH}"}
        legend.append(_element("path", **line))
        legend.append(_element("text", text=label, x=f"{x + SWATCH + 6:.1f}", y=f"{y + 12:.1f}"))
        x += needed
    return legend, y + LEGEND_ROW if len(legend) else 0.0


def _keys(figure: Element) -> Iterator[tuple[str, str]]:
    """Class and name of every line in the page's legend."""
    for key in figure.iterfind(".//span[@class='key']"):
        # The swatch's first child is the line; what follows the swatch is the name.
        swatch = key.find("svg")
        if swatch is not None and len(swatch):
            yield swatch[0].get("class", ""), (swatch.tail or "").strip()


def _element(tag: str, *children: Element, text: str | None = None, **attributes: str) -> Element:
    element = Element(tag, attributes)
    element.text = text
    element.extend(children)
    return element


def _text(element: Element) -> str:
    return "".join(element.itertext()).strip()
