"""What three gloo ranks get from the collectives: ``python -m tests.comm.three_ranks DIR`` writes DIR/rank-N.json.

One launch for all questions; torch is imported once, then forked. The pair is ranks 1 and 2, so that a rank in the group is not the
rank in the world.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.comm.collectives import all_reduce_max, all_reduce_sum, barrier, broadcast_json, gather_json
from dist_llm.comm.context import Group
from dist_llm.comm.ledger import CommLedger

SIZE = 3
LATE_S = 0.4
CPU = torch.device("cpu")


def nested_value(rank: int) -> dict[str, Any]:
    """Something a rank might say: of another length on each, with text that is not ASCII."""
    return {"rank": rank, "text": "日本 é \u0000 \U0001f600" * rank, "deep": [{"x": [None, True, 0.1, -1e300, {}]}] * (3 * rank), "": []}


def ask(group: Group) -> dict[str, Any]:
    """Every collective once, on ``group``."""
    rank, last = group.rank, group.size - 1
    return {
        "sum": all_reduce_sum([2**52 if rank == 0 else 2**52 - 1 if rank == last else 0, rank == last, -0.5, rank], group, CPU),
        "max": all_reduce_max([rank, -1.0 - rank, float("inf") if rank == 0 else 0.0, rank == 0], group, CPU),
        "broadcast": broadcast_json(nested_value(7) if rank == 0 else {"not": "this"}, group, CPU),
        "broadcast empty": broadcast_json({} if rank == 0 else None, group, CPU),
        "broadcast text": broadcast_json("é" if rank == 0 else None, group, CPU),
        "gather": gather_json(nested_value(rank), group, CPU),
        "gather empty": gather_json({}, group, CPU),
        "gather some empty": gather_json({} if rank == 0 else "x" * 3000, group, CPU),
        "gather large": [len(text) for text in gather_json("y" * (100_000 * rank), group, CPU)],
    }


def time_a_late_rank(world: Group) -> dict[str, Any]:
    """Seconds that the clock and the wall count while the last rank comes late, three times."""
    one = torch.ones(1)

    def made_of_another(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)  # by the name in the module, as DeepSpeed's wrappers do

    original = dist.reduce
    dist.reduce = made_of_another
    answer: dict[str, Any] = {}
    with CommLedger() as clock:
        for what, call in (
            ("plain", lambda: dist.all_reduce(one)),
            ("ours", lambda: barrier(world, CPU)),
            ("nested", lambda: dist.reduce(one)),
        ):
            dist.barrier()
            clock.take()
            if world.rank == SIZE - 1:
                time.sleep(LATE_S)
            start = time.perf_counter()
            call()
            wall = time.perf_counter() - start
            answer[what] = {"counted": clock.take(), "wall": wall, "again": clock.take()}
    answer["restored"] = dist.reduce is made_of_another
    dist.reduce = original
    return answer


def run_rank(directory: Path, rank: int) -> None:
    """One rank, to its answers."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=SIZE, timeout=datetime.timedelta(seconds=30)
    )
    world = Group(rank=rank, size=SIZE, handle=dist.group.WORLD)
    handle = dist.new_group([1, 2])
    answers: dict[str, Any] = {"world": ask(world)}
    if rank in (1, 2):
        answers["pair"] = ask(Group(rank=rank - 1, size=2, handle=handle))
    answers["clock"] = time_a_late_rank(world)
    dist.destroy_process_group()
    (directory / f"rank-{rank}.json").write_text(json.dumps(answers))


def main(directory: Path) -> int:
    """Fork the ranks and wait for them; 0 when all ended well."""
    children = []
    for rank in range(SIZE):
        pid = os.fork()
        if pid == 0:
            run_rank(directory, rank)
            sys.exit(0)
        children.append(pid)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
