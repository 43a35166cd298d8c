"""A plan as files that run it: the config of the run, and the batch script with the nodes it wants."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dist_llm.config.load import load_config
from dist_llm.config.schema import RunConfig
from dist_llm.config.write import dump_yaml
from dist_llm.planning.advice import learning_rate
from dist_llm.planning.amounts import Fleet
from dist_llm.planning.answer import layout_name, num_steps
from dist_llm.planning.legality import base_config, config_at
from dist_llm.planning.question import Question
from dist_llm.planning.search import Plan
from dist_llm.utils.errors import ConfigError, StorageError
from dist_llm.utils.files import write_atomic

__all__ = ["Written", "run_config", "sbatch_script", "write_plan"]

_TEMPLATE = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"
_WARMUP_STEPS = 2000  # of LLaMA (arXiv:2302.13971, table 2 and section 2.3), where the run is long enough
_SAVES = 20  # checkpoints in a run, beside those that a job's end asks for


@dataclass(frozen=True)
class Written:
    """The files."""

    config: Path
    sbatch: Path
    data: str | None


def run_config(question: Question, plan: Plan, *, name: str, data: str | None) -> RunConfig:
    """The config of the run, validated: that of the question with steps and layout replaced, or one made for the advised model."""
    layout = plan.layout
    steps = num_steps(question.tokens, layout.global_batch, question.model.seq_len)
    if question.config is not None:
        base = question.config
        warmup = min(base.optim.warmup_steps, steps // 10)
        optim = base.optim.model_copy(update={"warmup_steps": warmup})
        if optim.decay_steps is not None:
            optim = optim.model_copy(update={"decay_steps": max(1, min(optim.decay_steps, steps - warmup))})
    else:
        base = base_config(question.model, layout.global_batch, question.precision)
        warmup = min(_WARMUP_STEPS, steps // 10)
        optim = base.optim.model_copy(update={"lr": learning_rate(question.flops), "warmup_steps": warmup})
    base = base.model_copy(
        update={
            "name": name,
            "data": base.data.model_copy(update={"path": data} if data is not None else {}),
            "optim": optim,
            "train": base.train.model_copy(update={"steps": steps, "threads": None}),
            "checkpoint": base.checkpoint.model_copy(update={"every": max(1, steps // _SAVES)}),
        }
    )
    try:
        return RunConfig.model_validate(config_at(base, layout).model_dump())
    except ValidationError as error:
        # Layout and sizes have passed the trainer's rules: what is left is what the command line said.
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
        raise ConfigError(f"--write: the config would not be valid: {problems}") from None


def write_plan(folder: Path, question: Question, plan: Plan, fleet: Fleet, *, name: str, data: str | None, job_hours: float) -> Written:
    """Write ``config.yaml`` and ``train.sbatch`` to ``folder``, which is made if need be; the config is read back and checked.

    Raises:
        ConfigError: a model with experts, which the trainer cannot train yet; or a config the trainer refuses.
        StorageError: the folder cannot be written.
    """
    if question.model.num_experts:
        raise ConfigError(
            "--write: the trainer cannot train a mixture of experts yet, so there is no config to write; plan it without --write, or without --moe"
        )
    config = run_config(question, plan, name=name, data=data)
    written = Written(folder / "config.yaml", folder / "train.sbatch", config.data.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--write {folder}: cannot make the directory ({error.strerror}); choose another") from None
    note = f"# {layout_name(plan.layout)} on {fleet}, {plan.step.total_s:.3g} s a step expected. Written by `dist-llm plan`.\n"
    if config.data.path is None:
        note += "# data.path is missing: a directory that `dist-llm data prepare` wrote.\n"
    write_atomic(written.config, note + dump_yaml(config))
    load_config(written.config, ranks=plan.layout.ranks)
    write_atomic(written.sbatch, sbatch_script(written.config.resolve(), fleet, name=name, job_hours=job_hours))
    written.sbatch.chmod(0o755)
    return written


def sbatch_script(config: Path, fleet: Fleet, *, name: str, job_hours: float) -> str:
    """``slurm/train.sbatch`` with the name, the nodes and the time of this run, and its config as the first argument.

    Options given to sbatch still win, and words behind the script's name are still overrides of the config.
    """
    text = _TEMPLATE.read_text(encoding="utf-8")
    minutes = max(1, math.ceil(job_hours * 60))
    text = _replaced(text, r"^#SBATCH --job-name=.*$", f"#SBATCH --job-name={name}")
    time = f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"
    per_node = min(fleet.gpus, fleet.per_node)
    request = [f"#SBATCH --time={time}", f"#SBATCH --nodes={fleet.nodes}", f"#SBATCH --ntasks-per-node={per_node}"]
    if fleet.cluster.generation != "cpu":
        request.append(f"#SBATCH --gpus-per-node={per_node}")
    text = _replaced(text, r"^#SBATCH --time=.*$", "\n".join(request))
    text = _replaced(
        text,
        r"^#   sbatch --nodes=.*$",
        f"#   sbatch [options] train.sbatch [a.b=c ...]      # {fleet} for {config.name}, by `dist-llm plan`",
    )
    return _replaced(
        text,
        r"^set -uo pipefail$",
        f'set -uo pipefail\n\n# The config of this run comes before everything else.\nset -- {shlex.quote(str(config))} "$@"',
    )


def _replaced(text: str, pattern: str, line: str) -> str:
    changed, count = re.subn(pattern, lambda _: line, text, count=1, flags=re.MULTILINE)
    if count != 1:
        raise AssertionError(f"{_TEMPLATE} has no line like {pattern}: it changed, and planning/write.py has to follow")
    return changed
