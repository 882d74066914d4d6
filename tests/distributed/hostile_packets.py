"""What strangers may send to the port at which ranks meet: by name, the pieces of what they send, and the seconds
between two pieces. A rank of this user's other runs knows the secret: its packets are functions of the greeting."""

import json
import struct

HELLO = {"rank": 1, "pid": 1, "flags": "0" * 64, "challenge": "0" * 32, "proof": "0" * 64}


def line(**changes) -> bytes:
    return json.dumps(HELLO | changes).encode() + b"\n"


PACKETS: dict[str, list[bytes]] = {
    "nothing": [],
    "an empty line": [b"\n"],
    "many empty lines": [b"\n" * 5000],
    "garbage": [bytes(range(256)) * 4],
    "garbage with line ends": [b"\xff\xfe\n\x00\n" * 100],
    "a browser": [b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"],
    "TLS": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x55" * 500],
    "a rank of MLX's ring": [struct.pack("<i", 1)],
    "rank 1 as it was": [b'{"rank": 1, "flags": []}\n'],
    "rank 99 as it was": [b'{"rank": 99, "flags": []}\n'],
    "rank 1 without a proof": [json.dumps({k: v for k, v in HELLO.items() if k != "proof"}).encode() + b"\n"],
    "rank 1 with a wrong proof": [line()],
    "rank 0": [line(rank=0)],
    "rank 99": [line(rank=99)],
    "rank -1": [line(rank=-1)],
    "a rank of a thousand digits": [b'{"rank": ' + b"9" * 1000 + b"}\n"],
    "a rank of ten thousand digits": [b'{"rank": ' + b"9" * 10_000 + b"}\n"],
    "a rank that is a list": [line(rank=[1])],
    "a rank that is a text": [line(rank="1")],
    "a rank that is NaN": [line(rank=float("nan"))],
    "other flags": [line(flags="1" * 64)],
    "flags that are a list": [line(flags=["--x"])],
    "unknown fields": [line(admin=True)],
    "a list": [b"[1, 2, 3]\n"],
    "null": [b"null\n"],
    "deep nesting": [b"[" * 8000 + b"]" * 8000 + b"\n"],
    "deep nesting of objects": [b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"\n"],
    "a huge line": [b"x" * (1 << 22)],
    "a failure": [b'{"failed": "rank 7 died"}\n'],
    "a hello in two pieces": [line()[:20], line()[20:]],
    "a hello that never ends": [line()[:40]],
    "a slow drip": [bytes([byte]) for byte in line()[:40]],
    "a report and a farewell": [b'{"count": 3, "waits": false}\n{"count": 3, "left": true}\n'],
}
