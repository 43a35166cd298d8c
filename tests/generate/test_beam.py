from __future__ import annotations

import itertools

import pytest
import torch

from dist_llm.generate import beam as beam_module
from dist_llm.generate.beam import beam_search, length_penalty, normalised_score
from dist_llm.generate.sample import Sampling, sample
from dist_llm.generate.vocabulary import Continuation, Vocabulary
from tests.generate.tiny import SHAPES, tiny_model

EOS = 0
PROMPT = [1, 3, 2, 4]
VOCAB = 5
LENGTH = 4


def small_model(seed: int = 7, **overrides: object):
    return tiny_model(seed=seed, vocab_size=VOCAB, **overrides)


VOCABULARY = Vocabulary(torch.tensor([True, False, True, True, True]), EOS)  # token 1 is forbidden


def every_continuation(model) -> list[Continuation]:
    """All texts of up to LENGTH tokens that end with the end token, and all of LENGTH tokens that do not, each scored by itself."""
    writable = [2, 3, 4]
    endings = [(*body, EOS) for n in range(LENGTH) for body in itertools.product(writable, repeat=n)]
    cut = list(itertools.product(writable, repeat=LENGTH))
    found = []
    for tokens in [*endings, *cut]:
        text = torch.tensor([[*PROMPT, *tokens]])
        with torch.no_grad():
            hidden = model(text, torch.arange(text.shape[1])[None])[0]
        log_probs = VOCABULARY.log_probs(hidden @ model.head_weight.T)
        total = sum(log_probs[len(PROMPT) - 1 + i, token].item() for i, token in enumerate(tokens))
        found.append(Continuation(tuple(tokens), total, finished=tokens[-1] == EOS))
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0, -1.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_beam_wide_enough_finds_what_trying_everything_finds(seed: int, alpha: float) -> None:
    model = small_model(seed)
    wanted = sorted(every_continuation(model), key=lambda c: -normalised_score(c, alpha))[:6]
    found = beam_search(model, PROMPT, VOCABULARY, beams=4**LENGTH, max_new_tokens=LENGTH, alpha=alpha, num_results=6)
    assert [c.tokens for c in found] == [c.tokens for c in wanted]
    assert [c.finished for c in found] == [c.finished for c in wanted]
    assert [c.logprob for c in found] == pytest.approx([c.logprob for c in wanted], abs=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_beam_is_greedy(shape: str, alpha: float) -> None:
    for seed in range(5):
        model = small_model(seed, **SHAPES[shape])
        (greedy,) = sample(model, PROMPT, VOCABULARY, max_new_tokens=40, sampling=Sampling(greedy=True))
        (found,) = beam_search(model, PROMPT, VOCABULARY, beams=1, max_new_tokens=40, alpha=alpha)
        assert found.tokens == greedy.tokens
        assert found.finished == greedy.finished
        assert found.logprob == pytest.approx(greedy.logprob, abs=1e-4)


def test_one_beam_is_greedy_when_the_text_ends_although_alpha_promises_more_to_a_longer_one() -> None:
    ended = 0
    for seed in range(40):
        model = small_model(seed)
        (greedy,) = sample(model, PROMPT, VOCABULARY, max_new_tokens=12, sampling=Sampling(greedy=True))
        (found,) = beam_search(model, PROMPT, VOCABULARY, beams=1, max_new_tokens=12, alpha=5.0)
        assert found.tokens == greedy.tokens
        ended += greedy.finished
    assert ended > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_beams_are_the_same_with_and_without_cache_and_past_the_window(shape: str) -> None:
    model = small_model(**SHAPES[shape])
    without_end = Vocabulary(torch.tensor([False, False, True, True, True]), EOS)
    results = [
        beam_search(model, PROMPT, without_end, beams=3, max_new_tokens=45, num_results=3, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert [c.tokens for c in results[0]] == [c.tokens for c in results[1]]
    assert len({c.tokens for c in results[0]}) == 3
    assert [len(c.tokens) for c in results[0]] == [45, 45, 45]


def test_more_beams_find_at_least_as_probable_a_text_somewhere() -> None:
    gained = 0.0
    for seed in range(10):
        model = small_model(seed)
        one, eight = (beam_search(model, PROMPT, VOCABULARY, beams=b, max_new_tokens=10)[0].logprob for b in (1, 8))
        gained = max(gained, eight - one)
    assert gained > 0.1


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.6, 3.0])
def test_stopping_early_never_changes_the_answer(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = 0
    for seed in range(15):
        model = small_model(seed)
        lengths: dict[str, list[int]] = {"early": [], "never": []}
        early = beam_search(
            model, PROMPT, VOCABULARY, beams=4, max_new_tokens=15, alpha=alpha, num_results=2, on_step=lengths["early"].append
        )
        with monkeypatch.context() as patched:
            patched.setattr(beam_module, "_reachable", lambda *_: float("inf"))
            never = beam_search(
                model, PROMPT, VOCABULARY, beams=4, max_new_tokens=15, alpha=alpha, num_results=2, on_step=lengths["never"].append
            )
        assert early == never
        saved += len(lengths["never"]) - len(lengths["early"])
    assert saved > 0 or alpha == 3.0  # a large alpha promises so much to long texts that the search has to look at them


def test_results_come_best_first_without_doubles() -> None:
    model = small_model()
    found = beam_search(model, PROMPT, VOCABULARY, beams=6, max_new_tokens=6, alpha=0.6, num_results=6)
    scores = [normalised_score(c, 0.6) for c in found]
    assert scores == sorted(scores, reverse=True)
    assert len({c.tokens for c in found}) == 6


def test_a_vocabulary_with_few_texts_gives_those_there_are() -> None:
    only_end = Vocabulary(torch.tensor([True, False, False, False, False]), EOS)
    found = beam_search(small_model(), PROMPT, only_end, beams=3, max_new_tokens=5, num_results=3)
    assert found == [Continuation((EOS,), 0.0, finished=True)]


def test_the_length_penalty_is_that_of_wu_and_others() -> None:
    assert length_penalty(1, 0.6) == 1.0
    assert length_penalty(7, 1.0) == 2.0
    assert length_penalty(19, 0.5) == 2.0
    assert {length_penalty(n, 0.0) for n in range(1, 50)} == {1.0}


def test_more_results_than_beams_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_results \(3\).*beams \(2\)"):
        beam_search(small_model(), PROMPT, VOCABULARY, beams=2, max_new_tokens=3, num_results=3)
