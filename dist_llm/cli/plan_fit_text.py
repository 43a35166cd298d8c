"""A fitted law as text: coefficients with intervals, errors, the best sizes, what to run next."""

from __future__ import annotations

from typing import Any

from dist_llm.planning.fit import Fit

__all__ = ["fit_as_text"]


def fit_as_text(answer: dict[str, Any], fit: Fit) -> str:
    """The answer of ``plan fit --json`` for a person: one paragraph a question."""
    lines = [f"{answer['law']} law, {answer['points']} runs", ""]
    for name in fit.coefficients:
        low, high = answer["interval"][name]
        edges = [side.split()[1] for side in fit.open_sides if side.split()[0] == name]
        note = f"   open {' and '.join(edges)}: the runs do not say" if edges else ""
        lines.append(f"  {name:<8} {fit.coefficients[name]:>12.5g}   [{low:.5g}, {high:.5g}]{note}")
    error = answer["leave_one_out"]
    lines += [
        f"  (all in their intervals together: at least {fit.level_joint:.0%} of repetitions; each: {fit.level_each:.1%})",
        "",
        f"residuals {100 * fit.rms:.2f} % rms; left out of the fit: median {100 * error['median_rel_err']:.2f} %, worst {100 * error['worst_rel_err']:.2f} %",
    ]
    for other, quality in answer["beside"].items():
        said = (
            quality["reason"]
            if "reason" in quality
            else f"residuals {100 * quality['rms_log_loss']:.2f} % rms, left out {100 * quality['left_out_rms_log_loss']:.2f} %"
        )
        lines.append(f"{other}'s law beside: {said}")
    lines += ["", "best size, N = k C^a:"]
    if fit.law != "kaplan":
        c = fit.coefficients
        lines.append(f"  parametric            a = {c['beta'] / (c['alpha'] + c['beta']) if c['alpha'] + c['beta'] else float('nan'):.3f}")
    for name, found in answer["approaches"].items():
        label = name.replace("_", " ")
        if "reason" in found:
            lines.append(f"  {label:<21} none: {found['reason']}")
        else:
            span = found["exponent_interval"]
            between = f"  [{span[0]:.3f}, {span[1]:.3f}] 95 %" if span else ""
            lines.append(f"  {label:<21} a = {found['exponent']:.3f}{between}")
    lines.append("")
    for best in answer["optimal"]:
        if "reason" in best:
            lines.append(f"for {best['flops']:.3g} FLOPs: {best['reason']}")
            continue
        i = best["interval"]
        lines.append(
            f"for {best['flops']:.3g} FLOPs: {best['params']:.4g} parameters [{i['params'][0]:.3g}, {i['params'][1]:.3g}], "
            f"{best['tokens']:.4g} tokens [{i['tokens'][0]:.3g}, {i['tokens'][1]:.3g}], loss {best['loss']:.4f} [{i['loss'][0]:.4f}, {i['loss'][1]:.4f}] (95 %)"
        )
    for best in answer.get("data_constrained", ()):
        if "reason" in best:
            lines.append(f"with {best['unique_tokens']:.3g} unique tokens: {best['reason']}")
        else:
            lines.append(
                f"with {best['unique_tokens']:.3g} unique tokens: {best['params']:.4g} parameters, {best['tokens']:.4g} tokens "
                f"({best['passes']:.1f} passes), loss {best['loss']:.4f}"
            )
    advice = answer["next_run"]
    if "reason" in advice:
        lines.append(f"next run: none, {advice['reason']}")
    else:
        lines.append(
            f"next run: {advice['params']:.3g} parameters on {advice['tokens']:.3g} tokens ({advice['flops']:.2g} FLOPs), expected loss {advice['loss']:.4f}; it takes the error "
            f"at {advice['target_flops']:.3g} FLOPs from {100 * advice['target_error_now']:.2f} % to {100 * advice['target_error_then']:.2f} %"
        )
    for row in answer.get("held_out", ()):
        lines.append(
            f"held out: {row['params']:.4g} parameters, {row['tokens']:.4g} tokens: measured {row['measured']:.4f}, predicted {row['predicted']:.4f} "
            f"[{row['low']:.4f}, {row['high']:.4f}], {100 * row['rel_err']:+.2f} %"
        )
    if "plot" in answer:
        lines.append(answer["plot"])
    return "\n".join(lines)
