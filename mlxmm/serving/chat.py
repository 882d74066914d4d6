"""OpenAI's chat completions: what of a request a captioner can answer, and the form of the answer.

https://platform.openai.com/docs/api-reference/chat. A picture comes as a data URL inside the request: addresses are not
fetched, and files are never read.
"""

import base64
import time
import uuid
from typing import Any

import attrs
from PIL import Image

from mlxmm.escaping import visible
from mlxmm.networks.generation import GenerationConfig
from mlxmm.preprocessing.images import UndecodableImage, decode_image
from mlxmm.serving.engine import Piece
from mlxmm.storage import json_values

DATA_URL = "a data URL, as data:image/jpeg;base64,…"
WANTED = "a request is JSON, with the picture in it as a data URL; no file is uploaded (docs/serve.md has a curl line)"
MAX_LETTERS = 20_000  # of a prompt, a class or a text
LENGTHS = ("max_completion_tokens", "max_tokens")
NUMBERS = {"temperature": int | float, "top_p": int | float, "seed": int} | dict.fromkeys(LENGTHS, int)
OFF = {  # what a captioner does not do: the values that ask for nothing
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "stop": (None, [], ""),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
}


class BadRequest(Exception):
    """A request that cannot be answered, in one line; `status` is that of HTTP."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status

    def body(self) -> dict:
        """As OpenAI writes it."""
        kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        return {"error": {"message": visible(self), "type": kind, "param": self.param, "code": None}}


@attrs.frozen(kw_only=True)
class ChatRequest:
    """A picture to be captioned."""

    image: Image.Image
    text: str
    config: GenerationConfig
    stream: bool
    with_usage: bool


def read_json(body: bytes) -> dict:
    """Raises `BadRequest`."""
    try:
        values = json_values.loads(body)
    except ValueError:
        raise BadRequest(f"the body is not JSON: {WANTED}") from None
    if not isinstance(values, dict):
        raise BadRequest("the body is not a JSON object")
    return values


def read_chat(values: dict, model: str, longest: int) -> ChatRequest:
    """The request in the JSON `values`, for the served `model`. Captions have `longest` tokens at most.

    Raises `BadRequest`.
    """
    if values.get("model") not in (model, None):
        raise BadRequest(f"no model {values['model']!r} here: {model!r} is", "model", 404)
    for name, nothing in OFF.items():
        if values.get(name) not in nothing:
            raise BadRequest(f"{name} is not supported: a captioner writes one caption of one picture", name)
    text, urls = _last_question(values.get("messages"))
    if len(urls) != 1:
        raise BadRequest(
            f"a message needs one picture, as an image_url with {DATA_URL}; this one has {len(urls)}", "messages"
        )
    return ChatRequest(
        image=read_image(urls[0]),
        text=text,
        config=_generation(values, longest),
        stream=values.get("stream") is True,
        with_usage=_wants_usage(values.get("stream_options")),
    )


def _wants_usage(options: Any) -> bool:
    if not isinstance(options, dict | None):
        raise BadRequest("stream_options is an object", "stream_options")
    return bool(options and options.get("include_usage"))


def read_image(url: Any) -> Image.Image:
    """The picture in a data URL. Raises `BadRequest`."""
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise BadRequest(f"image_url must be {DATA_URL}; addresses and files are not read", "messages")
    try:
        return decode_image(base64.b64decode(data, validate=True))
    except UndecodableImage as error:
        raise BadRequest(str(error), "messages") from None
    except ValueError:  # also of letters that are none of ASCII
        raise BadRequest("the picture is not valid base64", "messages") from None


def read_text(value: Any, name: str) -> str:
    """The text under this name of a request, or one of its texts: short enough to be tokenized for each of fifty
    pictures. Raises `BadRequest`."""
    if not isinstance(value, str):
        raise BadRequest(f"{name} is missing, or no text", name)
    if len(value) > MAX_LETTERS:
        raise BadRequest(f"a text of {len(value):,} letters: {MAX_LETTERS:,} are the most", name)
    return value


def _last_question(messages: Any) -> tuple[str, list]:
    """The text and the addresses of the pictures in the last message of the user."""
    asked = (
        [m for m in messages if isinstance(m, dict) and m.get("role") == "user"] if isinstance(messages, list) else []
    )
    if not asked:
        raise BadRequest("messages must hold one of the role user", "messages")
    content = asked[-1].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise BadRequest("the content of a message is a text or a list of parts", "messages")
    if unknown := {str(part.get("type")) for part in parts} - {"text", "image_url"}:
        raise BadRequest(f"parts of type {', '.join(sorted(unknown))}: text and image_url are read", "messages")
    text = " ".join(str(part.get("text", "")) for part in parts if part["type"] == "text")
    urls = [part.get("image_url") for part in parts if part["type"] == "image_url"]
    return text, [url.get("url") if isinstance(url, dict) else url for url in urls]


def _generation(values: dict, longest: int) -> GenerationConfig:
    settings = {name: values[name] for name in NUMBERS if values.get(name) is not None}
    for name, value in settings.items():
        if not isinstance(value, NUMBERS[name]) or isinstance(value, bool):
            raise BadRequest(f"{name} must be a number; {value!r} is none", name)
    lengths = [settings.pop(name) for name in LENGTHS if name in settings]
    if not settings.get("temperature"):
        settings.pop("top_p", None)  # which does nothing where the likeliest token is taken; clients send 1
    try:
        return GenerationConfig(max_new_tokens=min([*lengths, longest]), **settings)
    except ValueError as error:
        raise BadRequest(str(error.args[0])) from None


@attrs.frozen
class Answer:
    """The form of the answer to one request."""

    model: str
    prompt_tokens: int
    id: str = attrs.field(factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = attrs.field(factory=lambda: int(time.time()))

    def whole(self, text: str, last: Piece) -> dict:
        """Of a request that does not stream."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": last.finish_reason}
        return self._values("chat.completion", [choice]) | {"usage": self._usage(last)}

    def chunk(self, piece: Piece, *, first: bool) -> dict:
        """Of a request that streams."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": piece.text} if piece.text or first else {})
        return self._values(
            "chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": piece.finish_reason}]
        )

    def usage_chunk(self, last: Piece) -> dict:
        """The last chunk, where it was asked for."""
        return self._values("chat.completion.chunk", []) | {"usage": self._usage(last)}

    def _values(self, kind: str, choices: list) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _usage(self, last: Piece) -> dict:
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": last.num_tokens}
        return counts | {"total_tokens": sum(counts.values())}
