"""The teacher store: parts on disk (`format`, `writer`, `reader`) and the codecs of hidden states (`codec`).

`docs/format.md` describes what lies on disk. Nothing here imports torch or zarr until it is used.
"""
