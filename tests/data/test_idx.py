"""The IDX reader: what it reads, and that nothing wrong is taken for an array."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from fastdeq.data import read_idx
from fastdeq.data.archive import is_gzip
from tests.data.idx_files import idx, zipped

VALUES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4) * 10
CONTENT = idx(VALUES)
HEADER = 16  # bytes: magic and three sizes


def refusal(path: Path) -> str:
    """What the reader says of a file: always one line that begins with its path."""
    with pytest.raises(ValueError, match=r"^\S") as caught:
        read_idx(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_values_shape_and_checksum_are_those_of_the_content(tmp_path):
    for compressed in [False, True]:
        for shape in [(300,), (2, 3, 4), (1,), (1, 2, 1, 300)]:
            values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            path = tmp_path / "file"
            path.write_bytes(zipped(idx(values)) if compressed else idx(values))
            read = read_idx(path)
            assert read.values.dtype == np.uint8, (shape, compressed)
            assert np.array_equal(read.values, values), (shape, compressed)
            assert read.sha256 == hashlib.sha256(idx(values)).hexdigest(), (shape, compressed)


def test_the_format_is_that_of_the_publication():
    # The first 16 bytes of train-images-idx3-ubyte as its page gives them: 60,000 of 28 × 28
    page = bytes.fromhex("00000803 0000ea60 0000001c 0000001c")
    assert idx(np.zeros((60_000, 28, 28), dtype=np.uint8))[:HEADER] == page


def test_the_name_does_not_say_whether_a_file_is_compressed(tmp_path):
    plain, compressed = tmp_path / "plain.gz", tmp_path / "compressed"
    plain.write_bytes(CONTENT)
    compressed.write_bytes(zipped(CONTENT))
    assert not is_gzip(plain)
    assert is_gzip(compressed)
    for path in (plain, compressed):
        assert np.array_equal(read_idx(path).values, VALUES)


def test_the_values_may_be_written_to(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    assert read_idx(path).values.flags.writeable  # torch.from_numpy warns otherwise


# What is wrong


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    for kept in range(len(CONTENT)):
        path = tmp_path / "file"
        path.write_bytes(CONTENT[:kept])
        text = refusal(path)
        assert ("not an IDX file" if kept < 4 else "truncated") in text, kept
        if kept >= HEADER:
            assert f"2 × 3 × 4 = 24 bytes of data, found {kept - HEADER}" in text, kept


def test_a_compressed_file_truncated_anywhere_is_refused(tmp_path):
    path, content = tmp_path / "file", zipped(CONTENT)
    for kept in range(len(content)):
        path.write_bytes(content[:kept])
        assert ("not an IDX file" if kept < 2 else "damaged gzip file") in refusal(path), kept


def test_a_flipped_bit_in_a_compressed_file_never_changes_what_is_read(tmp_path):
    path, content = tmp_path / "file", zipped(CONTENT)
    refused = 0
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read = read_idx(path)
        except ValueError as error:
            refused += str(error).startswith(f"{path}: ")
        else:
            assert np.array_equal(read.values, VALUES), bit
    # Of the 10 bytes of header some say nothing of the content, as time and operating system do.
    assert refused >= 8 * (len(content) - 10)


def test_bytes_left_over_are_refused(tmp_path):
    for extra in [b"\0", b"and more", CONTENT]:
        path = tmp_path / "file"
        for content in (CONTENT + extra, zipped(CONTENT + extra), zipped(CONTENT) + zipped(extra)):
            path.write_bytes(content)
            assert "bytes are left over after the 2 × 3 × 4 = 24" in refusal(path), extra


def test_what_follows_a_compressed_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(zipped(CONTENT) + b"no gzip")
    assert "damaged gzip file" in refusal(path)


def test_what_is_not_an_idx_file_of_uint8_is_refused(tmp_path):
    for content, message in [
        (b"", "not an IDX file: it begins with nothing"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file: it begins with 89 50 4e 47"),
        (b"<!DOCTYPE html>", "not an IDX file: it begins with 3c 21 44 4f"),
        (zipped(b"<!DOCTYPE html>"), "not an IDX file"),
        (idx(VALUES, type_code=0x0D), r"IDX type 0x0d is not supported, only uint8 (0x08)"),
        (b"\0\0\x08\0" + bytes(8), "not an IDX file: it says that it has 0 axes"),
        (b"\0\0\x08\xff" + bytes(2000), "not an IDX file: it says that it has 255 axes"),
        (idx(np.zeros((3, 0, 4), dtype=np.uint8)), "its header says 3 × 0 × 4 values"),
    ]:
        path = tmp_path / "file"
        path.write_bytes(content)
        assert message in refusal(path), content


def test_no_memory_is_allocated_for_more_than_the_file_holds(tmp_path):
    path = tmp_path / "file"
    # 2⁹⁶ bytes: an attempt to allocate them would end in a MemoryError or an OverflowError.
    path.write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", *[2**32 - 1] * 3) + b"few")
    assert "truncated" in refusal(path)
    assert "found 3" in refusal(path)


def test_what_cannot_be_opened_is_named_with_the_reason(tmp_path):
    assert refusal(tmp_path / "nothing") == "cannot be read (No such file or directory)"
    assert refusal(tmp_path) == "cannot be read (Is a directory)"
