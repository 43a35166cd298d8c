from __future__ import annotations

import pytest
import torch
from scipy import stats

from dist_llm.generate.logits import keep_top_k, keep_top_p, pick
from dist_llm.generate.sample import Sampling, sample, uniform
from dist_llm.generate.vocabulary import Vocabulary
from dist_llm.utils.errors import ConfigError
from tests.generate.tiny import SHAPES, tiny_model

EOS = 3
PROMPT = [2, 9, 4, 17, 5]
VOCABULARY = Vocabulary(torch.arange(31) >= EOS, EOS)
GREEDY = Sampling(greedy=True)


def first_log_probs(model) -> torch.Tensor:
    positions = torch.arange(len(PROMPT))[None]
    with torch.no_grad():
        return VOCABULARY.log_probs(model(torch.tensor([PROMPT]), positions)[:, -1] @ model.head_weight.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_the_same_with_and_without_cache(shape: str) -> None:
    model = tiny_model(**SHAPES[shape])
    endless = Vocabulary(torch.arange(31) > EOS, EOS)
    texts = [sample(model, PROMPT, endless, max_new_tokens=40, sampling=GREEDY, use_cache=cache)[0] for cache in (True, False)]
    assert texts[0].tokens == texts[1].tokens
    assert len(texts[0].tokens) == 40
    assert len(set(texts[0].tokens)) > 2 or shape == "learned"  # tied: a random model likes to repeat itself


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), lambda x: x),
        (Sampling(temperature=0.7), lambda x: x / 0.7),
        (Sampling(top_k=5), lambda x: keep_top_k(x, 5)),
        (Sampling(top_p=0.8), lambda x: keep_top_p(x, 0.8)),
        (Sampling(temperature=1.5, top_k=9, top_p=0.9), lambda x: keep_top_p(keep_top_k(x / 1.5, 9), 0.9)),
    ],
)
def test_tokens_are_as_frequent_as_they_are_probable(sampling: Sampling, kept) -> None:
    model = tiny_model(gain=1.0)
    draws = 4000
    counts = torch.zeros(31)
    for continuation in sample(model, PROMPT, VOCABULARY, max_new_tokens=1, sampling=sampling, num_samples=draws, seed=11):
        counts[continuation.tokens[0]] += 1
    expected = kept(first_log_probs(model))[0].softmax(-1) * draws
    assert counts[expected == 0].sum() == 0
    common = expected >= 5  # rarer tokens are one class: the approximation needs five draws expected in each
    observed = [*counts[common].tolist(), counts[~common].sum().item()]
    wanted = [*expected[common].tolist(), expected[~common].sum().item()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 2
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def test_a_sample_is_the_same_alone_in_a_batch_and_after_others_have_ended() -> None:
    model = tiny_model(gain=1.0)
    many = sample(model, PROMPT, VOCABULARY, max_new_tokens=30, sampling=Sampling(), num_samples=6, seed=5)
    assert len({len(c.tokens) for c in many}) > 1, "some end early, so that the batch shrinks"
    for wanted in (1, 2, 4):
        few = sample(model, PROMPT, VOCABULARY, max_new_tokens=30, sampling=Sampling(), num_samples=wanted, seed=5)
        assert [c.tokens for c in few] == [c.tokens for c in many[:wanted]]


def test_each_token_is_the_one_its_own_random_number_points_at() -> None:
    model = tiny_model(gain=1.0)
    many = sample(model, PROMPT, VOCABULARY, max_new_tokens=15, sampling=Sampling(), num_samples=6, seed=5)
    assert any(c.finished for c in many[:-1]), "one ends before a later one, which must keep its own numbers"
    for number, continuation in enumerate(many):
        text = torch.tensor([[*PROMPT, *continuation.tokens]])
        with torch.no_grad():
            hidden = model(text, torch.arange(text.shape[1])[None])[0, len(PROMPT) - 1 : -1]
        uniforms = [uniform(5, number, place) for place in range(len(continuation.tokens))]
        wanted = pick(VOCABULARY.log_probs(hidden @ model.head_weight.T), torch.tensor(uniforms, dtype=torch.float64))
        assert continuation.tokens == tuple(wanted.tolist())


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = tiny_model(gain=1.0)
    texts = [sample(model, PROMPT, VOCABULARY, max_new_tokens=20, sampling=Sampling(), seed=seed)[0].tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_text_ends_at_the_end_token_and_says_so() -> None:
    model = tiny_model(gain=1.0)
    many = sample(model, PROMPT, VOCABULARY, max_new_tokens=30, sampling=Sampling(), num_samples=20, seed=5)
    assert {c.finished for c in many} == {True, False}
    for c in many:
        assert EOS not in c.tokens[:-1]
        assert c.finished == (c.tokens[-1] == EOS)
        assert c.finished or len(c.tokens) == 30


def test_forbidden_tokens_are_never_written() -> None:
    model = tiny_model(gain=0.0)  # all tokens equally probable
    only = Vocabulary(torch.tensor([i in (3, 8, 12) for i in range(31)]), EOS)
    many = sample(model, PROMPT, only, max_new_tokens=5, sampling=Sampling(temperature=100.0), num_samples=200)
    assert {token for c in many for token in c.tokens} == {3, 8, 12}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.5, top_k=4)])
def test_logprob_is_the_models_own_however_the_token_was_chosen(sampling: Sampling) -> None:
    model = tiny_model()
    (written,) = sample(model, PROMPT, VOCABULARY, max_new_tokens=8, sampling=sampling, seed=4)
    text = torch.tensor([[*PROMPT, *written.tokens]])
    with torch.no_grad():
        hidden = model(text, torch.arange(text.shape[1])[None])[0]
    log_probs = VOCABULARY.log_probs(hidden @ model.head_weight.T)
    wanted = sum(log_probs[len(PROMPT) - 1 + i, token].item() for i, token in enumerate(written.tokens))
    assert written.logprob == pytest.approx(wanted, abs=1e-4)


def test_each_step_reports_the_tokens_it_wrote() -> None:
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    steps: list[int] = []

    def note(written: dict[int, int]) -> None:
        for number, token in written.items():
            seen[number].append(token)

    many = sample(
        tiny_model(gain=1.0),
        PROMPT,
        VOCABULARY,
        max_new_tokens=10,
        sampling=Sampling(),
        num_samples=3,
        on_tokens=note,
        on_step=steps.append,
    )
    assert [tuple(seen[n]) for n in range(3)] == [c.tokens for c in many]
    assert steps == list(range(1, max(len(c.tokens) for c in many) + 1))


def test_bf16_weights_generate() -> None:
    (written,) = sample(tiny_model(dtype=torch.bfloat16), PROMPT, VOCABULARY, max_new_tokens=30, sampling=Sampling())
    assert written.tokens


def test_random_numbers_are_a_fixed_function_of_seed_sample_and_place() -> None:
    # A change of these changes every text that anyone has noted down with its seed.
    assert uniform(0, 0, 0) == 0.9964064002091109
    assert uniform(12, 3, 45) == 0.15577734891558026
    numbers = [uniform(seed, number, place) for seed in range(10) for number in range(10) for place in range(10)]
    assert len(set(numbers)) == 1000
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": 0.0}, "--greedy"),
        ({"temperature": float("nan")}, "nan"),
        ({"temperature": float("inf")}, "inf"),
        ({"top_k": 0}, "top-k 0"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.1}, "top-p 1.1"),
    ],
)
def test_a_setting_out_of_range_is_refused(values: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sampling(**values)  # type: ignore[arg-type]
