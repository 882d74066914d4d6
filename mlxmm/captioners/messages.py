"""Messages over pipes: a header of JSON, then blobs of bytes, each after its length. No pickle."""

import json
import struct
from collections.abc import Sequence
from typing import BinaryIO

LENGTH = struct.Struct(">Q")
MAX_LENGTH = 1 << 32  # bytes; what is longer was not written by `write_message`


def write_message(stream: BinaryIO, header: dict, blobs: Sequence[bytes] = ()) -> None:
    """Write one message and flush it. Raises `OSError` if nobody reads."""
    for part in (json.dumps({"header": header, "num_blobs": len(blobs)}).encode(), *blobs):
        stream.write(LENGTH.pack(len(part)))
        stream.write(part)
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[dict, list[bytes]] | None:
    """The header and the blobs of the next message; None at the end of the stream, also within a message.

    Raises `ValueError` if this is no message.
    """
    try:
        head = json.loads(_read_part(stream))
        return head["header"], [_read_part(stream) for _ in range(head["num_blobs"])]
    except EOFError:
        return None


def _read_part(stream: BinaryIO) -> bytes:
    (length,) = LENGTH.unpack(_read_exactly(stream, LENGTH.size))
    if length > MAX_LENGTH:
        raise ValueError("this is no message")
    return _read_exactly(stream, length)


def _read_exactly(stream: BinaryIO, length: int) -> bytes:
    """Buffered streams return less only at their end."""
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data
