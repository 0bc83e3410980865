"""Sources of text, local or on the Hugging Face hub, read as documents; whatever is wrong with them is said at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from preceptor.data.corpora.corpus import adapted, adapter_named, joined, read_documents
from preceptor.errors import DataError, MissingExtraError

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_SUFFIXES = {".csv", ".gz", ".json", ".jsonl", ".md", ".parquet", ".text", ".txt", ".zip", ".zst"}


@dataclass(frozen=True)
class Source:
    """Where the documents of one dataset come from.

    Attributes:
        name: what the dataset is called everywhere.
        location: a file or folder that exists (see :func:`~preceptor.data.corpora.corpus.read_documents`), else the
            name of a dataset on the hub.
        adapter: how a row becomes a document: a name in :data:`~preceptor.data.corpora.corpus.ADAPTERS`, or
            ``field:NAME``.
        split: of a hub dataset; a file or folder is read whole.
        subset: configuration of a hub dataset, such as ``wikitext-103-raw-v1``; empty for its default.
        join: consecutive rows that make one document, at least 1.
        max_documents: how many are read, from the beginning; 0: all. A hub dataset needs a limit, since documents are
            kept in memory.
    """

    name: str
    location: str
    adapter: str = "text"
    split: str = "train"
    subset: str = ""
    join: int = 1
    max_documents: int = 0


def source_faults(sources: Sequence[Source]) -> list[str]:
    """What is wrong with ``sources``, found without opening any of them.

    >>> source_faults([Source("a", "a.txt"), Source("a", "b.txt", adapter="dialogue")])
    ["dataset 'a' is listed twice; names must differ", "dataset 'a': unknown adapter 'dialogue' (did you mean...
    """
    faults = [] if sources else ["no dataset is listed; list at least one"]
    names = [source.name for source in sources]
    faults += [
        f"dataset '{name}' is listed twice; names must differ" for name in sorted(set(names)) if names.count(name) > 1
    ]
    for source in sources:
        if not source.name or not source.location:
            faults.append(f"a dataset needs a name and a location, got {source.name!r} at {source.location!r}")
        if source.join < 1:
            faults.append(f"dataset '{source.name}': `join` must be at least 1, got {source.join}")
        if source.max_documents < 0:
            faults.append(f"dataset '{source.name}': `max_documents` must be at least 0, got {source.max_documents}")
        try:
            adapter_named(source.adapter)
        except DataError as error:
            faults.append(f"dataset '{source.name}': {error}")
    return faults


def read_sources(sources: Sequence[Source], *, root: Path | None = None) -> dict[str, list[str]]:
    """The documents of each source by its name, every one of at least one character.

    Args:
        sources: with different names.
        root: folder that relative locations start from; ``None``: the current one.

    Raises:
        DataError: naming every source that is faulty, missing, unreadable or empty, with what is wrong with each.
    """
    # Every source is tried before anything is raised: one start of the program shows all mistakes.
    faults = source_faults(sources)
    documents: dict[str, list[str]] = {}
    if not faults:
        for source in sources:
            try:
                # islice stops a stream after the documents wanted, so no more than these are downloaded.
                documents[source.name] = list(islice(_documents(source, root or Path()), source.max_documents or None))
            except (DataError, MissingExtraError, OSError) as error:
                faults.append(f"dataset '{source.name}': {error}")
                continue
            if not documents[source.name]:
                faults.append(f"dataset '{source.name}': {source.location} has no text; check its adapter and split")
    if faults:
        raise DataError("; ".join(faults))
    return documents


def _documents(source: Source, root: Path) -> Iterator[str]:
    path = root / Path(source.location).expanduser()
    if path.exists():
        return read_documents(path, adapter=source.adapter, join=source.join)
    # A missing file must not be looked up on the hub under its name.
    if Path(source.location).suffix.lower() in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(source.location):
        raise DataError(f"{path} does not exist; check the path, or give the name of a dataset on the hub")
    # A hub dataset may hold terabytes.
    if not source.max_documents:
        raise DataError(
            f"there is no file or folder {path}, and the hub dataset {source.location} needs `max_documents`, since "
            "documents are kept in memory"
        )
    return hub_documents(source)


def hub_documents(source: Source) -> Iterator[str]:
    """Documents of a dataset on the Hugging Face hub, streamed: what is not asked for is not downloaded.

    ``source.location`` is anything that ``datasets.load_dataset`` takes. Code of a dataset is never run.

    Raises:
        MissingExtraError: the extra ``datasets`` is not installed.
        DataError: there is no such dataset, subset, split or field, or the hub is out of reach.
    """
    try:
        import datasets
        import httpx
    except ImportError as error:
        raise MissingExtraError(f"the hub dataset {source.location}", package="datasets", extra="datasets") from error
    adapt = adapter_named(source.adapter)
    place = f"{source.location}, split {source.split}"
    try:
        # streaming: rows arrive one by one and nothing is stored on disk.
        stream = datasets.load_dataset(source.location, source.subset or None, split=source.split, streaming=True)
        rows = ((f"{place}, row {number}", row) for number, row in enumerate(stream, start=1))
        yield from joined(adapted(rows, adapt), source.join)
    except DataError:
        raise
    except (datasets.exceptions.DatasetsError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        # The library raises RuntimeError for datasets that are code and ValueError for unknown subsets and splits.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"the hub dataset {place} cannot be read ({reason}); check its name, subset and split, and the network"
        ) from error
