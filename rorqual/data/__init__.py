"""Training data: corpora, token shards, fill-in-the-middle, mixtures and packing with exact resume."""

from rorqual.data.conversations import pieces_of_rendered, render_conversation
from rorqual.data.corpora import Corpus, CorpusDocument, folder_corpus, open_corpus, python_corpus
from rorqual.data.document import Document, encode_pieces
from rorqual.data.fim import fim_document
from rorqual.data.loader import PackedLoader
from rorqual.data.packing import IGNORE, Batch, Packer, heldout_batches
from rorqual.data.shards import TokenShard, build_shard
from rorqual.data.sources import GeneratorSource, ShardSource, Source, task_sources

__all__ = [
    "IGNORE",
    "Batch",
    "Corpus",
    "CorpusDocument",
    "Document",
    "GeneratorSource",
    "PackedLoader",
    "Packer",
    "ShardSource",
    "Source",
    "TokenShard",
    "build_shard",
    "encode_pieces",
    "fim_document",
    "folder_corpus",
    "heldout_batches",
    "open_corpus",
    "pieces_of_rendered",
    "python_corpus",
    "render_conversation",
    "task_sources",
]
