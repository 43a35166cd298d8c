"""transformers' GPT-2, LLaMA and Mistral (with its sliding window) with the same weights: another program that has to find the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dist_llm.config.schema import ModelConfig
from dist_llm.generate.beam import beam_search
from dist_llm.generate.sample import Sampling, sample
from dist_llm.generate.vocabulary import Vocabulary
from dist_llm.models.decoder import Decoder
from tests.models.models import loss_and_grads, make_batch, make_config, make_model

transformers = pytest.importorskip("transformers")

PROMPT = [2, 30, 11, 7]
Get = Callable[[str], torch.Tensor]


def gpt2_tensors(get: Get, num_layers: int) -> dict[str, torch.Tensor]:
    """GPT-2's tensors under our names, as views: one matrix holds its queries, keys and values, and all are transposed."""
    named = {
        "embedding.weight": get("transformer.wte.weight"),
        "positions.weight": get("transformer.wpe.weight"),
        "final_norm.weight": get("transformer.ln_f.weight"),
        "final_norm.bias": get("transformer.ln_f.bias"),
    }
    matrices = {"attention.output": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    norms = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    for i in range(num_layers):
        for ours, theirs in {**matrices, **norms}.items():
            weight = get(f"transformer.h.{i}.{theirs}.weight")
            named[f"blocks.{i}.{ours}.weight"] = weight.T if ours in matrices else weight
            named[f"blocks.{i}.{ours}.bias"] = get(f"transformer.h.{i}.{theirs}.bias")
        for kind in ("weight", "bias"):
            thirds = get(f"transformer.h.{i}.attn.c_attn.{kind}").chunk(3, dim=-1)
            for ours, third in zip(("query", "key", "value"), thirds, strict=True):
                named[f"blocks.{i}.attention.{ours}.{kind}"] = third.T if kind == "weight" else third
    return named


def llama_tensors(get: Get, num_layers: int) -> dict[str, torch.Tensor]:
    """LLaMA's tensors under our names."""
    named = {"embedding.weight": get("model.embed_tokens.weight"), "final_norm.weight": get("model.norm.weight"), "head.weight": get("lm_head.weight")}  # fmt: skip
    inside = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    for i in range(num_layers):
        for ours, theirs in inside.items():
            named[f"blocks.{i}.{ours}.weight"] = get(f"model.layers.{i}.{theirs}.weight")
    return named


def gpt2_pair() -> tuple[Decoder, nn.Module, Callable[[Get, int], dict[str, torch.Tensor]]]:
    config = make_config(norm="layer_norm", position="learned", activation="gelu", bias=True, tie_embeddings=True)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.d_model,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_inner=config.ffn_size,
            layer_norm_epsilon=config.norm_eps,
            activation_function="gelu_new",
            bos_token_id=2,
            eos_token_id=3,
        )
    )
    return make_model(config), theirs, gpt2_tensors


def llama_like(
    config: ModelConfig, model: Any, its_config: Any, **more: Any
) -> tuple[Decoder, nn.Module, Callable[[Get, int], dict[str, torch.Tensor]]]:
    theirs = model(
        its_config(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len,
            hidden_size=config.d_model,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.ffn_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            bos_token_id=2,
            eos_token_id=3,
            **more,
        )
    )
    return make_model(config), theirs, llama_tensors


def llama_pair() -> tuple[Decoder, nn.Module, Callable[[Get, int], dict[str, torch.Tensor]]]:
    config = make_config(norm="rms_norm", position="rotary", activation="swiglu", num_kv_heads=2, tie_embeddings=False, rope_theta=500.0)
    return llama_like(config, transformers.LlamaForCausalLM, transformers.LlamaConfig)


def mistral_pair() -> tuple[Decoder, nn.Module, Callable[[Get, int], dict[str, torch.Tensor]]]:
    config = make_config(norm="rms_norm", position="rotary", activation="swiglu", num_kv_heads=2, tie_embeddings=False, window=5)
    return llama_like(config, transformers.MistralForCausalLM, transformers.MistralConfig, sliding_window=config.window)


PAIRS = {"gpt2": gpt2_pair, "llama": llama_pair, "mistral, window": mistral_pair}
EOS = {"gpt2": 14, "llama": 4, "mistral, window": 4}  # a token these random models write now and then: some texts end, some do not


def same_weights(kind: str) -> tuple[Decoder, nn.Module, Callable[[Get, int], dict[str, torch.Tensor]]]:
    """Our model, theirs with our weights, and their tensors by our names."""
    ours, theirs, tensors = PAIRS[kind]()
    theirs.eval()  # no dropout
    views = tensors(lambda name: theirs.get_parameter(name).data, ours.config.num_layers)
    weights = dict(ours.named_parameters())
    assert views.keys() == weights.keys()
    assert sum(v.numel() for v in views.values()) == sum(p.numel() for p in theirs.parameters()), "no tensor of theirs is left out"
    for name, view in views.items():
        view.copy_(weights[name].data)
    return ours, theirs, tensors


@pytest.mark.parametrize("kind", PAIRS)
def test_logits_and_gradients_are_those_of_transformers(kind: str) -> None:
    ours, theirs, tensors = same_weights(kind)
    tokens, targets, positions = make_batch(ours.config, batch=3, length=19)
    hidden, loss, grads = loss_and_grads(ours, tokens, targets, positions)
    logits = theirs(tokens).logits
    their_loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    their_loss.backward()

    torch.testing.assert_close(hidden @ ours.head_weight.T, logits, atol=1e-4, rtol=1e-4)
    assert logits.abs().max() > 1, "logits near zero would agree by themselves"
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    wanted = tensors(lambda name: theirs.get_parameter(name).grad, ours.config.num_layers)
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, grad in grads.items():
        assert grad is not None, name
        # The gradient of a key bias is zero in theory without rotary positions, and noise in fp32: measured against the model's.
        scale = max(float(wanted[name].abs().max()), 1e-3 * largest)
        assert float((grad - wanted[name]).abs().max()) / scale < 1e-4, name


@pytest.mark.parametrize("kind", PAIRS)
def test_greedy_and_beam_texts_are_those_of_transformers(kind: str) -> None:
    ours, theirs, _ = same_weights(kind)
    eos, length = EOS[kind], 14  # with the prompt, as many tokens as there are positions
    vocabulary = Vocabulary(torch.ones(ours.config.vocab_size, dtype=torch.bool), eos)
    ended = set()
    for beams, first in itertools.product((1, 2, 5), range(6, 36, 3)):
        prompt = [*PROMPT, first]
        found = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=length,
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            length_penalty=0.0,  # theirs divides by length^alpha, another formula than ours
            early_stopping=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
        rows = found[:, len(prompt) :].tolist()
        wanted = [tuple(row[: row.index(eos) + 1] if eos in row else row) for row in rows]  # padded after the end
        if beams == 1:
            written = sample(ours, prompt, vocabulary, max_new_tokens=length, sampling=Sampling(greedy=True))
        else:
            written = beam_search(ours, prompt, vocabulary, beams=beams, max_new_tokens=length, num_results=beams)
        assert [c.tokens for c in written] == wanted
        ended |= {c.finished for c in written}
    assert ended == {True, False}, "texts that end and texts that are cut are both compared"
