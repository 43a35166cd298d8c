from __future__ import annotations

import hashlib
import json
import pickletools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dist_llm.checkpoint.load import open_checkpoint
from dist_llm.checkpoint.manifest import FORMAT, SECTIONS
from dist_llm.checkpoint.names import checkpoint_name

from .saving import SHAPES, holds, make_tensors, names, save


def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    directory = save(tmp_path / "checkpoints", 3)
    assert directory == tmp_path / "checkpoints" / checkpoint_name(3) == tmp_path / "checkpoints" / "step-00000003"
    assert holds(open_checkpoint(directory), 3)
    assert not holds(open_checkpoint(directory), 4)


def test_other_dtypes_and_strided_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    given = {"half": base.bfloat16(), "count": torch.tensor([2**53 + 1]), "turned": base.t(), "part": base[1:3, ::2]}
    directory = save(tmp_path, 1, tensors=[("weights", name, tensor) for name, tensor in given.items()])
    found = dict(open_checkpoint(directory).tensors("weights"))
    for name, tensor in given.items():
        expected = tensor.contiguous()
        assert torch.equal(found[name], expected)
        assert found[name].dtype == expected.dtype


def test_an_iterator_may_reuse_one_buffer(tmp_path: Path) -> None:
    def reusing() -> Iterator[tuple[str, str, torch.Tensor]]:
        buffer = torch.empty(3)
        for number in range(4):
            yield "weights", f"w{number}", buffer.fill_(number)

    found = dict(open_checkpoint(save(tmp_path, 1, tensors=reusing(), max_file_bytes=1 << 20)).tensors("weights"))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {f"w{n}": [float(n)] * 3 for n in range(4)}


def test_manifest_says_what_the_checkpoint_holds(tmp_path: Path) -> None:
    directory = save(tmp_path, 12)
    manifest = open_checkpoint(directory).manifest
    assert (manifest.step, manifest.next_sample, manifest.tokens, manifest.corpus) == (12, 96, 6132, "c0ffee")
    assert manifest.config == {"name": "tiny", "optim": {"lr": 1e-3}, "model": {"bias": False, "num_kv_heads": None}}
    assert manifest.versions == {"torch": torch.__version__}
    assert manifest.format == FORMAT
    assert {section: sorted(of) for section, of in manifest.tensors.items()} == {section: sorted(SHAPES) for section in SECTIONS}
    on_disk = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "manifest.json"}
    assert manifest.files == {name: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in on_disk.items()}
    assert (tmp_path / "latest").read_text() == "step-00000012\n"


def test_a_new_file_begins_where_a_file_would_grow_too_large(tmp_path: Path) -> None:
    directory = save(tmp_path, 1, max_file_bytes=150)
    files = [path.name for path in sorted(directory.glob("*.safetensors"))]
    # 140 bytes; 20; 220, alone since it is larger than the bound; 4 and none.
    assert files == sorted(f"{section}-0000{n}.safetensors" for section in SECTIONS for n in range(4))
    for file in files:
        with safe_open(directory / file, framework="pt") as f:
            sizes = [f.get_tensor(name).nbytes for name in f.keys()]  # noqa: SIM118  # not a dict
        assert sum(sizes) <= 150 or len(sizes) == 1
    assert len(list(save(tmp_path / "whole", 1, max_file_bytes=1 << 20).glob("*.safetensors"))) == len(SECTIONS)


def test_a_rank_that_does_not_write_reads_all_tensors_and_leaves_the_disk_alone(tmp_path: Path) -> None:
    seen = []

    def watched() -> Iterator[tuple[str, str, torch.Tensor]]:
        for item in make_tensors(1):
            seen.append(item[:2])
            yield item

    root = tmp_path / "checkpoints"
    assert save(root, 1, tensors=watched(), writes=False) == root / checkpoint_name(1)
    assert seen == [(section, name) for section in SECTIONS for name in SHAPES]
    assert not root.exists()


def test_no_file_holds_a_pickle(tmp_path: Path) -> None:
    for path in save(tmp_path, 1).iterdir():
        data = path.read_bytes()
        if path.name == "manifest.json":
            json.loads(data)
            continue
        assert path.suffix == ".safetensors"
        # An 8-byte length, that many bytes of JSON, then only numbers.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert set(header) - {"__metadata__"} <= set(SHAPES)
        with pytest.raises(ValueError):
            list(pickletools.genops(data))


def test_the_same_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 5, seed=1)
    directory = save(tmp_path, 5, seed=2)
    assert holds(open_checkpoint(directory), 2)
    assert names(tmp_path) == ["latest", "step-00000005"]
