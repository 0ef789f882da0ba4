"""What people read, HTML and Markdown: one Jinja2 template a page, and one style sheet.

An HTML page needs no other file and no network. `*.html.j2` escapes what it is given, `*.md.j2` does not.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

_FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """The page of a template, `report.html.j2`; the same text for the same values.

    Raises jinja2.UndefinedError for a value that the template needs and does not get.
    """
    return _ENVIRONMENT.get_template(template).render(values)


def number(value: float | list[float] | None) -> str:
    """Four digits, or all of a whole number; "1 to 2" for a list; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(number(each) for each in value)
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def size(count: float) -> str:
    """Bytes as MB, or as GB from 10^9 on."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_FOLDER),
    autoescape=select_autoescape(["html.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"number": number, "size": size}
