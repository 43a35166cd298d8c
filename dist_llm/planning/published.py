"""A row of published runs as a question to the time model: shape, layout, cluster, system, and the unit of the answer.

Columns are those of ``published_runs.csv``. What a row leaves unsaid gets the default of the framework it ran on; what cannot be
filled in that way makes the row skip, with the reason. FLOPs are counted as each source counts them (column
``flops_convention``): model FLOPs with full or causal-halved attention, or hardware FLOPs with the recomputed forward.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dist_llm.planning.cluster import Cluster, load_cluster
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.systems import System, system_of
from dist_llm.utils.errors import DataError

__all__ = ["Run", "SkipRow", "parse_row", "read_rows"]

# A device's name in the table, most particular first, and the description that has its public figures.
_DEVICES = (
    (r"H100.*(500 ?W|HBM2e|lower TDP)", "h100-96g-500w"),
    (r"GB300", "gb300"), (r"GB200", "gb200"), (r"B300", "b300"), (r"B200", "b200"),
    (r"(?<!G)H200", "h200"), (r"H800", "h800"), (r"H100(?!.*(PCIe|NVL))", "h100-80g"),
    (r"A100.*40 ?G", "a100-40g"), (r"A100(?!.*PCIe)", "a100-80g"), (r"V100(?!.*PCIe)", "v100-32g"),
)  # fmt: skip
_PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8", "mxfp8": "fp8", "nvfp4": "fp4", "fp4": "fp4", "fp32": "fp32", "tf32": "fp32"}
_UNITS = ("tokens/s/GPU", "s/iter", "TFLOP/s/GPU", "MFU%", "samples/s", "samples/s/GPU", "tokens/s")
_GPT2_VOCABULARY = 51200  # padded for tensor parallelism, Megatron's default


class SkipRow(ValueError):
    """A row cannot be predicted; the text is the reason."""


@dataclass(frozen=True)
class Run:
    """A published run."""

    id: str
    source: str  # the document, so that rows of one publication are left out together
    sweep: tuple[object, ...]  # rows with equal sweeps differ in their layout only
    model: ModelShape
    layout: LayoutShape
    cluster: Cluster
    system: System
    unit: str
    measured: float
    flops_per_token: float  # as the source counts
    peak: float  # of one device, where the unit is a share of it

    @property
    def weight_flops_per_token(self) -> float:
        """Six for each weight that a token meets, recomputation and attention's products not counted."""
        return 6.0 * _active_weights(self.model)

    @property
    def measured_s(self) -> float:
        """The measured time of a step."""
        return self.seconds_or_unit(self.measured)

    def seconds_or_unit(self, value: float) -> float:
        """Seconds of a step to the row's unit, or back: each unit but seconds is a rate, its own inverse up to the work done."""
        tokens = self.layout.global_batch * self.model.seq_len
        ranks = self.layout.ranks
        if self.unit == "s/iter":
            return value
        if self.unit == "tokens/s/GPU":
            return tokens / ranks / value
        if self.unit == "tokens/s":
            return tokens / value
        if self.unit in ("samples/s", "samples/s/GPU"):
            return self.layout.global_batch / (ranks if self.unit == "samples/s/GPU" else 1) / value
        flops = self.flops_per_token * tokens / ranks
        return flops / (value * 1e12) if self.unit == "TFLOP/s/GPU" else flops / (value / 100 * self.peak)


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Rows of a table of published runs.

    Raises:
        DataError: the file cannot be read, is not a table, or lacks the columns that name a run and its measured value.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [{(k or "").strip(): v.strip() if isinstance(v, str) else "" for k, v in row.items()} for row in reader]
            columns = [name.strip() for name in reader.fieldnames or ()]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; give a CSV with the columns of published runs") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV in UTF-8: {error}") from None
    missing = [name for name in ("id", "hardware", "measured", "unit") if name not in columns]
    if missing:
        raise DataError(f"{path}: missing column {', '.join(missing)}; docs/planning/predict.md lists the columns")
    return rows


def parse_row(row: Mapping[str, str]) -> Run:
    """The run that ``row`` describes.

    Raises:
        SkipRow: the row is marked doubtful, its hardware is unknown, a field without a default is missing, or sizes contradict
            one another.
    """
    try:
        return _parse(row)
    except SkipRow:
        raise
    except ValueError as error:  # a size that the shapes refuse, with the rule
        raise SkipRow(str(error)) from None


def _parse(row: Mapping[str, str]) -> Run:
    note = row.get("note", "")
    if "[doubtful]" in note:
        raise SkipRow("marked doubtful")
    name = _system_name(row)
    cluster = _cluster(row)
    hopper = cluster.generation not in ("ampere", "volta")
    convention = row.get("flops_convention", "")
    source = row.get("source", "")
    recompute = row.get("recompute", "") or _default_recompute(convention)
    if recompute not in ("none", "selective", "full"):
        raise SkipRow(f"recompute '{recompute}' is not one of none, selective, full")
    year = _year(f"{source} {convention}")
    system = system_of(name, hopper=hopper, year=year, note=f"{row['id']} {note}", recompute=recompute)
    model = _model(row)
    layout, cluster = _layout(row, system, cluster, recompute, model)
    if "no sequence paral" in note:
        layout = replace(layout, sequence_parallel=False)
    elif re.search(r"with sequence paral|sequence parallel(ism)? (and|\+|on)", note):
        layout = replace(layout, sequence_parallel=True)
    unit = row.get("unit", "")
    if unit not in _UNITS:
        raise SkipRow(f"unit '{unit}' is not one of {', '.join(_UNITS)}")
    measured = _number(row, "measured")
    document = _document(source)
    sweep = (
        document, cluster.name, layout.ranks, model.num_layers, model.d_model, model.num_heads, model.num_experts, model.seq_len,
    )  # fmt: skip
    return Run(
        id=row["id"],
        source=document,
        sweep=sweep,
        model=model,
        layout=layout,
        cluster=cluster,
        system=system,
        unit=unit,
        measured=measured,
        flops_per_token=_flops_per_token(model, convention, hardware=system.counts_recompute and recompute == "full"),
        peak=cluster.peak("fp16" if cluster.generation == "volta" else "bf16"),
    )


def _cluster(row: Mapping[str, str]) -> Cluster:
    hardware = row.get("hardware", "")
    name = next((name for pattern, name in _DEVICES if re.search(pattern, hardware, re.IGNORECASE)), None)
    if name is None:
        raise SkipRow(f"no cluster description for hardware '{hardware}'")
    cluster = load_cluster(name)
    per_node = _optional(row, "gpus_per_node")
    if per_node is not None and per_node >= 1:
        cluster = replace(cluster, gpus_per_node=int(per_node))
    rate = _network(row.get("interconnect", ""), cluster.gpus_per_node)
    return cluster if rate is None else replace(cluster, network_bandwidth=rate)


def _network(text: str, per_node: int) -> float | None:
    # bytes/s a GPU, where the row says what the network is
    if found := re.search(r"(\d+)x? *(?:links? of )?Omni-Path", text, re.IGNORECASE) or re.search(r"(\d+)x Omni-Path", text):
        return int(found[1]) * 12.5e9 / per_node
    if found := re.search(r"(\d+)x? ?HDR ?200", text):
        return int(found[1]) * 25e9 / per_node
    if found := re.search(r"(\d+)x ConnectX-6 HDR", text):
        return int(found[1]) * 25e9 / per_node
    if found := re.search(r"(\d+)x(\d+) ?Gb/s", text):
        return int(found[1]) * int(found[2]) / 8 * 1e9 / per_node
    if found := re.search(r"(\d+) ?Gb/s[^,;]*per node(?! or)", text):
        return int(found[1]) / 8 * 1e9 / per_node
    if found := re.search(r"(\d+) ?Gb/s per GPU", text):
        return int(found[1]) / 8 * 1e9
    return None


def _model(row: Mapping[str, str]) -> ModelShape:
    layers, width, heads = (int(_number(row, key)) for key in ("n_layers", "hidden", "n_heads"))
    moe = row.get("moe", "")
    kv = int(_optional(row, "kv_heads") or heads)
    ffn = int(_optional(row, "ffn_hidden") or 4 * width)  # a GPT's
    vocab = int(_optional(row, "vocab") or (256000 if "nemotron" in row["id"].lower() else _GPT2_VOCABULARY))  # arXiv:2402.16819
    head_dim = _head_dim(moe, width, heads)
    experts = per_token = shared = dense = matrix = 0
    expert_ffn = None
    if moe and moe not in ("0", "none"):
        numbers = re.match(r"(\d+)/(\d+)(?:/(\d+))?", moe)
        if not numbers:
            raise SkipRow(f"moe '{moe}' is not experts/top-k/shared")
        experts, per_token, shared = int(numbers[1]), int(numbers[2]), int(numbers[3] or 0)
        if found := re.search(r"expert ffn (\d+)", moe):
            expert_ffn = int(found[1])
        if found := re.search(r"first (\d+) layers? dense", moe):
            dense = int(found[1])
        if "MLA" in moe:
            # DeepSeek-V3 (arXiv:2412.19437, section 4.2): queries through 1536, keys and values through 512, heads of 128 and 64
            # rotary; products of 192 for scores and 128 for values cost as much as two of 160.
            matrix = width * 1536 + 1536 * heads * 192 + width * (512 + 64) + 512 * heads * 256 + heads * 128 * width
            head_dim, kv = 160, heads
    return ModelShape(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        ffn_dim=ffn,
        gated=row.get("gated_mlp", "") in ("1", "1.0", "true", "True"),
        vocab_size=vocab,
        seq_len=int(_number(row, "seq_len")),
        tied=False,
        learned_positions=0 if row.get("gated_mlp", "") in ("1", "1.0") else int(_number(row, "seq_len")),
        num_experts=experts,
        experts_per_token=per_token,
        shared_experts=shared,
        expert_ffn_dim=expert_ffn,
        dense_layers=dense,
        attention_matrix=matrix,
    )


def _head_dim(moe: str, width: int, heads: int) -> int:
    if found := re.search(r"head dim (\d+)", moe):
        return int(found[1])
    if width % heads == 0 and width // heads % 2 == 0:
        return width // heads
    # A head is not width / heads there (GPT-OSS: 64): the next power of two.
    size = 1
    while size < width / heads:
        size *= 2
    return size


def _layout(row: Mapping[str, str], system: System, cluster: Cluster, recompute: str, model: ModelShape) -> tuple[LayoutShape, Cluster]:
    tp, pp = (int(_number(row, key)) for key in ("tp", "pp"))
    cp, ep = int(_optional(row, "cp") or 1), int(_optional(row, "ep") or 1)
    gpus = int(_number(row, "num_gpus"))
    dp = int(_optional(row, "dp") or max(1, gpus // (tp * pp * cp)))
    if tp * pp * cp * dp != gpus:
        raise SkipRow(f"tp {tp} x pp {pp} x cp {cp} x dp {dp} is not {gpus} GPUs")
    batch = int(_optional(row, "global_batch_seqs") or 0)
    micro = int(_optional(row, "micro_batch") or 0)
    if not batch and not micro:
        raise SkipRow("neither micro_batch nor global_batch_seqs is given")
    if not micro and pp > 1 and "torchtitan" in _system_name(row).lower():
        micro = max(1, batch // (dp * pp))  # torchtitan splits the local batch into as many micro-batches as stages
    # Unsaid, a micro-batch is one row: the default of Megatron's large runs and what a long row leaves room for.
    micro = micro or 1
    batch = batch or micro * dp
    precision = row.get("precision", "").lower() or ("fp16" if cluster.generation == "volta" else "bf16")
    if precision not in _PRECISIONS:
        raise SkipRow(f"precision '{row.get('precision')}' is not one of {', '.join(_PRECISIONS)}")
    zero_text = row.get("zero_or_fsdp", "")
    shard = None
    if zero_text == "hsdp":
        zero, shard = 3, min(dp, cluster.gpus_per_node)
    else:
        zero = int(zero_text) if zero_text in ("0", "1", "2", "3") else system.zero
    virtual = int(_optional(row, "virtual_pp") or 0) or _default_virtual(row, pp, model.num_layers)
    layout = LayoutShape(
        tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, zero=zero, micro_batch=micro, global_batch=batch, virtual_pp=virtual if pp > 1 else 1,
        recompute=recompute,  # type: ignore[arg-type]
        precision=_PRECISIONS[precision], sequence_parallel=system.sequence_parallel, shard_size=shard,
    )  # fmt: skip
    return layout, cluster


def _default_virtual(row: Mapping[str, str], pp: int, layers: int) -> int:
    if re.search(r"(?<!no )(?<!non-)interleaved", f"{row['id']} {row.get('note', '')}", re.IGNORECASE):
        # Without a number: torchtitan's default of two chunks a stage; elsewhere as fine as it goes, one layer a chunk.
        return 2 if "torchtitan" in _system_name(row).lower() else max(1, layers // pp)
    return 1


def _default_recompute(convention: str) -> str:
    # A source that counts the recomputed forward has recomputed it.
    return "full" if re.search(r"hardware FLOPs|incl\. recompute|INCLUDING full recompute", convention) else "none"


def _flops_per_token(model: ModelShape, convention: str, *, hardware: bool) -> float:
    layers = _active_weights(model) - model.head_weights
    scores = model.num_layers * model.num_heads * model.head_dim * model.seq_len  # one multiply-add for each of two products: 4 a pair
    if re.search(r"hardware FLOPs|incl\. recompute|INCLUDING full recompute", convention) or (hardware and "model FLOPs" not in convention):
        return 8.0 * layers + 6.0 * model.head_weights + 16.0 * scores  # arXiv:2104.04473, equation 3
    if "causal-halved" in convention and "not causal-halved" not in convention:
        return 6.0 * (layers + model.head_weights) + 6.0 * scores
    return 6.0 * (layers + model.head_weights) + 12.0 * scores


def _active_weights(model: ModelShape) -> int:
    # Matrix elements that a token's products use: no look-up, of the experts those it is sent to.
    dense = model.num_layers * model.attention_weights + (model.num_layers - model.moe_layers) * model.mlp_weights
    experts = model.experts_per_token + model.shared_experts
    return dense + model.moe_layers * (experts * model.expert_weights + model.router_weights) + model.head_weights


def _document(source: str) -> str:
    if found := re.search(r"arXiv[: ]*(\d{4}\.\d{4,5})", source):
        return f"arXiv {found[1]}"
    return source.split(" ")[0] or "unnamed"


def _year(text: str) -> int | None:
    found = re.search(r"arXiv[: ]*(\d{2})\d{2}\.\d{4,5}", text)
    return 2000 + int(found[1]) if found else None


def _system_name(row: Mapping[str, str]) -> str:
    return row.get("system", "") or "unnamed"


def _optional(row: Mapping[str, str], key: str) -> float | None:
    text = row.get(key, "") or ""
    if text == "":
        return None
    try:
        value = float(text)
    except ValueError:
        raise SkipRow(f"{key} '{text}' is not a number") from None
    if not 0 <= value < float("inf"):
        raise SkipRow(f"{key} must be finite and not negative, got {text}")
    return value


def _number(row: Mapping[str, str], key: str) -> float:
    value = _optional(row, key)
    if value is None:
        raise SkipRow(f"{key} is not given")
    if value <= 0:
        raise SkipRow(f"{key} must be above 0, got {row.get(key)}")
    return value
