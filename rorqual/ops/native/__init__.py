"""C twins of the operations in `ops/`, built by the system compiler and loaded with ctypes (see `library.py`)."""

from rorqual.ops.native.library import cache_folder, compiler, infers, load, usable, usable_typed

__all__ = ["cache_folder", "compiler", "infers", "load", "usable", "usable_typed"]
