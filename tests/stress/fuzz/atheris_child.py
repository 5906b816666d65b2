"""Coverage-guided fuzzing of one parser by atheris: `python atheris_child.py TARGET FOLDER [libFuzzer options]`.

Ends with status 0 where only errors of the contract came, and otherwise with a traceback and the input in hexadecimal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kdpipe", "yaml", "csv"]):  # type: ignore[attr-defined]
    from kdpipe.data.audio import decode
    from kdpipe.data.cota import TraceSchema
    from kdpipe.data.errors import ConfigError, ManifestError, Rejected
    from kdpipe.data.manifest import AudioRef, check_sample, load_manifest
    from kdpipe.pipeline.config import load_config
    from kdpipe.stages.textualize.descriptions import Descriptions
    from kdpipe.stages.train.metrics import read_metrics


def manifest(file: Path) -> None:
    for sample in load_manifest(file).samples:
        check_sample(sample)


def trace(file: Path) -> None:
    text = file.read_bytes().decode(errors="replace")
    TraceSchema().extract_response(text)
    schema = TraceSchema()
    schema.render(schema.parse(text))


def clip(file: Path) -> None:
    decode(AudioRef(file, None, "clip"), rate=8_000, max_seconds=2.0)


def lines(file: Path) -> None:
    Descriptions(file)
    read_metrics(file)


TARGETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "jsonl": ("m.jsonl", manifest),
    "csv": ("m.csv", manifest),
    "config": ("kdpipe.yaml", lambda file: load_config(file) and None),
    "trace": ("trace.txt", trace),
    "clip": ("clip", clip),
    "lines": ("lines.jsonl", lines),
}


def main() -> None:
    name, look = TARGETS[sys.argv[1]]
    file = Path(sys.argv[2]) / name

    def one(data: bytes) -> None:
        file.write_bytes(data)
        try:
            look(file)
        except (ConfigError, ManifestError, Rejected) as error:
            assert str(error).strip()
        except BaseException:
            print(f"input: {data.hex()}", file=sys.stderr)
            raise

    atheris.Setup([sys.argv[0], *sys.argv[3:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
