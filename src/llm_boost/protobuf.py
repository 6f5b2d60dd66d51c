"""Protocol buffers' wire format (https://protobuf.dev/programming-guides/encoding/): fields in, fields out.

Nothing is copied or allocated beyond what is there: every length is checked against the bytes that are left
before it is used, and a field's bytes are a view of the message's. Errors are ValueErrors that say at which
byte; whoever reads a file puts its name before them.
"""

from __future__ import annotations

from collections.abc import Iterator

Value = int | memoryview

VARINT, EIGHT_BYTES, LENGTH_DELIMITED, FOUR_BYTES = 0, 1, 2, 5


def read_fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of one message: number, and a varint or bytes (those of fixed size too)."""
    position = 0
    while position < len(data):
        start = position
        key, position = _read_varint(data, position)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"field number 0 at byte {start}")
        if wire_type == VARINT:
            integer, position = _read_varint(data, position)
            yield number, integer
            continue
        if wire_type == LENGTH_DELIMITED:
            size, position = _read_varint(data, position)
        elif wire_type in (EIGHT_BYTES, FOUR_BYTES):
            size = 8 if wire_type == EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {start}")
        if size > len(data) - position:
            raise ValueError(
                f"field {number} at byte {start} says {size} bytes, {len(data) - position} are left"
            )
        yield number, data[position : position + size]
        position += size


def as_bytes(value: Value) -> memoryview:
    """A string, bytes or an embedded message."""
    if isinstance(value, int):
        raise ValueError(f"a number ({value}) where bytes belong")
    return value


def as_text(value: Value) -> str:
    """A string; UnicodeDecodeError is a ValueError."""
    return bytes(as_bytes(value)).decode("utf-8")


def as_integer(value: Value) -> int:
    """An int64 or bool: negative numbers come as 64-bit two's complement."""
    if not isinstance(value, int):
        raise ValueError(f"{len(value)} bytes where a number belongs")
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def as_int32(value: Value) -> int:
    """An int32, which is the lower half of what stands there."""
    value = as_integer(value) & (1 << 32) - 1
    return value - (1 << 32) if value >= 1 << 31 else value


def as_integers(value: Value) -> list[int]:
    """One element of a repeated integer, or all of them where they are packed."""
    if isinstance(value, int):
        return [as_integer(value)]
    position, integers = 0, []
    while position < len(value):
        integer, position = _read_varint(value, position)
        integers.append(as_integer(integer))
    return integers


def integer_field(number: int, value: int) -> bytes:
    """A field of an int32, int64, uint32 or bool."""
    return _varint(number << 3 | VARINT) + _varint(value & (1 << 64) - 1)


def bytes_field(number: int, data: bytes) -> bytes:
    """A field of bytes, a string or an embedded message."""
    return bytes_prefix(number, len(data)) + data


def bytes_prefix(number: int, size: int) -> bytes:
    """What stands before the `size` bytes of such a field."""
    return _varint(number << 3 | LENGTH_DELIMITED) + _varint(size)


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    result = 0
    for index in range(10):
        if position >= len(data):
            raise ValueError("it ends in the middle of a number")
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return result, position
    raise ValueError(f"a number of more than ten bytes before byte {position}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
