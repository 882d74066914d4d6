"""Evaluate a captioner over a whole split: one caption per image against all references, with a control.

    python -m recipes.evaluate_captions --module runs/align_qwen3/mine/checkpoints/best --data.source pictures.parquet

Writes summary.json with all metrics and captions.jsonl with every caption. Metrics that end in "_shuffled" are the
control: each caption is compared with the references of another image.
"""

import attrs

from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, option, section
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.errors import UserError
from mlxmm.evaluation.captions import evaluate, require_room
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.modules.loading import load_captioner
from mlxmm.networks.generation import GenerationConfig
from mlxmm.storage.atomic import write_text
from mlxmm.storage.json_values import dumps
from mlxmm.storage.runs import RunConfig, model_of, open_run

from .parts.monitoring import report_split
from .parts.named_parts import check_parts


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config(RunConfig):
    """Model, images and decoding."""

    module: str | None = option(
        None, "checkpoint or folder of a Qwen3Aligner or CaptionDecoder, or its Hub id", first=True
    )
    clip: str | None = option(None, "CLIP folder or Hub id for CLIPScore and RefCLIPScore; none: without", first=True)
    split: str = option("test", "split of the data to evaluate on", first=True)
    data: CaptionDataConfig = section(CaptionDataConfig(), without=("random_crop", "shuffle_buffer", "weights"))
    generation: GenerationConfig = section(GenerationConfig())


def main(config: Config) -> None:
    if config.module is None:
        raise UserError("--module is missing: name a checkpoint, for example runs/align_qwen3/mine/checkpoints/best")
    config.data.require_one_source()
    with open_run(config, "evaluate_captions") as run:
        module = model_of(config.module)
        check_parts(captioner=module, clip=config.clip)
        captioner = load_captioner(module)
        clip = None if config.clip is None else ContrastiveCLIP.from_pretrained(config.clip)
        source = open_source(config.data, config.seed, to_train=False)
        run.save_lineage(source.lineage)
        source.require_split(config.split)
        rows = source.rows[config.split]
        report_split(config.split, rows, run)
        if clip is not None:
            require_room(clip, [text for i in range(len(rows)) for text in rows[i]["captions"]])
        settings = attrs.asdict(config.generation)
        metrics, each = evaluate(captioner, rows, clip=clip, batch_size=config.data.batch_size, **settings)
        write_text(run.folder / "captions.jsonl", "".join(dumps(one) + "\n" for one in each))
        run.report({"pictures": len(rows)} | metrics)


if __name__ == "__main__":
    run_recipe("evaluate_captions", main, {"default": Preset("", Config())})
