"""The server of `mist ui`: a socket of the loopback interface, until somebody ends it.

Between the command and the application. It listens nowhere else, writes no log of addresses, and leaves with all
processes ended.
"""

from __future__ import annotations

import secrets
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from mist import registry
from mist.errors import Problem, ScenarioError
from mist.ui.app import application
from mist.ui.scenarios import Scenarios

#: seconds that requests get to be answered when the server is ended
_PATIENCE_S = 2


def serve(
    folder: Path,
    *,
    runs: Path | None = None,
    port: int = 0,
    workers: int = 1,
    plugins: Sequence[str] = (),
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the scenarios of `folder` until SIGINT or SIGTERM, which end the process with status 0.

    `ready` is called with the address once it can be opened; `port` 0 is any free one. ScenarioError where the folder
    or the port can't be used.
    """
    if not folder.is_dir():
        raise ScenarioError(Problem(f"{folder} is no folder", hint="give the folder that your scenarios are in"))
    for plugin in plugins:
        registry.load_plugin_file(plugin)
    place = folder.resolve()
    scenarios = Scenarios(place, (runs or place / "out" / "ui").resolve())
    token = secrets.token_urlsafe(24)
    app = application(scenarios, token, workers=workers, plugins=[str(Path(each).resolve()) for each in plugins])
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, ws="none", lifespan="on", server_header=False,
        timeout_graceful_shutdown=_PATIENCE_S,
    )  # fmt: skip
    with _listening(port) as listener:
        for each in (signal.SIGINT, signal.SIGTERM):  # uvicorn's while it serves, which raises them again at its end
            signal.signal(each, lambda *_: sys.exit(0))
        ready(f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/")
        uvicorn.Server(config).run(sockets=[listener])


def _listening(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        hint = "leave --port out for any free one"
        raise ScenarioError(Problem(f"port {port} can't be used: {error.strerror}", hint=hint)) from None
    listener.listen()
    return listener
