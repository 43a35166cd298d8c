"""How often ZeRO-3 gathers each parameter in one micro-batch: its bookkeeping, replayed on integers.

DeepSpeed gathers a module's parameters before the module runs, gathers some of the next modules' ahead, and lets go of them when they are
not needed again within ``max_reuse_distance`` elements. With the defaults a model below about 5 x 10^8 parameters keeps
what forward gathered until backward has used it: one gather a micro-batch, where the paper counts two (Rajbhandari et al.,
arXiv:1910.02054, section 7.2.2). This replays ``runtime/zero/partitioned_param_coordinator.py`` of 0.19.8 in its steady state.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dist_llm.config.schema import RunConfig

__all__ = ["Fetches", "ModuleCall", "Parameter", "count_fetches", "module_calls"]


@dataclass(frozen=True)
class Parameter:
    """A parameter as one rank holds it before ZeRO divides it."""

    name: str
    numel: int
    ndim: int


@dataclass(frozen=True)
class ModuleCall:
    """A module enters or leaves forward or backward.

    Attributes:
        module: its name.
        parameters: its own, and those it uses of others.
        enters: False when it leaves, and may let go.
    """

    module: str
    parameters: tuple[Parameter, ...]
    enters: bool


@dataclass
class Fetches:
    """Gathers of one micro-batch: how many calls, and how often each parameter takes part."""

    calls: int = 0
    parameters: Counter[Parameter] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Module:
    name: str
    parameters: tuple[Parameter, ...] = ()
    children: tuple[_Module, ...] = ()
    # Its input needs no gradient: backward never reports its end, and it lets go at the end of the pass.
    opens_graph: bool = False
    recomputed: bool = False
    # Tensors it puts out: backward enters it once for each.
    outputs: int = 1


def module_calls(config: RunConfig, parameters: Mapping[str, Parameter]) -> list[ModuleCall]:
    """The order in which modules enter and leave in one micro-batch, as DeepSpeed's hooks see it.

    Args:
        config: the run.
        parameters: of the whole model, by name.
    """
    model, recompute = config.model, config.parallel.recompute

    def leaf(name: str, *, opens_graph: bool = False, outputs: int = 1) -> _Module:
        own = tuple(parameters[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in parameters)
        return _Module(name, own, opens_graph=opens_graph, outputs=outputs)

    def block(number: int) -> _Module:
        name = f"blocks.{number}"
        projections = ("gate", "up", "down") if model.activation == "swiglu" else ("up", "down")
        attention = tuple(leaf(f"{name}.attention.{part}") for part in ("query", "key", "value", "output"))
        mlp = tuple(leaf(f"{name}.mlp.{part}") for part in projections)
        children = (
            leaf(f"{name}.attention_norm"),
            _Module(f"{name}.attention", children=attention),
            _Module(f"{name}.attention_dropout"),
            leaf(f"{name}.mlp_norm", outputs=2),  # the norm, and the residual stream
            _Module(f"{name}.mlp", children=mlp),
            _Module(f"{name}.mlp_dropout"),
        )
        layers = config.parallel.recompute_layers
        return _Module(name, children=children, recomputed=recompute == "full" and (layers is None or number < layers))

    tables = [leaf("embedding", opens_graph=True)]
    if model.position == "learned":
        tables.append(leaf("positions", opens_graph=True))
    inside = (*tables, _Module("embedding_dropout"), *(block(i) for i in range(model.num_layers)), leaf("final_norm"))
    decoder = _Module("decoder", children=inside, opens_graph=True)
    head = parameters["embedding.weight" if model.tie_embeddings else "head.weight"]
    # The objective reads the head's weight outside the module that owns it; the engine registers it there.
    root = _Module("stages", children=(_Module("loss", (head,), (decoder,), opens_graph=True),), opens_graph=True)
    late: list[ModuleCall] = []
    return _forward(root) + _backward(root, late) + late


def _forward(module: _Module) -> list[ModuleCall]:
    inner = [call for child in module.children for call in _forward(child)]
    return [ModuleCall(module.name, module.parameters, True), *inner, ModuleCall(module.name, module.parameters, False)]


def _backward(module: _Module, late: list[ModuleCall]) -> list[ModuleCall]:
    calls = [ModuleCall(module.name, module.parameters, True)] * module.outputs
    if module.recomputed:
        calls += _forward(module)
    for child in reversed(module.children):
        calls += _backward(child, late)
    (late if module.opens_graph else calls).append(ModuleCall(module.name, module.parameters, False))
    return calls


def count_fetches(calls: Sequence[ModuleCall], persistent: set[str], *, max_live: int, max_reuse_distance: int, prefetch: int) -> Fetches:
    """Replay one micro-batch.

    Args:
        calls: from ``module_calls``.
        persistent: names of parameters that are never let go.
        max_live, max_reuse_distance, prefetch: DeepSpeed's settings, in elements.
    """
    entered = [call for call in calls if call.enters]
    queue = deque((p, step) for step, call in enumerate(entered) for p in sorted(set(call.parameters), key=lambda p: p.name))
    answer = Fetches()
    fetched_for: dict[Parameter, int] = {}
    active: dict[Parameter, set[str]] = {}
    here: set[Parameter] = set()  # gathered, beside the persistent ones
    live = step = 0

    def gather(wanted: Sequence[Parameter]) -> int:
        missing = [p for p in wanted if p not in here and p.name not in persistent]
        if missing:
            answer.calls += 1
            answer.parameters.update(missing)
            here.update(missing)
        return sum(p.numel for p in missing)

    for call in calls:
        if call.enters:
            live += gather(call.parameters)
            for p in call.parameters:
                active.setdefault(p, set()).add(call.module)
            new = {p for p in call.parameters if fetched_for.get(p, -1) < step}
            popped: set[Parameter] = set()
            while queue and len(popped) < len(new):
                p, used = queue.popleft()
                fetched_for[p] = used
                popped.add(p)
            ahead: list[Parameter] = []
            room, taken = min(max_live - live, prefetch), 0
            while queue and taken < room:
                p, used = queue.popleft()
                if p not in here and p.name not in persistent and p not in ahead:
                    ahead.append(p)
                    taken += p.numel
                fetched_for[p] = max(fetched_for.get(p, -1), used)
            live += gather(ahead)
            step += 1
            continue
        kept = {p for p in call.parameters if p.name in persistent or fetched_for.get(p, -1) > step}
        traversed = 0
        for later in entered[step:]:
            if traversed >= max_reuse_distance:
                break
            kept.update(later.parameters)
            traversed += sum(p.numel for p in later.parameters)
        for p in call.parameters:
            active.get(p, set()).discard(call.module)
            if p not in kept and p in here and not active.get(p):
                here.discard(p)
                live -= p.numel
    return answer
