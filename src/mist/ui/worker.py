"""The process that a run, a report or a comparison has for itself, so that it can be ended: `python -m mist.ui.worker`.

One job as a line of JSON on stdin, then nothing: when stdin ends, its parent has, and so does it. Messages go to stdout
as lines of JSON, the last one with the outcome. It writes results only whole, and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mist import registry
from mist.errors import InvariantError, ScenarioError

Job = dict[str, Any]
Say = Callable[..., None]

#: seconds between two messages of progress
_BETWEEN_S = 0.1


def main() -> None:
    messages = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what a plug-in prints is no message,
    sys.stdout = sys.stderr  # and doesn't come out behind what it died of

    def say(**message: Any) -> None:
        print(json.dumps(message, ensure_ascii=False), file=messages, flush=True)

    job = json.loads(sys.stdin.buffer.readline())
    signal.signal(signal.SIGTERM, lambda *_: _end(job))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for plugin in job["plugins"]:
            registry.load_plugin_file(plugin)
        JOBS[job["kind"]](job, say)
    except ScenarioError as error:
        from mist.ui.checking import told

        say(problems=told(error.problems, job.get("name", "")))
    except OSError as error:
        say(problems=[{"message": str(error)}])
    except InvariantError as error:
        say(problems=[{"message": f"a law of the simulation broke, which is a bug: {error}"}])


def _end_with_parent() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _end(job: Job) -> NoReturn:
    """End at once, with nothing half-written (`Result.write`), by no exception: what loads may turn it into another."""
    if "out" in job:
        out = Path(job["out"])
        shutil.rmtree(out.with_name(f".{out.name}.{os.getpid()}.partial"), ignore_errors=True)
    os._exit(128 + signal.SIGTERM)


def _run(job: Job, say: Say) -> None:
    """Simulate a text and write the result."""
    from mist.scenario.build import run
    from mist.ui.checking import read

    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _BETWEEN_S or done == total:
            last = now
            say(progress=[done, total])

    run(read(job["text"], job["name"], Path(job["folder"])), progress=progress).write(job["out"])
    say(done=True)


def _report(job: Job, say: Say) -> None:
    from mist.report.html import report_html
    from mist.scenario.stored import read_result

    say(page=report_html(read_result(job["folder"])))


def _compare(job: Job, say: Say) -> None:
    """The page of results below a folder, the first against the others, called by their names."""
    from mist.report.html.compare import compare_html
    from mist.search.compare import compare, deployments_of, paired

    os.chdir(job["folder"])
    first, *others = deployments_of([Path(name) for name in job["runs"]])
    say(page=compare_html(compare([first, *others]), [paired(first, other) for other in others]))


JOBS: dict[str, Callable[[Job, Say], None]] = {"run": _run, "report": _report, "compare": _compare}

if __name__ == "__main__":
    main()
