"""The web application: OpenAI's chat completions for programs, a page and what it asks for.

It binds to 127.0.0.1 alone, and answers only requests that name this machine as their host, so that no page of another
site can use it under a name of its own.
"""

import asyncio
import errno
import hmac
import io
import json
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mlxmm.errors import UserError
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.preprocessing.tokenizers import plain_tokens
from mlxmm.serving.answers import class_probabilities, heat_map
from mlxmm.serving.chat import Answer, BadRequest, ChatRequest, read_chat, read_image, read_json, read_text
from mlxmm.serving.engine import CaptionJob, Engine, Piece
from mlxmm.terminal import say

HOST = "127.0.0.1"
MAX_BODY = 32 * 2**20  # bytes of a request
MAX_WAITING = 256  # requests
PAGE = Path(__file__).with_name("page.html")
INLINE = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # all of the page is one file
POLICY = f"default-src 'none'; {INLINE}; img-src 'self' data:; connect-src 'self'"


@attrs.frozen(kw_only=True)
class Served:
    """What is served: a captioner or a CLIP, under a name, and pictures to try it on, with their captions."""

    model: CaptioningModule | ContrastiveCLIP
    name: str
    examples: Sequence[tuple[Image.Image, str]] = ()
    api_key: str | None = None
    uses_text: bool = False  # the text of a request is the prompt, in place of the one the model was trained with

    @property
    def captioner(self) -> CaptioningModule | None:
        """The model, if it writes captions."""
        return self.model if isinstance(self.model, CaptioningModule) else None


def bind(*ports: int) -> socket.socket:
    """A socket on this machine alone, at the first of `ports` that is not taken; port 0 is a free one. Says which are
    taken. Raises `UserError` where all are."""
    for port in ports:
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((HOST, port))
            bound.listen()  # who comes before the server is up waits
            return bound
        except OSError as error:
            bound.close()
            failure = f"port {port}: {(error.strerror or str(error)).lower()}"
            if len(ports) > 1 and error.errno == errno.EADDRINUSE:
                say(f"{failure}; the next one is tried")
                continue
            break
    raise UserError(f"{failure}; --port 0 takes a free one")


def serve(served: Served, bound: socket.socket) -> None:
    """Answer requests until Ctrl-C. This thread computes; another one speaks HTTP."""
    engine = Engine()
    config = uvicorn.Config(
        make_app(served, engine), log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name="http", daemon=True)
    thread.start()
    try:
        engine.run(served.captioner)
    finally:
        server.should_exit = True
        thread.join(5)


def make_app(served: Served, engine: Engine) -> Starlette:
    """The application for one model."""
    web = Web(served, engine)
    return Starlette(
        routes=[
            Route("/", web.page),
            Route("/health", web.health),
            Route("/v1/models", web.models),
            Route("/v1/chat/completions", web.chat, methods=["POST"]),
            Route("/api/info", web.info),
            Route("/api/examples/{number:int}", web.example),
            Route("/api/classify", web.classify, methods=["POST"]),
            Route("/api/heat", web.heat, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
        exception_handlers={BadRequest: _refused, UserError: _refused},
    )


async def _refused(request: Request, error: Exception) -> Response:
    refused = error if isinstance(error, BadRequest) else BadRequest(str(error))
    waits = {"Retry-After": "1"} if refused.status == 429 else None
    return JSONResponse(refused.body(), refused.status, headers=waits)


@attrs.frozen
class Web:
    """The answers to each route."""

    served: Served
    engine: Engine

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse(
            {"object": "list", "data": [{"id": self.served.name, "object": "model", "owned_by": "mlxmm"}]}
        )

    async def info(self, request: Request) -> Response:
        self._check_key(request)
        captions = [caption for _, caption in self.served.examples]
        writes = self.served.captioner is not None
        return JSONResponse({"model": self.served.name, "writes_captions": writes, "examples": captions})

    async def example(self, request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(self.served.examples):
            raise BadRequest("there is no such example", status=404)
        file = io.BytesIO()
        self.served.examples[number][0].save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    async def classify(self, request: Request) -> Response:
        values = await self._json(request)
        names, image = values.get("classes"), read_image(values.get("image"))
        if not isinstance(names, list):
            raise BadRequest("classes is a list of texts", "classes")
        names = [read_text(name, "classes") for name in names]
        probabilities = await self._computed(lambda: class_probabilities(self.served.model, image, names))
        return JSONResponse({"probabilities": probabilities})

    async def heat(self, request: Request) -> Response:
        values = await self._json(request)
        image, text = read_image(values.get("image")), read_text(values.get("text"), "text")
        if not text.strip():
            raise BadRequest("text is missing", "text")
        return JSONResponse(
            {"cells": (await self._computed(lambda: heat_map(self.served.model, image, text))).tolist()}
        )

    async def chat(self, request: Request) -> Response:
        values, captioner = await self._json(request), self.served.captioner
        if captioner is None:
            raise BadRequest(f"{self.served.name} compares pictures with texts: it writes no captions", "model", 404)
        asked = read_chat(values, self.served.name, captioner.max_new_tokens)
        prompt = read_text(asked.text, "messages") if self.served.uses_text else ""
        answer = Answer(self.served.name, len(plain_tokens(captioner.tokenizer, prompt)))
        pieces = self._pieces(asked, prompt)
        if asked.stream:
            first = await anext(pieces)  # what is refused is refused before the stream begins
            return StreamingResponse(_events(answer, first, pieces, asked.with_usage), media_type="text/event-stream")
        every = [piece async for piece in pieces]
        return JSONResponse(answer.whole("".join(piece.text for piece in every), every[-1]))

    async def _pieces(self, asked: ChatRequest, prompt: str) -> AsyncIterator[Piece]:
        """The pieces of a caption as they are made. Whoever stops listening cancels it."""
        loop, made = asyncio.get_running_loop(), asyncio.Queue()
        emit = lambda piece: loop.call_soon_threadsafe(made.put_nowait, piece)
        job = CaptionJob(asked.image, prompt, asked.config, emit)
        self.engine.caption(job)
        try:
            while True:
                piece = await made.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            job.is_over = True

    async def _computed(self, compute) -> Any:
        return await asyncio.wrap_future(self.engine.submit(compute))

    async def _json(self, request: Request) -> dict:
        """The body, if it is allowed, small enough and JSON. Raises `BadRequest`."""
        self._check_key(request)
        if self.engine.num_waiting > MAX_WAITING:
            raise BadRequest("too many requests wait: try again", status=429)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise BadRequest(f"the request is larger than {MAX_BODY // 2**20} MiB", status=413)
        return read_json(bytes(body))

    def _check_key(self, request: Request) -> None:
        given, wanted = request.headers.get("authorization", ""), f"Bearer {self.served.api_key}"
        if self.served.api_key and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise BadRequest("the API key is missing or wrong", status=401)


async def _events(answer: Answer, first: Piece, rest: AsyncIterator[Piece], with_usage: bool) -> AsyncIterator[str]:
    """A stream of server-sent events, as OpenAI's."""
    event = lambda values: f"data: {json.dumps(values)}\n\n"
    last = first
    yield event(answer.chunk(first, first=True))
    async for last in rest:
        yield event(answer.chunk(last, first=False))
    if with_usage:
        yield event(answer.usage_chunk(last))
    yield "data: [DONE]\n\n"
