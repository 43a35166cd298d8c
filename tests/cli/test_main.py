"""The command line itself: fast, helpful, quiet about what it does not know."""

from __future__ import annotations

import resource
import subprocess
import sys

from dist_llm import __version__
from dist_llm.cli.main import VERBS
from tests.conftest import ROOT, Run, clean_environment


def test_help_costs_less_than_a_third_of_a_second_of_cpu_time_and_names_every_verb() -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "dist_llm", "--help"], capture_output=True, text=True, cwd=ROOT, env=clean_environment(), check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert all(verb in done.stdout for verb in VERBS)
    assert min(times) < 0.3


def test_help_of_the_light_verbs_imports_no_torch() -> None:
    for verb in VERBS:
        code = f"import sys; from dist_llm.cli.main import main\ntry: main(['{verb}', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=clean_environment(), check=True)


def test_an_unknown_verb_names_the_nearest(dist_llm: Run) -> None:
    done = dist_llm("trian", "x.yaml")
    assert done.returncode == 2 and "did you mean 'train'" in done.stderr


def test_version_no_words_and_help_of_a_verb(dist_llm: Run) -> None:
    assert dist_llm("--version").stdout.strip() == f"dist-llm {__version__}"
    assert dist_llm().returncode == 2
    helped = dist_llm("train", "--help")
    assert helped.returncode == 0 and "deepspeed --num_gpus" in helped.stdout


def test_options_may_stand_between_config_and_overrides(dist_llm: Run) -> None:
    done = dist_llm("train", "configs/tiny/llama.yaml", "--dry-run", "optim.lr=nonsense")
    assert done.returncode == 2 and "optim.lr" in done.stderr


def test_output_into_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m dist_llm config schema | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=clean_environment(), check=False)
    assert done.stderr == ""


def test_a_full_disk_under_stdout_ends_with_74() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dist_llm", "config", "schema"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=clean_environment(), check=False,
        )  # fmt: skip
    assert done.returncode == 74 and "disk is full" in done.stderr and "Traceback" not in done.stderr
