"""What studies of written captions share: training on chosen captions of drawn scenes, held-out metrics, tables.

What is measured was never trained on: the pictures of the test split are drawn for it alone, and nothing is chosen by
it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from PIL import Image

from mlxmm import TrainerConfig
from mlxmm.captioners.caption_writer import CaptionWriter, Sampling
from mlxmm.captioners.filters import FilterConfig, Verdict, apply_filters
from mlxmm.captioners.job import Shard, hashes_of, journal_name, requests, write_captions
from mlxmm.captioners.journal import Entry, Journal
from mlxmm.captioners.records import candidates
from mlxmm.config import to_json
from mlxmm.data.caption_source import CaptionDataConfig, CaptionSource, open_source
from mlxmm.data.pictures import Pictures, pictures_of
from mlxmm.data.sources.rows import Rows
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.evaluation.clip import evaluate_shapes, retrieval_metrics
from mlxmm.modules.caption_decoder import CaptionDecoder, CaptionDecoderConfig
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.recipes import train_captioner
from mlxmm.recipes.parts import captioning, tower
from mlxmm.recipes.parts.plan import Plan
from mlxmm.storage.atomic import write_json
from mlxmm.storage.runs import Run

SEEDS = (1, 2, 3)
PROMPTS = {"describe": ""}  # our captioners are trained without a prompt
Metrics = dict[str, float]
Pairs = list[tuple[int, str]]  # scenes by their places, each with a caption


# ---- scenes and captions


@attrs.frozen
class CaptionedScenes(Sequence):
    """Some of the scenes of `rows`, each with the caption that it is given here; a scene may be there several times.

    With `moves` each picture is there once for each move, by (right, down) pixels, next to each other.
    """

    rows: Rows
    pairs: Pairs
    moves: Sequence[tuple[int, int]] = ((0, 0),)

    def __len__(self) -> int:
        return len(self.pairs) * len(self.moves)

    def __getitem__(self, place: int) -> dict:
        scene, caption = self.pairs[place // len(self.moves)]
        row, move = self.rows[scene], self.moves[place % len(self.moves)]
        return row | {"image": moved(row["image"], *move), "captions": [caption]}

    def without_image(self, place: int) -> dict:
        """The row without its picture."""
        return {"captions": [self.pairs[place // len(self.moves)][1]], "id": self.name(place)}

    def captions(self) -> list[str]:
        """Every caption."""
        return [caption for _, caption in self.pairs]

    def name(self, place: int) -> str:
        """That of the scene."""
        return self.rows.name(self.pairs[place // len(self.moves)][0])

    def fingerprint(self) -> bytes:
        """What the pictures are a function of."""
        return self.rows.fingerprint() + repr((self.pairs, self.moves)).encode()


def moved(image: Image.Image, right: int, down: int) -> Image.Image:
    """The image moved by pixels; what comes in has the colour of its first pixel, the ground of a drawn scene."""
    canvas = Image.new("RGB", image.size, image.getpixel((0, 0)))
    canvas.paste(image, (right, down))
    return canvas


def drawn_source(shapes: ShapesConfig, seed: int) -> CaptionSource:
    """Drawn scenes with their true captions."""
    return open_source(CaptionDataConfig(shapes=shapes), seed)


def true_pairs(rows: Rows, scenes: Iterable[int]) -> Pairs:
    """Scenes with their true captions."""
    return [(scene, rows.without_image(scene)["captions"][0]) for scene in scenes]


@attrs.frozen
class Written:
    """What a writer wrote of pictures."""

    entries: list[Entry]
    pictures: Pictures
    places: Mapping[str, int]  # of the pictures, by the SHA-256 of their files

    @property
    def pairs(self) -> Pairs:
        """The captions in the order of the entries."""
        return [(self.places[entry.image], entry.text) for entry in self.entries]

    def judged(self, clip: ContrastiveCLIP, **settings) -> list[Verdict]:
        """The verdict of filters on each entry. A small CLIP knows captions alone: CLIPScore's prompt is left out."""
        config = FilterConfig(clip="in memory", clip_prompt="", **settings)
        images = lambda sha256: self.pictures[self.places[sha256]]
        return apply_filters(candidates(self.entries), config, images=images, clip=clip)[0]


def write(rows: Rows, scenes: Iterable[int], writer: CaptionWriter, folder: Path) -> Written:
    """Write a caption of each of these scenes, by a captioning job whose journal is in `folder`."""
    pictures, wanted, sampling = pictures_of(rows), set(scenes), Sampling()
    places = {digest: place for digest, place in hashes_of(pictures, Shard()).items() if place in wanted}
    folder.mkdir(parents=True)
    journal = Journal(folder / journal_name(Shard()), writer=writer.name, revision=writer.revision, sampling=sampling)
    try:
        missing = requests(places, PROMPTS, journal.written())
        write_captions(pictures, missing, PROMPTS, writer, journal, sampling, lambda progress: None)
        return Written(list(journal.entries()), pictures, places)
    finally:
        journal.close()


# ---- training and measuring


def trained_clip(source: CaptionSource, train: Rows, steps: int, seed: int, folder: Path) -> ContrastiveCLIP:
    """A CLIP trained on `train` alone, saved in `folder`."""
    config = tower.TowerConfig(trainer=_trainer(steps))
    clip, _ = tower.train(config, _training_on(source, train), _run(folder), seed)
    clip.save_pretrained(folder)
    return clip


def trained_captioner(
    source: CaptionSource, train: Rows, vision: Path, steps: int, seed: int, folder: Path
) -> tuple[CaptionDecoder, Metrics]:
    """A decoder trained on `train` alone over the frozen tower in `vision`, with its metrics on the test split."""
    module = CaptionDecoderConfig(vision=str(vision))
    config = train_captioner.Config(module=module, trainer=_trainer(steps), seed=seed)
    source, run = _training_on(source, train), _run(folder)
    plan = Plan(run, captioning.CAPTIONER_PARTS)
    captioner = train_captioner.build(config, source, run, plan)
    captioning.fit(config, captioner, source, run, plan, "captioner")
    captioning.evaluate(config, captioner, source, run, plan)
    return captioner, {name: run.metrics[f"test/{name}"] for name in ("exact_match", "exact_match_shuffled")}


def clip_metrics(clip: ContrastiveCLIP, source: CaptionSource, seed: int) -> Metrics:
    """Zero-shot accuracy on single objects, and retrieval on the test split, with chance."""
    found = evaluate_shapes(clip, source, seed) | retrieval_metrics(clip, source.rows["test"])
    names = {"zero_shot": "zero_shot/accuracy", "retrieval": "retrieval/image_to_text/recall_at_1"}
    return {f"{short}{end}": found[f"{name}{end}"] for short, name in names.items() for end in ("", "_chance")}


def _training_on(source: CaptionSource, train: Rows) -> CaptionSource:
    """`source` with other training scenes. Without the grammar, recipes do not draw more of them."""
    rows = {"train": train} | {split: source.rows[split] for split in ("val", "test")}
    return attrs.evolve(source, rows=rows, grammar=None)


def _trainer(steps: int) -> TrainerConfig:
    """The weights of the last update count: nothing is chosen by the validation split."""
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return TrainerConfig(max_steps=steps, max_epochs=-1, val_check_interval=steps, num_sanity_val_steps=0, **silent)


def _run(folder: Path) -> Run:
    folder.mkdir(parents=True)
    return Run(folder)


# ---- the command


@attrs.frozen
class Study:
    """A study as a command: what runs, and the tables of what it finds."""

    run: Callable[[Any, int, Path], dict[str, Metrics]]  # (sizes, seed, folder) to the metrics of each arm
    sizes: Any
    quick_sizes: Any
    tables: Sequence[Mapping[str, str]]  # for each table the metrics that are its columns, with their heads


def run_command(study: Study, description: str) -> None:
    """Run `study` for each seed, print its tables in Markdown, and write all figures where `--out` says."""
    arguments = _parse(description)
    sizes = study.quick_sizes if arguments.quick else study.sizes
    start, found = time.perf_counter(), {}
    for seed in arguments.seeds or (SEEDS[:1] if arguments.quick else SEEDS):
        with tempfile.TemporaryDirectory() as folder:
            found[seed] = study.run(sizes, seed, Path(folder))
        report = {"sizes": to_json(sizes), "seconds": round(time.perf_counter() - start), "seeds": found}
        if arguments.out:
            write_json(arguments.out, report)  # after each seed: the next ones take long
    for columns in study.tables:
        print(table(list(found.values()), columns) + "\n")
    print(f"seeds {', '.join(map(str, found))}; {report['seconds']} s")


def say(text: str) -> None:
    """Tell on stderr what is being done."""
    print(text, file=sys.stderr, flush=True)


def table(seeds: Sequence[dict[str, Metrics]], columns: Mapping[str, str]) -> str:
    """A row for each arm that has any of these metrics: the mean over seeds, and in brackets the least and the most."""
    arms = [arm for arm, metrics in seeds[0].items() if metrics.keys() & columns.keys()]
    rows = [[arm, *(_cell([seed[arm].get(name) for seed in seeds]) for name in columns)] for arm in arms]
    head = ["", *columns.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _cell(values: list[float | None]) -> str:
    if None in values:
        return ""
    shown = "{:.0f}" if isinstance(values[0], int) else "{:.3f}"
    mean, least, most = (shown.format(value) for value in (statistics.mean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least}–{most})"


def _parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and small sizes, to try this tool")
    parser.add_argument("--seeds", type=int, nargs="+", help="of scenes, weights and all else that is random; 1 2 3")
    parser.add_argument("--out", type=Path, help="a new JSON file for the figures of each seed")
    arguments = parser.parse_args()
    if arguments.out and (arguments.out.exists() or not arguments.out.absolute().parent.is_dir()):
        parser.error(f"--out {arguments.out}: name a new file, in a folder that exists")
    return arguments
