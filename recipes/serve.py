"""Serve a model on this machine: a page to try it, and OpenAI's chat completions for other programs.

    python -m recipes.serve runs/align_qwen3/mine
    python -m recipes.serve runs/train_clip/mine/model --port 8080

The page takes a picture: it shows a caption, how well the classes fit that you type, and which parts of the picture say
so. Programs send pictures to http://127.0.0.1:PORT/v1 as data URLs. Nothing outside this machine can reach it.
"""

from pathlib import Path

import attrs
from attrs.validators import ge, le, optional
from PIL import Image

from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, from_json, option, positional
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.distributed.signals import Ended
from mlxmm.errors import UserError
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.modules.loading import KINDS, load_captioner
from mlxmm.storage.hub import local_folder
from mlxmm.storage.pretrained import read_config, read_json
from mlxmm.storage.runs import model_of
from mlxmm.terminal import say

NUM_EXAMPLES = 12
PORT, NUM_PORTS = 8765, 20  # the first that is tried, and how many


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config:
    """What to serve, and where."""

    model: str | None = positional(None, "folder of a run, checkpoint, folder or Hub id of a captioner or a CLIP")
    port: int | None = option(
        None, f"port on 127.0.0.1; none: {PORT}, or the next that is free; 0: any", optional([ge(0), le(65_535)])
    )
    api_key: str | None = option(None, "key that every request must have; none: this machine's users may all ask")
    use_text: bool = option(False, "the text of a request is the prompt, in place of the one of training")


def main(config: Config) -> None:
    if config.model is None:
        raise UserError("name what to serve: the folder of a run, a checkpoint or a Hub id")
    folder = local_folder(model_of(config.model))
    if not (folder / "config.json").is_file():  # said before a port is looked for
        raise UserError(f"{folder} holds no model: name the folder of a run, a checkpoint or an exported model")
    try:
        from mlxmm.serving.app import HOST, Served, bind, serve
    except ModuleNotFoundError as error:
        raise UserError(f'pip install "mlxmm[serve]": {error.name} is missing') from None
    bound = bind(*range(PORT, PORT + NUM_PORTS) if config.port is None else [config.port])
    served = Served(
        model=load(folder),
        name="/".join(Path(config.model).parts[-2:]),
        examples=examples(Path(config.model)),
        api_key=config.api_key,
        uses_text=config.use_text,
    )
    address = f"http://{HOST}:{bound.getsockname()[1]}"
    say(f"page: {address}", f"for OpenAI's clients: {address}/v1, model {served.name}", "Ctrl-C ends it")
    try:
        serve(served, bound)
    except KeyboardInterrupt:
        say("stopped")
    except Ended as error:  # as a service manager ends it
        say("stopped")
        raise SystemExit(error.code) from None


def load(folder: Path):
    """The captioner or CLIP in a folder. Raises `UserError`."""
    if read_config(folder).get("model_type") in KINDS:
        return load_captioner(folder)
    return ContrastiveCLIP.from_pretrained(folder)


def examples(run: Path) -> list[tuple[Image.Image, str]]:
    """The first test pictures of a run, each with its caption; none where its data cannot be opened, which a line says,
    and of what is no run."""
    if not run.is_dir():
        return []
    try:
        values = read_json(run / "config.json")
        source = open_source(from_json(CaptionDataConfig, values["data"]), values["seed"], to_train=False)
        rows = source.rows["test"]
    except KeyError:
        return []
    except UserError as error:
        say(f"no pictures of the run are shown: {error}")
        return []
    return [(rows[i]["image"], rows[i]["captions"][0]) for i in range(min(len(rows), NUM_EXAMPLES))]


if __name__ == "__main__":
    run_recipe("serve", main, {"default": Preset("", Config())})
