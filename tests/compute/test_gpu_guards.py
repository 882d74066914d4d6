"""What a GPU cannot do is in none of our updates and none of our decoding: seen in their graphs, on any device."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_modules import CAPTIONS, small_aligner, small_batch, small_clip, tokenizer

from mlxmm import CaptionDecoder
from mlxmm.compute.precision import autocast
from mlxmm.modules.caption_decoder import CaptionDecoderConfig
from mlxmm.modules.text_model import TextModel, TextModelConfig
from mlxmm.networks.adapters import LoRAConfig, add_adapters
from mlxmm.networks.decoder import DecoderConfig
from mlxmm.networks.generation import GenerationConfig, generate

# Primitives with neither a Metal nor a CUDA kernel (mlx/backend/cuda/primitives.cpp, mlx/backend/metal/primitives.cpp).
CPU_ONLY = {"LUF", "QRF", "SVD", "Inverse", "Cholesky", "Eig", "Eigh"}


@pytest.fixture(autouse=True)
def as_gpu(monkeypatch):
    monkeypatch.setenv("MLXMM_ACT_AS", "gpu")


def aligner(bits=0, rank=0):
    module = small_aligner()
    if rank:
        add_adapters(module.language_model, LoRAConfig(rank=rank))
    if bits:
        nn.quantize(module.language_model, group_size=32, bits=bits)
        module.language_model.freeze()
    return module


def decoder(reading):
    base = small_aligner()
    config = CaptionDecoderConfig(decoder=DecoderConfig(reading=reading), max_new_tokens=8)
    return CaptionDecoder(config, base.vision, {}, base.processor, tokenizer(False))


def text_model():
    return TextModel(TextModelConfig(max_tokens=16), tokenizer(False))


MODULES = {
    "clip": small_clip,
    "aligner": aligner,
    "aligner, lora": lambda: aligner(rank=2),
    "aligner, 4 bits": lambda: aligner(bits=4),
    "decoder, cross": lambda: decoder("cross"),
    "decoder, prefix": lambda: decoder("prefix"),
    "text model": text_model,
}


def batch_of(module) -> dict:
    if isinstance(module, TextModel):
        examples = [module.transform(("", caption)) for caption in CAPTIONS]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    batch = small_batch(module)
    return module.collate(batch) if hasattr(module, "collate") else batch


def graph(function, **arrays) -> list[dict]:
    """The primitives that computing `function(**arrays)`, a list of arrays, takes."""
    nodes = []
    mx.export_function(nodes.append, function, {name: mx.array(array) for name, array in arrays.items()})
    return [node for node in nodes if node["type"] == "primitive"]


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="GPUs show it by computing")
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("name", MODULES)
def test_an_update_has_no_operation_and_no_number_that_a_gpu_lacks(name, precision):
    module = MODULES[name]()

    def measured(batch):
        metrics = module.training_step(batch)
        return metrics["loss"], metrics

    loss_and_grad = nn.value_and_grad(module, measured)

    def update(**batch):
        with autocast(module, precision):
            (_, metrics), grads = loss_and_grad(batch)
        return [array for _, array in tree_flatten([metrics, grads])]

    nodes = graph(update, **batch_of(module))
    assert len(nodes) > 100 and not CPU_ONLY & {node["name"] for node in nodes}
    dtypes = {dtype for node in nodes for _, _, dtype in node["outputs"]}
    assert max(dtype.size for dtype in dtypes) <= 4, dtypes


@pytest.mark.parametrize("name", MODULES)
def test_batches_have_no_number_of_8_bytes(name):
    assert {array.dtype.itemsize for array in batch_of(MODULES[name]()).values()} <= {1, 2, 4}


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"temperature": 1.0, "top_k": 5}, {"repetition_penalty": 2.0}])
def test_decoding_reads_tokens_of_4_bytes(way):
    network, seen = small_aligner().decoder, []

    class Watched(type(network)):
        def embed(self, tokens):
            seen.append(tokens.dtype)
            return super().embed(tokens)

    prefix = mx.random.normal((2, 4, 32))
    generate(Watched(network.model), prefix, GenerationConfig(max_new_tokens=4, **way), stop_id=0)
    assert seen and max(dtype.size for dtype in seen) <= 4, seen
