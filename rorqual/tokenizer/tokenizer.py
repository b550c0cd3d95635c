"""Text to token ids and back: a thin, strict wrapper around a byte-level BPE `tokenizer.json`.

The file format is the `tokenizers` library's, so DeepSeek's released V4 tokenizer and ours load alike.
What this class adds: errors that say what is wrong with a file, bytes of every token (for exact streaming
and loss masks), and a way to encode untrusted text without ever producing a control token.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from rorqual.errors import CheckpointError, DataError
from rorqual.tokenizer.special import BOS, EOS, PAD, THINK
from rorqual.tokenizer.stream import StreamDecoder

FILE_NAME = "tokenizer.json"


def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def clean_text(text: str) -> str:
    """`text` with lone surrogates (they have no UTF-8 form) replaced by U+FFFD; other text as it is."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class Tokenizer:
    """A byte-level BPE vocabulary. Build it with `from_file`, `from_folder`, `from_json` or
    `train_tokenizer`.

    Encoding never adds BOS or EOS by itself. `encode` then `decode` gives back any text that has a UTF-8
    form.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, origin: str = "memory") -> None:
        self._backend = backend
        self._origin = origin
        self._ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._added = backend.get_added_tokens_decoder()
        self.bos_token_id = self.token_id(BOS)
        self.eos_token_id = self.token_id(EOS)
        # V4 pads with EOS and so does any tokenizer without a pad token of its own.
        self.pad_token_id = self._ids.get(PAD, self.eos_token_id)
        self.vocab_size = max(self._ids.values()) + 1

    # ------------------------------------------------------------------ files

    @classmethod
    def from_json(cls, text: str, *, origin: str = "memory") -> "Tokenizer":
        """From the text of a `tokenizer.json`. Raises CheckpointError when it is not byte-level BPE."""
        try:
            content = json.loads(text)
        except ValueError as error:
            hint = (
                " It looks like a Git LFS pointer: run `git lfs pull`."
                if text.startswith("version https://git-lfs")
                else ""
            )
            raise CheckpointError(
                f"{origin} is not JSON ({error}). No tokenizer can be read from it.{hint} "
                "Fix: download or copy the file again; it may be truncated."
            ) from None
        kind = (content.get("model") or {}).get("type", "missing") if isinstance(content, dict) else "missing"
        if kind != "BPE":
            raise CheckpointError(
                f"{origin} holds a tokenizer whose model type is {kind}. DeepSeek-V4 models use "
                "byte-level BPE, so its "
                "ids would mean other text. Fix: use the tokenizer.json that was saved beside the model."
            )
        stages = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
        if '"ByteLevel"' not in stages:
            raise CheckpointError(
                f"{origin} is a BPE tokenizer without the ByteLevel stage. Its tokens are not bytes, "
                "so text cannot be "
                "decoded exactly. Fix: use the tokenizer.json that was saved beside the model."
            )
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for every malformed part
            raise CheckpointError(
                f"{origin} could not be read as a tokenizer: {error}. A part is malformed or missing. "
                "Fix: copy the file again, or save it anew with Tokenizer.save."
            ) from None
        # Where the file leaves a gap the library renumbers, and every later marker would be off by one.
        for entry in content.get("added_tokens", ()):
            loaded = backend.token_to_id(entry["content"])
            if loaded != entry["id"]:
                raise CheckpointError(
                    f"{origin} gives {entry['content']!r} the id {entry['id']}, but it loads as {loaded}. "
                    "The ids of added tokens must go on from the vocabulary without a gap. "
                    "Fix: restore the tokenizer.json saved beside the model."
                )
        return cls(backend, origin=origin)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Load one `tokenizer.json`. Raises CheckpointError naming the file when it is absent or unusable."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} does not exist. Without it text cannot become token ids. "
                "Fix: copy tokenizer.json from the folder the model came from."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path} cannot be read as a text file ({error}). Without it text cannot become token ids. "
                "Fix: check the path and its permissions, or copy the file again."
            ) from None
        return cls.from_json(text, origin=str(path))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Load `tokenizer.json` from a checkpoint folder."""
        return cls.from_file(Path(folder) / FILE_NAME)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder`; returns the path of the first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_048_576,
        }
        for name, text in (
            (FILE_NAME, self.to_json()),
            ("tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n"),
        ):
            # Written beside and renamed, so a reader never meets half a file.
            partial = folder / f".{name}.{os.getpid()}"
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, folder / name)
        return folder / FILE_NAME

    def to_json(self) -> str:
        """The text of its `tokenizer.json`."""
        return self._backend.to_str(pretty=True)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides ids; part of the key of cached token shards."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:32]

    # ------------------------------------------------------------- vocabulary

    def token_id(self, token: str) -> int:
        """Id of a marker or vocabulary entry by its name. Raises CheckpointError when it is missing."""
        try:
            return self._ids[token]
        except KeyError:
            raise CheckpointError(
                f"The tokenizer of {self._origin} has no token {token!r}. The V4 prompt format needs "
                "it as one token. "
                "Fix: use a DeepSeek-V4 tokenizer.json, or train one with "
                "`rorqual.tokenizer.train_tokenizer`."
            ) from None

    def has_token(self, token: str) -> bool:
        """Whether `token` is one entry of the vocabulary."""
        return token in self._ids

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise CheckpointError when a model with this many embeddings cannot work with this tokenizer."""
        if self.vocab_size > model_vocab_size:
            raise CheckpointError(
                f"The tokenizer of {self._origin} has {self.vocab_size} ids, the model only "
                f"{model_vocab_size} "
                "embeddings. Some text would have no embedding. Fix: use the tokenizer.json saved "
                "beside the model."
            )
        if self._ids.get(THINK) == 128798:
            raise CheckpointError(
                f"The tokenizer of {self._origin} has {THINK} at id 128798, where DeepSeek-V3 has it; "
                "V4 has it at "
                "128821. Prompts would be silently wrong. Fix: use the tokenizer.json of the V4 checkpoint."
            )

    @cached_property
    def control_token_ids(self) -> frozenset[int]:
        """Ids of every added token: BOS, EOS, pad and the markers, which are no text."""
        return frozenset(self._added)

    @cached_property
    def _bytes(self) -> list[bytes]:
        symbols = _byte_of_symbol()
        table = [b""] * self.vocab_size
        for token, token_id in self._ids.items():
            added = self._added.get(token_id)
            try:
                table[token_id] = added.content.encode() if added else bytes(symbols[c] for c in token)
            except KeyError:
                raise CheckpointError(
                    f"Token {token_id} of {self._origin}, {token!r}, is not written in the byte "
                    "alphabet. Text "
                    "cannot be decoded exactly. Fix: use the tokenizer.json that was saved beside the model."
                ) from None
        return table

    @cached_property
    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes per token id [vocab_size]; a marker's are those of its name."""
        return np.array([len(b) for b in self._bytes], dtype=np.int64)

    @cached_property
    def text_byte_lengths(self) -> npt.NDArray[np.int64]:
        """Like `byte_lengths` with 0 for markers, which are no text: the denominator of bits per byte."""
        lengths = self.byte_lengths.copy()
        lengths[list(self._added)] = 0
        return lengths

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; a marker's are its name. Raises DataError for an unknown id."""
        if not 0 <= token_id < self.vocab_size:
            raise DataError(
                f"Token id {token_id} is outside this vocabulary of {self.vocab_size} (0 to "
                f"{self.vocab_size - 1}). It "
                "stands for no text. Fix: check that ids and tokenizer belong to the same model."
            )
        return self._bytes[token_id]

    # --------------------------------------------------------------- encoding

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same vocabulary without added tokens: markers are spelled out in ordinary tokens."""
        content: dict[str, Any] = json.loads(self._backend.to_str())
        content["added_tokens"] = []
        content["post_processor"] = None
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Token ids of `text`.

        With `allow_special` markers such as `<｜User｜>` become their control tokens; without it they are
        spelled out as plain text, which is what untrusted text and raw corpora need. Lone surrogates
        become U+FFFD.
        """
        backend = self._backend if allow_special else self._plain
        return backend.encode(clean_text(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], allow_special: bool = True) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        backend = self._backend if allow_special else self._plain
        batch = backend.encode_batch_fast([clean_text(t) for t in texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    @cached_property
    def _marker_pattern(self) -> re.Pattern[str]:
        names = sorted((t.content for t in self._added.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)))

    def encode_guarded(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of the joined pieces, where only pieces marked trusted (True) may produce control tokens.

        For text without markers in its untrusted pieces this equals `encode` of the joined text:
        everything between two control tokens is one run, not cut where caller text meets fixed text.
        """
        ids: list[int] = []
        run: list[str] = []

        def end_run() -> None:
            if run:
                ids.extend(self.encode("".join(run), allow_special=False))
                run.clear()

        for text, is_trusted in pieces:
            position = 0
            for match in self._marker_pattern.finditer(text) if is_trusted else ():
                run.append(text[position : match.start()])
                end_run()
                ids.append(self._ids[match.group()])
                position = match.end()
            run.append(text[position:])
        end_run()
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Markers keep their names. `skip_special` drops the tokens flagged special (BOS, EOS, pad), nothing
        else.
        """
        special = {i for i, t in self._added.items() if t.special} if skip_special else set()
        return b"".join(self.token_bytes(i) for i in ids if i not in special).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """A fresh incremental decoder: `push(id)` gives complete characters only, `flush()` the rest."""
        return StreamDecoder(self.token_bytes)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, origin={self._origin!r})"
