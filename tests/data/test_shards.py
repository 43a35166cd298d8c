from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dist_llm.data.index import load_index
from dist_llm.data.shards import ShardError, ShardReader, ShardWriter, open_shard


def write(directory: Path, *, shard_bytes: int = 10_000, count: int = 20, dtype: str = "<u2") -> list[np.ndarray]:
    directory.mkdir()
    arrays = [np.arange(7 * n, dtype=dtype) for n in range(count)]
    with ShardWriter(directory, "train", shard_bytes=shard_bytes) as writer:
        for n, tokens in enumerate(arrays):
            writer.write(source=f"s{n}", text=b"x" * n, tokens=tokens)
    assert [shard.name for shard in writer.shards] == sorted(path.name for path in directory.iterdir())
    return arrays


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_what_is_written_is_read(tmp_path: Path, dtype: str) -> None:
    arrays = write(tmp_path / "s", dtype=dtype)
    paths = sorted((tmp_path / "s").iterdir())
    assert len(paths) > 2
    samples = [sample for path in paths for sample in ShardReader(path).samples()]
    assert [s.key for s in samples] == [f"train-{n:09d}" for n in range(20)]
    for n, (sample, tokens) in enumerate(zip(samples, arrays, strict=True)):
        assert (sample.source, sample.text_bytes) == (f"s{n}", n)
        assert sample.tokens.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(sample.tokens, tokens)


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        with tarfile.open(path) as tar:  # both were written within a second: the clock is looked at apart
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "dist_llm", "dist_llm", 0o444)}


def test_tokens_of_a_mapped_shard_cannot_be_written_to(tmp_path: Path) -> None:
    write(tmp_path / "s")
    with pytest.raises(ValueError, match="read-only"):
        ShardReader(tmp_path / "s" / "train-000000.tar").tokens(3)[0] = 1


def test_webdataset_reads_the_shards(texts_and_corpus: tuple[dict[str, bytes], Path]) -> None:
    import webdataset

    from dist_llm.data.tokenizer import Tokenizer

    texts, corpus = texts_and_corpus
    index = load_index(corpus)
    tokenizer = Tokenizer.load(index.tokenizer_path)
    urls = [str(corpus / shard.name) for split in index.splits.values() for shard in split.shards]
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        found[sample["json"]["source"].removeprefix("texts/")] = tokenizer.decode_bytes(sample["npy"])
    assert found == texts


def tar_of(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = kind
            tar.addfile(info, io.BytesIO(data))
    return path


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.json": b"{}", "a.pkl": b"cos\nsystem\n"}, r"member 'a\.pkl' .* not a plain \.json or \.npy"),
        ({"a.npy": npy(np.zeros(3, np.uint16))}, r"a\.npy has no a\.json before it"),
        ({"a.json": b"{}", "b.npy": npy(np.zeros(3, np.uint16))}, r"after a\.json comes 'b\.npy'"),
        ({"a.json": b"{}"}, r"after a\.json comes"),
        ({"a.json": b"{}", "a.npy": npy(np.zeros(3, np.int64))}, "not a one-dimensional array of little-endian uint16 or uint32"),
        ({"a.json": b"{}", "a.npy": npy(np.zeros((3, 1), np.uint16))}, "not a one-dimensional array"),
        ({"a.json": b"{}", "a.npy": npy(np.zeros(3, np.uint16))[:-1]}, "its header says 3 tokens of 2 bytes"),
        ({"a.json": b"{}", "a.npy": b""}, "not a one-dimensional array"),
    ],
)
def test_anything_else_in_a_shard_is_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ShardError, match=message) as caught:
        ShardReader(tar_of(tmp_path / "x.tar", members))
    assert caught.value.kind == "member"


def test_a_link_in_a_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="not a plain"):
        ShardReader(tar_of(tmp_path / "x.tar", {"a.json": b""}, tarfile.SYMTYPE))


def test_a_pickled_object_array_is_refused(tmp_path: Path) -> None:
    data = io.BytesIO()
    np.save(data, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match="not a one-dimensional array"):
        ShardReader(tar_of(tmp_path / "x.tar", {"a.json": b"{}", "a.npy": data.getvalue()}))


def test_every_truncation_is_noticed_without_a_hash(tmp_path: Path) -> None:
    write(tmp_path / "s", count=4)
    data = (tmp_path / "s" / "train-000000.tar").read_bytes()
    used = len(data.rstrip(b"\0"))
    for size in range(0, used, 97):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(ShardError):
            ShardReader(tmp_path / "cut.tar")


@pytest.mark.parametrize("verify", [True, False])
def test_opening_names_a_missing_and_a_truncated_shard(tmp_path: Path, verify: bool) -> None:
    directory = tmp_path / "s"
    directory.mkdir()
    with ShardWriter(directory, "val", shard_bytes=1 << 20) as writer:
        writer.write(source="s", text=b"abc", tokens=np.arange(3, dtype="<u2"))
    (shard,) = writer.shards
    path = directory / shard.name
    data = path.read_bytes()
    path.write_bytes(data[:-512])
    with pytest.raises(ShardError, match=rf"val-000000\.tar is truncated: {shard.size - 512} bytes.*dist-llm data check"):
        open_shard(directory, shard, verify=verify)
    path.unlink()
    with pytest.raises(ShardError, match=r"val-000000\.tar is missing.*dist-llm data check"):
        open_shard(directory, shard, verify=verify)


def test_opening_finds_one_flipped_bit_anywhere(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    directory.mkdir()
    with ShardWriter(directory, "val", shard_bytes=1 << 20) as writer:
        writer.write(source="s", text=b"abc", tokens=np.arange(300, dtype="<u2"))
    (shard,) = writer.shards
    path = directory / shard.name
    data = path.read_bytes()
    for at in range(0, len(data), 251):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(ShardError, match=r"val-000000\.tar is damaged: its sha256"):
            open_shard(directory, shard)
    path.write_bytes(data)
    assert len(open_shard(directory, shard)) == 1
