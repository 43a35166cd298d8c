from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.cluster.slurm import RankEnv, expand_nodelist, expand_tasks_per_node, port_for_job, rank_environment
from dist_llm.utils.errors import ExitCode, LaunchError

# As `srun env` printed it on Slurm 22.05 for rank 3 of a job of 2 nodes x 2 tasks.
STEP = {
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}

LISTS = {
    "n1": ["n1"],
    "n[3]": ["n3"],
    "n[1-3,07-09],m1": ["n1", "n2", "n3", "n07", "n08", "n09", "m1"],
    "rack[1-2]n[1-3]": ["rack1n1", "rack1n2", "rack1n3", "rack2n1", "rack2n2", "rack2n3"],
    "n[08-011]": ["n08", "n09", "n10", "n11"],
    "n[9-11]": ["n9", "n10", "n11"],
    "n[098-101]": ["n098", "n099", "n100", "n101"],
    "n[08-11,5]": ["n08", "n09", "n10", "n11", "n5"],
    "n[01-3]": ["n01", "n02", "n03"],
    "a,b,a": ["a", "b", "a"],
    "a,,b": ["a", "b"],
    "gpu-a100-[1-2],login.cluster": ["gpu-a100-1", "gpu-a100-2", "login.cluster"],
}


@pytest.mark.parametrize("text", LISTS)
def test_a_node_list_names_its_hosts_in_order(text: str) -> None:
    assert expand_nodelist(text) == LISTS[text]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="scontrol is not installed: `tools/install_slurm.sh`")
def test_node_lists_are_read_as_scontrol_reads_them(tmp_path: Path) -> None:
    # scontrol wants a configuration even for this, though no daemon.
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=test\nSlurmctldHost=localhost\nNodeName=n1\nPartitionName=main Nodes=n1\n")
    whole = ",".join(LISTS)
    answer = subprocess.run(
        ["scontrol", "show", "hostnames", whole],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env=os.environ | {"SLURM_CONF": str(conf)},
    )
    assert answer.returncode == 0, answer.stderr
    assert expand_nodelist(whole) == answer.stdout.split()


ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=3)


@settings(max_examples=50, deadline=None)
@given(names=st.lists(st.tuples(st.sampled_from(["n", "node-", "a1b"]), ranges), min_size=1, max_size=3))
def test_a_list_written_with_ranges_equals_the_list_written_out(names: list[tuple[str, list[tuple[int, int, int]]]]) -> None:
    written, out = [], []
    for prefix, parts in names:
        inside = ",".join(f"{first:0{width}d}-{first + more:0{width}d}" for first, more, width in parts)
        written.append(f"{prefix}[{inside}]")
        out += [f"{prefix}{n:0{width}d}" for first, more, width in parts for n in range(first, first + more + 1)]
    assert expand_nodelist(",".join(written)) == out
    assert expand_nodelist(",".join(out)) == out


@pytest.mark.parametrize("text", ["n[1", "n]", "n[a-b]", "n[2-1]", "n[]", "n[1,,2]", "n[1-2,m1", "n[[1]]"])
def test_a_broken_node_list_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(LaunchError, match="node list") as caught:
        expand_nodelist(text)
    assert text in str(caught.value)
    assert caught.value.exit_code == ExitCode.INTERNAL


def test_tasks_per_node_are_repeated_as_written() -> None:
    assert expand_tasks_per_node("2(x2),1") == [2, 2, 1]
    assert expand_tasks_per_node("8") == [8]
    with pytest.raises(LaunchError, match="2\\(y3\\)"):
        expand_tasks_per_node("2(y3)")


def test_a_step_gives_its_ranks_their_places() -> None:
    assert rank_environment(STEP) == RankEnv(
        rank=3,
        world_size=4,
        local_rank=1,
        local_world_size=2,
        master_addr="n1",
        master_port=port_for_job(2),
        job_id=2,
        restart_count=0,
    )


def test_uneven_nodes_have_their_own_local_world_size() -> None:
    env = STEP | {"SLURM_STEP_NODELIST": "b7,a[01-02]", "SLURM_STEP_TASKS_PER_NODE": "3,2(x2)", "SLURM_STEP_NUM_TASKS": "7"}
    last = rank_environment(env | {"SLURM_PROCID": "6", "SLURM_NODEID": "2", "SLURM_LOCALID": "1", "SLURM_RESTART_COUNT": "4"})
    assert last is not None
    assert (last.local_world_size, last.master_addr, last.world_size, last.restart_count) == (2, "b7", 7, 4)


def test_a_step_smaller_than_its_job_counts_its_own_tasks() -> None:
    env = STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "n2"}
    rank = rank_environment(env | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert rank is not None
    assert (rank.world_size, rank.master_addr) == (1, "n2")


def test_a_given_meeting_point_wins() -> None:
    rank = rank_environment(STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4242"})
    assert rank is not None
    assert (rank.master_addr, rank.master_port) == ("10.0.0.7", 4242)
    with pytest.raises(LaunchError, match="MASTER_PORT is 70000"):
        rank_environment(STEP | {"MASTER_PORT": "70000"})


def test_outside_a_step_there_is_no_rank() -> None:
    batch_shell = {k: v for k, v in STEP.items() if "STEP" not in k}
    assert rank_environment({}) is None
    assert rank_environment(batch_shell) is None
    assert rank_environment(STEP | {"SLURM_STEP_ID": "4294967290"}) is None  # the interactive step of salloc


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID 4 of 4"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID is 2"),
        ({"SLURM_LOCALID": "2"}, "SLURM_LOCALID 2"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, "SLURM_NODEID is 1"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, "disagree"),
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID is not set"),
        ({"SLURM_STEP_NODELIST": ",", "SLURM_JOB_NODELIST": ""}, "names no node"),
    ],
)
def test_variables_that_disagree_are_refused_by_name(change: dict[str, str], named: str) -> None:
    with pytest.raises(LaunchError, match=named):
        rank_environment(STEP | change)


def test_ports_of_neighbouring_jobs_differ_and_stay_below_the_ephemeral_ones() -> None:
    ports = [port_for_job(job) for job in range(67_000_000, 67_000_000 + 1000)]
    assert len(set(ports)) == 1000
    assert all(10_000 < port_for_job(job) < 32_768 for job in (0, 1, 17_999, 18_000, 2**31, 67_108_863))
