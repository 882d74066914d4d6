"""How ranks meet, and who does not join them: strangers, other runs, packets of every kind."""

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile_packets import PACKETS

from mlxmm.distributed import meeting
from mlxmm.distributed.launch import Launch
from mlxmm.distributed.messages import MAX_LINE, BadMessage, Peer, parse
from mlxmm.errors import UserError

ROOT = Path(__file__).parents[2]
SECRET = "a secret of this test"


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("MLXMM_RANK_SECRET", SECRET)


def connect(address):
    """A connection to who listens at `address`, as soon as somebody does."""
    place, _, port = address.partition(":")
    for _ in range(200):
        with contextlib.suppress(OSError):
            return socket.create_connection((place, int(port)), timeout=5)
        time.sleep(0.01)
    raise AssertionError("nobody listens")


def send(address, pieces):
    """Send the pieces of a packet; return the connection, which stays open."""
    connection = connect(address)
    for piece in pieces:
        with contextlib.suppress(OSError):  # it was refused before the last piece
            connection.sendall(piece)
            time.sleep(0.002 if len(pieces) > 1 else 0)
    return connection


def start(pool, address, rank, size=2, limit=10.0):
    return pool.submit(meeting.meet, Launch("ring", rank, size, address), limit)


def assert_met(zero, one):
    [peer], [first] = zero.result(timeout=10), one.result(timeout=10)
    assert (peer.rank, first.rank) == (1, 0) and peer.pid == first.pid == os.getpid()
    assert peer.is_local()
    peer.send({"count": 3})
    assert first.receive() == [{"count": 3}]
    for one in (peer, first):
        one.connection.close()


@pytest.mark.parametrize("name", PACKETS)
def test_a_hostile_packet_neither_joins_a_start_nor_ends_it(name, address):
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        zero = start(pool, address, 0)
        stack.enter_context(send(address, PACKETS[name]))
        assert not zero.done()
        assert_met(zero, start(pool, address, 1))


def test_all_hostile_packets_at_once_do_not_keep_a_rank_away(address):
    with ThreadPoolExecutor(40) as pool, contextlib.ExitStack() as stack:
        zero = start(pool, address, 0)
        for packet in [*PACKETS.values()] * 4:  # more than may wait at once
            stack.enter_context(connection := connect(address))
            with contextlib.suppress(OSError):
                connection.sendall(b"".join(packet)[: 1 << 16])
        assert_met(zero, start(pool, address, 1))


def hello(challenge, secret=SECRET, **changes):
    facts = {"rank": 1, "pid": 1, "flags": meeting._flags(), "challenge": "0" * 32}
    return json.dumps(meeting._proved(facts | changes, secret.encode(), challenge)).encode() + b"\n"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rank": 99}, "a second rank 99, or one too many"),
        ({"rank": 0}, "a second rank 0, or one too many"),
        ({"flags": "0" * 64}, "rank 1 with other flags"),
        ({"secret": "that of another user"}, "has another secret"),
    ],
)
def test_a_rank_of_another_run_is_refused_with_the_reason(changes, why, address):
    with ThreadPoolExecutor() as pool:
        zero = start(pool, address, 0)
        guest = Peer(0, connect(address))
        guest.connection.sendall(hello(guest.receive()[0]["challenge"], **changes))
        [answer] = guest.receive()
        assert why in answer["failed"] and not zero.done()
        assert_met(zero, start(pool, address, 1))


def test_a_hello_in_pieces_is_a_hello(address):
    with ThreadPoolExecutor() as pool:
        zero = start(pool, address, 0)
        guest = Peer(0, connect(address))
        for byte in hello(guest.receive()[0]["challenge"]):
            guest.connection.sendall(bytes([byte]))
        assert zero.result(timeout=10)[0].rank == 1
        guest.connection.close()


def test_a_hello_counts_once_even_where_somebody_has_overheard_it(address):
    with ThreadPoolExecutor() as pool:
        zero = start(pool, address, 0)
        first, second = Peer(0, connect(address)), Peer(0, connect(address))
        overheard = hello(first.receive()[0]["challenge"])
        second.receive()
        second.connection.sendall(overheard)
        assert "another secret" in second.receive()[0]["failed"]
        assert_met(zero, start(pool, address, 1))


def test_who_listens_in_the_place_of_rank_0_is_not_believed(address):
    place, _, port = address.partition(":")
    with ThreadPoolExecutor() as pool, socket.create_server((place, int(port))) as server:
        one = start(pool, address, 1)
        imposter = Peer(1, server.accept()[0])
        imposter.send({"challenge": "0" * 32})
        [told] = imposter.receive()
        assert SECRET not in json.dumps(told)
        imposter.send({"pid": 1, "proof": told["proof"]})
        with pytest.raises(UserError, match="is not rank 0"):
            one.result(timeout=10)


def test_ranks_that_do_not_come_are_named_with_why_others_were_refused(address):
    with ThreadPoolExecutor() as pool, send(address_of(pool, address), PACKETS["a list"]):
        with pytest.raises(UserError, match=r"rank 1 did not come within 1 s .*; 1 connections were refused"):
            pool.started.result(timeout=10)


def address_of(pool, address):
    pool.started = start(pool, address, 0, limit=1.0)
    return address


def test_the_secret_is_made_once_for_all_ranks_and_read_by_this_user_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("MLXMM_RANK_SECRET")
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda _: meeting.shared_secret(), range(8)))
    assert len(set(secrets)) == 1 and len(secrets[0]) == 64
    [path] = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("")
    with pytest.raises(UserError, match="too short: delete"):
        meeting.shared_secret()


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b"1", b"[" * 5000, b'{"count": 1.5}', b'{"count": true}', b'{"left": 1}', b'{"x": 1}', b"\xff",
     b'{"failed": "' + b"x" * MAX_LINE + b'"}'],
)  # fmt: skip
def test_what_is_no_message_is_refused(line):
    with pytest.raises(BadMessage):
        parse(line)


WATCHED = """
import sys, time
from mlxmm.distributed import watchdog
from mlxmm.distributed.launch import Launch
watchdog.GRACE = 0.1
sys.argv[1:], address = [], sys.argv[1]
watchdog.gather(Launch("ring", 0, 2, address))
time.sleep(30)
"""
BAD_REPORTS = {
    "garbage": b"\xff\x00\n",
    "a list": b"[1]\n",
    "deep nesting": b"[" * 9000 + b"\n",
    "a count that is a text": b'{"count": "1"}\n',
    "no end of line": b"x" * (MAX_LINE + 1),
}


@pytest.mark.parametrize("name", BAD_REPORTS)
def test_a_bad_report_ends_a_rank_with_a_reason_and_not_its_watchdog(name, address, monkeypatch):
    monkeypatch.setattr(sys, "argv", [sys.argv[0]])
    child = subprocess.Popen([sys.executable, "-c", WATCHED, address], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    [first] = meeting.meet(Launch("ring", 1, 2, address), 20.0)
    first.connection.sendall(b'{"count": 1}\n' + BAD_REPORTS[name])
    _, told = child.communicate(timeout=20)
    assert child.returncode == 1 and told.startswith("error: rank 1 sent ") and len(told.splitlines()) == 1
