"""What each launcher says is read alike."""

from __future__ import annotations

import pytest

from dist_llm.engine.ranks import read_launch
from dist_llm.utils.errors import LaunchError

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "1234",
    "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "3",
}  # fmt: skip


def test_torchrun_deepspeed_and_srun_say_where_a_rank_is() -> None:
    torchrun, deepspeed, srun = read_launch(TORCHRUN), read_launch(DEEPSPEED), read_launch(SRUN)
    assert (torchrun.launcher, torchrun.rank, torchrun.world_size, torchrun.local_rank, torchrun.local_size) == ("torchrun", 3, 4, 1, 2)
    assert (deepspeed.launcher, deepspeed.rank, deepspeed.world_size, deepspeed.local_size) == ("deepspeed", 1, 2, 2)
    assert (srun.launcher, srun.rank, srun.world_size, srun.local_rank, srun.local_size, srun.cpus) == ("srun", 1, 2, 0, 1, 3)
    assert srun.master_addr == "n1" and srun.job_id == "77" and 1024 < srun.master_port < 32768


def test_without_a_launcher_a_process_is_alone_also_in_the_shell_of_a_batch_job() -> None:
    assert read_launch({}).world_size == 1
    shell = {k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}
    assert read_launch(shell).world_size == 1


@pytest.mark.parametrize("broken", [{"WORLD_SIZE": "two"}, {"MASTER_PORT": "http"}, {"LOCAL_RANK": ""}])
def test_nonsense_from_a_launcher_names_the_variable(broken: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=next(iter(broken))):
        read_launch({**TORCHRUN, **broken})
