"""Tensors and tables to bytes and back; whatever bytes come in, only our errors go out."""

import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from selectune.errors import CorruptFileError, DataError
from selectune.files.manifest import parse_json

# pyarrow comes without types, so this module, the one that calls it, hands out Any under names.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
Table: TypeAlias = Any  # pyarrow.Table
Schema: TypeAlias = Any  # pyarrow.Schema

# numpy, pyarrow and torch are imported late: a command line that only reads a recipe needs none.
if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array: TypeAlias = np.ndarray
    Torch: TypeAlias = Tensor
    AnyTensor: TypeAlias = np.ndarray | Tensor
else:
    Array = Torch = AnyTensor = Any

_HEADER_LIMIT_BYTES = 100_000_000  # safetensors' own limit
_TABLE_SLACK_BYTES = 64 << 20
_TABLE_RATIO = 50
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
    "C64": "<c8",
}


def tensors_to_bytes(tensors: Mapping[str, AnyTensor], name: str) -> bytes:
    """Return arrays or torch tensors as one safetensors file; views and devices do not matter.

    Raises:
        DataError: an array has a type that the format does not know, such as objects.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors import numpy as for_numpy

    torch = sys.modules.get("torch")  # A caller who holds a tensor has imported it.
    try:
        if torch is not None and any(isinstance(t, torch.Tensor) for t in tensors.values()):
            from safetensors import torch as for_torch

            # A clone each: the format refuses tensors that share memory, as tied weights do.
            dense = torch.contiguous_format
            own = {k: torch.as_tensor(t).detach().cpu() for k, t in tensors.items()}
            return for_torch.save({k: t.clone(memory_format=dense) for k, t in own.items()})
        arrays = {k: np.array(t, order="C") for k, t in tensors.items()}
        return for_numpy.save(arrays)
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{name} cannot be written as safetensors", why=str(error)) from error


def tensors_from_bytes(data: bytes, path: Path) -> dict[str, Array]:
    """Return the arrays of a safetensors file; bfloat16 comes widened to float32, exactly.

    Raises:
        CorruptFileError: the bytes are not a sound safetensors file.
    """
    import numpy as np

    arrays: dict[str, Array] = {}
    for name, dtype, shape, raw in _deserialize(data, path):
        if dtype == "BF16":
            wide = np.frombuffer(raw, "<u2").astype("<u4") << 16
            arrays[name] = wide.view("<f4").reshape(shape)
        elif dtype in _DTYPES:
            arrays[name] = np.frombuffer(raw, _DTYPES[dtype]).reshape(shape)
        else:
            raise _unsound(path, f'tensor "{name:.80}" has the type {dtype}')
    return arrays


def torch_from_bytes(data: bytes, path: Path) -> dict[str, Torch]:
    """Return the tensors of a safetensors file on the CPU, each with the type it was saved in.

    Raises:
        CorruptFileError: the bytes are not a sound safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    _check_header(data, path)
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _unsound(path, str(error)) from error


def _check_header(data: bytes, path: Path) -> None:
    if len(data) < 8:
        raise _unsound(path, f"it has {len(data)} bytes, the header alone takes 8")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(len(data) - 8, _HEADER_LIMIT_BYTES):
        raise _unsound(path, f"it claims a header of {length} bytes in a file of {len(data)}")
    parse_json(data[8 : 8 + length], path)  # safetensors lets a key stand twice


def _deserialize(data: bytes, path: Path) -> list[tuple[str, str, list[int], bytearray]]:
    from safetensors import SafetensorError, deserialize

    _check_header(data, path)
    try:
        found = cast("list[tuple[str, dict[str, Any]]]", deserialize(data))
    except (SafetensorError, ValueError) as error:
        raise _unsound(path, str(error)) from error
    found.sort(key=lambda item: item[0])  # it comes in the order of a hash table
    return [(name, v["dtype"], v["shape"], v["data"]) for name, v in found]


def table_to_bytes(table: Table) -> bytes:
    """Return a table as one parquet file.

    No dictionaries: what a file of ours holds then follows from its size, and a reader can refuse
    one that would inflate. Compression makes up for the bytes.
    """
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd", use_dictionary=False)
    return sink.getvalue().to_pybytes()


def table_from_bytes(data: bytes, path: Path, schema: Schema | None) -> Table:
    """Return the table of a parquet file of ours.

    Args:
        data: the file.
        path: its name, for messages.
        schema: columns and types that it must have, further ones are let through; None for any.

    Raises:
        CorruptFileError: the bytes are no sound parquet, would inflate, or hold other columns.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pa.BufferReader(data))
        _refuse_bomb(file.metadata, len(data), path)
        table = file.read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise _unsound(path, str(error) or type(error).__name__) from error
    for column in schema or ():
        found = table.schema.field(column.name).type if column.name in table.column_names else None
        if found != column.type:
            raise _unsound(
                path, f'column "{column.name}": expected {column.type}, found {found or "none"}'
            )
    return table


def _refuse_bomb(facts: Any, n_bytes: int, path: Path) -> None:  # noqa: ANN401
    held = 8 * facts.num_rows * facts.num_columns
    for group in range(facts.num_row_groups):
        for column in range(facts.num_columns):
            chunk = facts.row_group(group).column(column)
            if any("DICTIONARY" in encoding for encoding in chunk.encodings):
                name = chunk.path_in_schema
                raise _unsound(path, f'column "{name}" has a dictionary; ours have none')
            held += chunk.total_uncompressed_size
    if held > _TABLE_SLACK_BYTES + _TABLE_RATIO * n_bytes:
        raise _unsound(path, f"its {n_bytes} bytes would inflate to {held}")


def _unsound(path: Path, why: str) -> CorruptFileError:
    return CorruptFileError(
        f"{path.name} is damaged",
        where=str(path),
        why=why[:500],
        do="remove its folder and run the command again, or restore it from a copy",
    )
