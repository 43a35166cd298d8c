"""``dist-llm generate`` on a run that was really trained, for three steps."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Run, clean_environment

PROMPT = "def \u00e9t\u00e9("


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path, dist_llm: Run) -> Path:
    """A directory with corpus/ and runs/tiny, checkpoints of steps 2 and 3. Never to be written to."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpus, root / "corpus")
    words = ["data.path=corpus", "run_dir=runs/tiny", "train.steps=3", "train.threads=1", "checkpoint.every=2", "checkpoint.keep=0"]
    done = dist_llm("train", ROOT / "configs/tiny/llama.yaml", *words, cwd=root)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (root / "runs/tiny/checkpoints").glob("step-*")) == ["step-00000002", "step-00000003"]
    return root


@pytest.fixture
def broken(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


Answer = tuple[int, str, str]
Generate = Callable[..., Answer]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Generate:
    """The command in this process, from a directory: exit code, stdout, stderr."""
    from dist_llm.cli.main import main

    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: object, cwd: Path, prompt: str | None = PROMPT) -> Answer:
        monkeypatch.chdir(cwd)
        said = [] if prompt is None else ["--prompt", prompt]
        try:
            code = main(["generate", "--threads", "1", *map(str, words), *said])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def answer(result: Answer) -> dict[str, Any]:
    code, out, err = result
    assert code == 0, err
    value: dict[str, Any] = json.loads(out)
    return value


def test_text_is_written_after_its_prompt_as_bytes_arrive(trained: Path, dist_llm: Run) -> None:
    done = dist_llm("generate", "runs/tiny", "--prompt", PROMPT, "--max-new-tokens", 30, "--threads", 1, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT)
    assert len(done.stdout) > len(PROMPT) + 5
    assert re.search(r"30 tokens, cut there, logprob -\d+\.\d+, \d+\.\d tokens/s, runs/tiny/checkpoints/step-00000003\n$", done.stderr)


def test_json_answers_with_one_object_that_agrees_with_the_text(trained: Path, generate: Generate) -> None:
    value = answer(generate("runs/tiny", "--max-new-tokens", 30, "--json", cwd=trained))
    _, streamed, _ = generate("runs/tiny", "--max-new-tokens", 30, cwd=trained)
    assert value.keys() == {"prompt", "continuations", "tokens_per_s", "checkpoint"}
    assert value["prompt"] == PROMPT
    assert value["checkpoint"] == "runs/tiny/checkpoints/step-00000003"
    assert value["tokens_per_s"] > 0
    (one,) = value["continuations"]
    assert one.keys() == {"text", "tokens", "logprob", "finished"}
    assert streamed == PROMPT + one["text"] + "\n"
    assert len(one["tokens"]) == 30
    assert not one["finished"]
    # Three steps teach nothing: close to the logarithm of the vocabulary a token.
    assert one["logprob"] == pytest.approx(-30 * math.log(512), rel=0.25)


def test_a_seed_repeats_its_text_alone_and_among_others(trained: Path, generate: Generate) -> None:
    def tokens(*words: object) -> list[list[int]]:
        value = answer(generate("runs/tiny", "--json", "--max-new-tokens", 20, *words, cwd=trained))
        return [c["tokens"] for c in value["continuations"]]

    three = tokens("--seed", 5, "--num-samples", 3)
    assert tokens("--seed", 5, "--num-samples", 3) == three
    assert tokens("--seed", 5) == three[:1]
    assert tokens("--seed", 6) != three[:1]
    assert len({tuple(t) for t in three}) == 3


@pytest.mark.parametrize("words", [["--greedy"], ["--beams", "3", "--num-samples", "2", "--length-penalty", "0.6"], ["--top-k", "20", "--top-p", "0.9"]])  # fmt: skip
def test_every_method_writes_the_same_with_and_without_the_cache_also_past_the_window(
    words: list[str], trained: Path, generate: Generate
) -> None:
    results = [
        answer(generate("runs/tiny", "--json", "--max-new-tokens", 90, *words, *cache, cwd=trained)) for cache in ([], ["--no-cache"])
    ]
    assert [c["tokens"] for c in results[0]["continuations"]] == [c["tokens"] for c in results[1]["continuations"]]


def test_several_samples_are_printed_each_under_its_number(trained: Path, generate: Generate) -> None:
    code, out, _ = generate("runs/tiny", "--max-new-tokens", 8, "--num-samples", 3, cwd=trained)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("---")] == ["--- 1 of 3", "--- 2 of 3", "--- 3 of 3"]
    assert out.count(PROMPT) == 3


def test_one_beam_is_greedy_on_a_real_run(trained: Path, generate: Generate) -> None:
    texts = [answer(generate("runs/tiny", "--json", "--max-new-tokens", 20, *w, cwd=trained))["continuations"] for w in (["--greedy"], ["--beams", 1])]  # fmt: skip
    assert texts[0][0]["tokens"] == texts[1][0]["tokens"]


def test_no_cache_makes_no_cache(trained: Path, generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_llm.generate import context

    made: list[int] = []
    real = context.new_cache
    monkeypatch.setattr(context, "new_cache", lambda *args: made.append(1) or real(*args))
    for method in (["--greedy"], ["--beams", "2"]):
        made.clear()
        answer(generate("runs/tiny", "--json", "--max-new-tokens", 2, *method, "--no-cache", cwd=trained))
        assert not made
        answer(generate("runs/tiny", "--json", "--max-new-tokens", 2, *method, cwd=trained))
        assert made


def test_the_length_penalty_decides_between_a_text_that_ends_at_once_and_a_longer_one(trained: Path, generate: Generate) -> None:
    lengths = {}
    for alpha in (-10, 10):  # with as many beams as tokens the end token is surely among those tried first
        words = ["--beams", 512, "--max-new-tokens", 2, f"--length-penalty={alpha}"]
        (best,) = answer(generate("runs/tiny", "--json", *words, cwd=trained))["continuations"]
        lengths[alpha] = len(best["tokens"])
        assert best["finished"] == (alpha == -10)
    assert lengths == {-10: 1, 10: 2}


def test_a_context_longer_than_the_rows_of_training_is_said_aloud(broken: Path, generate: Generate) -> None:
    path = broken / "runs/tiny/config.resolved.yaml"
    text = path.read_text()
    assert "seq_len: 64" in text
    path.write_text(re.sub(r"(\n  )seq_len: 64", r"\1seq_len: 32", text))
    code, _, err = generate("runs/tiny", "--max-new-tokens", 20, cwd=broken, prompt="x" * 10)
    assert (code, "may grow" in err) == (0, False)
    code, _, err = generate("runs/tiny", "--max-new-tokens", 200, cwd=broken)
    assert code == 0
    assert "the context may grow to 64 tokens, the rows the model learned from had 32 (data.seq_len)" in err


def test_a_prompt_file_is_taken_as_it_is(trained: Path, generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"x =\r\n\n")
    value = answer(generate("runs/tiny", "--json", "--max-new-tokens", 2, "--prompt-file", tmp_path / "prompt", cwd=trained, prompt=None))
    assert value["prompt"] == "x =\r\n\n"


def test_a_prompt_can_come_from_stdin_and_the_reader_may_leave(trained: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dist_llm",
        "generate",
        "runs/tiny",
        "--prompt-file",
        "-",
        "--max-new-tokens",
        "3000",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(
        command, cwd=trained, env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(b"import ")
    process.stdin.close()
    assert os.read(process.stdout.fileno(), 7) == b"import "
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0
    assert said == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_ends_with_74_and_one_line(trained: Path) -> None:
    command = [sys.executable, "-m", "dist_llm", "generate", "runs/tiny", "--prompt", "x", "--max-new-tokens", "3", "--threads", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=trained, env=clean_environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 74
    assert re.fullmatch(r"dist-llm generate: cannot write the text to stdout: No space left on device; .*\n", done.stderr)


def test_an_empty_prompt_begins_a_document(trained: Path, generate: Generate) -> None:
    value = answer(generate("runs/tiny", "--json", "--max-new-tokens", 4, cwd=trained, prompt=""))
    assert len(value["continuations"][0]["tokens"]) == 4


def test_a_named_step_is_taken(trained: Path, generate: Generate) -> None:
    value = answer(generate("runs/tiny", "--json", "--max-new-tokens", 2, "--step", 2, cwd=trained))
    assert value["checkpoint"].endswith("step-00000002")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_passed_over_aloud_unless_it_was_named(broken: Path, generate: Generate) -> None:
    flip_a_byte(broken / "runs/tiny/checkpoints/step-00000003/weights-00000.safetensors")
    code, out, err = generate("runs/tiny", "--json", "--max-new-tokens", 2, cwd=broken)
    assert code == 0
    assert json.loads(out)["checkpoint"].endswith("step-00000002")
    assert "passing over a checkpoint: runs/tiny/checkpoints/step-00000003/weights-00000.safetensors is damaged" in err

    code, out, err = generate("runs/tiny", "--step", 3, cwd=broken)
    assert (code, out) == (66, "")
    assert "weights-00000.safetensors is damaged" in err


def test_a_run_with_only_damaged_checkpoints_or_none_ends_with_66(broken: Path, generate: Generate) -> None:
    for step in (2, 3):
        (broken / f"runs/tiny/checkpoints/step-0000000{step}/manifest.json").unlink()
    code, out, err = generate("runs/tiny", cwd=broken)
    assert (code, out) == (66, "")
    assert "no valid checkpoint" in err
    assert "never finished" in err

    shutil.rmtree(broken / "runs/tiny/checkpoints")
    code, _, err = generate("runs/tiny", cwd=broken)
    assert code == 66
    assert "runs/tiny has no checkpoint" in err


def test_a_step_that_was_never_saved_ends_with_66_and_names_those_there_are(trained: Path, generate: Generate) -> None:
    code, _, err = generate("runs/tiny", "--step", 7, cwd=trained)
    assert code == 66
    assert "step 7" in err
    assert "step-00000002, step-00000003" in err


def test_a_named_step_is_found_where_a_killed_save_left_it_and_a_copy_beside_it_is_none(broken: Path, generate: Generate) -> None:
    checkpoints = broken / "runs/tiny/checkpoints"
    (checkpoints / "step-00000003").rename(checkpoints / ".step-00000003.77.old")
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000002.bak")
    value = answer(generate("runs/tiny", "--json", "--max-new-tokens", 2, "--step", 3, cwd=broken))
    assert value["checkpoint"].endswith(".step-00000003.77.old")
    code, _, err = generate("runs/tiny", "--step", 7, cwd=broken)
    assert code == 66
    assert err.endswith("there are step-00000002, step-00000003\n")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("runs/tini", "there is no run at runs/tini; did you mean runs/tiny?"),
        ("tiny", "there is no run at tiny; did you mean runs/tiny?"),
        ("runs/zzz", "the runs near it are runs/tiny"),
        ("runs", "runs is not a run directory: it has no config.resolved.yaml; the runs near it are runs/tiny"),
        ("runs/tiny/config.resolved.yaml", "is not a run directory: it has no config.resolved.yaml; the run is "),
        ("runs/tiny/checkpoints/step-00000003", "is not a run directory: it has no config.resolved.yaml; the run is "),
    ],
)
def test_a_wrong_run_directory_ends_with_2_and_names_the_nearest(run: str, said: str, trained: Path, generate: Generate) -> None:
    code, out, err = generate(run, cwd=trained)
    assert (code, out) == (2, "")
    assert said in err


def test_without_any_run_the_nearest_directory_is_named(tmp_path: Path, generate: Generate) -> None:
    code, _, err = generate(tmp_path / "a/b/c", cwd=tmp_path)
    assert code == 2
    assert f"the nearest directory is {tmp_path}, without a run in it" in err


def test_a_lost_corpus_ends_with_65_and_the_way_out_works(broken: Path, generate: Generate) -> None:
    (broken / "corpus/tokenizer.model").rename(broken / "kept.model")
    wanted = answer(generate("runs/tiny", "--json", "--tokenizer", "kept.model", "--max-new-tokens", 9, cwd=broken))
    shutil.rmtree(broken / "corpus")

    code, out, err = generate("runs/tiny", cwd=broken)
    assert (code, out) == (65, "")
    assert "there is no corpus at corpus" in err
    assert "--tokenizer FILE" in err

    code, out, err = generate("runs/tiny", "--json", "--tokenizer", "kept.model", "--max-new-tokens", 9, cwd=broken)
    assert json.loads(out)["continuations"] == wanted["continuations"]
    assert "taking kept.model at your word" in err


def test_a_changed_or_missing_tokenizer_ends_with_65(broken: Path, generate: Generate) -> None:
    path = broken / "corpus/tokenizer.model"
    data = path.read_bytes()
    flip_a_byte(path)
    code, _, err = generate("runs/tiny", cwd=broken)
    assert code == 65
    assert "does not match the shards" in err

    path.unlink()
    assert generate("runs/tiny", cwd=broken)[0] == 65
    path.write_bytes(data)
    assert generate("runs/tiny", "--max-new-tokens", 1, cwd=broken)[0] == 0


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory: pytest.TempPathFactory, dist_llm: Run) -> Path:
    root = tmp_path_factory.mktemp("other")
    (root / "texts").mkdir()
    for i in range(4):
        (root / f"texts/{i}.txt").write_text(f"quite another text, number {i}\n" * 40)
    done = dist_llm("data", "prepare", "--source", root / "texts", "--out", root / "other", "--vocab-size", 340, "--val-fraction", 0.3)
    assert done.returncode == 0, done.stderr
    return root / "other"


def test_another_corpus_in_the_place_of_the_trained_one_ends_with_65(broken: Path, other_corpus: Path, generate: Generate) -> None:
    shutil.copy(broken / "corpus/tokenizer.model", broken / "kept.model")
    shutil.rmtree(broken / "corpus")
    shutil.copytree(other_corpus, broken / "corpus")
    code, out, err = generate("runs/tiny", cwd=broken)
    assert (code, out) == (65, "")
    assert "the corpus at corpus is not the one runs/tiny/checkpoints/step-00000003 was trained on" in err
    assert generate("runs/tiny", "--tokenizer", "kept.model", "--max-new-tokens", 1, cwd=broken)[0] == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other", "is not the tokenizer the run was trained with"),
        ("junk", "not a sentencepiece model"),
        ("none", "cannot read the tokenizer"),
    ],
)
def test_a_wrong_tokenizer_file_ends_with_65(
    name: str, said: str, trained: Path, other_corpus: Path, tmp_path: Path, generate: Generate
) -> None:
    (tmp_path / "junk").write_bytes(b"no model")
    file = other_corpus / "tokenizer.model" if name == "other" else tmp_path / name
    code, out, err = generate("runs/tiny", "--tokenizer", file, cwd=trained)
    assert (code, out) == (65, "")
    assert said in err


def test_a_config_that_is_not_the_checkpoints_ends_with_2_and_names_the_key(broken: Path, generate: Generate) -> None:
    path = broken / "runs/tiny/config.resolved.yaml"
    text = path.read_text()
    path.write_text(re.sub(r"ffn_dim: \d+", "ffn_dim: 96", text))
    code, _, err = generate("runs/tiny", cwd=broken)
    assert code == 2
    assert "model.ffn_dim is 96 there, 192 in the checkpoint" in err

    path.write_text(text.replace("ffn_dim", "fnn_dim"))
    code, _, err = generate("runs/tiny", cwd=broken)
    assert code == 2
    assert "did you mean" in err


def test_a_prompt_too_long_ends_with_2_and_both_numbers_before_anything_is_printed(trained: Path, generate: Generate) -> None:
    code, out, err = generate("runs/tiny", cwd=trained, prompt="x\u65e5" * 100)
    assert (code, out) == (2, "")
    numbers = re.search(r"the prompt has (\d+) tokens, .* at most 64", err)
    assert numbers
    assert int(numbers[1]) > 64


def test_an_unreadable_prompt_is_refused(trained: Path, generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    code, _, err = generate("runs/tiny", "--prompt-file", tmp_path / "latin", cwd=trained, prompt=None)
    assert code == 65
    assert "byte 0xe9 at offset 3" in err

    code, _, err = generate("runs/tiny", "--prompt-file", tmp_path / "nowhere", cwd=trained, prompt=None)
    assert code == 2
    assert "nowhere" in err

    code, _, err = generate("runs/tiny", cwd=trained, prompt="half a pair \ud800")
    assert code == 65
    assert "surrogate" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--beams", "0"], "--beams 0"),
        (["--threads", "100000"], "--threads 100000 must be at most 1024"),
        (["--temperature", "0"], "use --greedy"),
        (["--temperature", "nan"], "temperature nan"),
        (["--top-k", "-1"], "top-k -1"),
        (["--top-p", "1.5"], "top-p 1.5"),
        (["--greedy", "--top-k", "3"], "--top-k would do nothing"),
        (["--beams", "2", "--seed", "3"], "--seed would do nothing"),
        (["--greedy", "--beams", "2"], "--beams 1 is greedy"),
        (["--greedy", "--num-samples", "2"], "would be the same"),
        (["--beams", "2", "--num-samples", "3"], "more than --beams 2"),
        (["--length-penalty", "0.6"], "--beams"),
        (["--beams", "2", "--length-penalty", "inf"], "between -10 and 10"),
        (["--step", "-1"], "--step -1"),
        (["--prompt-file", "x"], "not allowed with"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_what_to_change(words: list[str], said: str, tmp_path: Path, generate: Generate) -> None:
    code, out, err = generate("runs/none", *words, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert said in err


def test_no_prompt_at_all_ends_with_2(tmp_path: Path, generate: Generate) -> None:
    code, _, err = generate("runs/none", cwd=tmp_path, prompt=None)
    assert code == 2
    assert "--prompt" in err


def test_several_processes_are_refused(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dist_llm.cli.main import main

    monkeypatch.chdir(trained)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code = main(["generate", "runs/tiny", "--prompt", PROMPT])
    err = capsys.readouterr().err
    assert code == 2
    assert "2 processes" in err


def test_help_imports_no_torch() -> None:
    code = "import sys, dist_llm.cli.main as m; m.main(['generate', '--help'])"
    script = f"try:\n    exec({code!r})\nexcept SystemExit: pass\nimport sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--length-penalty" in done.stdout
