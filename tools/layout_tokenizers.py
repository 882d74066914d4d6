"""Tokenizers with the special tokens and steps of CLIP's, Qwen's, SmolLM2's and Gemma's, trained on a few captions.

A BPE learns the words of the captions. The rest of the vocabulary, up to the real number of tokens, are pairs and
triples of bytes (not in Gemma's, which stays small): token ids, and lengths of captions in tokens, are then as real.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tools.layout_flickr30k import caption_words

CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GEMMA_NORMALIZER = normalizers.Replace(" ", "▁")
GEMMA_SPLITTER = pre_tokenizers.Split(" ", "merged_with_previous")
START, END = "<|startoftext|>", "<|endoftext|>"
QWEN_SPECIAL = [END, "<|im_start|>", "<|im_end|>"]
QWEN_SPECIAL += [f"<|{part}_{end}|>" for part in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
QWEN_SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
QWEN_ADDED += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
SMOLLM_SPECIAL = [END, "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"]
SMOLLM_SPECIAL += ["<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>"]
SMOLLM_SPECIAL += ["<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"]


@attrs.define
class BPE:
    """Tokens by id, and the merges that make them."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]

    def add(self, left: str, right: str) -> None:
        self.merges.append((left, right))
        self.vocab.setdefault(left + right, len(self.vocab))

    def fill(self, size: int, suffix: str) -> None:
        """Pairs and triples of bytes, until there are `size` tokens."""
        for left, right in _fillers(suffix):
            if len(self.vocab) == size:
                return
            if left + right not in self.vocab:
                self.add(left, right)


def _fillers(suffix: str) -> Iterator[tuple[str, str]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(itertools.product(letters, letters))
    if suffix:
        yield from ((left, right + suffix) for left, right in pairs)
    yield from pairs
    yield from ((left + middle, right) for (left, middle), right in itertools.product(pairs, letters))


def train(size: int, splitter, *, first: Iterable[str] = (), suffix: str = "") -> BPE:
    """A BPE of `size` tokens: `first`, the bytes, the words of captions, and fillers."""
    ending = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**ending))
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(vocab_size=4_000, show_progress=False, **ending)
    tokenizer.train_from_iterator(caption_words(), trainer)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*first, *letters, *(letter + suffix for letter in letters if suffix)]
    bpe = BPE({token: i for i, token in enumerate(tokens)}, [])
    for left, right in json.loads(tokenizer.to_str())["model"]["merges"]:
        bpe.add(left, right)
    bpe.fill(size, suffix)
    return bpe


def write_clip(folder: Path) -> None:
    """49,408 tokens; texts become start, lower-case words, end."""
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe = train(49_406, splitter, suffix="</w>")
    bpe.vocab |= {START: 49_406, END: 49_407}
    tokenizer = Tokenizer(models.BPE(bpe.vocab, bpe.merges, unk_token=END, end_of_word_suffix="</w>"))
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence(steps), splitter
    tokenizer.post_processor = processors.RobertaProcessing((END, 49_407), (START, 49_406), False, False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    start, end = token | {"content": START}, token | {"content": END}
    names = {"unk_token": end, "bos_token": start, "eos_token": end}
    settings = {name: value | {"__type": "AddedToken"} for name, value in names.items()} | {"pad_token": END}
    settings |= {"add_prefix_space": False, "errors": "replace", "do_lower_case": True}
    settings |= {"name_or_path": "./clip_ViT_B_32/", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    write_files(folder, tokenizer, bpe, settings)
    _write_json(folder / "special_tokens_map.json", names | {"pad_token": END})


def write_qwen3(folder: Path) -> None:
    """151,643 tokens, and 26 added ones behind them: END is the first of those."""
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe = train(151_643, splitter)
    tokenizer = Tokenizer(models.BPE(bpe.vocab, bpe.merges))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in QWEN_ADDED])
    settings = {"add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": _added(tokenizer)}
    settings |= {"additional_special_tokens": QWEN_SPECIAL[1:], "bos_token": None, "errors": "replace"}
    settings |= {"clean_up_tokenization_spaces": False, "eos_token": END, "model_max_length": 131_072}
    settings |= {"pad_token": END, "split_special_tokens": False, "unk_token": None}
    write_files(folder, tokenizer, bpe, settings | {"tokenizer_class": "Qwen2Tokenizer"})


def write_smollm2(folder: Path) -> None:
    """49,152 tokens, of which the first 17 are special."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    bpe = train(49_152, splitter, first=SMOLLM_SPECIAL)
    tokenizer = Tokenizer(models.BPE(bpe.vocab, bpe.merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SMOLLM_SPECIAL])
    names = {name: END for name in ("bos_token", "eos_token", "unk_token")}
    names["additional_special_tokens"] = SMOLLM_SPECIAL
    settings = names | {"add_prefix_space": False, "added_tokens_decoder": _added(tokenizer)}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": 8192, "vocab_size": 49_152}
    write_files(folder, tokenizer, bpe, settings | {"tokenizer_class": "GPT2Tokenizer"})
    _write_json(folder / "special_tokens_map.json", names)


def write_gemma(folder: Path) -> None:
    """SigLIP 2's: Gemma's special tokens, bytes and steps; of its 256,000 tokens only the words of captions."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    learned = Tokenizer(models.BPE())
    learned.normalizer, learned.pre_tokenizer = GEMMA_NORMALIZER, GEMMA_SPLITTER
    learned.train_from_iterator(caption_words(), trainers.BpeTrainer(vocab_size=4_000, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab, merges = {token: i for i, token in enumerate(tokens)}, [tuple(pair) for pair in model["merges"]]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer, tokenizer.pre_tokenizer = GEMMA_NORMALIZER, GEMMA_SPLITTER
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{token.strip('<>')}_token": token for token in special[:4]}
    settings = names | {"add_bos_token": False, "add_eos_token": True, "added_tokens_decoder": _added(tokenizer)}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": 64, "padding_side": "right"}
    settings |= {"processor_class": "SiglipProcessor", "tokenizer_class": "GemmaTokenizer"}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", names)


def write_files(folder: Path, tokenizer: Tokenizer, bpe: BPE, settings: dict) -> None:
    """`tokenizer.json`, and the three files that the first tokenizers had instead."""
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "vocab.json").write_text(json.dumps(bpe.vocab, ensure_ascii=False))
    merges = ["#version: 0.2", *(f"{left} {right}" for left, right in bpe.merges)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")


def _added(tokenizer: Tokenizer) -> dict[str, dict]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    tokens = sorted(tokenizer.get_added_tokens_decoder().items())
    return {str(i): {name: getattr(token, name) for name in names} for i, token in tokens}


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))
