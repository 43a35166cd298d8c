"""Whole logical tensors come out of the parts that ranks hold, whatever the grid."""

from __future__ import annotations

import torch

from dist_llm.comm.build import build_context
from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import ModelConfig
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.parallel.state import join_parts, whole_tensors
from dist_llm.planning.count import parameter_shapes
from dist_llm.planning.shards import tensor_slice
from dist_llm.topology.grid import RankGrid
from tests.models.models import make_config

WORLD = 4
# tp 4 holds two copies of each key-value head, or four of the only one; 37 and 10 rows divide over 2 and 4 ranks unevenly.
MODELS = {
    "uneven vocabulary, copied heads": make_config(vocab_size=37, num_layers=3, num_kv_heads=2, bias=True, norm="layer_norm", position="learned"),
    "one head, last rank one row": make_config(vocab_size=10, num_kv_heads=1, tie_embeddings=True),
}  # fmt: skip
GRIDS = [{"tp": 4}, {"tp": 2, "pp": 2}, {"tp": 2, "dp": 2}, {"pp": 2, "cp": 2}, {"pp": 2, "dp": 2}, {"dp": 4}]


def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


def part_of(name: str, whole: torch.Tensor, model: ModelConfig, ctx: ParallelContext) -> torch.Tensor:
    part = tensor_slice(name, model, ctx.tp.size, ctx.tp.rank)
    return whole if part is None else whole.narrow(part.dim, part.start, part.stop - part.start)


def stage_of(name: str, stages: int) -> int:
    """Blocks dealt out in turn, as an interleaved pipeline has them."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) % stages
    return 0 if name.startswith(("embedding", "positions")) else stages - 1


def join_everywhere(ctx: ParallelContext) -> list[str]:
    """What was joined wrongly, on this rank."""
    wrong = []
    for sizes in GRIDS:
        for label, model in MODELS.items():
            mine = build_context(RankGrid(sizes), ctx.world.rank, ctx.device, kv_heads=model.kv_heads)
            asked = []

            def held(name: str, mine: ParallelContext = mine, model: ModelConfig = model, asked: list[str] = asked) -> torch.Tensor:
                asked.append(name)
                return part_of(name, value(name, parameter_shapes(model)[name]), model, mine)

            for name, shape in parameter_shapes(model).items():
                if not torch.equal(join_parts(name, shape, held(name), model, mine.tp), value(name, shape)):
                    wrong.append(f"{sizes} {label}: {name} joined")
            asked.clear()
            names = []
            for name, whole in whole_tensors(model, mine, stage_of=lambda n, s=mine.pp.size: stage_of(n, s), part=held):
                names.append(name)
                expected = value(name, parameter_shapes(model)[name])
                if mine.is_main and not (torch.equal(whole, expected) and whole.is_contiguous()):
                    wrong.append(f"{sizes} {label}: {name} on the main rank")
            if names != list(parameter_shapes(model)):
                wrong.append(f"{sizes} {label}: not in the model's order")
            # Only what a stage holds is asked of it.
            if asked != [name for name in names if stage_of(name, mine.pp.size) == mine.pp.rank]:
                wrong.append(f"{sizes} {label}: asked for {asked}")
    return wrong


def test_the_main_rank_gets_every_whole_tensor_in_the_models_order() -> None:
    assert run_on_ranks(join_everywhere, dp=WORLD) == [[]] * WORLD
