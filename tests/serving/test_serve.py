"""`recipes.serve` as programs use it: OpenAI's own client, our captioner of servers, and requests that are wrong."""

import base64
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import openai
import pytest
from PIL import Image
from small_modules import small_aligner, small_clip

from mlxmm.captioners.caption_writer import Sampling
from mlxmm.captioners.server_writer import ServerConfig, ServerWriter
from mlxmm.networks.language_model import with_dtype
from mlxmm.serving.app import bind

ROOT = Path(__file__).parents[2]
PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)) for i in range(6)]


def start(folder, *flags):
    """The process of a server, and its address."""
    command = [sys.executable, "-m", "recipes.serve", str(folder), "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("page: http://127.0.0.1:"), line + process.stderr.read()
    return process, line.split()[1]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A captioner, and its folder."""
    module, folder = small_aligner(), tmp_path_factory.mktemp("served") / "captioner"
    vision = module.vision.config
    sizes = {name: getattr(vision, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= {name: getattr(vision, name) for name in ("intermediate_size", "image_size", "patch_size")}
    module.vision_config = {"model_type": "clip_vision_model", **sizes}
    module.lm_config = with_dtype(module.lm_config, module.language_model)
    module.save_pretrained(folder)
    return module, folder


@pytest.fixture(scope="module")
def address(module):
    process, address = start(module[1])
    yield address
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and "stopped" in output and errors == ""


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def messages(image, text="Describe."):
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": data_url(image)}}]
    return [{"role": "user", "content": parts}]


def client(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def post(address, path, body, **headers):
    """Status and values of the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(address + path, data, {"Content-Type": "application/json"} | headers)) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def test_openais_client_gets_the_captions_of_the_module_whole_and_streamed(address, module):
    expected, chat = module[0].caption(PICTURES[:2]), client(address).chat.completions
    [name] = [model.id for model in client(address).models.list()]
    for image, caption in zip(PICTURES, expected):
        whole = chat.create(model=name, messages=messages(image))
        assert whole.choices[0].message.content == caption != ""
        [tokens] = module[0].caption_tokens([image])
        assert whole.usage.completion_tokens == len(tokens) and whole.choices[0].finish_reason in ("stop", "length")
        chunks = list(
            chat.create(model=name, messages=messages(image), stream=True, stream_options={"include_usage": True})
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == caption
        assert chunks[-1].usage == whole.usage and len(chunks) > 2


def test_our_captioner_of_servers_writes_what_the_module_says(address, module):
    [name] = [model.id for model in client(address).models.list()]
    writer = ServerWriter(ServerConfig(urls=(f"{address}/v1",), model=name))
    written = writer.write(PICTURES, ["Describe."] * len(PICTURES), Sampling(max_tokens=8))
    writer.close()
    assert [caption.text for caption in written] == module[0].caption(PICTURES)


def test_a_request_in_the_form_of_vlmevalkit_gets_the_caption(address, module):
    """What VLMEvalKit's OpenAIWrapper posts (vlmeval/api/gpt.py: generate_inner, prepare_inputs)."""
    file = io.BytesIO()
    PICTURES[0].save(file, "JPEG")
    picture = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": picture, "detail": "low"}},
        {"type": "text", "text": "Describe the picture."},
    ]
    asked = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": parts}]
    body = {"model": "gpt-4o", "messages": asked, "n": 1, "temperature": 0, "max_tokens": 2_048}
    [name] = [model.id for model in client(address).models.list()]
    status, answer = post(address, "/v1/chat/completions", body | {"model": name}, Authorization="Bearer sk-none")
    said = answer["choices"][0]["message"]["content"].strip()
    assert status == 200 and said == module[0].caption([Image.open(file)])[0]


def test_many_users_at_once_get_the_answers_of_each_alone(address, module):
    chat = client(address).chat.completions
    ask = lambda i: chat.create(
        model=client(address).models.list().data[0].id, messages=messages(PICTURES[i % 6]), temperature=1.0, seed=i
    )
    with ThreadPoolExecutor(12) as pool:
        together = [answer.choices[0].message.content for answer in pool.map(ask, range(12))]
    assert together == [ask(i).choices[0].message.content for i in range(12)]


def test_a_client_that_goes_away_holds_nobody_up(address):
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"messages": messages(PICTURES[0]), "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(20):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + body)
    started = time.monotonic()
    assert post(address, "/v1/chat/completions", {"messages": messages(PICTURES[1])})[0] == 200
    assert time.monotonic() - started < 10


GOOD = {"messages": messages(PICTURES[0])}
NOT_A_PICTURE = "data:image/png;base64," + base64.b64encode(b"no picture").decode()


def with_url(url):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


WRONG = [
    (b"{", 400, "the body is not JSON: a request is JSON, with the picture in it as a data URL"),
    (b"[]", 400, "the body is not a JSON object"),
    (b"[" * 100_000, 400, "the body is not JSON"),
    ({}, 400, "messages must hold one of the role user"),
    ({"messages": "hello"}, 400, "messages must hold one of the role user"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "a text or a list of parts"),
    ({"messages": [{"role": "user", "content": "hello"}]}, 400, "needs one picture"),
    (
        {"messages": messages(PICTURES[0])[:1] + [{"role": "user", "content": [{"type": "input_audio"}]}]},
        400,
        "input_audio",
    ),
    ({"messages": [{"role": "user", "content": messages(PICTURES[0])[0]["content"] * 2}]}, 400, "this one has 2"),
    (with_url("file:///etc/passwd"), 400, "addresses and files are not read"),
    (with_url("/etc/passwd"), 400, "addresses and files are not read"),
    (with_url("http://127.0.0.1:1/x.png"), 400, "addresses and files are not read"),
    (with_url(7), 400, "addresses and files are not read"),
    (with_url("data:image/png;base64,%%%"), 400, "not valid base64"),
    (with_url(NOT_A_PICTURE), 400, "not a picture"),
    (GOOD | {"model": "gpt-4o"}, 404, "no model 'gpt-4o' here"),
    (GOOD | {"n": 2}, 400, "n is not supported"),
    (GOOD | {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    (GOOD | {"temperature": -1}, 400, "temperature"),
    (GOOD | {"temperature": "hot"}, 400, "temperature"),
    (GOOD | {"max_tokens": -5}, 400, "max_new_tokens"),
    (GOOD | {"seed": "x"}, 400, "seed"),
    (GOOD | {"temperature": 10**400}, 400, "temperature"),
    (GOOD | {"temperature": math.inf}, 400, "temperature"),
    (GOOD | {"stream_options": [1]}, 400, "stream_options is an object"),
    (with_url("data:image/png;base64,\u00e9\ud800"), 400, "not valid base64"),
    ({"messages": [{"role": "user", "content": [{"type": "\ud800\x1b"}]}]}, 400, r"parts of type \ud800\x1b"),
]


@pytest.mark.parametrize(("body", "status", "line"), WRONG, ids=[line for *_, line in WRONG])
def test_a_request_that_cannot_be_answered_says_why(address, body, status, line):
    answered, values = post(address, "/v1/chat/completions", body)
    assert answered == status and line in values["error"]["message"] and "\n" not in values["error"]["message"]
    assert post(address, "/v1/chat/completions", GOOD)[0] == 200


@pytest.mark.parametrize(("text", "line"), [("a \ud800", "is not a text"), ("a " * 20_000, "20,000 are the most")])
def test_texts_that_are_none_or_too_long_are_refused_for_classes_and_heat(address, text, line):
    picture = data_url(PICTURES[0])
    asked = {"/api/classify": {"image": picture, "classes": ["a", text]}, "/api/heat": {"image": picture, "text": text}}
    for path, body in asked.items():
        status, values = post(address, path, body)
        assert status == 400 and line in values["error"]["message"]


def test_a_body_that_is_too_large_is_not_read(address):
    try:
        assert post(address, "/v1/chat/completions", bytes(40 * 2**20))[0] == 413
    except OSError:  # the connection was closed while it was sent
        pass
    assert post(address, "/v1/chat/completions", GOOD)[0] == 200


def test_a_page_of_another_name_is_refused(address):
    assert post_as("attacker.example", address) == 400
    assert post_as("localhost", address) == 200


def post_as(host, address):
    try:
        with urlopen(Request(f"{address}/health", headers={"Host": host})) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def test_classes_and_heat_come_from_a_captioner_and_from_a_clip(address, tmp_path):
    small_clip().save_pretrained(tmp_path / "clip")
    process, of_clip = start(tmp_path / "clip")
    try:
        for server in (address, of_clip):
            asked = {"image": data_url(PICTURES[0]), "classes": ["a red circle", "a blue square", "a circle"]}
            status, values = post(server, "/api/classify", asked)
            assert (
                status == 200 and sum(values["probabilities"]) == pytest.approx(1) and len(values["probabilities"]) == 3
            )
            status, values = post(server, "/api/heat", {"image": data_url(PICTURES[0]), "text": "a red circle"})
            assert status == 200 and np.shape(values["cells"]) == (7, 7) and np.abs(values["cells"]).max() > 0
            for classes, line in [
                ([], "class"),
                (["a", "a"], "class"),
                ("a", "classes is a list"),
                ([""] * 101, "most"),
            ]:
                status, values = post(server, "/api/classify", asked | {"classes": classes})
                assert status == 400 and line in values["error"]["message"]
        status, values = post(of_clip, "/v1/chat/completions", GOOD)
        assert status == 404 and "writes no captions" in values["error"]["message"]
    finally:
        process.kill()


def test_a_key_is_asked_for_and_never_printed(module):
    process, address = start(module[1], "--api-key", "secret-7")
    try:
        for key in (None, "Bearer wrong", "secret-7"):
            headers = {"Authorization": key} if key else {}
            assert post(address, "/v1/chat/completions", GOOD, **headers)[0] == 401
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").models.list()
        assert post(address, "/v1/chat/completions", GOOD, Authorization="Bearer secret-7")[0] == 200
    finally:
        process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert "secret-7" not in output + errors
    assert (process.returncode, output.splitlines()[-1], errors) == (128 + signal.SIGTERM, "stopped", "")


def test_wrong_uses_are_one_line(module, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = {
            (): "name what to serve",
            ("nowhere/at-all/x", "--port", port): "neither a folder",  # what is not there is said first
            (str(tmp_path), "--port", port): f"{tmp_path} holds no model",
            (str(module[1]), "--port", port): f"port {port}: address already in use",
        }
        for flags, line in cases.items():
            command = [sys.executable, "-m", "recipes.serve", *flags]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=60)
            assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_of_several_ports_the_first_that_is_free_is_taken_and_that_is_said(capsys):
    with bind(0) as taken, bind(0) as free:
        ports = [one.getsockname()[1] for one in (taken, free)]
        free.close()
        with bind(*ports) as found:
            assert found.getsockname() == ("127.0.0.1", ports[1])
    assert capsys.readouterr().out == f"port {ports[0]}: address already in use; the next one is tried\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_line_of_the_page_gets_a_caption_and_an_upload_is_told_what_is_wanted(address, module, tmp_path):
    PICTURES[0].save(tmp_path / "holiday.jpg", format="PNG")
    page = (ROOT / "docs" / "serve.md").read_text()
    [line] = re.findall(r"^    (printf .*?)\n\n", page, re.DOTALL | re.MULTILINE)
    line = line.replace("http://127.0.0.1:8765", address)
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == module[0].caption([PICTURES[0]])[0]
    upload = ["curl", "-s", "-F", "file=@holiday.jpg", f"{address}/v1/chat/completions"]
    done = subprocess.run(upload, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "no file is uploaded (docs/serve.md has a curl line)" in done.stdout


def test_the_python_of_the_page_gets_a_caption(address, module, tmp_path):
    [block] = re.findall(r"```py\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
    [name] = [model.id for model in client(address).models.list()]
    PICTURES[0].save(tmp_path / "holiday.jpg", quality=95)
    code = block.replace("http://127.0.0.1:8765", address).replace("align_qwen3/mine", name)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == module[0].caption([Image.open(tmp_path / "holiday.jpg")])[0], done.stderr
