"""A small Qwen3 that learns captions of 5 to 60 tokens, all of its weights: the second epoch over 512.

mlx-lm's trainer sorts captions by length and pads batches to multiples of 32; both count the tokens with a label only.
"""

import numpy as np

from tools.bench.child import Case, clocks, since

SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768, "num_attention_heads": 4}
VOCABULARY, LONGEST, BATCH = 8_192, 62, 16


def texts(case: Case) -> list[list[int]]:
    """Captions as tokens, without start and end. Most are short, as those of pictures are."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.5, 0.5, 128 if case.quick else 512), 5, LONGEST - 2).astype(int)
    return [rng.integers(2, VOCABULARY, length).tolist() for length in lengths]


def _network():
    import mlx.core as mx

    from mlxmm.networks.language_model import Qwen3Config

    mx.random.seed(0)
    return Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=64)


class _Tokenizer:
    """Texts are lists of tokens already."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id, name_or_path = 1, 0, 0, None, ""
    all_special_ids, added_tokens_decoder = (0, 1), {}

    def __len__(self) -> int:
        return VOCABULARY

    def __call__(self, tokens: list[int], **options) -> dict:
        return {"input_ids": tokens}


def ours(case: Case):
    from mlxmm import Trainer
    from mlxmm.data.loader import Loader
    from mlxmm.modules.text_model import TextModel, TextModelConfig
    from tools.bench.ours import QUIET, Epochs

    module = TextModel(TextModelConfig(network=_network(), max_tokens=LONGEST), _Tokenizer())
    rows = [([], caption) for caption in texts(case)]
    loader = Loader(
        rows=rows,
        transform=lambda text, rng: module.transform(text),
        collate=module.collate,
        batch_size=BATCH,
        shuffle=True,
        lengths=[len(caption) for _, caption in rows],
    )
    epochs = Epochs()
    trainer = Trainer(max_epochs=2, callbacks=[epochs], **QUIET)

    def turn() -> dict:
        trainer.fit(module, train_dataloaders=loader)
        return epochs.seconds

    return turn


def theirs(case: Case):
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
    from mlx_lm.utils import _get_classes

    network, arguments = _get_classes(hub := _network().to_hub(_Tokenizer()))
    model, optimizer = network(arguments.from_dict(hub)), optim.AdamW(learning_rate=1e-4)
    data = [([1, *caption, 0], 0) for caption in texts(case)]
    args = TrainingArgs(
        batch_size=BATCH,
        iters=2 * (len(data) // BATCH),
        max_seq_length=LONGEST + 2,
        steps_per_report=len(data) // BATCH,
        steps_per_save=10**6,
        adapter_file=str(case.folder / "weights.safetensors"),
    )

    class Epochs(TrainingCallback):
        """The clocks at the end of each epoch."""

        def on_train_loss_report(self, train_info):
            self.seconds, self.before = since(self.before), clocks()

    def turn() -> dict:
        epochs = Epochs()
        epochs.before = clocks()
        train(model, optimizer, data, args=args, training_callback=epochs)
        return epochs.seconds

    return turn
