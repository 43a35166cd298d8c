"""The report: one HTML file that needs nothing else, neither a network nor the run directory it came from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from dist_llm.report.console import duration
from dist_llm.report.forecast import forecast_notes, forecast_rows
from dist_llm.report.plots import draw_figures
from dist_llm.report.run import RunData, load_run, numbers, summary
from dist_llm.utils.errors import StorageError
from dist_llm.utils.files import write_atomic
from dist_llm.utils.format import byte_size

__all__ = ["draw_report", "write_report"]

# A page may not hold these, and a byte-level sample may: they are shown as the replacement character.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Draw a run, finished or not, as one HTML file, and its figures as ``plots/*.png`` in the run directory.

    Args:
        run_dir: the run directory.
        out: where the page goes; default ``report.html`` in the run directory.

    Returns:
        the path of the page.

    Raises:
        ConfigError: there is no run there.
        DataError: a file of the run is damaged.
        StorageError: the page cannot be written.
    """
    return draw_report(load_run(run_dir), out)


def draw_report(run: RunData, out: Path | None = None) -> Path:
    """Like :func:`write_report`, for a run that has been read already."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    drawings = draw_figures(run)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "size": byte_size, "value": _value}
    page = environment.get_template("report.html.j2").render(
        run=run,
        cards=_cards(run),
        comparison=_comparison(run),
        sample=_mapping(run, "sample"),
        plan=_mapping(run, "plan"),
        forecast=forecast_rows(run),
        forecast_notes=forecast_notes(run),
        # Not escaped again: matplotlib wrote it, and no text of the run is drawn.
        figures=[{"name": d.name, "caption": d.caption, "svg": Markup(d.svg)} for d in drawings],
        events=[{"time": e.get("time", ""), "event": e.get("event", ""), "details": _details(e)} for e in run.events],
        state=_state(run),
    )
    target = out if out is not None else run.directory / "report.html"
    plots = run.directory / "plots"
    try:
        plots.mkdir(exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write into {error.filename}: {error.strerror}; free some space or choose another --out") from error
    for drawing in drawings:
        write_atomic(plots / f"{drawing.name}.png", drawing.png)
    write_atomic(target, _CONTROL.sub("\ufffd", page))
    return target


def _mapping(run: RunData, key: str) -> dict[str, Any]:
    value = run.results.get(key)
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> str:
    """A number of things: 12, 4,096, 7.31 M."""
    if not isinstance(value, int | float):
        return str(value)
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.2f} {name}"
    return f"{value:,.0f}"


def _value(value: Any) -> str:
    """Any JSON value as one line of text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _details(event: dict[str, Any]) -> str:
    return "  ".join(f"{k}={_value(v)}" for k, v in event.items() if k not in ("time", "event"))


def _state(run: RunData) -> str:
    # The last event that says how the run stands. A killed run could not write one.
    names = [e.get("event") for e in run.events if e.get("event") in ("start", "resume", "stop", "finish")]
    last = names[-1] if names else None
    return {"finish": "finished", "stop": "stopped, to be resumed"}.get(str(last), "not finished" if run.train or last else "not started")


def _cards(run: RunData) -> list[tuple[str, str]]:
    """The headline: what and how much, as (label, text); only what is known."""
    said = summary(run)
    started: dict[str, Any] = next((e for e in run.events if e.get("event") == "start"), {})
    cards: list[tuple[str, str]] = []
    bits = said["eval_bits_per_byte"]
    if isinstance(bits, int | float):
        cards.append(("held-out bits per byte", f"{bits:.4f}"))
    if isinstance(said["final_loss"], int | float):
        cards.append(("last training loss", f"{said['final_loss']:.4f}"))
    params = _mapping(run, "plan").get("params", started.get("params"))
    if params is not None:
        cards.append(("parameters", _count(params)))
    tokens = numbers(run.train, "tokens")[1]
    if tokens:
        cards.append(("tokens trained on", _count(tokens[-1])))
    if run.train:
        cards.append(("steps", f"{said['steps']:,}"))
    for name, label, form in (
        ("tokens_per_s", "tokens per second, median", "{:,.0f}"),
        ("mfu", "model FLOPs utilisation, median", "{:.1%}"),
    ):
        values = numbers(run.train, name)[1]
        if values:
            cards.append((label, form.format(median(values))))
    seconds = numbers(run.train, "step_s")[1]
    if seconds:
        cards.append(("time in steps", duration(sum(seconds))))
    memory = numbers(run.train, "memory_bytes")[1]
    if memory:
        cards.append(("peak memory, fullest rank", byte_size(max(memory))))
    if run.timelines:
        last = run.timelines[-1]
        cards.append((f"pipeline bubble; {last.bubble_theory:.1%} in theory", f"{last.bubble:.1%}"))
    return cards


def _comparison(run: RunData) -> list[dict[str, Any]]:
    """Held-out bits per byte of the run beside what needs no model, with a bar length in percent."""
    baselines = _mapping(run, "baselines")
    rows = [
        ("this run", summary(run)["eval_bits_per_byte"], "ours"),
        ("lzma -9, same bytes", baselines.get("lzma_bits_per_byte"), "theirs"),
        ("byte-unigram entropy", baselines.get("byte_unigram_entropy"), "theirs"),
    ]
    known = [(label, float(value), kind) for label, value, kind in rows if isinstance(value, int | float)]
    if len(known) < 2:
        return []
    longest = max(value for _, value, _ in known)
    return [
        {"label": label, "bits": f"{value:.3f}", "percent": f"{100 * value / longest:.1f}" if longest > 0 else "0", "kind": kind}
        for label, value, kind in known
    ]
