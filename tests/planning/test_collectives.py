from __future__ import annotations

import pytest

from dist_llm.planning.cluster import load_cluster
from dist_llm.planning.collectives import Span, all_gather, all_reduce, all_to_all, point_to_point, span

H100 = load_cluster("h100-80g")
NVLINK = H100.nvlink_bandwidth * H100.link_efficiency
PORT = H100.network_bandwidth * H100.network_efficiency
BIG = 64e9  # bytes: latencies vanish beside it


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_large_ring_moves_two_n_minus_one_over_n_of_the_message(n: int) -> None:
    seconds = all_reduce(BIG, span(n, 1, 8), H100)
    assert seconds == pytest.approx(2 * (n - 1) / n * BIG / NVLINK, rel=1e-3)
    assert all_gather(BIG, span(n, 1, 8), H100) == pytest.approx(seconds / 2, rel=1e-3)


def test_a_group_of_one_communicates_nothing() -> None:
    alone = Span(1, 1)
    assert all_reduce(BIG, alone, H100) == all_gather(BIG, alone, H100) == all_to_all(BIG, alone, H100) == 0.0


def test_a_small_sum_over_many_ranks_takes_the_tree() -> None:
    # 1024 ranks: a ring has 2 x 1023 hops, a double tree 2 x 10 levels.
    group = span(1024, 1, 8)
    assert all_reduce(1e3, group, H100) < 0.1 * 2 * all_gather(1e3, group, H100)


def test_a_group_uses_the_ports_of_its_ranks_in_a_node() -> None:
    # Stride 8: one rank a node, one port. Stride 1: eight ranks a node, eight ports, which NVLink then just keeps up with.
    one, eight = all_gather(BIG, span(64, 8, 8), H100), all_gather(BIG, span(64, 1, 8), H100)
    assert one == pytest.approx(63 / 64 * BIG / PORT, rel=1e-3)
    assert eight == pytest.approx(63 / 64 * BIG / min(8 * PORT, NVLINK), rel=1e-3)


def test_spans_follow_strides() -> None:
    assert span(8, 1, 8) == Span(8, 8)
    assert span(16, 4, 8) == Span(16, 2)
    assert span(4, 16, 8) == Span(4, 1)
    assert (span(8, 1, 8).nodes, span(16, 4, 8).nodes, span(12, 1, 8).nodes) == (1, 8, 2)


def test_rows_sent_once_a_node_save_traffic_between_nodes_only() -> None:
    inside, across = span(8, 1, 8), span(64, 1, 8)
    assert all_to_all(BIG, inside, H100, once_a_node=0.5) == all_to_all(BIG, inside, H100)
    assert all_to_all(BIG, across, H100, once_a_node=0.5) == pytest.approx(all_to_all(BIG, across, H100) / 2, rel=1e-3)


def test_between_nodes_a_message_goes_at_the_ports_rate() -> None:
    assert point_to_point(BIG, across_nodes=True, cluster=H100) == pytest.approx(BIG / PORT, rel=1e-3)
    assert point_to_point(BIG, across_nodes=False, cluster=H100) == pytest.approx(BIG / NVLINK, rel=1e-3)
