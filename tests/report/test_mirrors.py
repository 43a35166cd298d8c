"""TensorBoard and wandb show what metrics.jsonl says, over resumes too, and cannot hurt a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_llm.report.mirrors import Mirrors, TensorBoardMirror, WandbMirror, open_mirrors
from dist_llm.report.names import mirror_values

from .wandb_offline import read_records, read_wandb_offline


def _record(step: int, loss: float = 2.0) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "loss": loss, "bits_per_byte": 1.5, "lr": 1e-3, "grad_norm": 0.5, "tokens": 512 * step,
        "tokens_per_s": 1e4, "mfu": 0.3, "step_s": 0.05, "data_s": 0.001, "comm_s": 0.002, "memory_bytes": 1 << 20,
    }  # fmt: skip


def _scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(path), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_names_are_grouped_by_what_they_tell() -> None:
    assert set(mirror_values(_record(1))) == {
        "train/loss", "train/bits_per_byte", "train/lr", "train/grad_norm", "train/tokens",
        "perf/tokens_per_s", "perf/mfu", "perf/step_s", "perf/data_s", "perf/comm_s", "perf/memory_bytes",
    }  # fmt: skip
    assert mirror_values({"kind": "eval", "step": 1, "loss": 2.0, "bytes": 3, "mfu": None}) == {"eval/loss": 2.0, "eval/bytes": 3}


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    first = TensorBoardMirror(tmp_path / "tb")
    for step in range(1, 8):
        first.log(_record(step, loss=1.0))
    first.close()
    second = TensorBoardMirror(tmp_path / "tb")
    second.resumed(4)
    for step in range(5, 10):
        second.log(_record(step, loss=2.0))
    second.log({"kind": "eval", "step": 9, "loss": 3.0})
    second.close()
    scalars = _scalars(tmp_path / "tb")
    assert scalars["train/loss"] == [(s, 1.0 if s <= 4 else 2.0) for s in range(1, 10)]
    assert scalars["eval/loss"] == [(9, 3.0)]
    assert "perf/tokens_per_s" in scalars


def test_a_logged_step_is_on_disk_before_tensorboard_is_closed(tmp_path: Path) -> None:
    mirror = TensorBoardMirror(tmp_path / "tb")
    for step in range(1, 30):
        mirror.log(_record(step))
    assert len(_scalars(tmp_path / "tb")["train/loss"]) == 29
    mirror.close()


# wandb keeps a service and settings a process, so each session is a process of its own, as in a run.
_SESSION = """
import sys
from pathlib import Path
def watch(event, args):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(args[1], tuple)):
        print("network:", event, args, file=sys.stderr, flush=True)
sys.addaudithook(watch)
from dist_llm.report.mirrors import open_mirrors
run_dir, first, last, resumed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
mirrors = open_mirrors(run_dir, tensorboard=False, wandb="offline", project="p", name="n", config={"model": {"d_model": 64}},
                       note=lambda text: sys.exit(text))
if resumed:
    mirrors.resumed(resumed)
for step in range(first, last + 1):
    mirrors.log({"kind": "train", "step": step, "loss": 1 / step, "lr": 1e-3, "tokens_per_s": 1e4, "step_s": 0.1})
mirrors.log({"kind": "eval", "step": last, "loss": 2.5, "bits_per_byte": 1.25})
mirrors.close()
"""


def _session(run_dir: Path, first: int, last: int, resumed: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _SESSION, str(run_dir), str(first), str(last), str(resumed)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(run_dir)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_sessions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """A run of 400 steps (several 32 KiB blocks), resumed from step 300 and taken to 600."""
    run_dir = tmp_path_factory.mktemp("run")
    done = [_session(run_dir, 1, 400), _session(run_dir, 301, 600, resumed=300)]
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    return run_dir, done


def _files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_wandb_offline_run_holds_every_logged_step(two_sessions: tuple[Path, Any]) -> None:
    first, second = (read_wandb_offline(f) for f in _files(two_sessions[0]))
    assert _files(two_sessions[0])[0].stat().st_size > 2 * 32 * 1024
    trained = [(row["train/step"], row["train/loss"]) for row in first if "train/loss" in row]
    assert trained == [(s, 1 / s) for s in range(1, 401)]
    trained = [(row["train/step"], row["train/loss"]) for row in second if "train/loss" in row]
    assert trained == [(s, 1 / s) for s in range(301, 601)]
    assert [(r["train/step"], r["eval/loss"], r["eval/bits_per_byte"]) for r in first + second if "eval/loss" in r] == [
        (400, 2.5, 1.25),
        (600, 2.5, 1.25),
    ]


def test_a_resumed_wandb_run_keeps_its_id_and_marks_the_repeated_steps(two_sessions: tuple[Path, Any]) -> None:
    run_dir = two_sessions[0]
    run_id = (run_dir / "wandb" / "run-id").read_text().strip()
    assert [f.name for f in _files(run_dir)] == [f"run-{run_id}.wandb"] * 2
    first, second = (read_wandb_offline(f) for f in _files(run_dir))
    assert {row["run/attempt"] for row in first} == {1} and {row["run/attempt"] for row in second} == {2}
    assert second[0]["run/resumed_at"] == 300
    assert not any("run/resumed_at" in row for row in first + second[1:])
    counted = {row["train/step"]: row["run/attempt"] for row in first + second if "train/loss" in row}  # the later attempt counts
    assert counted == {step: 1 if step <= 300 else 2 for step in range(1, 601)}


def test_wandb_charts_have_the_training_step_as_x_axis(two_sessions: tuple[Path, Any]) -> None:
    axes = {}
    for record in read_records(_files(two_sessions[0])[0]):
        if record.WhichOneof("record_type") == "metric":
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
    assert {axes[f"{group}/*"] for group in ("train", "perf", "eval", "run")} == {"train/step"}


def test_an_offline_wandb_run_prints_nothing_and_asks_the_network_nothing(
    two_sessions: tuple[Path, list[subprocess.CompletedProcess[str]]],
) -> None:
    assert [(d.stdout, d.stderr) for d in two_sessions[1]] == [("", ""), ("", "")]


def test_a_mirror_that_cannot_be_opened_is_noted_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("in the way")
    (tmp_path / "wandb").write_text("in the way")
    notes: list[str] = []
    mirrors = open_mirrors(tmp_path, tensorboard=True, wandb="offline", project="p", name="n", config={}, note=notes.append)
    mirrors.log(_record(1))
    mirrors.close()
    assert mirrors.names == ()
    assert [n.split()[0] for n in notes] == ["tensorboard", "wandb"]
    assert all("training goes on" in n for n in notes)


def test_a_mirror_that_fails_later_is_dropped_with_one_note_and_the_others_go_on(tmp_path: Path) -> None:
    broken, works = TensorBoardMirror(tmp_path / "a"), TensorBoardMirror(tmp_path / "b")
    notes: list[str] = []
    mirrors = Mirrors({"broken": broken, "works": works}, notes.append)
    broken.close()  # its writer raises OSError from now on
    for step in range(1, 4):
        mirrors.log(_record(step))
    mirrors.close()
    assert len(notes) == 1 and notes[0].startswith("broken mirror is off")
    assert [s for s, _ in _scalars(tmp_path / "b")["train/loss"]] == [1, 2, 3]


def test_an_error_of_our_own_is_not_taken_for_a_failing_mirror(tmp_path: Path) -> None:
    mirrors = Mirrors({"tb": TensorBoardMirror(tmp_path)}, pytest.fail)
    with pytest.raises(KeyError, match="step"):
        mirrors.log({"kind": "train", "loss": 1.0})
    mirrors.close()


def test_the_wandb_mirror_outlives_its_service(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from dist_llm.report.mirrors import Mirrors, WandbMirror\n"
        "notes = []\n"
        "mirrors = Mirrors({'wandb': WandbMirror(Path(sys.argv[1]), 'p', 'offline', {}, 'n')}, notes.append)\n"
        "children = Path(f'/proc/{os.getpid()}/task').glob('*/children')\n"
        "for pid in {int(p) for c in children for p in c.read_text().split()}:\n"
        "    os.kill(pid, signal.SIGKILL)\n"
        "deadline = time.monotonic() + 20\n"
        "while mirrors.names and time.monotonic() < deadline:\n"
        "    mirrors.log({'kind': 'train', 'step': 1, 'loss': 1.0}); time.sleep(0.01)\n"
        "mirrors.log({'kind': 'train', 'step': 2, 'loss': 1.0})\n"
        "mirrors.close()\n"
        "print(len(notes), notes)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ['wandb mirror is off"), done.stdout


def test_an_online_run_without_a_server_is_noted_and_goes_on(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dist_llm.report.mirrors import open_mirrors\n"
        "notes = []\n"
        "m = open_mirrors(Path(sys.argv[1]), tensorboard=False, wandb='online', project='p', name='n', config={}, note=notes.append)\n"
        "m.log({'kind': 'train', 'step': 1, 'loss': 1.0}); m.close()\n"
        "print(len(notes), notes)\n"
    )
    # No key anywhere, and a server that is not there.
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, env=env, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ['wandb mirror is off"), done.stdout


def test_importing_the_mirrors_imports_no_client() -> None:
    program = "import sys, dist_llm.report.mirrors; print([m for m in ('torch', 'wandb', 'tensorboard') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert WandbMirror.__name__ == "WandbMirror"
