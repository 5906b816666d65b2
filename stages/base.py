"""What a stage is, and what it is given.

A stage is a value: its name, an integer version, the stages it reads from, the samples it wants with their
keys, and a function that makes some of them. Everything here is light; `run` imports what it needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

from kdpipe.data.errors import KdpipeError
from kdpipe.data.fields import Fields
from kdpipe.data.hashing import Fingerprints, digest
from kdpipe.data.ledger import Ledger
from kdpipe.data.manifest import Manifest, Sample, load_manifest
from kdpipe.stages.config import Config


@dataclass(frozen=True, slots=True)
class Wanted:
    """One source of one sample that the configuration asks for.

    Attributes:
        id: sample id.
        source: what of the sample this is; see `kdpipe.data.ledger.Row.source`.
        fields: named digests of everything that could change its bytes.
        cover: what must be stored beyond the key, e.g. `{"k": 32}`; see `covers`.
        pending: why the key cannot be known yet (something upstream is not fresh), or None.
    """

    id: str
    source: str
    fields: Mapping[str, str]
    cover: Mapping[str, Any] = field(default_factory=dict)
    pending: str | None = None

    @property
    def key(self) -> str:
        """Digest of the fields."""
        return self.fields.digest() if isinstance(self.fields, Fields) else digest(self.fields)


_COMPARED = ("id", "key", "held_as", "part", "cover", "made_with")


def covers(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether what is stored serves what is asked: numbers at least as large, lists a superset, mappings the same."""
    for name, value in asked.items():
        have = stored.get(name)
        if isinstance(value, list | tuple):
            if have is None or not set(value) <= set(have):
                return False
        elif isinstance(value, Mapping):
            if have != value:
                return False
        elif have is None or have < value:
            return False
    return True


@dataclass(frozen=True)
class Context:
    """What every stage is given.

    Attributes:
        config: the validated configuration.
        base: folder of the configuration file; relative paths in it start here.
        say: prints one line for the user.
    """

    config: Config
    base: Path
    say: Callable[[str], None] = print

    @cached_property
    def run_folder(self) -> Path:
        """Folder of this run's outputs."""
        return (self.base / self.config.run.folder).resolve()

    @cached_property
    def cache_folder(self) -> Path:
        """Folder that holds `textualize/` and `cache-teachers/`."""
        cache = self.config.run.cache
        return self.run_folder if cache is None else (self.base / cache).resolve()

    def folder(self, stage: str) -> Path:
        """Output folder of a stage."""
        return (self.cache_folder if stage in ("textualize", "cache-teachers") else self.run_folder) / stage

    def tmp(self, stage: str) -> Path:
        """Folder for unfinished files of a stage, on the same file system as its outputs."""
        return self.folder(stage).parent / "tmp"

    def ledger(self, stage: str) -> Ledger:
        """The state of a stage as it is on disk now."""
        return Ledger(self.folder(stage), self.tmp(stage))

    @cached_property
    def digests(self) -> dict[str, tuple[str, ...]]:
        """Digests of samples, once they were asked for; see `kdpipe.stages.textualize.stage.sample_fields`."""
        return {}

    @cached_property
    def prints(self) -> Fingerprints:
        """File digests, remembered in the run folder."""
        return Fingerprints(self.run_folder / "tmp" / "fingerprints.sqlite")

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, loaded once."""
        return load_manifest(self.base / self.config.data.manifest, allow_outside=self.config.data.allow_outside)

    def take_manifest(self, earlier: Context) -> None:
        """Takes over the manifest that another context has read, where this one would read the same."""
        if (self.base, self.config.data) == (earlier.base, earlier.config.data) and earlier.manifest.is_current():
            self.__dict__["manifest"] = earlier.manifest

    def samples(self, split: str) -> Sequence[Sample]:
        """Samples of one split, in the manifest's order."""
        return self.manifest.select(split)

    def recheck(self, samples: Iterable[Sample]) -> None:
        """Refuses to go on if an input changed since it was hashed; called before a commit.

        Raises:
            KdpipeError: names the files that changed.
        """
        paths = [ref.path for sample in samples for ref in sample.audio if ref.path is not None]
        changed = self.prints.changed(paths)
        if changed:
            names = ", ".join(str(path) for path in changed[:5])
            raise KdpipeError(
                f"{names}: changed while the stage was running; nothing made from it was recorded. "
                "Run the command again."
            )

    def recheck_model(self, folder: Path) -> None:
        """Refuses to go on if a model changed between being hashed and being loaded; called when it is loaded.

        Raises:
            KdpipeError: names the files that changed.
        """
        changed = self.prints.changed_in(folder)
        if changed:
            names = ", ".join(str(path) for path in changed[:5])
            raise KdpipeError(
                f"{names}: changed, added or removed since the command was started; nothing was made with this model. "
                "Restore it if that was not meant, and run the command again."
            )


class Stage(Protocol):
    """The contract of a stage.

    Attributes:
        name: as on the command line; also the name of its folder.
        version: raised when the same inputs would give other bytes.
        whole: whether its output is made from all samples together (a student) and not sample by sample.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def whole(self) -> bool: ...

    def needs(self, config: Config) -> tuple[str, ...]:
        """The stages whose outputs it reads."""
        ...

    def wanted(self, ctx: Context, plans: Mapping[str, StagePlan]) -> list[Wanted]:
        """What the configuration asks of this stage, with keys; `plans` are those of the stages in `needs`."""
        ...

    def run(self, ctx: Context, todo: Sequence[Wanted]) -> None:
        """Makes `todo` (nothing pending) and commits it to the stage's ledger, part by part.

        A stage that is `whole` makes its output from all that is wanted, whatever `todo` holds.
        """
        ...


@dataclass(frozen=True)
class StagePlan:
    """A stage's wants held against what lies on disk.

    Attributes:
        stage: the stage's name.
        wanted: everything asked for.
        fresh: (id, source) pairs that the ledger holds under the wanted key, in a part that is there.
        rejected: pairs whose rejection is recorded under the wanted key.
        todo: wants that are neither, in order.
        removed: (id, source) pairs on disk that nothing asks for any more.
        ledger: the ledger they were compared with.
        made_with: how many pairs of `fresh` were made with which other libraries than are installed.
        libraries: those that are installed.
        accepted: how many pairs of `fresh` are so because `kdpipe accept` took them for what is asked.
    """

    stage: str
    wanted: Sequence[Wanted]
    fresh: Set[tuple[str, str]]
    rejected: Set[tuple[str, str]]
    todo: Sequence[Wanted]
    removed: Sequence[tuple[str, str]]
    ledger: Ledger
    made_with: Mapping[str, int] = field(default_factory=dict)
    libraries: str = ""
    accepted: int = 0


class Made(Protocol):
    """Judges what was made by the libraries it was made with; `kdpipe.stages.environment.Environment`."""

    @property
    def text(self) -> str: ...
    @property
    def strict(self) -> bool: ...
    def made(self, made_with: str) -> bool: ...


def compare(stage: str, wanted: Sequence[Wanted], ledger: Ledger, by: Made | None = None) -> StagePlan:
    """Sorts wants into fresh, rejected and to do, by key, coverage and, where it is strict, by libraries.

    Args:
        stage: its name.
        wanted: what is asked for.
        ledger: what there is.
        by: the libraries that are installed; None: they do not matter.
    """
    fresh: set[tuple[str, str]] = set()
    rejected: set[tuple[str, str]] = set()
    open_: set[tuple[str, str]] = set()
    removed, others, accepted = [], Counter[str](), 0
    lost = ledger.lost_parts()
    refused = {(reject.id, reject.source): reject.key for reject in ledger.rejects()}
    made_alike = cache((lambda made_with: True) if by is None else by.made)
    strict = by is not None and by.strict
    served: dict[tuple[int, int], bool] = {}  # by identity: covers are shared by many wants, and by many rows

    def serves(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
        pair = id(stored), id(asked)
        if pair not in served:
            served[pair] = covers(stored, asked)
        return served[pair]

    asked: dict[str, list[Wanted]] = {source: [] for source in ledger.sources}
    for want in wanted:
        asked.setdefault(want.source, []).append(want)
    for source, wants in asked.items():  # one after the other, so that the rows of one are held at a time
        held = {row[0]: row for row in ledger.values(source, *_COMPARED)}
        for want in wants:
            pair = want.id, source
            row = held.pop(want.id, None)
            if want.pending is not None:
                open_.add(pair)
                continue
            key = want.key
            if row is not None:
                _, stored, held_as, part, cover, made_with = row
                if (key in (stored, held_as)) and part not in lost and serves(cover, want.cover):
                    alike = made_alike(made_with)
                    if alike or not strict:
                        fresh.add(pair)
                        if not alike:
                            others[made_with] += 1
                        if held_as and held_as != key:
                            accepted += 1
                        continue
            (rejected if refused.get(pair) == key else open_).add(pair)
        removed += [(sample, source) for sample in held]
    todo = [want for want in wanted if (want.id, want.source) in open_] if open_ else []
    libraries = by.text if by else ""
    return StagePlan(stage, wanted, fresh, rejected, todo, removed, ledger, others, libraries, accepted)
