"""Captions by servers: every way to fail has its outcome, and what no image is to blame for fails no image."""

import email.utils
import importlib.util
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image
from small_server import SmallServer, caption

from mlxmm.captioners.caption_writer import CaptionFailure, Sampling, WriterFailed, WrittenCaption
from mlxmm.captioners.server_writer import ServerConfig, ServerWriter
from mlxmm.errors import UserError

FAST = {"model": "m", "concurrency": 2, "backoff_seconds": 0.01, "pause_seconds": 0.1, "timeout_seconds": 1.0}


@pytest.fixture
def serve():
    servers = []

    def start(*arguments, **settings) -> SmallServer:
        servers.append(SmallServer(*arguments, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def open_writer(*servers, **settings) -> ServerWriter:
    urls = tuple(server if isinstance(server, str) else server.url for server in servers)
    return ServerWriter(ServerConfig(**{"urls": urls} | FAST | settings))


def write(writer: ServerWriter, reds) -> list:
    images = [Image.new("RGB", (20, 10), (red, 0, 0)) for red in reds]
    try:
        return writer.write(images, [f"p{red}" for red in reds], Sampling(max_tokens=5, temperature=0.5, seed=7))
    finally:
        writer.close()


def outcome(result) -> str:
    return result.text if isinstance(result, WrittenCaption) else f"failed: {result.reason}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


REFUSAL = "I cannot describe this picture."
NO_CHOICES = {name: value for name, value in caption("x").items() if name != "choices"}


@pytest.mark.parametrize(
    ("answers", "expected", "num_requests"),
    [
        ([200], "5", 1),
        ([500, 503, 200], "5", 3),
        ([500] * 9, "failed: HTTP 500: .*what went wrong.*", 3),
        ([408, 409, 200], "5", 3),
        ([400], "failed: HTTP 400: .*what went wrong.*", 1),
        ([403], "failed: HTTP 403: .*", 1),
        ([422], "failed: HTTP 422: .*", 1),
        ([302], "failed: HTTP 302: .*", 1),
        ([429] * 4 + [200], "5", 5),  # more than its retries: the image is not to blame
        ([(429, "0.3"), 200], "5", 2),
        ([(503, "0.3"), 200], "5", 2),
        (["hang", 200], "5", 2),
        (["hang"] * 3, "failed: no answer in time", 3),
        (["close", 200], "5", 2),
        (["close"] * 3, "failed: connection failed: .*", 3),
        (["no JSON {", 200], "5", 2),
        (["no JSON {"] * 3, "failed: the answer (cannot be read|holds no caption).*", 3),
        (["[]"] * 3, "failed: the answer (cannot be read|holds no caption).*", 3),
        ([NO_CHOICES] * 3, "failed: the answer holds no caption", 3),
        ([caption("x", choices=[])] * 3, "failed: the answer holds no caption", 3),
        ([caption(["x"])] * 3, "failed: the answer holds no caption", 3),
        ([caption(" \n")] * 3, "failed: the caption is empty", 3),
        ([caption(None), 200], "5", 2),
        ([caption(REFUSAL)], REFUSAL, 1),  # a caption: filters drop it
        ([caption(" two words \n", usage=None)], "two words", 1),
    ],
    ids=str,
)
def test_every_answer_has_its_outcome(answers, expected, num_requests, serve):
    server = serve(lambda number, image: answers[number])
    [result] = write(open_writer(server, max_retries=2), [5])
    assert re.fullmatch(expected, outcome(result))
    assert len(server.requests) == num_requests


def test_a_request_has_the_image_itself_and_the_sampling_and_the_caption_its_size(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve()
    writer = open_writer(server, max_pixels=28 * 28)
    image = Image.effect_noise((200, 100), 90).convert("RGB")
    [result] = writer.write([image], ["What is this?"], Sampling(max_tokens=5, temperature=0.5, top_p=0.9, seed=7))
    writer.close()
    assert (result.width, result.height, result.num_tokens, result.finish_reason) == (39, 19, 3, "stop")
    [request] = server.requests
    assert request["image"].size == (39, 19) and request["key"] == "Bearer sk-secret"
    assert request["messages"][0]["content"][1] == {"type": "text", "text": "What is this?"}
    sent = {name: request[name] for name in ("model", "max_tokens", "temperature", "top_p", "seed")}
    assert sent == {"model": "m", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 7}


def test_captions_come_in_the_order_of_their_images_with_so_many_requests_at_once(serve):
    server = serve(lambda number, image: time.sleep(0.05) or 200)
    writer = open_writer(server, concurrency=3)
    assert [r.text for r in write(writer, range(24))] == [str(red) for red in range(24)]
    assert max(request["busy"] for request in server.requests) == 3 and writer.batch_size == 12


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_obeyed_by_all_requests_up_to_a_bound(date, serve):
    wait = email.utils.formatdate(time.time() + 100, usegmt=True) if date else "100"
    server = serve(lambda number, image: (429, wait) if number == 0 else 200)
    writer = open_writer(server, concurrency=1, max_retry_after_seconds=0.5)
    assert [r.text for r in write(writer, range(3))] == ["0", "1", "2"]
    first, second = (request["time"] for request in server.requests[:2])
    assert second - first >= 0.5


def test_a_server_that_dies_gets_no_more_work_and_the_other_one_does_it(serve):
    good, bad = serve(), serve(lambda number, image: 500)
    writer = open_writer(good, bad, max_failures=3, pause_seconds=60.0)
    assert [r.text for r in write(writer, range(30))] == [str(red) for red in range(30)]
    assert 3 <= len(bad.requests) <= 4 and len(good.requests) == 30
    there_is_nobody = f"http://127.0.0.1:{free_port()}/v1"
    assert [r.text for r in write(open_writer(good, there_is_nobody, pause_seconds=60.0), range(9))][-1] == "8"


def test_a_server_that_comes_back_is_asked_by_single_requests_on_trial_and_then_has_work_again(serve):
    since_first = lambda: time.monotonic() - server.requests[0]["time"]
    server = serve(lambda number, image: time.sleep(0.03) or (500 if since_first() < 1.5 else 200))
    writer = open_writer(server, concurrency=4, max_failures=3, pause_seconds=0.2)
    assert [r.text for r in write(writer, range(20))] == [str(red) for red in range(20)]
    start = server.requests[0]["time"]
    on_trial = [request["busy"] for request in server.requests if 0.5 < request["time"] - start < 1.4]
    assert set(on_trial) == {1} and len(on_trial) <= 4
    assert max(request["busy"] for request in server.requests[-15:]) > 1


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (lambda number, image: 500, "HTTP 500"),
        (lambda number, image: 429, "HTTP 429"),
        (lambda number, image: 401, "HTTP 401"),
        (lambda number, image: 404, "HTTP 404"),
        (lambda number, image: "garbage", "the answer"),
    ],
)
def test_if_all_servers_are_down_for_long_no_image_fails_but_the_writer(behaviour, reason, serve):
    servers = serve(behaviour), serve(behaviour)
    writer = open_writer(*servers, max_failures=2, max_down_seconds=0.5, max_retries=9)
    with pytest.raises(WriterFailed, match=f"no server gives captions: .*{reason}.*; .*{reason}") as error:
        write(writer, range(20))
    assert "\n" not in str(error.value)
    assert sum(len(server.requests) for server in servers) < 30


def test_an_image_that_breaks_every_server_fails_and_the_others_do_not(serve):
    behaviour = lambda number, image: "close" if image.getpixel((0, 0))[0] == 3 else 200
    results = write(open_writer(serve(behaviour), serve(behaviour), max_retries=2), range(12))
    assert isinstance(results[3], CaptionFailure)
    assert [outcome(r) for r in results[:3] + results[4:]] == [str(red) for red in range(12) if red != 3]


@pytest.mark.parametrize(
    ("models", "revision"),
    [
        ([{"id": "m", "object": "model", "created": 1, "owned_by": "vllm", "root": "user/name"}], "user/name"),
        ([{"id": "other", "object": "model", "created": 1, "owned_by": "vllm", "root": "user/name"}], "unknown"),
        ([{"id": "m", "object": "model", "created": 1, "owned_by": "me"}], "unknown"),
        ([], "unknown"),
        (404, "unknown"),
    ],
)
def test_the_revision_is_what_the_server_says_of_the_model(models, revision, serve):
    writer = open_writer(serve(models=models))
    assert (writer.name, writer.revision) == ("m", revision)


@pytest.mark.parametrize(
    "url", ["", "localhost:1234", "ftp://x/v1", "http://", "/v1", "http://x:port", "http://x:99999"]
)
def test_an_address_that_is_none_is_one_line(url):
    with pytest.raises(UserError, match="is not the address of a server, as http://"):
        open_writer(url)


def test_no_address_no_server_a_wrong_key_and_no_client_are_one_line(serve, monkeypatch):
    with pytest.raises(UserError, match="need its address and its model"):
        open_writer()
    with pytest.raises(UserError, match="no server answers: http://127.0.0.1"):
        open_writer(f"http://127.0.0.1:{free_port()}/v1")
    with pytest.raises(UserError, match="does not take the key in OPENAI_API_KEY: HTTP 401"):
        open_writer(serve(models=401))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'mlxmm\[server\]'"):
        open_writer(serve())


def test_the_key_is_in_no_message_and_neither_proxies_nor_redirects_get_anything(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    proxy = serve(lambda number, image: caption("by the proxy"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    [good] = write(open_writer(serve()), [4])
    [sent_on] = write(open_writer(serve(lambda number, image: (307, f"{proxy.url}/chat/completions"))), [4])
    assert good.text == "4" and "HTTP 307" in sent_on.reason and proxy.requests == []
    [result] = write(open_writer(serve(lambda number, image: {"error": "bad key sk-secret"}, status=400)), [4])
    assert "bad key ***" in result.reason and "sk-secret" not in result.reason


@pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")
def test_mlx_vlms_server_writes_the_captions_of_mlx_vlm_itself(tmp_path):
    from test_mlx_vlm_writer import GREEDY, pictures
    from tiny_qwen_vl import save_tiny_qwen_vl

    from mlxmm.captioners.mlx_vlm_writer import MlxVlmConfig, MlxVlmWriter

    model, port = str(save_tiny_qwen_vl(tmp_path)), free_port()
    images, prompts = pictures(12)
    local = MlxVlmWriter(MlxVlmConfig(model=model))
    expected = local.write(images, prompts, GREEDY)
    local.close()
    command = [sys.executable, "-m", "mlx_vlm.server", "--host", "127.0.0.1", "--port", str(port), "--model", model]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            writer = open_writer(f"http://127.0.0.1:{port}/v1", model=model, timeout_seconds=60.0)
            results = writer.write(images, prompts, GREEDY)
            writer.close()
        finally:
            server.terminate()
    assert [outcome(r) for r in results] == [r.text for r in expected]
    assert [r.finish_reason for r in results] == [r.finish_reason for r in expected]
    ends = [r.finish_reason == "stop" for r in results]  # the server counts the token that ends a caption
    assert [r.num_tokens - end for r, end in zip(results, ends)] == [r.num_tokens for r in expected]


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
