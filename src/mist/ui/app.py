"""The page's application: what each address answers.

Routes around `scenarios`, `checking` and `runs`, behind the guard. Work that takes long is done in threads and
processes; it computes nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mist.errors import ScenarioError
from mist.report.html.markup import el, section
from mist.report.html.page import page
from mist.scenario.source import MAX_BYTES
from mist.ui.checking import check, told
from mist.ui.guard import REPORT_POLICY, Guard
from mist.ui.runs import Runs
from mist.ui.scenarios import ConflictError, Scenarios, example_names

#: hosts that a browser may take this for; any other name that leads here is somebody's rebinding
HOSTS = ["127.0.0.1", "localhost"]
#: bytes of a request: a scenario whose every character is escaped
MAX_BODY = 6 * MAX_BYTES
#: runs that are listed, where nothing else is asked for
LISTED = 50
#: name -> package that it ships in, and type
ASSETS = {
    "": ("mist.ui", "static/index.html", "text/html"),
    "ui.css": ("mist.ui", "static/ui.css", "text/css"),
    "ui.js": ("mist.ui", "static/ui.js", "text/javascript"),
    "editor.js": ("mist.ui", "static/editor.js", "text/javascript"),
    "theme.js": ("mist.ui", "static/theme.js", "text/javascript"),
    "icon.svg": ("mist.ui", "static/icon.svg", "image/svg+xml"),
    "report.css": ("mist.report.html", "report.css", "text/css"),
}


def application(scenarios: Scenarios, token: str, *, workers: int = 1, plugins: Sequence[str] = ()) -> Starlette:
    """The ASGI application; runs that are going on when it stops are ended."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.scenarios, app.state.runs = scenarios, Runs(scenarios.runs, workers, plugins)
        try:
            yield
        finally:
            await app.state.runs.close()

    return Starlette(
        routes=[
            *(Route(f"/{name}", _asset(*where), methods=["GET"]) for name, where in ASSETS.items()),
            Route("/api/scenarios", _list),
            Route("/api/scenario", _open),
            Route("/api/check", _check, methods=["POST"]),
            Route("/api/save", _save, methods=["POST"]),
            Route("/api/runs", _runs, methods=["GET"]),
            Route("/api/runs", _start, methods=["POST"]),
            Route("/api/cancel", _cancel, methods=["POST"]),
            Route("/api/delete", _delete, methods=["POST"]),
            Route("/api/differences", _differences),
            Route("/report", _report),
            Route("/asked", _asked),
            Route("/compare", _compare),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
            Middleware(Guard, token=token),
        ],
        exception_handlers={ScenarioError: _refused, ConflictError: _conflict, OSError: _failed},
        lifespan=lifespan,
    )


def _asset(package: str, name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (files(package) / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return answer


async def _list(request: Request) -> Response:
    scenarios: Scenarios = request.app.state.scenarios
    names = await run_in_threadpool(scenarios.names)
    return JSONResponse({"folder": str(scenarios.folder), "runs": str(scenarios.runs), "names": names,
                         "examples": example_names()})  # fmt: skip


async def _open(request: Request) -> Response:
    query = request.query_params
    opened = request.app.state.scenarios.open(query.get("name", ""), is_example=query.get("origin") == "example")
    return JSONResponse(asdict(opened))


async def _check(request: Request) -> Response:
    given = await _body(request, "text", "name", "origin")
    path = request.app.state.scenarios.path(given["name"], is_example=given["origin"] == "example")
    return JSONResponse(await run_in_threadpool(check, given["text"], given["name"], path.parent))


async def _save(request: Request) -> Response:
    given = await _body(request, "text", "name", "opened")
    digest = request.app.state.scenarios.save(given["name"], given["text"], given["opened"])
    return JSONResponse({"digest": digest})


async def _runs(request: Request) -> Response:
    """The newest ones and those that `run` names, and how many there are."""
    limit = request.query_params.get("limit", str(LISTED))
    if not limit.isdecimal() or len(limit) > 9:
        raise HTTPException(400, "limit is a count")
    also = request.query_params.getlist("run")
    found, count = await run_in_threadpool(request.app.state.runs.listed, int(limit), also)
    return JSONResponse({"runs": found, "count": count})


async def _start(request: Request) -> Response:
    """Queue what is in the editor, saved or not."""
    given = await _body(request, "text", "name", "origin", "label")
    path = request.app.state.scenarios.path(given["name"], is_example=given["origin"] == "example")
    found = await run_in_threadpool(check, given["text"], given["name"], path.parent)
    if found["problems"]:
        return JSONResponse(found, status_code=422)
    run_id = request.app.state.runs.start(given["text"], given["name"], path.parent, given["label"].strip())
    return JSONResponse({"id": run_id}, status_code=201)


async def _cancel(request: Request) -> Response:
    await request.app.state.runs.cancel((await _body(request, "id"))["id"])
    return JSONResponse({})


async def _delete(request: Request) -> Response:
    await run_in_threadpool(request.app.state.runs.delete, (await _body(request, "id"))["id"])
    return JSONResponse({})


async def _differences(request: Request) -> Response:
    given = request.query_params.getlist("run")
    if len(given) != 2:
        raise HTTPException(400, "two runs differ")
    return JSONResponse(await run_in_threadpool(request.app.state.runs.differences, *given))


async def _report(request: Request) -> Response:
    return await _shown(request.app.state.runs.report(request.query_params.get("run", "")))


async def _asked(request: Request) -> Response:
    """The scenario of a run, as it is kept."""
    text = await run_in_threadpool(request.app.state.runs.scenario, request.query_params.get("run", ""))
    return PlainTextResponse(text)


async def _compare(request: Request) -> Response:
    return await _shown(request.app.state.runs.comparison(request.query_params.getlist("run")))


async def _shown(making: Awaitable[str]) -> Response:
    """A page of the library, or one that says why there is none."""
    status = 200
    try:
        text = await making
    except ScenarioError as error:
        problems = [el("div", el("pre", each.message), el("p", each.hint)) for each in error.problems]
        text, status = page("This can't be shown", "MIST", [section("why", "Why", None, problems)]), 422
    return HTMLResponse(text, status, {"Content-Security-Policy": REPORT_POLICY})


async def _body(request: Request, *names: str) -> dict[str, str]:
    """The texts of these names in the request's JSON."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY:
            raise HTTPException(413, f"a request has at most {MAX_BODY:,} bytes")
    try:
        given: Any = json.loads(raw)
    except (ValueError, RecursionError):  # of brackets in brackets in brackets
        raise HTTPException(400, "this is no JSON") from None
    if not isinstance(given, dict) or not all(isinstance(given.get(name, ""), str) for name in names):
        raise HTTPException(400, f"give texts: {', '.join(names)}")
    found = {name: given.get(name, "") for name in names}
    try:
        "".join(found.values()).encode()
    except UnicodeEncodeError:
        raise HTTPException(400, "half of a character is no text") from None
    return found


async def _refused(request: Request, error: Exception) -> Response:
    problems = error.problems if isinstance(error, ScenarioError) else ()
    return JSONResponse({"problems": told(problems)}, status_code=422)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"problems": [{"message": f"that didn't work: {error}"}]}, status_code=422)


async def _conflict(request: Request, error: Exception) -> Response:
    return JSONResponse({"conflict": str(error)}, status_code=409)
