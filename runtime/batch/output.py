"""The output of a batch, made from its journal: JSON lines or parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mobilevlm.console.terminal import shown
from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.journal import json_line
from mobilevlm.runtime.parquet import parquet_module
from mobilevlm.whole_file import written_whole

ROW_GROUP = 1000
"""Rows of a parquet file that are written, and in memory, at a time"""


def check_output(path: Path) -> None:
    """Refuse an output that cannot be written when all is done.

    Raises:
        MobileVLMError: its name says no format, or its folder is not there.
        MissingExtraError: pyarrow is not installed.
    """
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".parquet"):
        raise MobileVLMError(f"-o {shown(path)}: expected a name that ends in .jsonl or .parquet")
    if path.suffix.lower() == ".parquet":
        parquet_module()
    if not path.parent.is_dir():
        raise MobileVLMError(f"-o {shown(path)}: there is no folder {shown(path.parent)}: make it")
    if path.is_dir():
        raise MobileVLMError(f"-o {shown(path)}: a folder: give the name of a file")


def write_output(path: Path, records: Iterable[dict[str, Any]], *, logprobs: bool) -> None:
    """Write all records, whole or not at all."""
    with written_whole(path) as draft:
        if path.suffix.lower() == ".parquet":
            _write_parquet(draft, iter(records), logprobs)
        else:
            with draft.open("wb") as file:
                file.writelines(map(json_line, records))


def _write_parquet(path: Path, records: Iterator[dict[str, Any]], logprobs: bool) -> None:
    import pyarrow

    schema = _schema(pyarrow, logprobs)
    with parquet_module().ParquetWriter(path, schema) as writer:
        while rows := list(islice(records, ROW_GROUP)):
            for row in rows:
                row["id"] = None if row["id"] is None else str(row["id"])
            writer.write_table(pyarrow.Table.from_pylist(_encodable(rows), schema))


def _schema(arrow: Any, logprobs: bool) -> Any:
    times = ("preprocess", "vision", "prefill", "ttft", "decode", "tokens_per_second")
    fields = [
        ("index", arrow.int64()),
        ("id", arrow.string()),
        ("answer", arrow.string()),
        ("finish_reason", arrow.string()),
        ("prompt_tokens", arrow.int32()),
        ("visual_tokens", arrow.int32()),
        ("new_tokens", arrow.int32()),
        ("timings", arrow.struct([(name, arrow.float64()) for name in times])),
    ]
    if logprobs:
        token = [
            ("token_id", arrow.int32()),
            ("token", arrow.string()),
            ("bytes", arrow.list_(arrow.uint8())),
            ("logprob", arrow.float64()),
        ]
        top = ("top", arrow.list_(arrow.struct(token)))
        fields.append(("logprobs", arrow.list_(arrow.struct([*token, top]))))
    fields += [("warnings", arrow.list_(arrow.string())), ("error", arrow.string())]
    return arrow.schema(fields)


def _encodable(value: Any) -> Any:
    """Return data whose texts are UTF-8: U+FFFD for half a surrogate pair."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {name: _encodable(item) for name, item in value.items()}
    return value
