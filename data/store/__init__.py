"""The teacher store: parts on disk (`format`, `writer`, `reader`) and the codecs of hidden states (`codec`).

`open_store` opens one for notebooks and scripts. `docs/format.md` describes what lies on disk. Nothing here imports
torch or zarr until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.data.store.open import TeacherStore as TeacherStore
    from kdpipe.data.store.open import open_store as open_store

__all__ = ["TeacherStore", "open_store"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from kdpipe.data.store import open

        return getattr(open, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
