"""The tokenizer a checkpoint was trained with, and the proof that it is."""

from __future__ import annotations

from pathlib import Path

from dist_llm.checkpoint.load import Checkpoint
from dist_llm.config.schema import RunConfig
from dist_llm.data.index import INDEX_NAME, Index, load_index, read_index
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.engine.run_dir import corpus_hash
from dist_llm.utils.errors import DataError

__all__ = ["tokenizer_of_run"]


def tokenizer_of_run(config: RunConfig, checkpoint: Checkpoint, file: Path | None) -> tuple[Tokenizer, list[str]]:
    """The tokenizer, and a sentence on whatever could not be proved about it.

    The checkpoint knows its corpus by a hash of tokenizer and shards. When the index at ``data.path`` has that hash, it names the
    tokenizer by hash too, whether the file comes from there or from ``file``.

    Args:
        config: of the run.
        checkpoint: whose tokenizer it has to be.
        file: the tokenizer given by the user, or None to take the corpus's own.

    Raises:
        DataError: it is missing, damaged or another one.
    """
    tokenizer, notes = _from_corpus(config, checkpoint) if file is None else _from_file(config, checkpoint, file)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model {config.model.vocab_size} rows (model.vocab_size): "
            "it is not the one the run was trained with; give that one with --tokenizer FILE"
        )
    return tokenizer, notes


def _from_corpus(config: RunConfig, checkpoint: Checkpoint) -> tuple[Tokenizer, list[str]]:
    path = _corpus(config)
    if path is None or not (path / INDEX_NAME).is_file():
        where = "data.path is not set" if path is None else f"there is no corpus at {path} (data.path, seen from {Path.cwd()})"
        raise DataError(
            f"{where}, and so no tokenizer; go to the directory the run was started in, or give the corpus's tokenizer.model with --tokenizer FILE"
        )
    index = load_index(path)
    if not _is_corpus_of(index, checkpoint):
        raise DataError(
            f"the corpus at {path} is not the one {checkpoint.directory} was trained on: its tokenizer and shards have the hash "
            f"{corpus_hash(index)[:12]}, the checkpoint says {checkpoint.manifest.corpus[:12]}; put that corpus back, "
            "or give its tokenizer.model with --tokenizer FILE"
        )
    return Tokenizer.load(index.tokenizer_path), []


def _from_file(config: RunConfig, checkpoint: Checkpoint, file: Path) -> tuple[Tokenizer, list[str]]:
    tokenizer = Tokenizer.load(file)
    path = _corpus(config)
    # The index alone will do: --tokenizer is the way out when the tokenizer beside it is lost.
    index = read_index(path) if path is not None and (path / INDEX_NAME).is_file() else None
    if index is None or not _is_corpus_of(index, checkpoint):
        return tokenizer, [f"taking {file} at your word: the corpus of {checkpoint.directory} is not here to compare it with"]
    if tokenizer.sha256 != index.tokenizer.sha256:
        raise DataError(
            f"{file} is not the tokenizer the run was trained with: its sha256 is {tokenizer.sha256[:12]}..., the index of {path} "
            f"says {index.tokenizer.sha256[:12]}...; leave --tokenizer out, or give the right file"
        )
    return tokenizer, []


def _corpus(config: RunConfig) -> Path | None:
    return None if config.data.path is None else Path(config.data.path)


def _is_corpus_of(index: Index, checkpoint: Checkpoint) -> bool:
    return corpus_hash(index) == checkpoint.manifest.corpus
