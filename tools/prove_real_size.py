"""Train Qwen3Aligner at its real size on random weights: seconds an update, and the peak of memory.

    python tools/prove_real_size.py --train layers --gradient-checkpointing
    python tools/prove_real_size.py --train lora --gradient-checkpointing

The language model has the shape of Qwen3-0.6B, the tower that of CLIP's ViT-B/32; nothing is read or downloaded.
"""

import argparse
import resource
import sys
import time

import attrs
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxmm import Callback, Qwen3Aligner, Trainer, seed_everything
from mlxmm.callbacks import FreezeSchedule
from mlxmm.compute.precision import PRECISIONS
from mlxmm.modules.memory_plan import plan_memory
from mlxmm.modules.qwen3_aligner import Qwen3AlignerConfig
from mlxmm.networks.adapters import LoRAConfig
from mlxmm.networks.clip import CLIPVisionTower, VisionConfig
from mlxmm.networks.language_model import Qwen3Config, build_language_model
from mlxmm.optimizers import OptimizerConfig
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import train_tokenizer
from mlxmm.training.trainable import trainable_names

VOCABULARY = 151_936
LANGUAGE_MODEL = Qwen3Config(
    hidden_size=1_024,
    num_hidden_layers=28,
    intermediate_size=3_072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32_768,
    rope_theta=1e6,
)
TOWER = VisionConfig(
    hidden_size=768,
    num_hidden_layers=12,
    intermediate_size=3_072,
    num_attention_heads=12,
    image_size=224,
    patch_size=32,
)
STAGES = {"projector": "projector", "layers": ("projector", "language_model.model.layers[-2:]")}
STAGES["lora"] = ("projector", "lora")


class Clock(Callback):
    """Prints what each update took, on the clock and of the CPU. The trainer has waited for it."""

    def on_train_batch_start(self, trainer, module, batches):
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer, module, metrics, batches):
        seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu_start
        loss, peak = float(metrics["loss"]), mx.get_peak_memory() / 2**30
        print(f"update {trainer.global_step}: {seconds:.1f} s (CPU {cpu:.1f} s), loss {loss:.3f}, peak {peak:.2f} GiB")
        sys.stdout.flush()


def build(args) -> Qwen3Aligner:
    seed_everything(0)
    tokenizer = train_tokenizer(["a red circle"], 300)
    sizes = attrs.evolve(LANGUAGE_MODEL, num_hidden_layers=args.layers)
    hub = sizes.to_hub(tokenizer) | {"vocab_size": VOCABULARY}
    config = Qwen3AlignerConfig(
        layer=-2,
        projector_width=2_048,
        max_new_tokens=args.tokens,
        lora=LoRAConfig(rank=args.rank if args.train == "lora" else 0),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0),
    )
    language_model = build_language_model(hub)
    if args.half:
        language_model.set_dtype(mx.bfloat16)
    parts = CLIPVisionTower(TOWER), {}, ImageProcessor.square(224), language_model, hub, tokenizer
    module = Qwen3Aligner(config, *parts)
    mx.eval(module.parameters())
    return module


def batch(args) -> dict:
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 256, (args.images, 224, 224, 3), dtype=np.uint8),
        "tokens": rng.integers(0, VOCABULARY, (args.images, args.tokens), dtype=np.int32),
        "mask": np.ones((args.images, args.tokens), dtype=np.float32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=STAGES, default="layers", help="what is trained beside the projector")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32, help="of each caption")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28, help="of the language model")
    parser.add_argument("--half", action="store_true", help="the language model in bfloat16, as a GPU loads it")
    parser.add_argument("--precision", choices=PRECISIONS, default="32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    module = build(args)
    mx.reset_peak_memory()
    print(
        f"{args.train}: {sum(a.size for _, a in tree_flatten(module.parameters())) / 1e6:,.1f} M parameters", end=", "
    )
    print(f"{mx.get_active_memory() / 2**30:.2f} GiB of weights", flush=True)
    mx.reset_peak_memory()
    trainer = Trainer(
        callbacks=[FreezeSchedule({0: STAGES[args.train]}), Clock()],
        logger=False,
        max_steps=args.updates,
        gradient_checkpointing=args.gradient_checkpointing,
        precision=args.precision,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, train_dataloaders=[module.collate(batch(args))] * args.updates)
    trained = sum(a.size for _, a in tree_flatten(module.trainable_parameters()))
    plan = plan_memory(module, trainable_names(module), trainer.config, batch_size=args.images)
    print(plan)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"trained {trained / 1e6:,.1f} M; peak {mx.get_peak_memory() / 2**30:.2f} GiB, resident {resident:.2f} GiB")


if __name__ == "__main__":
    main()
