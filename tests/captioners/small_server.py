"""An OpenAI-compatible server on 127.0.0.1 that misbehaves as it is told."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def caption(text: str, **changes) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
    } | changes


class SmallServer(ThreadingHTTPServer):
    """Answers requests by what `behaviour` gives for (number of the request, its image): see `Handler.answer`.

    By default it captions an image with its first pixel's red.
    """

    daemon_threads = True

    def __init__(
        self, behaviour: Callable = lambda number, image: 200, models: list[dict] | int = 404, status: int = 200
    ):
        self.behaviour, self.models, self.status = behaviour, models, status
        self.requests: list[dict] = []  # bodies, with "image", "time", "key" and "busy" added
        self.busy, self.lock = 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that went away

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        models = self.server.models
        if isinstance(models, int):
            self.answer(models)
        else:
            self.send(200, json.dumps({"object": "list", "data": models}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][0]["content"]
        url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
        assert url.startswith("data:image/png;base64,") and self.path == "/v1/chat/completions"
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        key = self.headers.get("Authorization")
        with self.server.lock:
            self.server.busy += 1
            extra = {"image": image, "time": time.monotonic(), "key": key, "busy": self.server.busy}
            self.server.requests.append(body | extra)
            number = len(self.server.requests) - 1
        try:
            self.answer(self.server.behaviour(number, image), image)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def answer(self, what, image=None):
        """`what`: an HTTP status, (status, Retry-After or Location), a dict or text to send, "hang" or "close"."""
        if what == "hang":
            time.sleep(3)
        elif what == "close":
            self.send(200, "{", length=1000)
        elif what == 200:
            self.send(200, json.dumps(caption(str(image.getpixel((0, 0))[0]))))
        elif isinstance(what, int):
            self.send(what, json.dumps({"error": {"message": "what went wrong"}}))
        elif isinstance(what, tuple):
            self.send(what[0], "{}", {"Location" if what[0] < 400 else "Retry-After": what[1]})
        else:
            self.send(self.server.status, what if isinstance(what, str) else json.dumps(what))

    def send(self, status: int, text: str, headers: dict | None = None, length: int | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *args):
        pass
