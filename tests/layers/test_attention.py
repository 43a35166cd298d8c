from __future__ import annotations

import pytest
import torch

from dist_llm.kernels.attention.reference import attention_reference
from dist_llm.layers.attention import KeyValueCache, SelfAttention
from dist_llm.layers.rotary import rotary_table


def make(num_kv_heads: int = 2, *, bias: bool = True) -> SelfAttention:
    layer = SelfAttention(12, num_heads=4, num_kv_heads=num_kv_heads, head_dim=6, bias=bias, fn=attention_reference)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_shared_key_heads_equal_multi_head_attention_with_the_heads_repeated(num_kv_heads: int) -> None:
    shared, full = make(num_kv_heads), make(4)
    weights = dict(shared.state_dict())
    for name in ("key.weight", "key.bias", "value.weight", "value.bias"):
        heads = weights[name].unflatten(0, (num_kv_heads, 6))
        weights[name] = heads.repeat_interleave(4 // num_kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x, rotary = torch.randn(2, 5, 12), rotary_table(torch.arange(5).expand(2, 5), 6, 10_000.0)
    torch.testing.assert_close(shared(x, rotary=rotary, doc_ids=None), full(x, rotary=rotary, doc_ids=None))


def test_cache_holds_the_keys_as_they_were_turned() -> None:
    layer = make()
    x, (cos, sin) = torch.randn(2, 7, 12), rotary_table(torch.arange(7).expand(2, 7), 6, 10_000.0)
    with torch.no_grad():
        whole = layer(x, rotary=(cos, sin), doc_ids=None)
        cache = KeyValueCache(torch.empty(2, 8, 2, 6), torch.empty(2, 8, 2, 6))
        parts = [layer(x[:, a:b], rotary=(cos[:, a:b], sin[:, a:b]), doc_ids=None, cache=cache) for a, b in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert cache.length == 7


def test_cache_returns_all_it_has_seen_in_order() -> None:
    cache = KeyValueCache(torch.empty(2, 5, 1, 3), torch.empty(2, 5, 1, 3))
    k, v = torch.randn(2, 2, 5, 1, 3)
    for a, b in ((0, 2), (2, 3), (3, 5)):
        keys, values = cache.append(k[:, a:b], v[:, a:b])
        assert torch.equal(keys, k[:, :b])
        assert torch.equal(values, v[:, :b])
    with pytest.raises(AssertionError, match="cache of 5 tokens asked to hold 6"):
        cache.append(k[:, :1], v[:, :1])


def test_reordered_cache_holds_the_rows_asked_for() -> None:
    cache = KeyValueCache(torch.empty(3, 4, 1, 2), torch.empty(3, 4, 1, 2))
    k, v = torch.randn(2, 3, 2, 1, 2)
    cache.append(k, v)
    cache.reorder(torch.tensor([2, 0, 0]))
    more = torch.randn(3, 1, 1, 2)
    keys, values = cache.append(more, more)
    assert torch.equal(keys, torch.cat([k[[2, 0, 0]], more], dim=1))
    assert torch.equal(values, torch.cat([v[[2, 0, 0]], more], dim=1))
