"""The feed of a real run: corpora and synthetic tasks, tokenized, mixed by weight, packed."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual import log
from rorqual.config import ModelConfig
from rorqual.data import (
    Batch,
    Corpus,
    Document,
    PackedLoader,
    ShardSource,
    Source,
    build_shard,
    encode_pieces,
    heldout_batches,
    open_corpus,
    python_corpus,
    task_sources,
)
from rorqual.data import tasks as task_room
from rorqual.data.tasks import TaskFamily
from rorqual.errors import ConfigError, DataError
from rorqual.seeds import derive
from rorqual.tokenizer import EOS, Tokenizer, compress_vocabulary, train_tokenizer
from rorqual.train.config import SourceSection, TrainConfig
from rorqual.train.feed import Continuation, Rows

logger = log.get(__name__)

_EVAL_ROWS = 8


def build_corpus_feed(config: TrainConfig, cfg: ModelConfig, folder: Path, *, is_new: bool = False) -> "CorpusFeed":
    """Read the corpora, train or load the tokenizer, tokenize, and set up the mixture.

    With `is_new` a tokenizer.json that lies in `folder` is another run's and is not used.
    Raises: DataError for a corpus that cannot be read or leaves nothing to train on; ConfigError for an
    unknown task family or a tokenizer larger than the model's vocabulary.
    """
    data = config.data
    cache = Path(data.cache) if data.cache else folder / "cache"
    corpora = [_open(source).split(data.held_out) for source in data.sources]
    families = _families(config)
    if not corpora and not families:
        raise DataError(
            "The mixture is empty: data.sources lists nothing and data.tasks.weight is 0. There is nothing "
            "to train on. "
            'Add a [[data.sources]] entry such as kind = "python", or give the tasks a weight.'
        )
    tokenizer = _tokenizer(config, cfg, folder, [train for train, _ in corpora], families, is_new)
    tokenizer.check_fits(cfg.vocab_size)
    longest = max(length for _, length in config.schedule.seq_lens)
    sources: list[Source] = []
    held_out: dict[str, ShardSource] = {}
    weights: dict[str, float] = {}
    for section, (train, rest) in zip(data.sources, corpora, strict=True):
        name = train.name
        while name in weights:
            name += "+"
        sources.append(
            ShardSource(
                build_shard(train, tokenizer, cache),
                tokenizer,
                window_tokens=max(longest, 16),
                fim_rate=section.fim_rate,
                name=name,
            )
        )
        weights[name] = section.weight
        if len(rest):
            held_out[name] = ShardSource(build_shard(rest, tokenizer, cache), tokenizer, window_tokens=max(longest, 16))
    if families:
        shares = _shares(config, families)
        for source in task_sources(tokenizer, families=families):
            sources.append(source)
            weights[source.name] = data.tasks.weight * shares[source.name.removeprefix("task:")]
    loader = PackedLoader(
        sources,
        weights,
        seq_len=longest,
        batch_size=1,
        seed=derive(config.run.seed, "data"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return CorpusFeed(loader, tokenizer, held_out, families, config, cfg.vocab_size)


class CorpusFeed:
    """Implements `Feed` over a `PackedLoader`."""

    def __init__(
        self,
        loader: PackedLoader,
        tokenizer: Tokenizer,
        held_out: dict[str, ShardSource],
        families: dict[str, TaskFamily],
        config: TrainConfig,
        vocab_size: int,
    ) -> None:
        self.loader = loader
        self.tokenizer = tokenizer
        self._held_out = held_out
        self._families = families
        self._config = config
        self._vocab_size = vocab_size

    def next_rows(self, num_rows: int, seq_len: int) -> Rows:
        """See `Feed`."""
        self.loader.set_batch_size(num_rows)
        self.loader.set_seq_len(seq_len)
        return _rows(next(self.loader))

    def state_dict(self) -> dict[str, Any]:
        """See `Feed`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Feed`."""
        self.loader.load_state_dict(state)

    def token_counts(self) -> Tensor:
        """Counts over the first rows of the mixture (about a million tokens); the position stays where it
        was.
        """
        before = self.loader.state_dict()
        seq_len = max(length for _, length in self._config.schedule.seq_lens)
        counts = torch.zeros(self.tokenizer.vocab_size, dtype=torch.int64)
        sample = min(1_000_000, self._config.schedule.total_tokens)
        for _ in range(max(1, sample // (64 * seq_len))):
            rows = self.next_rows(64, seq_len)
            lengths = torch.tensor(rows.lengths or [seq_len] * 64)
            tokens = rows.tokens[torch.arange(seq_len) < lengths.unsqueeze(1)]  # padding is no text
            counts += torch.bincount(tokens, minlength=counts.shape[0])
        self.loader.load_state_dict(before)
        return counts

    def token_byte_lengths(self) -> Tensor | None:
        """Bytes of text per token; markers such as end of sentence stand for none."""
        return torch.from_numpy(self.tokenizer.text_byte_lengths)

    def token_compression(self) -> Tensor:
        """See `Feed`."""
        return torch.from_numpy(compress_vocabulary(self.tokenizer, self._vocab_size))

    def held_out(self, num_tokens: int, seq_len: int) -> Iterator[tuple[str, Rows]]:
        """Held-out files of every corpus, then calibration items of the task families (the answers' tokens
        count).
        """
        num_batches = max(1, num_tokens // (_EVAL_ROWS * seq_len))
        for name, source in self._held_out.items():
            for batch in itertools.islice(heldout_batches(source, _EVAL_ROWS, seq_len), num_batches):
                yield name, _rows(batch)
        if not self._families:
            return
        items = [_ItemSource(name, family, self.tokenizer) for name, family in self._families.items()]
        with PackedLoader(
            items, seq_len=seq_len, batch_size=_EVAL_ROWS, seed=0, pad_token_id=self.tokenizer.pad_token_id
        ) as loader:
            for batch in itertools.islice(loader, num_batches):
                yield "tasks", _rows(batch)

    def continuation(self, text: str) -> Continuation:
        """See `Feed`."""
        ids = [self.tokenizer.bos_token_id, *self.tokenizer.encode(text)]
        return Continuation(ids, self.tokenizer.decode, self.tokenizer.vocab_size)

    def save_artifacts(self, folder: str) -> None:
        """Write tokenizer.json and, when tasks were trained on, world.json."""
        self.tokenizer.save(folder)
        if self._families:
            tasks = self._config.data.tasks
            kind = task_room.Census if "census" in self._families else task_room.World
            world = kind.build(tasks.world, tasks.world_size).to_dict()
            (Path(folder) / "world.json").write_text(json.dumps(world, indent=2) + "\n", encoding="utf-8")


class _ItemSource:
    """Calibration items of a task family as documents whose answers are the targets."""

    has_splittable = False

    def __init__(self, name: str, family: TaskFamily, tokenizer: Tokenizer) -> None:
        self.name = f"items:{name}"
        self.fingerprint = ""
        self._family = family
        self._tokenizer = tokenizer

    def documents(self, seed: int, index: int) -> list[Document]:
        """The `index`-th calibration item."""
        item = self._family.make_item(random.Random(derive(seed, "held-out-items", self.name, index)), "cal", index)
        gold = item.gold if item.gold.endswith(EOS) else item.gold + EOS
        return [Document(*encode_pieces(self._tokenizer, [(item.prompt_text(bos=False), False), (gold, True)]))]


def _rows(batch: Batch) -> Rows:
    return Rows(batch.tokens, batch.labels, batch.segment_ids, batch.lengths if batch.is_padded else None)


def _open(section: SourceSection) -> Corpus:
    if section.kind == "python":
        return python_corpus(include_tests=section.include_tests)
    assert section.path is not None
    return open_corpus(Path(section.path), is_jsonl=section.kind == "jsonl")


def _families(config: TrainConfig) -> dict[str, TaskFamily]:
    """The chosen task families by name. Raises: ConfigError for a name that is none."""
    tasks = config.data.tasks
    if tasks.weight == 0:
        return {}
    known = task_room.named_families(tasks.world, size=tasks.world_size, model_name=tasks.model_name)
    if "census" in tasks.families:
        known |= task_room.study_families(tasks.world, size=tasks.world_size)
    chosen = list(tasks.families) or list(task_room.DEFAULT_WEIGHTS)
    for name in chosen:
        if name not in known:
            raise ConfigError(
                f"data.tasks.families names {name!r}, which is not a task family, so nothing can be "
                "generated for it. "
                f"Choose from {', '.join(sorted(known))}."
            )
    return {name: known[name] for name in chosen}


def _shares(config: TrainConfig, families: dict[str, TaskFamily]) -> dict[str, float]:
    """Shares of the task tokens by family, summing to 1: the recipe's, or those the families suggest."""
    given = config.data.tasks.families or task_room.DEFAULT_WEIGHTS
    shares = {name: given.get(name, 0.0) for name in families}
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _tokenizer(
    config: TrainConfig,
    cfg: ModelConfig,
    folder: Path,
    corpora: list[Corpus],
    families: dict[str, TaskFamily],
    is_new: bool,
) -> Tokenizer:
    """The given tokenizer, the one this run began with, that of the weights it starts from, or a new one from a
    sample of the mixture.
    """
    data = config.data
    if data.tokenizer:
        path = Path(data.tokenizer)
        return Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_file(path)
    own = folder / "tokenizer.json"
    if own.is_file() and not is_new:
        return Tokenizer.from_file(own)
    if config.model.init_from:
        tokenizer = _tokenizer_of(Path(config.model.init_from))
    else:
        logger.info("Training a tokenizer of %d tokens.", cfg.vocab_size)
        texts = _sample_texts(config, corpora, families)
        tokenizer = train_tokenizer(texts, cfg.vocab_size, digits=data.tokenizer_digits)
    folder.mkdir(parents=True, exist_ok=True)
    if own.is_file() and own.read_text(encoding="utf-8") != tokenizer.to_json():
        own.replace(aside := own.with_suffix(".json.old"))
        logger.warning("%s was there before this run and is not its tokenizer; it is now %s.", own, aside.name)
    tokenizer.save(folder)
    return tokenizer


def _tokenizer_of(weights: Path) -> Tokenizer:
    """The tokenizer beside the weights a run starts from: with another one their embeddings mean other words."""
    if not (weights / "tokenizer.json").is_file():
        raise ConfigError(
            f"model.init_from names {weights}, which has no tokenizer.json, so it is unknown which text its token ids "
            "stand for. Put the model's tokenizer.json there, or name one in data.tokenizer."
        )
    return Tokenizer.from_folder(weights)


def _sample_texts(config: TrainConfig, corpora: list[Corpus], families: dict[str, TaskFamily]) -> Iterator[str]:
    """Texts of every part in proportion to its weight, about `tokenizer_sample_bytes` in all."""
    data = config.data
    total = sum(source.weight for source in data.sources) + (data.tasks.weight if families else 0.0)
    for source, corpus in zip(data.sources, corpora, strict=True):
        order = list(corpus.documents)
        random.Random(derive(config.run.seed, "tokenizer", corpus.name)).shuffle(order)
        left = data.tokenizer_sample_bytes * source.weight / total
        for document in order:
            if left <= 0:
                break
            left -= len(document.text)
            yield document.text
    for name, share in _shares(config, families).items() if families else ():
        left = data.tokenizer_sample_bytes * share * data.tasks.weight / total
        for index in itertools.count():
            if left <= 0:
                break
            generator = random.Random(derive(config.run.seed, "tokenizer", name, index))
            text = "".join(piece for piece, _ in families[name].train_document(generator))
            left -= len(text)
            yield text
