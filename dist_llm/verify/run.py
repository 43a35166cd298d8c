"""Compare layouts with one plain process: which can run, one launch a world size, what came out of each."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_llm.config.schema import RunConfig
from dist_llm.parallel.ranks import RanksFailed, run_on_ranks
from dist_llm.topology.layout import Layout
from dist_llm.verify.figures import Difference
from dist_llm.verify.program import layouts_program, plain_program
from dist_llm.verify.shrink import apply_layout, refusal

__all__ = ["TOLERANCES", "Outcome", "Verification", "verify_layouts"]

# Sums in another order: in fp32 a few roundings of 6e-8. In bf16 the activations that travel between ranks are rounded to 8 bits
# (4e-3), which several layers add up. docs/verify.md has the measured spread of both.
TOLERANCES = {"fp32": 1e-5, "bf16": 0.1}
_START_S, _LAYOUT_S = 60.0, 30.0  # a launch may take the first, and the second for each layout: ten times what two busy cores need
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Outcome:
    """One layout: how far it is from the plain process, or what stopped it."""

    layout: Layout
    difference: Difference | None
    error: str | None = None

    def holds(self, tolerance: float) -> bool:
        """Whether every figure is within ``tolerance``."""
        return self.difference is not None and self.difference.largest <= tolerance


@dataclass(frozen=True)
class Verification:
    """All layouts of one config."""

    config: RunConfig  # the small copy
    tolerance: float
    outcomes: tuple[Outcome, ...]
    refused: tuple[tuple[Layout, str], ...]

    @property
    def ok(self) -> bool:
        """Whether something was compared and all of it holds."""
        return bool(self.outcomes) and all(outcome.holds(self.tolerance) for outcome in self.outcomes)


def verify_layouts(
    small: RunConfig,
    layouts: Iterable[Layout],
    *,
    tolerance: float | None = None,
    program: Callable[..., Any] = layouts_program,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Verification:
    """Run each layout and compare it with one plain process.

    Args:
        small: the config, shrunk, at its own precision.
        layouts: to compare; equal ones once.
        tolerance: default that of the precision.
        program: what runs on the ranks; tests plant mistakes in it.
        on_outcome: told each outcome as soon as it is known, perhaps from another thread, one at a time.
    """
    limit = tolerance if tolerance is not None else TOLERANCES[small.precision]
    wanted = list(dict.fromkeys(layouts))
    reasons = {layout: refusal(small, layout) for layout in wanted}
    refused = tuple((layout, reason) for layout, reason in reasons.items() if reason is not None)
    runnable = [layout for layout in wanted if reasons[layout] is None]
    outcomes: dict[Layout, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="dist-llm-verify-") as directory:
        plain = str(Path(directory) / "plain.safetensors")
        if runnable:
            run_on_ranks(plain_program, args=(small.model_dump(mode="json"), plain), deadline_s=_START_S + _LAYOUT_S)

        def tell(outcome: Outcome) -> None:
            outcomes[outcome.layout] = outcome
            on_outcome(outcome)

        for world_size in sorted({layout.world_size for layout in runnable}):
            same_size = [layout for layout in runnable if layout.world_size == world_size]
            _compare_world(world_size, same_size, small, plain, Path(directory), limit, program, tell)
    return Verification(small, limit, tuple(outcomes[layout] for layout in runnable), refused)


def _compare_world(
    world_size: int,
    layouts: Sequence[Layout],
    small: RunConfig,
    plain: str,
    directory: Path,
    tolerance: float,
    program: Callable[..., Any],
    tell: Callable[[Outcome], None],
) -> None:
    """Compare layouts of one world size: one launch, and another one after each layout that breaks its launch."""
    pending = list(layouts)
    while pending:
        configs = [apply_layout(small, layout).model_dump(mode="json") for layout in pending]
        done = directory / f"done-{world_size}-{len(pending)}"
        broken: RanksFailed | None = None
        with _Answers(done, pending, tell) as answers:
            try:
                run_on_ranks(
                    program,
                    dp=world_size,
                    args=(configs, plain, tolerance, str(done)),
                    deadline_s=_START_S + _LAYOUT_S * len(pending),
                )
            except RanksFailed as error:
                broken = error
        if broken is not None and answers.count == len(pending):
            raise broken  # after the last answer: not about a layout
        if broken is not None:
            tell(Outcome(pending[answers.count], None, str(broken)))
        pending = pending[answers.count + 1 :]


class _Answers:
    """Tells of each line that the ranks write to ``done`` while they go on with the next layout."""

    def __init__(self, done: Path, layouts: Sequence[Layout], tell: Callable[[Outcome], None]) -> None:
        self.count = 0
        self._done = done
        self._layouts = layouts
        self._tell = tell
        self._over = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> _Answers:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if kind is not None:
            return
        if self._failure is not None:
            raise self._failure
        self._read()

    def _follow(self) -> None:
        try:
            while not self._over.wait(_LOOK_EVERY_S):
                self._read()
        except Exception as failure:  # noqa: BLE001 - whatever the caller's function raised is raised to the caller
            self._failure = failure

    def _read(self) -> None:
        # What stands behind the last end of a line is still being written.
        lines = self._done.read_text(encoding="utf-8").split("\n")[:-1] if self._done.exists() else []
        for line in lines[self.count :]:
            self.count += 1
            self._tell(_outcome(self._layouts[self.count - 1], json.loads(line)))


def _outcome(layout: Layout, answer: dict[str, Any]) -> Outcome:
    if "error" in answer:
        return Outcome(layout, None, answer["error"])
    return Outcome(layout, Difference(**answer))
