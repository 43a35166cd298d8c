"""The report: one file, from whatever a run has left so far."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dist_llm.cli.main import main
from dist_llm.report.html import write_report
from dist_llm.report.metrics import EventLog, MetricsWriter
from dist_llm.report.plots import _POINTS, smooth, thin
from dist_llm.report.run import load_run, summary
from dist_llm.utils.errors import ConfigError, DataError, StorageError

RESULTS = {
    "eval": {"bits_per_byte": 1.4125, "loss": 2.3, "bytes": 262144, "documents": 40},
    "baselines": {"byte_unigram_entropy": 4.68, "lzma_bits_per_byte": 1.69},
    "plan": {"params": 262144, "tokens": 5.2e6, "tokens_per_param": 20.1, "reason": "the largest that fits"},
    "sample": {"prompt": "def f(x):\n", "continuation": "    return <script>alert(1)</script> & \x00\ud800"},
}


def _make_run(path: Path, steps: int = 30) -> Path:
    path.mkdir(parents=True)
    events = EventLog(path / "events.jsonl")
    events.write("start", params=262144)
    with MetricsWriter(path / "metrics.jsonl") as writer:
        for step in range(1, steps + 1):
            loss = 2 + 5 / step if step != 3 else math.nan
            writer.write({
                "kind": "train", "step": step, "loss": loss, "bits_per_byte": loss / 2, "lr": 1e-3 / step, "grad_norm": 1 / step, "tokens": 512 * step,
                "tokens_per_s": 1e4, "mfu": 0.25, "step_s": 0.05, "data_s": 0.001, "comm_s": 0.004, "memory_bytes": 3 << 20,
            })  # fmt: skip
            if step % 10 == 0:
                writer.write(
                    {"kind": "eval", "step": step, "loss": loss, "bits_per_byte": loss / 2, "tokens": 100, "bytes": 300, "eval_s": 0.1}
                )
    events.write("resume", step=10)
    events.write("finish", step=steps)
    (path / "results.json").write_text(json.dumps(RESULTS))
    (path / "config.resolved.yaml").write_text("name: A & <b>B</b>\ntrain:\n  steps: 30\n")
    (path / "env.json").write_text(json.dumps({"torch": "2.13.0", "host": "<node>"}))
    for step, files in ((10, ["model.safetensors"]), (20, ["model.safetensors", "manifest.json"])):
        folder = path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_bytes(b"{}" * 600)
    return path


class _Page(HTMLParser):
    """Tags, their attributes, and the text outside style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make_run(tmp_path_factory.mktemp("runs") / "full")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> _Page:
    return _Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_the_page_says_what_the_run_is_and_how_it_did(page: _Page) -> None:
    for said in ("A & <b>B</b>", "finished", "1.4125", "1.690", "4.680", "262,144", "the largest that fits", "20.1 tokens a parameter", "15,360", "25.0%",
                 "def f(x):", "step-00000020", "step-00000010", "incomplete: no manifest", "<node>", "resume", "steps: 30"):  # fmt: skip
        assert said in page.text, said


def test_text_of_the_run_is_never_markup(page: _Page) -> None:
    assert "<script>alert(1)</script> & \ufffd\ufffd" in page.text
    assert not {"script", "b", "node"} & {tag for tag, _ in page.tags}


def test_the_page_needs_nothing_but_itself(run_dir: Path, page: _Page) -> None:
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "://" not in text and "@import" not in text
    for tag, attributes in page.tags:
        assert tag not in ("link", "script", "iframe", "img", "object")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)


def test_drawings_follow_the_page_into_the_dark(page: _Page) -> None:
    drawn = [a for tag, a in page.tags if tag in ("path", "g", "use", "text") and "style" in a]
    styles = " ".join(a["style"] or "" for a in drawn)
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 3
    assert "var(--ink)" in styles and "var(--blue)" in styles and "#24292f" not in styles and "#000000" not in styles


def test_every_reference_inside_the_drawings_has_its_own_target(page: _Page) -> None:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        if "xlink:href" in attributes:
            assert (attributes["xlink:href"] or "")[1:] in ids
        if "clip-path" in attributes:
            assert (attributes["clip-path"] or "")[5:-1] in ids


def test_figures_are_files_too(run_dir: Path, page: _Page) -> None:
    del page
    files = sorted((run_dir / "plots").iterdir())
    assert [f.name for f in files] == ["loss.png", "schedule.png", "time.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path: Path, run_dir: Path, keep: int) -> None:
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:keep]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"kind": "tr')
    page = _Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert ("No step has been recorded yet" in page.text) == (keep == 0)
    assert "No evaluation has been recorded yet" in page.text
    assert summary(load_run(tmp_path))["steps"] == keep


@pytest.mark.parametrize(
    "results", [{}, {"eval": {}}, {"eval": None, "baselines": None, "plan": {}, "sample": {"prompt": "only"}}, {"plan": {"reason": "r"}}]
)
def test_every_key_of_the_results_may_be_missing(tmp_path: Path, results: dict[str, Any]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert write_report(tmp_path).stat().st_size > 0


def test_a_missing_run_is_named_together_with_the_nearest(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"ful is not a run directory: there is no such directory; did you mean .*/full\?"):
        load_run(run_dir.parent / "ful")
    with pytest.raises(ConfigError, match=r"none of .*metrics\.jsonl.* is in it"):
        load_run(tmp_path)


def test_a_run_is_found_by_its_name_under_runs(tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "full").symlink_to(run_dir)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean runs/full\?"):
        load_run(Path("full"))


@pytest.mark.parametrize(("name", "text"), [("results.json", "{"), ("env.json", "[1]"), ("config.resolved.yaml", "a: [")])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written_is_a_storage_error(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        write_report(run_dir, tmp_path / "file" / "report.html")


def test_the_verb_prints_where_the_page_is(tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "page.html"
    assert main(["report", str(run_dir), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.is_file()


def test_the_verb_answers_in_json(tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(run_dir), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out), "steps": 30, "final_loss": 2 + 5 / 30, "eval_bits_per_byte": 1.4125}


def test_the_verb_refuses_a_missing_run_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "nothing is not a run directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_report_needs_torch() -> None:
    program = (
        "import sys, tempfile; from pathlib import Path; from dist_llm.report.html import write_report; import dist_llm.report.mirrors\n"
        "light = [m for m in ('matplotlib', 'jinja2', 'rich', 'wandb') if m in sys.modules]\n"
        "d = Path(tempfile.mkdtemp()); (d / 'metrics.jsonl').touch(); write_report(d)\n"
        "print(light, 'torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[] False\n"


def test_smoothing_keeps_constants_lines_and_length() -> None:
    assert smooth([], 8) == []
    assert smooth([3.0] * 40, 8) == pytest.approx([3.0] * 40)
    line = [0.5 * i for i in range(41)]
    assert smooth(line, 16) == pytest.approx(line)
    assert smooth([1.0, 5.0], 1) == [1.0, 5.0]


def test_thinning_keeps_every_spike() -> None:
    steps, values = list(range(100_000)), [0.0] * 100_000
    values[54_321], values[7] = 9.0, -9.0
    few_steps, few = thin(steps, values)
    assert len(few) <= 2 * _POINTS
    assert dict(zip(few_steps, few, strict=True))[54_321] == 9.0 and min(few) == -9.0
    assert few_steps == sorted(few_steps)
