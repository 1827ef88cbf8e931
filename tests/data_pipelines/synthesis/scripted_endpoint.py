"""A server of chat completions on this machine that says what a test tells it to."""

import contextlib
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Reply(NamedTuple):
    """A reply. `cut`: the body is shorter than its header says; `seconds`: how long it takes."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012
    cut: bool = False
    seconds: float = 0.0


def says(text: str, **others: Any) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **others}
    return Reply(json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode())


class Scripted(NamedTuple):
    """`requests`: the bodies of all requests, in the order in which they came; `headers`: theirs."""

    url: str
    requests: list[dict[str, Any]]
    headers: list[dict[str, str]]


@contextlib.contextmanager
def scripted(script: Callable[[dict[str, Any]], Reply]) -> Iterator[Scripted]:
    """`script` makes a reply of a request's body; it may be called by several threads at once."""
    over = threading.Event()
    seen = Scripted("", [], [])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.requests.append({"path": self.path, **body})
            seen.headers.append(dict(self.headers))
            reply = script(body)
            over.wait(reply.seconds)
            with contextlib.suppress(OSError):
                self.send_response(reply.status)
                self.send_header("Content-Length", str(len(reply.body) + 10 * reply.cut))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield seen._replace(url=f"http://127.0.0.1:{server.server_port}/v1")
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def synthesis_config(name: str, **others: Any) -> ConfigDict:
    """The configuration "code", "code:finetune" or "maths" as users have it, in a hurry; `a__b` stands for a.b."""
    name, _, arg = name.partition(":")
    path = Path(__file__).parents[3] / f"configs/data/synthesis_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: ConfigDict = module.get_config(arg)
    with result.unlocked():
        for key, value in {"endpoint__retries": 1, "endpoint__backoff_s": 0.01, **others}.items():
            parent, _, last = key.rpartition("__")
            (result[parent] if parent else result)[last] = value
    return result
