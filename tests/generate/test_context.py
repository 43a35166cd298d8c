from __future__ import annotations

import pytest
import torch

from dist_llm.generate.context import Context
from dist_llm.utils.errors import ConfigError, NumericalError
from tests.generate.tiny import SHAPES, tiny_model

PROMPT = [2, 9, 4, 17, 5]


def full_logits(model, window: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(window.shape[1]).expand(window.shape[0], -1)
    return model(window, positions)[:, -1] @ model.head_weight.T


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cached_logits_equal_those_of_the_whole_text(shape: str) -> None:
    model = tiny_model(**SHAPES[shape])
    context = Context(model, PROMPT, max_new_tokens=12)
    for token in range(3, 15):
        torch.testing.assert_close(context.next_logits(), full_logits(model, context.tokens_BT), atol=1e-5, rtol=1e-5)
        context.append(torch.tensor([token]))


@torch.no_grad()
def test_selected_rows_take_their_keys_and_values_with_them() -> None:
    model = tiny_model()
    context = Context(model, PROMPT, max_new_tokens=8)
    context.next_logits()
    context.select([0, 0, 0])
    context.append(torch.tensor([7, 8, 9]))
    context.next_logits()
    context.select([2, 0, 2])
    context.append(torch.tensor([3, 4, 5]))
    assert context.tokens_BT[:, -2:].tolist() == [[9, 3], [7, 4], [9, 5]]
    torch.testing.assert_close(context.next_logits(), full_logits(model, context.tokens_BT), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("shape", ["rotary", "learned"])
@torch.no_grad()
def test_a_full_window_slides_to_its_last_half_read_from_position_zero(shape: str, use_cache: bool) -> None:
    model = tiny_model(**SHAPES[shape])
    context = Context(model, PROMPT, max_new_tokens=60, use_cache=use_cache)
    text = list(PROMPT)
    widths = []
    for step in range(60):
        window = context.tokens_BT
        assert window[0].tolist() == text[-window.shape[1] :]
        torch.testing.assert_close(context.next_logits(), full_logits(model, window), atol=1e-5, rtol=1e-5)
        widths.append(window.shape[1])
        text.append(3 + step % 20)
        context.append(torch.tensor([text[-1]]))
    assert widths == [*range(5, 25), *[w for _ in range(4) for w in range(12, 25)]][:60]


@torch.no_grad()
def test_a_model_of_one_position_sees_only_the_last_token() -> None:
    context = Context(tiny_model(max_seq_len=1), [2], max_new_tokens=3)
    for token in (5, 6):
        context.next_logits()
        context.append(torch.tensor([token]))
        assert context.tokens_BT.tolist() == [[token]]


def test_a_prompt_that_just_fits_is_read_and_one_more_token_is_refused_with_both_numbers() -> None:
    model = tiny_model()
    Context(model, [2] * 24, max_new_tokens=5)
    with pytest.raises(ConfigError, match=r"25 tokens.*at most 24"):
        Context(model, [2] * 25, max_new_tokens=5)


@torch.no_grad()
def test_diverged_weights_are_an_error_and_no_text() -> None:
    model = tiny_model()
    model.final_norm.weight[3] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        Context(model, PROMPT, max_new_tokens=5).next_logits()
