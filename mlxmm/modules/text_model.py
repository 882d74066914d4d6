"""TextModel: a small Qwen3 trained to write captions, from text alone.

B texts, L tokens.
"""

import attrs
import numpy as np
from attrs.validators import ge

from mlxmm.config import checked, option
from mlxmm.errors import UserError
from mlxmm.modules.token_metrics import token_metrics
from mlxmm.networks.language_model import Qwen3Config, build_language_model, embed, hidden_states, save_language_model
from mlxmm.optimizers import OptimizerConfig
from mlxmm.preprocessing.tokenizers import end_token, plain_ids
from mlxmm.training.module import Module


@attrs.frozen(kw_only=True, field_transformer=checked)
class TextModelConfig:
    """The network and how it is trained."""

    network: Qwen3Config = Qwen3Config()
    max_tokens: int = option(32, "longest notes and caption together, in tokens", ge(2))
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=4e-3, warmup_steps=30, final_fraction=0.02, weight_decay=0.05
    )


class TextModel(Module):
    """Reads notes, a start token and a caption. The loss is on the caption and its end."""

    def __init__(self, config: TextModelConfig, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.hub_config = config.network.to_hub(tokenizer)
        self.language_model = build_language_model(self.hub_config)

    def transform(self, text: tuple[str, str]) -> dict:
        """An example of (notes, caption): tokens (L,) and a mask (L,), which is 1 where tokens count in the loss.

        Raises `UserError` if the notes leave no room for a caption.
        """
        notes, caption = (plain_ids(self.tokenizer, part) for part in text)
        if len(notes) + 3 > self.config.max_tokens:
            raise UserError(f"notes of {len(notes)} tokens leave no room in max_tokens={self.config.max_tokens}")
        before = [*notes, self.tokenizer.bos_token_id]
        room = self.config.max_tokens - len(before) - 1
        learned = [*caption[:room], end_token(self.tokenizer)]
        tokens = np.full(self.config.max_tokens, self.tokenizer.pad_token_id, dtype=np.int32)
        tokens[: len(before) + len(learned)] = before + learned
        mask = np.zeros(self.config.max_tokens, dtype=np.float32)
        mask[len(before) : len(before) + len(learned)] = 1
        return {"tokens": tokens, "mask": mask}

    def training_step(self, batch):
        tokens, mask = batch["tokens"], batch["mask"]
        states = hidden_states(self.language_model, embed(self.language_model, tokens[:, :-1]))  # (B, L - 1, D)
        return token_metrics(self.language_model, states, {"tokens": tokens[:, 1:], "mask": mask[:, 1:]})

    def configure_optimizers(self):
        return self.config.optimizer.build(self.trainer.estimated_stepping_batches)

    def save_pretrained(self, folder) -> None:
        """Write a folder that `mlx_lm.load` and transformers load."""
        folder.mkdir(parents=True, exist_ok=True)
        save_language_model(folder, self.language_model, self.hub_config)
        self.tokenizer.save_pretrained(str(folder))
        self.lineage.public().write(folder)
