"""Opening a store of whatever kind. A new kind is a module with a class of `Store`, and its name here."""

from __future__ import annotations

from pathlib import Path

from hpcssl.core.errors import StoreError
from hpcssl.stores.loose import LooseStore
from hpcssl.stores.online import OnlineStore
from hpcssl.stores.packed import PackedStore
from hpcssl.stores.store import Store, read_header

KINDS: dict[str, type[Store]] = {kind.kind: kind for kind in (LooseStore, PackedStore, OnlineStore)}


def open_store(path: Path) -> Store:
    """Open a store; StoreError where there is none, one of another format or kind, or one that lacks parts."""
    header = read_header(path)
    kind = KINDS.get(header.get("kind", ""))
    if kind is None:
        *names, last = KINDS
        raise StoreError(
            f"{path}: a store of kind {header.get('kind')!r}; this version reads {', '.join(names)} and {last}"
        )
    return kind(path, header)
