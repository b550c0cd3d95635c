"""The state store: prefixes that were computed before, in memory and on disk, and why a request hit or missed."""

from rorqual.engine.store.disk import DiskStore
from rorqual.engine.store.explain import Explanation
from rorqual.engine.store.fingerprint import store_fingerprint
from rorqual.engine.store.tree import Hit, Node, Point, PrefixTree
from rorqual.engine.store.turns import TurnStore

__all__ = ["DiskStore", "Explanation", "Hit", "Node", "Point", "PrefixTree", "TurnStore", "store_fingerprint"]
