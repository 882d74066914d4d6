"""One OpenAI-compatible server: LM Studio, vLLM, mlx_vlm.server, Ollama. This is the only file that imports openai."""

import base64
import io
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from PIL import Image

from mlxmm import environment
from mlxmm.captioners.caption_writer import Sampling, WrittenCaption
from mlxmm.errors import UserError

CONNECT_TIMEOUT = 5.0  # seconds
MODELS_TIMEOUT = 30.0  # seconds for the list of models
MAX_REASON = 300  # characters


class RequestFailed(Exception):
    """No caption came; the message says why, in one line, without the API key.

    `image` and `server` say which of them may be to blame. A request that is not `again` to be made fails its image. A
    server that is `unusable` gives captions of no image. `retry_after` is in seconds, if the server said it.
    """

    def __init__(self, reason: str, *, image=True, server=True, again=True, unusable=False, retry_after=None):
        super().__init__(reason)
        self.image, self.server, self.again = image, server, again
        self.unusable, self.retry_after = unusable, retry_after


class ChatServer:
    """The server at `url`, as http://localhost:1234/v1, and its `model`. Raises `UserError`.

    Nothing is sent anywhere else: redirects are not followed, and proxies of the environment are not used.
    """

    def __init__(self, url: str, model: str, timeout: float):
        require_url(url)
        openai = _openai()
        self.url, self.model, self._key = url, model, environment.openai_api_key()
        self._client = openai.OpenAI(
            base_url=url,
            api_key=self._key or "none",
            timeout=openai.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
            max_retries=0,  # `ServerWriter` retries: it knows the other servers
            http_client=openai.DefaultHttpxClient(trust_env=False, follow_redirects=False),
        )

    def write(self, image: Image.Image, prompt: str, sampling: Sampling) -> WrittenCaption:
        """Raises `RequestFailed`."""
        image_part = {"type": "image_url", "image_url": {"url": data_url(image)}}
        answer = self._call(
            self._client.chat.completions.create,
            model=self.model,
            messages=[{"role": "user", "content": [image_part, {"type": "text", "text": prompt}]}],
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        return _caption(answer, image)

    def revision(self) -> str | None:
        """What /v1/models says that it serves under this model's name (vLLM's `root`); None if it says nothing.

        Raises `RequestFailed` if the server does not answer, and `UserError` if it wants another API key.
        """
        try:
            answer = self._call(self._client.models.list, timeout=MODELS_TIMEOUT)
        except RequestFailed as failure:
            if failure.__cause__ is not None and _status(failure.__cause__) in (401, 403):
                raise UserError(f"{self.url} does not take the key in OPENAI_API_KEY: {failure}") from None
            if _status(failure.__cause__) is not None:
                return None  # it answers, but has no list
            raise
        entries = getattr(answer, "data", None) or []
        return next((getattr(entry, "root", None) for entry in entries if entry.id == self.model), None)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _call(self, function, **arguments):
        openai = _openai()
        try:
            return function(**arguments)
        except openai.APIStatusError as error:
            raise self._failure_of_status(error) from error
        except openai.APITimeoutError as error:
            raise RequestFailed("no answer in time") from error
        except openai.APIConnectionError as error:
            raise RequestFailed(self._line(f"connection failed: {error.__cause__ or error}")) from error
        except (openai.OpenAIError, ValueError) as error:
            raise RequestFailed(self._line(f"the answer cannot be read: {error}")) from error
        except Exception as error:  # the transport's own, as of an answer that ends in its middle
            raise RequestFailed(self._line(f"connection failed: {error}")) from error

    def _failure_of_status(self, error) -> RequestFailed:
        status, said = error.status_code, error.body or error.response.text
        said = said.get("message", said) if isinstance(said, dict) else said
        reason = self._line(f"HTTP {status}: {said}")
        wait = _retry_after(error.response.headers.get("retry-after"))
        if status >= 500:
            return RequestFailed(reason, retry_after=wait)
        if status == 429:
            return RequestFailed(reason, image=False, retry_after=wait)
        if status in (401, 404):  # the key or the model, whatever the image
            return RequestFailed(reason, image=False, unusable=True)
        return RequestFailed(reason, server=False, again=status in (408, 409), retry_after=wait)

    def _line(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:MAX_REASON]


def require_url(url: str) -> None:
    """Raise `UserError` unless this is the address of a server."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{url!r} is not the address of a server, as http://localhost:1234/v1")


def data_url(image: Image.Image) -> str:
    """The image in the request itself: PNG, so that the server reads the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _caption(answer, image: Image.Image) -> WrittenCaption:
    try:
        choice = answer.choices[0]
        text = choice.message.content or ""
        text = text.strip()
    except (AttributeError, TypeError, IndexError):
        raise RequestFailed("the answer holds no caption") from None
    if not text:
        raise RequestFailed("the caption is empty", server=False)
    num_tokens = getattr(getattr(answer, "usage", None), "completion_tokens", None) or 0
    reason = choice.finish_reason or "stop"
    return WrittenCaption(
        text=text, num_tokens=num_tokens, finish_reason=reason, width=image.width, height=image.height
    )


def _status(error: BaseException | None) -> int | None:
    return getattr(error, "status_code", None)


def _retry_after(header: str | None) -> float | None:
    """Seconds, of a number of them or of a date; None of anything else."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _openai():
    try:
        import openai
    except ImportError:
        raise UserError("captions by a server need openai: pip install 'mlxmm[server]'") from None
    return openai
