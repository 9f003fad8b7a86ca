"""Which files does a path, glob or URL mean, in which order, and what is in them?

Files are taken in the order of their paths below the source, whatever order a listing has, and a record's key is that path
and its place in the file, so that neither content nor keys depend on the machine. Folders give no columns.
"""

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec

from actstore._lazy import missing
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError, StorageError

from .records import ReadOptions, Source
from .source_streams import COMPRESSED, SourceFile
from .source_tables import CsvSource, ParquetSource, parquet_schema
from .source_tar import TarSource
from .source_text import JsonSource, TextSource

FORMATS = ("jsonl", "json", "parquet", "csv", "tar", "text")
_SUFFIX_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".tar": "tar",
    ".tgz": "tar",
}
_TABLES = (".arrow", ".feather", ".xlsx", ".sqlite", ".db", ".zip", ".7z", ".rar")
"""Never meant as one document of text."""

KNOWN_SUFFIXES = (*_SUFFIX_FORMATS, *COMPRESSED, *_TABLES, ".txt", ".md")


def without_secrets(path: str) -> str:
    """Return a URL without what may be credentials: user information and, of a web address, query and fragment.

    What is shown here ends up in the corpus for good, and in every document's `source_key`.

    >>> without_secrets("https://me:secret@host/a.jsonl?signature=secret"), without_secrets("s3://bucket/a?.jsonl")
    ('https://host/a.jsonl', 's3://bucket/a?.jsonl')
    """
    protocol, separator, place = path.partition("://")
    if not separator:
        return path
    if "http" in protocol:
        place = re.split("[?#]", place, maxsplit=1)[0]
    authority, slash, rest = place.partition("/")
    return f"{protocol}://{authority.rpartition('@')[2]}{slash}{rest}"


def path_exists(path: str, *, storage_options: Mapping[str, Any]) -> bool:
    """Return whether a path, glob or URL names anything."""
    return bool(_list_files(path, storage_options))


def file_source(
    path: str, *, options: ReadOptions, source_format: str | None, storage_options: Mapping[str, Any]
) -> Source:
    """Return the source of a file, a folder or a glob.

    Raises:
        NotFoundError: no such file, or a folder or glob without files.
        InvalidInputError: files of several formats, or of one that is not read.
    """
    files = _list_files(path, storage_options)
    path = without_secrets(path)  # from here on it is only shown and stored
    if not files:
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND,
            f"no file at {path!r}: give a file, a folder or a glob of Parquet, JSONL, JSON, CSV, tar or text files, or a "
            "dataset's hub name",
        )
    kind, chosen = _choose(path, files, source_format)
    warnings = _left_out(path, kind, files, chosen)
    if kind == "parquet":
        return ParquetSource(chosen, path, options, parquet_schema(chosen[0]), warnings)
    if kind in ("jsonl", "json"):
        return JsonSource(chosen, path, options, kind == "jsonl", warnings)
    if kind == "csv":
        return CsvSource(chosen, path, options, warnings)
    if kind == "tar":
        return TarSource(chosen, path, options, warnings)
    return TextSource(chosen, path, options, warnings)


def _left_out(
    path: str, kind: str, files: Sequence[SourceFile], chosen: Sequence[SourceFile]
) -> tuple[str, ...]:
    taken = {file.name for file in chosen}
    names = [file.name for file in files if file.name not in taken]
    if not names:
        return ()
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (f"read {len(chosen)} {kind} files of {path}, left out {len(names)} others: {shown}",)


def _list_files(path: str, storage_options: Mapping[str, Any]) -> list[SourceFile]:
    try:
        return _find(*fsspec.core.url_to_fs(path, **storage_options))
    except ImportError as error:
        raise missing(str(error), needed_for=f"reading {without_secrets(path)}", extra="all") from error
    except (ValueError, TypeError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_URL, f"source {without_secrets(path)!r} cannot be opened: {error}"
        ) from error
    except Exception as error:
        # Every file system raises errors of its own, which do not name the source.
        raise StorageError(
            ErrorKind.STORAGE_FAILED,
            f"source {without_secrets(path)!r} cannot be listed ({type(error).__name__}): check address, network and permissions",
        ) from error


def _find(fs: Any, root: str) -> list[SourceFile]:
    fs.invalidate_cache()  # of listings made before another process wrote the files
    if fs.isfile(root):
        return [SourceFile(fs, root, posixpath.basename(without_secrets(root)))]
    if fs.isdir(root):
        base, paths = root, fs.find(root)
    else:
        base = root[: min((root.index(c) for c in "*?[" if c in root), default=len(root))].rpartition("/")[0]
        found = fs.glob(root, detail=True) if fs.exists(base or "/") or base == "" else {}
        paths = [path for path, info in found.items() if info.get("type") == "file"]
    named = [(posixpath.relpath(p, base) if base else p, p) for p in paths]
    return [SourceFile(fs, p, n) for n, p in sorted(named) if not _is_hidden(n)]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/")) or name.endswith("/")


def _format_of(name: str) -> str:
    stem = name.lower()
    for suffix in COMPRESSED:
        stem = stem.removesuffix(suffix)
    suffix = posixpath.splitext(stem)[1]
    return "table" if suffix in _TABLES else _SUFFIX_FORMATS.get(suffix, "text")


def _choose(
    path: str, files: Sequence[SourceFile], source_format: str | None
) -> tuple[str, tuple[SourceFile, ...]]:
    """Return the format and the files that have it."""
    by_format: dict[str, list[SourceFile]] = {}
    for file in files:
        by_format.setdefault(_format_of(file.name), []).append(file)
    json_files = tuple(file for file in files if _format_of(file.name) in ("jsonl", "json"))
    if source_format is not None:
        # Asked for by name: a single file, or files of no known suffix, are taken at the user's word.
        if source_format in ("jsonl", "json"):
            return source_format, json_files or tuple(files)
        return source_format, tuple(files if source_format == "text" else by_format.get(source_format, files))
    found = [kind for kind in FORMATS if kind in by_format and kind != "text"]
    if set(found) == {"jsonl", "json"}:
        return "json", json_files
    if len(found) == 2 and "json" in found:
        found.remove("json")  # of a downloaded dataset: its .json files describe it
    has_text = any(".txt" in f.name for f in by_format.get("text", []))
    if len(found) > 1 or (found and has_text):
        kinds = ", ".join(f"{len(v)} {k}" for k, v in sorted(by_format.items()))
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{path} holds files of several formats ({kinds}): choose with source_format= or a glob such as '{path}/*.jsonl'",
        )
    if found:
        return found[0], tuple(by_format[found[0]])
    if "text" not in by_format:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{path} holds no file of documents (found {by_format['table'][0].name}): convert it, for example with "
            "DuckDB's COPY ... TO 'x.parquet', or pass a pandas table; source_format='text' reads files as they are",
        )
    return "text", tuple(by_format["text"])
