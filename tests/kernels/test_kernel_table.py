"""Which implementation a run gets."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from dist_llm.config.schema import KernelsConfig
from dist_llm.kernels.impl import Impl, always, select
from dist_llm.kernels.rms_norm.native import why_not_native
from dist_llm.kernels.table import LAYOUT_TABLES, TABLES, choices
from dist_llm.utils.errors import ConfigError

CPU = torch.device("cpu")


def never(device: torch.device, dtype: torch.dtype) -> str:
    return f"no {dtype} unit on {device.type}"


TABLE = (Impl("op", "fast", abs, never), Impl("op", "middle", min, always), Impl("op", "slow", max, always))


def test_auto_takes_the_first_that_can_run() -> None:
    assert select(TABLE, "auto", CPU, torch.float32).name == "middle"


def test_auto_passes_over_what_has_never_run_on_such_a_device_and_a_name_does_not() -> None:
    gpu = torch.device("cuda", 0)
    table = (Impl("op", "native", abs, always), Impl("op", "reference", max, always))
    assert select(table, "auto", gpu, torch.float32).name == "reference"
    assert select(table, "native", gpu, torch.float32).name == "native"
    assert select(table, "auto", CPU, torch.float32).name == "native"


def test_a_name_is_taken_even_when_a_better_one_can_run() -> None:
    assert select(TABLE, "slow", CPU, torch.float32).fn is max


def test_a_name_that_cannot_run_is_refused_with_the_reason_and_the_choices() -> None:
    expected = "kernels.op = fast cannot run on cpu in torch.float32: no torch.float32 unit on cpu; choose one of auto, middle, slow"
    with pytest.raises(ConfigError) as caught:
        select(TABLE, "fast", CPU, torch.float32)
    assert str(caught.value) == expected


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"kernels\.op = fats: there is no such implementation; choose one of auto, middle, slow"):
        select(TABLE, "fats", CPU, torch.float32)


def test_every_table_ends_with_a_reference_that_always_runs() -> None:
    for table in (*TABLES.values(), *LAYOUT_TABLES.values()):
        assert table[-1].name == "reference"
        assert table[-1].why_not is always


def test_the_config_offers_exactly_the_implementations_of_the_tables() -> None:
    for table in (*TABLES.values(), *LAYOUT_TABLES.values()):
        field = KernelsConfig.model_fields[table[0].op]
        assert set(get_args(field.annotation)) == {"auto", *(impl.name for impl in table)}


def test_choices_cover_every_function_and_follow_the_config() -> None:
    chosen = choices(CPU, torch.bfloat16, KernelsConfig(rms_norm="reference").model_dump())
    assert set(chosen) == set(TABLES)
    assert chosen["rms_norm"].name == chosen["rms_norm_residual"].name == "reference"
    # One library holds all compiled kernels: where one of them runs, they all do.
    native = why_not_native(CPU, torch.bfloat16) is None
    assert (chosen["attention"].name, chosen["cross_entropy"].name) == (("native", "native") if native else ("sdpa", "reference"))


def test_a_layout_gets_its_own_functions_and_others_do_not() -> None:
    native = why_not_native(CPU, torch.float32) is None
    chosen = choices(CPU, torch.float32, {}, layout_functions=LAYOUT_TABLES)
    assert set(chosen) == {*TABLES, *LAYOUT_TABLES}
    assert chosen["attention_block"].name == chosen["attention_block_backward"].name == ("native" if native else "reference")


def test_sdpa_by_name_is_refused_only_where_a_log_sum_exp_is_needed() -> None:
    assert choices(CPU, torch.float32, {"attention": "sdpa"})["attention"].name == "sdpa"
    with pytest.raises(ConfigError, match=r"kernels\.attention = sdpa cannot run .* returns no log-sum-exp.*cp_kind = all_to_all"):
        choices(CPU, torch.float32, {"attention": "sdpa"}, layout_functions=["attention_block"])


def test_choices_fall_back_to_the_reference_where_nothing_is_compiled() -> None:
    expected = "native" if why_not_native(CPU, torch.float32) is None else "reference"
    assert choices(CPU, torch.float32, {})["rms_norm"].name == expected
    # No compiled kernel takes float64, whatever is built.
    assert choices(CPU, torch.float64, {})["rms_norm"].name == "reference"
    with pytest.raises(ConfigError, match=r"kernels\.rms_norm = native cannot run on cpu in torch\.float64"):
        choices(CPU, torch.float64, {"rms_norm": "native"})


def test_an_unknown_op_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"kernels.rms_nrom: there is no such op; did you mean 'rms_norm'\?"):
        choices(CPU, torch.float32, {"rms_nrom": "auto"})
