"""A CLIP trained on pictures with captions: by `train_clip`, and as the tower of a small captioner."""

import attrs
import mlx.core as mx
from attrs.validators import ge

from mlxmm import Callback, Trainer, TrainerConfig
from mlxmm.callbacks import CachedPixels, EmbeddingProjector, SimilarityMatrix, ZeroShotEvaluation
from mlxmm.config import checked, option, section, to_json
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.overview import training_warnings
from mlxmm.data.sources.shapes import single_objects
from mlxmm.evaluation.clip import evaluate_shapes, retrieval_metrics
from mlxmm.evaluation.prompt_templates import TEMPLATES
from mlxmm.modules.contrastive_clip import CLIPConfig, ContrastiveCLIP
from mlxmm.networks.towers import check_layer
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.storage.atomic import write_json
from mlxmm.storage.cache import cached, made_in
from mlxmm.storage.lineage import Lineage
from mlxmm.storage.pretrained import read_json
from mlxmm.storage.runs import Run

from .limits import tried_too
from .monitoring import checkpoints, log_results, monitors, newest
from .plan import OWN_LENGTH, Plan, chosen
from .refresh import refreshing
from .refresh_config import RefreshConfig

# For pictures on a light ground: about zero where the ground is.
LIGHT_MEAN, UNIT_STD = (0.88, 0.88, 0.88), (1.0, 1.0, 1.0)
NUM_EACH = 4  # pictures of each object of `shapes` in a validation
OTHER_PICTURES = 2**24  # added to a seed, all of which are smaller: other pictures than those of the test
TRAINING_SETTINGS = (  # these count for a pretrained CLIP too
    "chunk_size",
    "patch_dropout",
    "mask_duplicates",
    "locked",
    "optimizer",
)
FROM_TOKENIZER = ("vocab_size", "eos_token_id", "max_position_embeddings")


@attrs.frozen(kw_only=True, slots=False, field_transformer=checked)  # recipes derive their Config from two of these
class TowerConfig:
    """A CLIP and how long it is trained."""

    module: CLIPConfig = section(CLIPConfig())
    pretrained: str | None = option(
        None, "CLIP or SigLIP to start from: folder or Hub id; none: fresh weights", first=True
    )
    vocab_size: int = option(2_000, "most tokens of the tokenizer that is trained on the captions", ge(1), rare=True)
    max_tokens: int = option(77, "longest text, in tokens; shorter where all captions are", ge(2), rare=True)
    log_embeddings: int = option(
        0,
        "held-out pictures whose features, and those of their captions, go to TensorBoard's projector",
        ge(0),
        rare=True,
    )
    trainer: TrainerConfig = section(TrainerConfig(max_steps=700), without=("seed", "default_root_dir"))


def tower_or_train(config, source: CaptionSource, run: Run, plan: Plan) -> tuple[str, dict]:
    """The tower that `config.module` names, or one trained on `source`, now or in an earlier run, with its metrics."""
    if config.module.vision is not None:
        return config.module.vision, {}

    if config.tower.pretrained is None:
        check_layer(config.module.layer, config.tower.module.vision.num_hidden_layers)
    tower = attrs.evolve(config.tower, trainer=tried_too(config.tower.trainer, config.trainer))

    part = plan.next()

    def make(folder):
        subrun = run.subrun("tower")
        part.train(tower.trainer, subrun.ckpt_path, OWN_LENGTH)
        clip, metrics = train(tower, source, subrun, config.seed)
        clip.save_pretrained(folder)
        write_json(folder / "metrics.json", metrics)

    if run.keeps_files:
        folder = cached("tower", [to_json(config.data), source.fingerprints, config.seed, to_json(tower)], make)
    else:
        folder = made_in(run.folder / "tower-model", make)
    metrics = read_json(folder / "metrics.json")
    part.end("trained", chosen(metrics, "val/accuracy", "zero_shot/accuracy"), folder)
    return str(folder), chosen(metrics, "zero_shot/accuracy")


def train(
    config: TowerConfig, source: CaptionSource, run: Run, seed: int, refresh: RefreshConfig | None = None
) -> tuple[ContrastiveCLIP, dict]:
    """Train a CLIP on `source`; returns it with the metrics of the run's end."""
    clip = build(config, source, seed)
    clip.lineage = Lineage(source.lineage)
    data = CaptionData(source, transform=clip.transform)
    for line in training_warnings(source, contrastive=True):
        run.print(f"warning: {line}")
    with refreshing(refresh or RefreshConfig(), source, run, clip) as callbacks:
        trainer = Trainer(
            attrs.evolve(config.trainer, seed=seed, default_root_dir=run.folder),
            callbacks=[
                *callbacks,
                CachedPixels(max_gib=source.config.pixel_cache_gib),
                *monitors("tower"),
                *pictures(config, source, seed),
                # The loss may rise with the temperature while more and more pictures find their captions.
                *checkpoints(config.trainer, every_n_train_steps=200, monitor="val/accuracy", mode="max"),
            ],
        )
        trainer.fit(clip, data, ckpt_path=run.ckpt_path)
    metrics = newest(trainer)
    if source.is_synthetic and run.is_global_zero:
        results = evaluate_shapes(clip, source, seed) | retrieval_metrics(clip, source.rows["test"])
        log_results(trainer, results)
        metrics |= results
    return clip, metrics


def pictures(config: TowerConfig, source: CaptionSource, seed: int) -> list[Callback]:
    """Callbacks that log what the CLIP takes for similar; on `shapes` also which objects it takes for which."""
    callbacks: list[Callback] = [SimilarityMatrix(source.rows["val"])]
    if config.log_embeddings:
        callbacks.append(EmbeddingProjector(source.rows["val"], num_samples=config.log_embeddings))
    if source.is_synthetic:
        images, things = zip(*single_objects(source.grammar, seed + OTHER_PICTURES, NUM_EACH))
        names = list(map(str, source.grammar.trainable_things()))
        labels = list(map(str, things))
        callbacks.append(ZeroShotEvaluation(images, labels, names, TEMPLATES["name"], "val/zero_shot"))
    return callbacks


def build(config: TowerConfig, source: CaptionSource, seed: int) -> ContrastiveCLIP:
    """A CLIP with fresh weights and a tokenizer trained on the captions of `source`; or the pretrained one, for
    pictures of the size that the configuration says."""
    size = config.module.vision.image_size
    if config.pretrained is not None:
        clip = ContrastiveCLIP.from_pretrained(config.pretrained)
        clip.resize_images(size)
        clip.config = attrs.evolve(clip.config, **{name: getattr(config.module, name) for name in TRAINING_SETTINGS})
        return clip
    processor = ImageProcessor.square(size)
    if source.is_synthetic:
        processor = attrs.evolve(processor, mean=LIGHT_MEAN, std=UNIT_STD)
    mx.random.seed(seed)
    sizes = {"vocab_size": config.vocab_size, "max_tokens": config.max_tokens}
    return ContrastiveCLIP.from_scratch(config.module, source.sample_captions(), processor=processor, **sizes)
