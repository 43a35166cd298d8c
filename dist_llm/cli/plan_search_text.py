"""A plan as text: the model and why, the fastest layouts, what was left out, what trades against what; or a plain no."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_llm.planning.amounts import Fleet

__all__ = ["answer_as_text", "no_as_text", "table_as_text"]

_FITTED = (70e6, 16e9)  # the models of Hoffmann et al.
_AXES = {"tp": "tensor", "cp": "context", "ep": "experts", "pp": "pipeline", "dp": "data"}


def answer_as_text(answer: dict[str, Any], fleet: Fleet) -> str:
    """The whole answer."""
    lines = _model_lines(answer)
    lines += [
        "",
        f"fastest layouts on {fleet} ({fleet.nodes} node{'s' if fleet.nodes > 1 else ''}), one for each division over tp, pp, cp and experts:",
    ]
    header = ["layout", "step s", "90 % within", "MFU", "bubble", "comm", "memory", "stage", "hours", "jobs", "GPU-hours"]
    rows = [_layout_row(row) for row in answer["layouts"]]
    lines += _columns(header, rows)
    lines += ["", *_best_lines(answer["layouts"][0])]
    lines += ["", *_rejected_lines(answer["rejected"])]
    lines += ["", "what trades against what (nothing else is as good in time, memory and devices together):"]
    pareto = [[f"{r['gpus']:,}", f"{r['step_s']:.4g}", _gb(r["memory_bytes"]), r["layout"]] for r in answer["pareto"]]
    lines += _columns(["devices", "step s", "memory", "layout"], pareto)
    if "written" in answer:
        lines += [
            "",
            f"wrote {answer['written']['config']} and {answer['written']['sbatch']}; start it with: sbatch {answer['written']['sbatch']}{_corpus(answer)}",
        ]
    return "\n".join(lines)


def table_as_text(answer: dict[str, Any]) -> str:
    """The table over numbers of devices."""
    lines = _model_lines(answer)
    layouts = answer["layouts"]
    lines += ["", f"fastest layout on each number of {answer['device']}:"]
    if not layouts:
        return "\n".join([*lines, "no: the model fits on none of 1 to 16,384 devices"])
    rows = [
        [
            f"{r['gpus']:,}", f"{r['step_s']:.4g}", f"{100 * r['mfu']:.1f} %", _gb(r["memory_bytes"]), _days(r["hours"]),
            f"{_days(r['hours_interval'][0])} - {_days(r['hours_interval'][1])}", f"{r['gpu_hours']:,.0f}", r["layout"],
        ]
        for r in layouts
    ]  # fmt: skip
    lines += _columns(["devices", "step s", "MFU", "memory", "days", "90 % within", "GPU-hours", "layout"], rows)
    if layouts[0]["gpus"] > 1:
        lines.append(f"On fewer than {layouts[0]['gpus']:,} it does not fit.")
    if (limit := answer["deadline_hours"]) is not None:
        count = answer["smallest_in_time"]
        lines.append(f"{count:,} devices are enough for {_time(limit)}." if count else f"no: none of these does it in {_time(limit)}.")
    return "\n".join(lines)


def no_as_text(answer: dict[str, Any], fleet: Fleet) -> str:
    """A plain no, and what would do."""
    no, model = answer["impossible"], answer["model"]
    what = f"{_count(model['params_total'])} parameters"
    tokens = f"{_count(answer['tokens'])} tokens"
    limit_h = no["deadline_hours"]
    if no["reason"] == "time":
        best = answer["layouts"][0]
        lines = [f"no: {what} and {tokens} take {_time(best['hours'])} on {fleet} ({best['layout']}), not {_time(limit_h)}."]
    elif no["reason"] == "memory":
        lines = [
            f"no: {what} do not fit on {fleet}: the layout that needs least needs {_gb(no['smallest_bytes'])} on a device, which has {_gb(no['limit_bytes'])}."
        ]
    else:
        lines = [f"no: the trainer has no layout for {what} and {answer['batch_size']:,} rows a step on {fleet}."]
        lines += _rejected_lines(answer["rejected"])
        lines.append(f"A --batch-size that {fleet.gpus:,} divides would let every device have rows of its own.")
    lines += _would_do(no, fleet, tokens, limit_h)
    return "\n".join(lines)


def _would_do(no: dict[str, Any], fleet: Fleet, tokens: str, limit_h: float | None) -> list[str]:
    device, most = fleet.cluster.device, f"{no['most_gpus']:,}"
    fits, in_time, fastest = no["fits"], no["in_time"], no["fastest"]
    if fits is None:
        return [f"None of 1 to {most} {device} would hold it."]
    lines = []
    if no["reason"] != "time" or fits["gpus"] > fleet.gpus:
        lines.append(
            f"The smallest cluster that holds it: {fits['gpus']:,} x {device}, {fits['layout']}, {_gb(fits['memory_bytes'])} a device; "
            f"{tokens} take {_time(fits['hours'])} there."
        )
    if limit_h is None:
        return lines
    if in_time is not None:
        lines.append(
            f"The smallest that is done in {_time(limit_h)}: {in_time['gpus']:,} x {device}, {in_time['layout']}, {_time(in_time['hours'])}."
        )
    else:
        lines.append(
            f"None of up to {most} is done in {_time(limit_h)}; the fastest, {fastest['gpus']:,} x {device}, takes {_time(fastest['hours'])}."
        )
    return lines


def _model_lines(answer: dict[str, Any]) -> list[str]:
    model, law = answer["model"], answer["law"]
    shape = f"{model['num_layers']} layers, width {model['d_model']}, {model['num_heads']} heads ({model['num_kv_heads']} for keys), MLP {model['ffn_dim']}"
    if model["num_experts"]:
        shape += f", {model['num_experts']} experts of which {model['experts_per_token']} are met"
    active = f", {_count(model['params_active'])} met by a token" if model["params_active"] != model["params_total"] else ""
    lines = [
        f"model   {_count(model['params_total'])} parameters{active}: {shape}; rows of {model['seq_len']:,}",
        f"tokens  {_count(answer['tokens'])} ({law['tokens_per_parameter']:.1f} a parameter met), {_gb(answer['token_bytes'])} on disk; "
        f"{answer['flops']:.3g} FLOPs (6 N D); batch {answer['batch_size']:,} rows = {_count(answer['batch_tokens'])} tokens",
        f"law     L = {law['E']:g} + {law['A']:g} / N^{law['alpha']:g} + {law['B']:g} / D^{law['beta']:g}: {law['loss']:.3f} nats a token; "
        f"its optimum at these FLOPs: {_count(law['optimal_params'])} parameters, {_count(law['optimal_tokens'])} tokens, {law['optimal_loss']:.3f}",
    ]
    if "published_params" in law:
        dense = " (of a dense model)" if model["num_experts"] else ""
        (a, b), (c, d) = law["published_params"], law["params_within_0.01_nat"]
        lines.append(
            f"        how sure: published fits advise {_count(a)} to {_count(b)} parameters for these FLOPs{dense}; by this law {_count(c)} to {_count(d)} lose less than 0.01 nat"
        )
    if not _FITTED[0] <= model["params_active"] <= _FITTED[1]:
        lines.append("        the law was fitted on 70M to 16B parameters: at this size it is an extrapolation")
    lines.append(f"disk    a checkpoint {_gb(model['checkpoint_bytes'])}, exported weights {_gb(model['export_bytes'])}")
    return lines


def _layout_row(row: dict[str, Any]) -> list[str]:
    comm = sum(axis["seconds"] for axis in row["communication"].values())
    low, high = row["step_interval_s"]
    return [
        row["layout"], f"{row['step_s']:.4g}", f"{low:.3g} - {high:.3g}", f"{100 * row['mfu']:.1f} %", f"{100 * row['bubble']:.1f} %",
        f"{100 * comm / row['step_s']:.1f} %", _gb(row["memory_bytes"]), f"{row['fullest_stage'] + 1}/{row['pp']}",
        f"{row['hours']:,.1f}", f"{row['jobs']:,}", f"{row['gpu_hours']:,.0f}",
    ]  # fmt: skip


def _best_lines(row: dict[str, Any]) -> list[str]:
    low, high = row["hours_interval"]
    lines = [
        f"the first: {row['steps']:,} steps, {row['tokens_per_s']:,.0f} tokens/s; {row['hours']:,.1f} hours, nine of ten published runs lie between "
        f"{low:,.1f} and {high:,.1f}"
    ]
    comm = [
        f"{_AXES[axis]} {c['seconds']:.3g} s over {'the network' if c['link'] == 'network' else 'links in a node'}"
        for axis, c in row["communication"].items()
    ]
    lines.append(
        f"  a step: {row['compute_s']:.3g} s compute, bubble {row['bubble_s']:.3g}, optimiser {row['optimizer_s']:.2g}, stragglers {row['straggler_s']:.2g}"
    )
    if comm:
        lines.append(f"  communication that nothing hides: {', '.join(comm)}")
    lines.append("  memory of a device, GB:")
    names = ["parameters", "gradients", "masters", "optimizer", "activations", "logits", "buffers", "slack", "total"]
    stages = row["memory_of_stages"]
    shown = list(range(len(stages))) if len(stages) <= 8 else [0, 1, 2, len(stages) - 2, len(stages) - 1]
    table = [[f"stage {i + 1}", *(f"{stages[i][name] / 1e9:.1f}" for name in names)] for i in shown]
    lines += [f"    {line}" for line in _columns(["", *names], table)]
    return lines


def _rejected_lines(rejected: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["left out:"]
    for row in rejected:
        if row["kind"] == "memory":
            lines.append(
                f"  does not fit even with one row a micro-batch: {row['count']:,} of {row['of']:,} divisions; the closest, {row['example']}, "
                f"lacks {_gb(row['excess_bytes'])}"
            )
    for row in rejected:
        if row["kind"] == "rule":
            more = f" (and {row['count'] - 1:,} like it)" if row["count"] > 1 else ""
            lines.append(f"  {row['reason']}{more}")
    return lines if len(lines) > 1 else ["left out: nothing; every division is legal and fits"]


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    # Text to the left, numbers to the right; the header's own width counts too.
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    left = [header[i] in ("layout", "") for i in range(len(header))]
    return [
        "  ".join(cell.ljust(w) if is_left else cell.rjust(w) for cell, w, is_left in zip(line, widths, left, strict=True)).rstrip()
        for line in (header, *rows)
    ]


def _corpus(answer: dict[str, Any]) -> str:
    return "" if answer["written"]["data"] else " data.path=DIR (a corpus of `dist-llm data prepare`)"


def _count(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def _gb(num_bytes: float) -> str:
    # Decimal, as data sheets have it.
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _days(hours: float) -> str:
    days = hours / 24
    return f"{days:,.0f}" if days >= 100 else f"{days:.3g}"


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.3g} seconds"
    if hours < 1:
        return f"{60 * hours:.3g} minutes"
    if hours == 1:
        return "1 hour"
    return f"{hours:.3g} hours" if hours < 48 else _days(hours) + " days"
