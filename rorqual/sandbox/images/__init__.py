"""Images: layers of files named by their content, kept in any folder, stacked under a sandbox's own writable one."""

from rorqual.sandbox.images.store import Reference, Store

__all__ = ["Reference", "Store"]
