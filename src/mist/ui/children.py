"""Jobs in processes of their own: each is started, listened to, and ended with whoever asked for it.

Between the page's requests and `worker`. When a job's task is cancelled its process is gone before the task is; it
never leaves one behind.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any

#: bytes of one message, which may be a page; seconds that a process gets to end by itself
MAX_MESSAGE, PATIENCE_S = 1 << 28, 5.0

Progress = Callable[[int, int], None]


async def answer(job: Mapping[str, Any], progress: Progress | None = None) -> dict[str, Any]:
    """The last message of a job's process: its outcome, or `problems`."""
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "mist.ui.worker",
            stdin=PIPE, stdout=PIPE, stderr=errors, limit=MAX_MESSAGE, start_new_session=True,
        )  # fmt: skip
        try:
            return await _heard(process, job, progress) or _crash(await process.wait(), errors)
        finally:
            await _end(process)


async def _heard(process: Process, job: Mapping[str, Any], progress: Progress | None) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    last: dict[str, Any] = {}
    with suppress(BrokenPipeError, ConnectionResetError):  # it ended at once, and its stderr says why
        process.stdin.write(json.dumps(job).encode() + b"\n")
        await process.stdin.drain()
    async for line in process.stdout:
        message = json.loads(line)
        if "progress" not in message:
            last = message
        elif progress is not None:
            progress(*message["progress"])
    return last


async def _end(process: Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), PATIENCE_S)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _crash(status: int, errors: IO[bytes]) -> dict[str, Any]:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return {"problems": [{"message": f"the process ended with {status}: {lines[-1] if lines else 'no message'}",
                          "hint": "\n".join(lines[-20:-1])}]}  # fmt: skip
