"""Tokenizers: start tokens, special tokens in texts, tokens without a row, and files without a vocabulary."""

import copy
import json

import numpy as np
import pytest
from tokenizers import processors

from mlxmm.errors import UserError
from mlxmm.preprocessing.tokenizers import (
    END,
    START,
    encode,
    load_tokenizer,
    plain_ids,
    plain_tokens,
    require_rows,
    start_tokens,
    train_tokenizer,
)
from tests.small_modules import CAPTIONS


def trained():
    return train_tokenizer(CAPTIONS, 300)


def with_start(tokenizer, template=f"{START} $A"):
    """As Llama's: a start token before texts, and nothing behind."""
    tokenizer = copy.deepcopy(tokenizer)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (START, END)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return tokenizer


def test_the_start_token_is_the_one_that_the_tokenizer_puts_before_texts():
    assert start_tokens(trained()) == ()
    start, end = trained().bos_token_id, trained().eos_token_id
    assert start_tokens(with_start(trained())) == start_tokens(with_start(trained(), f"{START} $A {END}")) == (start,)
    assert start_tokens(with_start(trained(), f"{END} {START} $A")) == (end, start)  # as GLM's
    assert start_tokens(with_start(trained(), f"$A {END}")) == ()
    nameless = with_start(trained())
    nameless.bos_token = None
    assert start_tokens(nameless) == (start,)


@pytest.mark.parametrize("name", [END, START, "<image>"])
def test_a_text_that_names_a_special_token_has_its_other_tokens(name):
    tokenizer = trained()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    ids = plain_ids(tokenizer, f"a red {name} circle")
    assert ids == plain_ids(tokenizer, "a red ") + plain_ids(tokenizer, " circle")
    assert tokenizer.convert_tokens_to_ids(name) not in ids


def test_the_token_of_unknown_letters_stays_where_it_is_no_end(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    assert plain_ids(tokenizer, "a cat </s> a") == [2, 0, 2]


def test_tokens_without_a_row_are_refused_and_an_image_token_is_none():
    tokenizer = trained()
    num_rows = len(tokenizer)
    require_rows(tokenizer, num_rows)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    require_rows(tokenizer, num_rows)
    tokenizer.add_tokens(["cat", "dog"])
    with pytest.raises(UserError, match=rf"has 2 tokens without a row in the model's table of {num_rows}, as 'cat'"):
        require_rows(tokenizer, num_rows)


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "LlamaTokenizer", "T5Tokenizer"])
def test_a_folder_without_a_vocabulary_is_refused(kind, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UserError, match=r"holds no tokenizer: tokenizer.json is missing"):
        load_tokenizer(tmp_path)


def test_siglip_2_reads_capitals_as_small_letters_and_siglip_does_not(tmp_path):
    from mlxmm.modules.contrastive_clip import _as_trained
    from tests.small_clip import SIGLIP, small_clip
    from tools.layout_tokenizers import write_gemma

    write_gemma(tmp_path)
    gemma, ids = load_tokenizer(tmp_path), lambda tokenizer, text: tokenizer(text)["input_ids"]
    assert ids(gemma, "A Dog") != ids(gemma, "a dog")
    config = small_clip(**SIGLIP).config
    for _ in range(2):  # twice, as one that was saved and loaded
        gemma = _as_trained(config, gemma)
        assert np.array_equal(ids(gemma, "A Dog"), ids(gemma, "a dog"))
    tokenizer = small_clip().tokenizer
    assert _as_trained(config, tokenizer) is tokenizer and ids(tokenizer, "A Dog") != ids(tokenizer, "a dog")


def test_half_a_letter_is_refused_in_one_line_and_all_else_is_read():
    tokenizer, half = trained(), "a \ud800 \x1b cat"
    for call in (lambda: plain_ids(tokenizer, half), lambda: plain_tokens(tokenizer, half)):
        with pytest.raises(UserError, match=r"^a \\ud800 \\x1b cat is not a text in UTF-8$"):
            call()
    with pytest.raises(UserError, match="is not a text in UTF-8"):
        encode(tokenizer, ["a cat", half], padding=True)
    assert plain_tokens(tokenizer, "a \0 \x1b \u202e cat")
