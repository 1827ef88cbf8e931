"""The page as one file: a template, its style sheet, and what keeps the data's text in its place.

Every text that the template writes is made inert (`inert`) and escaped; the page has no scripts, and its policy
forbids everything but its own style sheet, which it names by hash: no script, no style, no request could come from the
data even if the escaping failed.
"""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_pipelines.inert import inert
from data_pipelines.reporting import charts, numbers, pictures
from data_pipelines.reporting.scan import quantile

FOLDER = Path(__file__).parent
FILTERS = ("number", "short", "share", "size", "about", "words", "clipped")


def render(context: Mapping[str, Any]) -> str:
    """The page, from what `report` found."""
    style = (FOLDER / "page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    # Markup: the style sheet and the policy are ours
    page: str = environment().get_template("page.html").render(**context, style=Markup(style), policy=Markup(policy))
    return page


def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {name: getattr(numbers, name) for name in FILTERS}
    made.globals |= {"charts": charts, "pictures": pictures, "colour": charts.colour, "quantile": quantile}
    return made


def finalize(value: Any) -> Any:
    """What is written for a value: texts without what could harm the reader."""
    return inert(value) if isinstance(value, str) and not isinstance(value, Markup) else value
