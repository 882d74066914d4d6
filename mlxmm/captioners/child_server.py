"""What a child process that captions images does: it loads a model, and answers the messages of its parent."""

import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from PIL import Image

from mlxmm.captioners.messages import read_message, write_message


def serve(load: Callable[[str], Any], write_captions: Callable[..., list]) -> None:
    """Answer messages until standard input is closed: by the parent, or because the parent has died.

    `load(folder)` gives the model of the folder that is the program's argument, and `write_captions(model, images,
    prompts, sampling)` a caption of each image: its text, its number of tokens and, where it is known, why it ended.
    """
    requests, answers = sys.stdin.buffer, _take_stdout()
    received: queue.Queue = queue.Queue()
    threading.Thread(target=_receive, args=(requests, received), daemon=True).start()
    try:
        model = load(sys.argv[1])
    except Exception as error:  # mlx-vlm and transformers raise a dozen kinds
        write_message(answers, {"error": _line(error)})
        return
    write_message(answers, {"ready": True})
    while True:
        write_message(answers, _answer(model, write_captions, *received.get()))


def _take_stdout() -> BinaryIO:
    """Standard output for messages alone: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _receive(requests: BinaryIO, received: queue.Queue) -> None:
    """In a thread, so that the process ends at once with its parent, also in the middle of a batch."""
    while (message := read_message(requests)) is not None:
        received.put(message)
    os._exit(0)


def _answer(model, write_captions: Callable[..., list], request: dict, blobs: list[bytes]) -> dict:
    """{"captions": [(text, number of tokens, …)]}, or {"error": one line}."""
    images = [Image.frombytes("RGB", tuple(size), blob) for size, blob in zip(request["sizes"], blobs)]
    try:
        return {"captions": write_captions(model, images, request["prompts"], request["sampling"])}
    except Exception as error:
        return {"error": _line(error)}


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
