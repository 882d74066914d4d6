"""What a refresh of captions in the background costs training: updates per second with one, and without, in turns.

    python tools/benchmark_refresh.py

A small captioner is trained on drawn pictures while a `CaptionRefresh` writes captions of others: by the same captioner
in a child process on this machine, and by a server that answers each request after 0.2 s and computes elsewhere. Within
one run the writer is paused and let go again every few updates, so that both turns feel whatever else the machine does.
Prints the median of the turns, their least and most, and the captions per second that were written meanwhile.
"""

import argparse
import http.server
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import attrs
import mlx.core as mx

from mlxmm import Callback, CaptionDecoder, Trainer
from mlxmm.callbacks import SyntheticRefresh
from mlxmm.captioners.own_child_writer import OwnChildWriter
from mlxmm.captioners.refresh import CaptionRefresh
from mlxmm.captioners.server_writer import ServerConfig, ServerWriter
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.modules.caption_decoder import CaptionDecoderConfig
from mlxmm.networks.clip import CLIPVisionTower
from mlxmm.networks.towers import VisionConfig
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import train_tokenizer

SHAPES = ShapesConfig(num_train=256, num_val=8, num_test=8)
NUM_PICTURES = 50_000  # more than are captioned while this runs
BATCH_SIZE = 16
SECONDS_OF_A_REQUEST = 0.2


class Endless(list):
    """The same pictures again and again, as if each were another one."""

    def __len__(self) -> int:
        return NUM_PICTURES

    def __getitem__(self, place: int):
        return super().__getitem__(place % super().__len__())

    def sha256(self, place: int) -> str:
        return f"{place:064x}"


class PausedWriter:
    """A writer that can be paused between two batches."""

    def __init__(self, writer):
        self.writer, self.name, self.revision, self.batch_size = writer, writer.name, writer.revision, writer.batch_size
        self.started, self.may_write, self.num_captions = threading.Event(), threading.Event(), 0
        self._writing = threading.Lock()
        self.may_write.set()

    def write(self, images, prompts, sampling):
        self.started.set()
        self.may_write.wait()
        with self._writing:
            written = self.writer.write(images, prompts, sampling)
        self.num_captions += len(written)
        return written

    def pause(self) -> None:
        """Return once nothing is written any more."""
        self.may_write.clear()
        with self._writing:
            pass

    def close(self) -> None:
        self.may_write.set()
        self.writer.close()


@attrs.define
class Turns(Callback):
    """Lets the writer go and pauses it, every `updates` updates; `rates` are updates per second of each turn."""

    writer: PausedWriter
    updates: int
    num_turns: int
    rates: dict = attrs.field(factory=lambda: {True: [], False: []}, init=False)
    captions: list = attrs.field(factory=list, init=False)  # per second, of each turn with the writer
    _is_writing: bool = attrs.field(default=False, init=False)
    _num: int = attrs.field(default=-1, init=False)  # updates of this turn; -1: the turns have not begun
    _start: tuple = attrs.field(default=(0.0, 0), init=False)

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self._num += self.writer.started.is_set()
        if self._num == self.updates:
            self._end_turn()
        if self._num == 0:
            self._switch()
        trainer.should_stop = len(self.rates[False]) + len(self.rates[True]) >= 2 * self.num_turns

    def _end_turn(self) -> None:
        seconds = time.perf_counter() - self._start[0]
        self.rates[self._is_writing].append(self.updates / seconds)
        if self._is_writing:
            self.captions.append((self.writer.num_captions - self._start[1]) / seconds)
        self._num = 0

    def _switch(self) -> None:
        self._is_writing = not self._is_writing
        if self._is_writing:
            self.writer.may_write.set()
        else:
            self.writer.pause()
        self._start = time.perf_counter(), self.writer.num_captions


def make_captioner(source) -> CaptionDecoder:
    mx.random.seed(0)
    vision = VisionConfig()
    config = CaptionDecoderConfig(layer=-2, max_new_tokens=16)
    described = {"model_type": "clip_vision_model"} | attrs.asdict(vision)
    processor = ImageProcessor.square(vision.image_size)
    tokenizer = train_tokenizer(source.sample_captions(), 300)
    return CaptionDecoder(config, CLIPVisionTower(vision), described, processor, tokenizer)


def measure(make_writer, arguments, folder: Path) -> None:
    source = open_source(CaptionDataConfig(shapes=SHAPES, batch_size=BATCH_SIZE), 0)
    drawn = list(source.rows["train"])  # once, so that drawing does not count
    module = make_captioner(source)
    data = CaptionData(source, transform=module.transform, collate=module.collate)
    data.replace_rows("train", drawn)
    quiet = {"logger": False, "limit_val_batches": 0, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(max_steps=1, **quiet).fit(module, data)
    module.trainer.save_checkpoint(folder / "captioner")
    writer = PausedWriter(make_writer(folder / "captioner"))
    pictures = Endless(row["image"] for row in drawn)
    refresh = CaptionRefresh(folder / "refresh", drawn, writer, {"none": ""}, pictures=pictures)
    turns = Turns(writer, arguments.updates, arguments.turns)
    trainer = Trainer(max_steps=10**6, callbacks=[SyntheticRefresh(refresh), turns], **quiet)
    try:
        trainer.fit(module, data)
    finally:
        refresh.close()
    report(turns)


def report(turns: Turns) -> None:
    medians = {is_writing: statistics.median(rates) for is_writing, rates in turns.rates.items()}
    for is_writing, name in ((False, "without"), (True, "with")):
        rates = turns.rates[is_writing]
        print(f"  {name:<8}{medians[is_writing]:7.2f} updates/s ({min(rates):.2f} to {max(rates):.2f})")
    share, captions = medians[True] / medians[False], statistics.median(turns.captions)
    print(f"  {share:.0%} of the updates, and {captions:.1f} captions/s", flush=True)


class SlowServer(http.server.BaseHTTPRequestHandler):
    """Answers every request after a while, as a model on another machine does."""

    def do_GET(self):
        self.send(404, {})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(SECONDS_OF_A_REQUEST)
        message = {"role": "assistant", "content": "a small red circle"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self.send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices})

    def send(self, status: int, values: dict) -> None:
        text = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args): ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=5, help="of a turn")
    parser.add_argument("--turns", type=int, default=20, help="with the writer, and as many without")
    arguments = parser.parse_args()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    writers = {
        "a captioner of ours in a child process": lambda captioner: OwnChildWriter(str(captioner)),
        "a server elsewhere": lambda _: ServerWriter(ServerConfig(urls=(url,), model="m")),
    }
    for name, make_writer in writers.items():
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            measure(make_writer, arguments, Path(folder))


if __name__ == "__main__":
    main()
