"""What one rank makes of an exception; what the ranks do together is in test_faults.py."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_llm.cluster.exit_file import read_exit
from dist_llm.cluster.health import Beat, HealthDir
from dist_llm.comm.context import ParallelContext
from dist_llm.config.load import load_config
from dist_llm.engine.faults import ending_of, failure_of, hang, is_echo, is_timeout, out_of_memory
from dist_llm.engine.watch import Watch
from dist_llm.utils.errors import NumericalError, OutOfMemory, StorageError
from tests.conftest import ROOT

HOST = socket.gethostname()


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    with pytest.raises(type(error)) as caught:
        raise error from cause
    return caught.value


def beat(rank: int, step: int, *, waits: bool) -> Beat:
    return Beat(rank=rank, host=f"n{rank // 2}", pid=100 + rank, step=step, where="row (rows.py:7)", waits=waits)


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 8000ms for recv operation"),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2356, remote process exited or there was a network error"),
        raised(TypeError("while handling"), RuntimeError(GLOO)),
    ],
)
def test_a_broken_collective_may_be_another_ranks_fault(error: Exception) -> None:
    assert is_echo(error)
    assert is_timeout(error) == ("Timed out" in str(error))


@pytest.mark.parametrize("error", [KeyError("planted"), RuntimeError("size mismatch"), NumericalError("nan"), TimeoutError("timed out")])
def test_what_a_rank_did_itself_is_its_own_fault(error: Exception) -> None:
    assert not is_echo(error) and not is_timeout(error)


def test_an_agreed_refusal_is_an_echo_where_it_says_so() -> None:
    error = StorageError("the main rank could not save step 4")
    assert not is_echo(error)
    error.is_echo = True
    assert is_echo(error)


def test_a_failure_names_rank_host_process_step_and_error_in_one_line() -> None:
    failure = failure_of(raised(ValueError("first\nsecond")), rank=3, step=17)
    assert failure.reason == f"rank 3 on {HOST} (pid {os.getpid()}) failed at step 17: ValueError: first"
    assert (failure.code, failure.rank, failure.teller, failure.step) == (1, 3, 3, 17)
    assert failure.traceback is not None and failure.traceback.endswith("ValueError: first\nsecond\n")


def test_an_error_for_a_person_keeps_its_exit_code() -> None:
    failure = failure_of(NumericalError("the loss is nan"), rank=0, step=4, alone=True)
    assert (failure.code, failure.reason) == (76, "NumericalError: the loss is nan")
    failure = failure_of(NumericalError("the loss is nan"), rank=0, step=4)
    assert failure.code == 76 and failure.reason.endswith("failed at step 4: NumericalError: the loss is nan")


def test_a_broken_collective_without_a_cause_says_what_is_known() -> None:
    assert "lost another rank at step ? and nobody said why" in failure_of(raised(RuntimeError(GLOO)), rank=1, step=None).reason


def test_a_hang_names_the_one_rank_that_does_not_wait() -> None:
    beats = {r: beat(r, 17 if r < 3 else 16, waits=r != 3) for r in range(5)}
    found = hang(RuntimeError("Timed out"), beats, rank=0, step=17, still_s=1800.4)
    assert (found.code, found.rank, found.host, found.step, found.teller) == (72, 3, "n1", 17, None)
    assert found.reason == (
        "hang: no step for 1800 s after step 17; rank 0 waited in a collective to its timeout; "
        "rank 3 on n1 (pid 103) is not in one but in row (rows.py:7); steps done: 16 by rank 3-4, 17 by rank 0-2"
    )


def test_a_hang_in_which_many_or_none_wait_blames_nobody() -> None:
    assert hang(RuntimeError(), {r: beat(r, 1, waits=False) for r in range(8)}, rank=0, step=1, still_s=1).reason.count("rows.py") == 4
    nobody = hang(RuntimeError(), {r: beat(r, 1, waits=True) for r in range(3)}, rank=0, step=1, still_s=1)
    assert nobody.rank is None and "all ranks wait, each for another" in nobody.reason


def test_memory_that_ran_out_names_the_keys() -> None:
    config = load_config(ROOT / "configs/tiny/llama.yaml", ["data.path=x"]).config
    assert out_of_memory(KeyError("x"), config) is None
    error = out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), config)
    assert isinstance(error, OutOfMemory) and "train.micro_batch_size (2)" in str(error)


def test_one_rank_alone_has_no_thread_and_its_own_error_is_the_cause(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/tiny/llama.yaml", ["data.path=x"]).config
    progress: dict[str, Any] = {"step": 4, "attempt": 1}
    health, ctx = HealthDir(tmp_path, 1), ParallelContext(device=torch.device("cpu"))
    health.prepare()
    before = threading.active_count()
    watch = Watch(health, tmp_path, ctx, progress)
    watch.start(ctx)
    assert threading.active_count() == before
    caught, start = raised(RuntimeError(GLOO)), time.monotonic()
    assert ending_of(caught, config, watch, rank=0, world_size=1, step=4) is caught
    assert time.monotonic() - start < 1  # there is nobody whose word to wait for
    record = read_exit(tmp_path)
    assert record is not None and (record.code, record.rank, record.step) == (1, 0, 4)
    watch.leave()
