"""The API described to people: a page made from the OpenAPI document, without scripts and without the internet."""

import hashlib
from base64 import b64encode
from functools import cache
from html import escape
from typing import Any

from fastapi import FastAPI, Response

from aggregator.api import benefit_schemas
from aggregator.api.schemas import SCHEMAS

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
code { font: 14px/1.4 ui-monospace, monospace } summary { cursor: pointer; padding: .2rem 0 }
table { border-collapse: collapse; margin: .3rem 0 1rem 1rem } td { padding: .1rem 1rem .1rem 0; vertical-align: top }
.method { display: inline-block; width: 4rem; font-weight: 600 } .muted { color: #666 }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd } .muted { color: #999 } }
"""
_POLICY = "default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_ABOUT = """Usage metering that counts every event exactly once. The paths and shapes are those of Polar's metering API.

Send `Authorization: Bearer <token>`. Every answer about usage says in `As-Of` which log position it is true for. To
read what was just written, send the `Log-Position` of the ingestion's answer back with `Prefer: wait=5`; when the time
is up before the view is there, the answer comes all the same and its `As-Of` says how far it got.

Lists take `page` and `limit`; events, quantities and meters take `metadata[key]=value`, repeatable.

Quantities are JSON numbers with all their digits: read them as decimals where that matters."""


def describe() -> str:
    """What the document says at its head."""
    return _ABOUT


def install_pages(app: FastAPI) -> None:
    """Serve ``/docs``, and complete the document at ``/openapi.json``."""
    digest = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    headers = {"Content-Security-Policy": _POLICY.format(digest=digest), "X-Content-Type-Options": "nosniff"}

    @cache
    def page() -> bytes:
        return _page(app.openapi()).encode()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """The API as a page to read."""
        return Response(page(), media_type="text/html", headers=headers)

    made = app.openapi

    def openapi() -> dict[str, Any]:
        """The document, made when somebody asks first: a start does not wait for it."""
        return app.openapi_schema or _completed(made())

    app.openapi = openapi  # type: ignore[method-assign]  # the framework's own way to have another one


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the schemas of bodies and the kind of credential."""
    components = document.setdefault("components", {})
    made = {name: schema for name, schema in components["schemas"].items() if "ValidationError" not in name}
    components["schemas"] = made | SCHEMAS | benefit_schemas.SCHEMAS
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}]
    return document


def _page(document: dict[str, Any]) -> str:
    """The whole page."""
    title = escape(document["info"]["title"])
    about = "".join(f"<p>{_prose(part)}</p>" for part in document["info"]["description"].split("\n\n"))
    sections: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            sections.setdefault(operation["tags"][0], []).append(_operation(method, path, operation))
    body = "".join(f"<h2>{escape(name)}</h2>{''.join(parts)}" for name, parts in sections.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f'<h1>{title}</h1>{about}<p>The same for machines: <a href="/openapi.json">openapi.json</a></p>{body}</html>'
    )


def _prose(text: str) -> str:
    """Paragraph text; what stands between backticks is code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = "".join(_parameter(parameter) for parameter in operation.get("parameters", ()))
    return (
        f'<details><summary><code><span class="method">{method.upper()}</span>{escape(path)}</code> '
        f'<span class="muted">{escape(operation["summary"])}</span></summary>'
        f"<p>{_prose(operation.get('description', ''))}</p><table>{rows}</table></details>"
    )


def _parameter(parameter: dict[str, Any]) -> str:
    required = "required" if parameter.get("required") else ""
    about = parameter.get("description") or _kind(parameter["schema"])
    return (
        f"<tr><td><code>{escape(parameter['name'])}</code><td class=muted>{escape(parameter['in'])} {required}"
        f"<td>{escape(about)}</tr>"
    )


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_kind(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"{_kind(schema.get('items', {}))}, repeatable"
    return str(schema.get("format") or schema.get("type") or "")
