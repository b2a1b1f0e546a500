"""A grading service on this machine: it answers as it is told and remembers what it was asked."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answering:
    """``answer(number, body)`` gives (status, headers, body) of the number-th request.

    Its body is bytes, or anything that becomes JSON; a callable writes to the socket itself.
    """

    answer: Callable
    url: str = ""
    bodies: list = field(default_factory=list)
    headers: list = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *args):
        """A client that hung up is what many tests do."""


@contextlib.contextmanager
def answering(answer: Callable) -> Iterator[Answering]:
    state = Answering(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
                state.busy += 1
                state.most_busy = max(state.most_busy, state.busy)
            try:
                status, headers, reply = state.answer(number, body)
            finally:
                with state.lock:
                    state.busy -= 1
            if callable(reply):
                reply(self.wfile)
                return
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            """Nothing on standard error."""

    server = _Quiet(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chat(content: object, finish: str = "stop") -> tuple:
    """A chat completion with this text (anything but text becomes JSON)."""
    text = content if isinstance(content, str) else json.dumps(content)
    message = {"role": "assistant", "content": text}
    return 200, {}, {"choices": [{"message": message, "finish_reason": finish}]}
