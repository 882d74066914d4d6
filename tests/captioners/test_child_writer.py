"""A child that dies or hangs: no caption is lost or another image's, and one bad image does not make batches small."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from mlxmm.captioners import child_writer
from mlxmm.captioners.caption_writer import CaptionFailure, Sampling, WriterFailed, WrittenCaption
from mlxmm.captioners.child_process import ChildFailed, ChildProcess
from mlxmm.captioners.child_writer import ChildWriter

ROOT = Path(__file__).parents[2]
# Captions an image with its first pixel's red. It aborts, as MLX does on Metal, if a batch has more images than its
# first argument; an image of red 255 aborts it, of 254 hangs it, of 253 raises, and of 252 aborts it the first time.
# It notes each batch in the file that is its second argument.
CHILD = """if True:
    import os, sys, time
    from messages import read_message, write_message
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    most, log = int(sys.argv[1]), sys.argv[2]
    write_message(stdout, {"ready": True})
    while (message := read_message(stdin)) is not None:
        reds = [blob[0] for blob in message[1]]
        with open(log, "a") as file:
            print(*reds, file=file)
        if len(reds) > most or 255 in reds or (252 in reds and open(log).read().count("252") == 1):
            print("[METAL] Insufficient Memory", file=sys.stderr, flush=True)
            os.abort()
        if 254 in reds:
            time.sleep(60)
        error = {"error": "ValueError: a bad image"} if 253 in reds else {}
        texts = [f"{red} {prompt}" for red, prompt in zip(reds, message[0]["prompts"])]
        write_message(stdout, {"captions": [(text, 2) for text in texts]} | error)
"""


def command(most: int, log: Path) -> list[str]:
    return ["env", f"PYTHONPATH={ROOT / 'mlxmm/captioners'}", sys.executable, "-c", CHILD, str(most), str(log)]


@pytest.fixture
def make_writer(tmp_path):
    writers = []

    def make(most: int = 100, batch_size: int = 8, timeout: float = 60.0) -> ChildWriter:
        child = ChildProcess(command(most, tmp_path / "log"), timeout)
        writer = ChildWriter(child, name="reds", revision="1", batch_size=batch_size, max_pixels=10_000)
        writers.append(writer)
        return writer

    yield make
    for writer in writers:
        writer.close()


def write(writer: ChildWriter, reds) -> list:
    images = [Image.new("RGB", (2, 3), (red, 0, 0)) for red in reds]
    return writer.write(images, [f"p{red}" for red in reds], Sampling(max_tokens=5))


def texts(results) -> list[str]:
    return [r.text if isinstance(r, WrittenCaption) else r.reason for r in results]


def batches(tmp_path) -> list[int]:
    return [len(line.split()) for line in (tmp_path / "log").read_text().splitlines()]


def right(reds) -> list[str]:
    return [f"{red} p{red}" for red in reds]


def test_captions_come_in_the_order_of_their_images_in_batches_of_the_given_size(make_writer, tmp_path):
    writer = make_writer(batch_size=4)
    results = write(writer, range(10))
    assert texts(results) == right(range(10)) and batches(tmp_path) == [4, 4, 2]
    assert results[0] == WrittenCaption(text="0 p0", num_tokens=2, finish_reason="stop", width=2, height=3)


def test_a_child_that_runs_out_of_memory_is_started_again_and_asked_for_half_from_then_on(make_writer, tmp_path):
    writer = make_writer(most=3, batch_size=8)
    assert texts(write(writer, range(20))) == right(range(20))
    assert writer.batch_size == 2
    assert batches(tmp_path) == [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    asked = (tmp_path / "log").read_text().splitlines()
    written = [line for line, num in zip(asked, batches(tmp_path)) if num <= 3]
    assert " ".join(written).split() == [str(red) for red in range(20)]  # each written once


@pytest.mark.parametrize(
    ("red", "reason"),
    [
        (255, "ended by SIGABRT: [METAL] Insufficient Memory"),
        (254, "no answer within 1.5 s"),
        (253, "ValueError: a bad image"),
    ],
)
def test_one_bad_image_fails_alone_with_its_reason_and_batches_stay_large(red, reason, make_writer):
    writer = make_writer(timeout=1.5)
    reds = [1, 2, 3, red, 5, 6, 7, 8]
    results = write(writer, reds)
    assert results[3] == CaptionFailure(reason)
    assert texts(results[:3] + results[4:]) == right([1, 2, 3, 5, 6, 7, 8])
    assert writer.batch_size == 8


def test_a_child_that_fails_whatever_the_image_is_the_writers_failure_and_not_the_images(make_writer, monkeypatch):
    monkeypatch.setattr(child_writer, "MAX_FAILURES_IN_A_ROW", 5)
    writer = make_writer(most=0)
    with pytest.raises(WriterFailed, match="reds failed 5 times in a row: ended by SIGABRT"):
        write(writer, range(8))
    with pytest.raises(WriterFailed, match="could not be loaded again: ended with exit code 3"):
        writer.child.close()
        writer.child.command = [sys.executable, "-c", "raise SystemExit(3)"]
        write(writer, [1])


def test_a_child_killed_between_batches_or_once_in_the_middle_of_one_image_costs_no_caption(make_writer):
    writer = make_writer()
    os.kill(writer.child.pid, signal.SIGKILL)
    assert texts(write(writer, [1])) == right([1])
    assert texts(write(writer, [252])) == right([252])


def test_a_child_ends_with_its_parent_and_after_close(make_writer):
    code = "import sys, time; from test_child_writer import *; child = ChildProcess(command(9, '/dev/null'), 60)\n"
    code += "child.start(); print(child.pid, flush=True); time.sleep(60)"
    path = f"PYTHONPATH={ROOT}:{Path(__file__).parent}"
    parent = subprocess.Popen(["env", path, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert ends(pid)
    writer = make_writer()
    pid = writer.child.pid
    writer.close()
    assert ends(pid) and writer.child.pid is None


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_program_that_is_no_child_fails_with_what_it_said_last():
    child = ChildProcess([sys.executable, "-c", "import sys; sys.exit('what went wrong')"], 60)
    with pytest.raises(ChildFailed, match="ended with exit code 1: what went wrong"):
        child.start()
    child = ChildProcess([sys.executable, "-c", "print('Loading ...' * 99, flush=True)"], 60)
    with pytest.raises(ChildFailed):
        child.start()
