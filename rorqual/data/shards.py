"""Token shards: a corpus tokenised once into memory-mapped arrays.

A shard is a folder named by a hash of the corpus content, the tokenizer and the options, so it is never
stale: `tokens.npy` (uint16, or uint32 for vocabularies above 65,536) holds all documents one after
another, `offsets.npy` int64 [n+1] their borders, `loss.npy` bool the loss mask where a corpus has one,
`meta.json` what it was made from. BOS is not stored. Plain documents end with EOS.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rorqual.data.corpora import Corpus
from rorqual.data.document import encode_pieces
from rorqual.errors import DataError
from rorqual.tokenizer import Tokenizer

_FORMAT = "1"
_BATCH = 64


@dataclass(frozen=True)
class TokenShard:
    """Tokenised documents. `tokens` [total] uint16/uint32, `offsets` int64 [n+1], `loss` bool [total] or
    None.

    `num_bytes`: UTF-8 bytes of the texts; `key`: hash of everything the content depends on.
    """

    name: str
    key: str
    tokens: npt.NDArray[np.unsignedinteger]
    offsets: npt.NDArray[np.int64]
    loss: npt.NDArray[np.bool_] | None
    num_bytes: int

    def __len__(self) -> int:
        return len(self.offsets) - 1


def shard_key(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Hash of the corpus content list, the tokenizer and the shard format."""
    digest = hashlib.sha256(f"{_FORMAT}\n{tokenizer.fingerprint}\n".encode())
    for document in corpus.documents:
        loss = "".join(f"{len(text)}{'+' if is_loss else '-'}" for text, is_loss in document.pieces or ())
        digest.update(f"{document.digest} {loss}\n".encode())
    return digest.hexdigest()[:32]


def build_shard(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache_folder: str | os.PathLike[str],
    *,
    show_progress: bool | None = None,
) -> TokenShard:
    """Open the shard of `corpus` in `cache_folder`, tokenising first when it is not there yet.

    `show_progress` None: a bar when stderr is a terminal. Raises: DataError for a corpus without
    documents, or a cache folder that cannot be written.
    """
    if not corpus.documents:
        raise DataError(
            f"The corpus {corpus.name!r} has no documents. There is nothing to tokenise. "
            "Fix: give more documents, or another held-out share if this side of a split came out empty."
        )
    key = shard_key(corpus, tokenizer)
    folder = Path(cache_folder) / f"{corpus.name}-{key}"
    if not (folder / "meta.json").exists():
        try:
            _write(
                corpus,
                tokenizer,
                folder,
                key,
                sys.stderr.isatty() if show_progress is None else show_progress,
            )
        except OSError as error:
            raise DataError(
                f"The token cache {folder} cannot be written ({error.strerror or error}). Tokenising "
                "needs a place on "
                "disk. Fix: free some space or choose another cache folder."
            ) from None
    return _open(corpus.name, folder, key)


def _open(name: str, folder: Path, key: str) -> TokenShard:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        offsets = np.load(folder / "offsets.npy")
        loss = np.load(folder / "loss.npy", mmap_mode="r") if meta["has_loss"] else None
        if len(tokens) != meta["num_tokens"] or int(offsets[-1]) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens instead of {meta['num_tokens']}")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"The cached shard {folder} is damaged ({error}). Its tokens cannot be trusted. "
            "Fix: delete that folder; it is made again at the next start."
        ) from None
    return TokenShard(name, key, tokens, offsets, loss, meta["num_bytes"])


def _write(corpus: Corpus, tokenizer: Tokenizer, folder: Path, key: str, show_progress: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    has_loss = any(document.pieces is not None for document in corpus.documents)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    # Written beside and renamed: a second process, or a kill, never leaves half a shard under the final name.
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        lengths: list[int] = []
        with contextlib.ExitStack() as stack:
            token_file = stack.enter_context((partial / "tokens.raw").open("wb"))
            loss_file = stack.enter_context((partial / "loss.raw").open("wb"))
            for ids, mask in _encoded(corpus, tokenizer, show_progress):
                lengths.append(len(ids))
                token_file.write(ids.astype(dtype).tobytes())
                if has_loss:
                    loss_file.write(mask.tobytes())
        for name, kind in (("tokens", dtype), ("loss", np.bool_)):
            raw = partial / f"{name}.raw"
            if name == "tokens" or has_loss:
                np.save(partial / f"{name}.npy", np.memmap(raw, dtype=kind, mode="r"))
            raw.unlink()
        np.save(partial / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        meta = {
            "corpus": corpus.name,
            "key": key,
            "tokenizer": tokenizer.fingerprint,
            "num_documents": len(corpus),
            "num_tokens": sum(lengths),
            "num_bytes": corpus.num_bytes,
            "has_loss": has_loss,
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        try:
            os.rename(partial, folder)
        except OSError:
            # Another process finished the same shard first; equal key means equal content.
            if not (folder / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _encoded(
    corpus: Corpus, tokenizer: Tokenizer, show_progress: bool
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    """Ids and loss mask of each document, without BOS."""
    from rich.console import Console
    from rich.progress import track

    batches = [corpus.documents[i : i + _BATCH] for i in range(0, len(corpus), _BATCH)]
    console = Console(stderr=True)
    for batch in track(batches, f"Tokenising {corpus.name}", console=console, disable=not show_progress):
        plain = [d for d in batch if d.pieces is None]
        # Raw text never yields control tokens: a source file that mentions a marker is just text.
        encoded = iter(tokenizer.encode_batch([d.text for d in plain], allow_special=False))
        for document in batch:
            if document.pieces is None:
                ids = np.array([*next(encoded), tokenizer.eos_token_id], dtype=np.int64)
                yield ids, np.ones(len(ids), dtype=np.bool_)
            else:
                ids, mask = encode_pieces(tokenizer, document.pieces)
                yield ids[1:], mask[1:]
