"""Tokenizers from the Hub, and small ones trained on captions. All are fast tokenizers of transformers."""

import copy
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from mlxmm.errors import UserError
from mlxmm.escaping import visible
from mlxmm.progress_bar import staged

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_SHOWN = 80  # letters of a text that a message shows
IMAGES = ("<image>", "<|image_pad|>")  # image tokens of LLaVA and of Qwen's tokenizers


@staged("loading the tokenizer")
def load_tokenizer(folder: Path):
    """The tokenizer of a folder in the Hub's layout. Python in the folder is not run. Raises `UserError`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of its readers, for whatever is in the files
        is_there = (folder / "tokenizer.json").exists()
        reason = (str(error).splitlines() or [type(error).__name__])[0] if is_there else "tokenizer.json is missing"
        raise UserError(f"{folder} holds no tokenizer: {reason}") from None
    if not _tells_texts_apart(tokenizer):  # transformers makes one without a vocabulary of a config.json alone
        raise UserError(f"{folder} holds no tokenizer: tokenizer.json is missing")
    return tokenizer


def _tells_texts_apart(tokenizer) -> bool:
    """Whether texts differ in their tokens: without a vocabulary all become unknown ones, or nothing."""
    one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a small cat", "the red dog"))
    return one != other


def encode(tokenizer, texts: str | list[str], **options):
    """What the tokenizer makes of texts. Raises `UserError` for half a letter, which no text in UTF-8 has."""
    try:
        return tokenizer(texts, **options)
    except (TypeError, UnicodeEncodeError):
        told = visible(texts if isinstance(texts, str) else " ".join(texts))
        raise UserError(f"{told[:MAX_SHOWN]} is not a text in UTF-8") from None


def plain_tokens(tokenizer, text: str) -> list[int]:
    """The tokens of a text, without those that the tokenizer puts around texts. Raises `UserError`."""
    return encode(tokenizer, text, add_special_tokens=False)["input_ids"]


def require_rows(tokenizer, num_rows: int) -> None:
    """Raise `UserError` if a token has no row in a table of `num_rows`: what is read there is foreign memory.

    A token that stands for images counts only where it is the padding or the end: texts do not become it.
    """
    named = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    is_read = lambda token, i: token not in IMAGES or i in named
    beyond = [(i, token) for token, i in tokenizer.get_vocab().items() if i >= num_rows and is_read(token, i)]
    if beyond:
        i, token = min(beyond)
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or 'given'} has {len(beyond)} tokens without a row in the model's "
            f"table of {num_rows}, as {token!r} ({i}): they are not of one model"
        )


def plain_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text, without the special ones that it names: an end amid a caption would be learned."""
    special = special_ids(tokenizer)
    return [i for i in plain_tokens(tokenizer, text) if i not in special]


def special_ids(tokenizer) -> frozenset[int]:
    """The tokens that no text becomes: all special ones but that of unknown letters, if it has no other use."""
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    named = [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id]
    return frozenset({*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id} | set(named) - {None})


def start_tokens(tokenizer) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before texts: one of Llama's and Gemma's, none of Qwen's; there may be
    several, and none may be called the start token."""
    special = special_ids(tokenizer)
    return tuple(takewhile(special.__contains__, tokenizer("a")["input_ids"][:-1]))


def lower_cased(tokenizer):
    """The tokenizer, changed in place to lower-case its texts, as transformers' `Siglip2Tokenizer` does."""
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer is not None else [])]
    backend.normalizer = normalizers.Sequence(steps)
    return tokenizer


@staged("training a tokenizer")
def train_tokenizer(texts: Iterable[str], vocab_size: int, *, adds_start_and_end: bool = False):
    """A byte-level BPE tokenizer with at most `vocab_size` tokens, and no unknown ones.

    With `adds_start_and_end` a text becomes start, tokens, end, as with CLIP's tokenizer; otherwise tokens only, as
    with Qwen's. END is also the padding token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if adds_start_and_end:
        ids = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, unk_token=END
    )


def end_token(tokenizer) -> int:
    """The id of the end token, with which captions end. Raises `UserError` if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or 'given'} has no end token, and captions could not learn to end: "
            'name one as "eos_token" in its tokenizer_config.json'
        )
    return tokenizer.eos_token_id


def with_image_token(tokenizer):
    """A copy of `tokenizer` with an image token, and that token: one of `IMAGES` if it has one, else a new token."""
    tokenizer = copy.deepcopy(tokenizer)
    image = next((token for token in IMAGES if token in tokenizer.get_added_vocab()), IMAGES[0])
    tokenizer.add_tokens([image], special_tokens=True)
    return tokenizer, image


@staged("tokenizing captions")
def token_length(tokenizer, texts: Iterable[str]) -> int:
    """The number of tokens of the longest text, rounded up to a multiple of four."""
    longest = max(map(len, encode(tokenizer, list(texts))["input_ids"]))
    return -(-longest // 4) * 4
