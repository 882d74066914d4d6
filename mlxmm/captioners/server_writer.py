"""Captions by OpenAI-compatible servers: several at once, with retries; one that is down gets no work."""

import time
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool

import attrs
from attrs.validators import ge, gt
from PIL import Image

from mlxmm.captioners.caption_writer import CaptionFailure, Sampling, WriterFailed, WrittenCaption
from mlxmm.captioners.chat_server import ChatServer, RequestFailed
from mlxmm.captioners.limit_pixels import limit_pixels
from mlxmm.captioners.server_pool import PoolLimits, ServerPool, backoff
from mlxmm.config import checked, option
from mlxmm.errors import UserError

BATCHES_IN_FLIGHT = 4  # images of a call for each request at once, so that few servers wait at its end


@attrs.frozen(kw_only=True, field_transformer=checked)
class ServerConfig:
    """Which servers write captions, and how long they may fail."""

    urls: tuple[str, ...] = option((), "servers, as http://localhost:1234/v1", first=True)
    model: str = option("", "the model, as the servers call it", first=True)
    concurrency: int = option(4, "requests at once to each server", ge(1))
    max_pixels: int = option(602_112, "larger images are made smaller; LM Studio makes them smaller again", ge(28 * 28))
    timeout_seconds: float = option(300.0, "a request without an answer for so long has failed", gt(0))
    max_retries: int = option(4, "more attempts for an image that failed", ge(0))
    backoff_seconds: float = option(0.5, "wait before the first of them; doubled for each, up to 30", ge(0), rare=True)
    max_retry_after_seconds: float = option(600.0, "longest wait that a server may ask for", ge(0), rare=True)
    max_failures: int = option(5, "failures in a row after which a server is down", ge(1), rare=True)
    pause_seconds: float = option(10.0, "wait between single requests to a server that is down", ge(0), rare=True)
    max_down_seconds: float = option(120.0, "end the job if all servers are down for so long", ge(0))


class ServerWriter:
    """A `CaptionWriter`. Raises `UserError` if an address is none, or no server answers.

    An image fails if the server refuses it (HTTP 4xx), or at the end of its retries. What no image is to blame for
    (HTTP 401, 404 and 429, servers that are down) fails no image, and in the end raises `WriterFailed`.
    """

    def __init__(self, config: ServerConfig):
        if not config.urls or not config.model:
            raise UserError("captions by a server need its address and its model: urls, as http://localhost:1234/v1")
        self.config, self.name, self.quantization, self._closed = config, config.model, "", False
        servers = [ChatServer(url, config.model, config.timeout_seconds) for url in config.urls]
        self.revision = _revision(servers)
        self.num_requests = len(servers) * config.concurrency  # at once
        self.batch_size = BATCHES_IN_FLIGHT * self.num_requests
        limits = PoolLimits(
            concurrency=config.concurrency,
            max_failures=config.max_failures,
            pause=config.pause_seconds,
            max_retry_after=config.max_retry_after_seconds,
            max_down=config.max_down_seconds,
        )
        self._pool = ServerPool(servers, limits)

    def write(
        self, images: Sequence[Image.Image], prompts: Sequence[str], sampling: Sampling
    ) -> list[WrittenCaption | CaptionFailure]:
        """For each image a caption by the prompt of the same place, or why there is none. Raises `WriterFailed`."""
        pairs = list(zip(images, prompts, strict=True))
        with ThreadPool(self.num_requests) as pool:  # of daemon threads: no request keeps a process from ending
            return pool.map(lambda pair: self._write_one(pair[0], pair[1], sampling), pairs, chunksize=1)

    def close(self) -> None:
        """Close all connections. A thread that writes gets `WriterFailed`, once its requests in flight have ended."""
        self._closed = True
        for place in self._pool.places:
            place.server.close()

    def _write_one(self, image: Image.Image, prompt: str, sampling: Sampling) -> WrittenCaption | CaptionFailure:
        image = limit_pixels(image.convert("RGB"), self.config.max_pixels)
        attempts = 0  # that the image may be to blame for
        while not self._closed:
            place, on_trial = self._pool.acquire()
            failure = None
            try:
                return place.server.write(image, prompt, sampling)
            except RequestFailed as error:
                failure = error
            finally:
                self._pool.release(place, failure)
            attempts += failure.image and not on_trial
            if not failure.again or attempts > self.config.max_retries:
                return CaptionFailure(str(failure))
            time.sleep(backoff(max(1, attempts), self.config.backoff_seconds))
        raise WriterFailed(f"{self.name} was closed")


def _revision(servers: Sequence[ChatServer]) -> str:
    """What the servers say of the model, or "unknown". Raises `UserError` if none of them answers."""
    said, failures = set(), []
    for server in servers:
        try:
            said.add(server.revision())
        except RequestFailed as failure:
            failures.append(f"{server.url}: {failure}")
    if not said:
        raise UserError(f"no server answers: {'; '.join(failures)}")
    return " | ".join(sorted(text for text in said if text)) or "unknown"
