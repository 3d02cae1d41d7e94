"""Pickles by strangers: arrays of every writer are read, everything else is refused unrun."""

import pickle
import struct

import numpy as np
import pytest

from fastdeq.data.pickles import read_pickle
from tests.data.cifar_svhn_files import array, listed, pickled, string

VALUES = np.arange(12, dtype=np.uint8).reshape(3, 4)


def test_arrays_of_every_protocol_come_back():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for values in [VALUES, VALUES.T, VALUES.astype(">i4"), VALUES > 5]:
            content = pickle.dumps({b"data": values, "labels": [1, 2]}, protocol)
            found = read_pickle(content)
            assert found["labels"] == [1, 2], protocol
            assert found[b"data"].dtype == pickle.loads(content)[b"data"].dtype, protocol
            assert np.array_equal(found[b"data"], values), protocol


def test_an_array_of_python_2_comes_back_without_numpys_warning():
    found = read_pickle(pickled({b"data": array(VALUES), b"names": listed([string(b"a")])}))
    assert np.array_equal(found[b"data"], VALUES)
    assert found[b"names"] == [b"a"]


def test_an_array_of_numpy_1_comes_back():
    content = pickle.dumps(VALUES, 2).replace(b"numpy._core.", b"numpy.core.")
    assert np.array_equal(read_pickle(content), VALUES)


def test_a_pickle_that_asks_for_more_is_refused_in_one_line(tmp_path, monkeypatch):
    for content, message in [
        (b"cos\nsystem\n(S'touch hit'\ntR.", "it asks for os.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "it asks for builtins.eval"),
        (b"c__builtin__\ngetattr\n.", "it asks for __builtin__.getattr"),
        (b"cnumpy\nload\n(S'f'\ntR.", "it asks for numpy.load"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "it asks for posix.system"),
        (b"Pfile\n.", "it asks for something outside of it"),
        (b"cnumpy\ndtype\n(S'O8'\ntR.", "it holds an array of 'O8'"),
        (b"cnumpy\ndtype\n(S'u1,O'\ntR.", "it holds an array of 'u1,O'"),
        (b"cnumpy\ndtype\n(K\x01tR.", "it holds an array of 1"),
    ]:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="not part of such a file: not read") as caught:
            read_pickle(content)
        assert str(caught.value).startswith(message), content
        assert "\n" not in str(caught.value), content
        assert not list(tmp_path.iterdir()), content


def test_a_pickle_cannot_set_attributes_on_what_it_finds():
    for name in [b"numpy\ndtype", b"numpy.core.numeric\n_frombuffer"]:
        with pytest.raises(ValueError, match="not a readable pickle"):
            read_pickle(b"c" + name + b"\n(N}S'__call__'\nNstb.")


def test_codecs_that_are_not_text_are_refused():
    for codec in ("zlib", "rot13"):
        with pytest.raises(ValueError, match="is not a text encoding"):
            read_pickle(f"c_codecs\nencode\n(Vx\nV{codec}\ntR.".encode())


def test_a_damaged_pickle_is_reported_in_one_line():
    for content in [
        b"",
        b"<!DOCTYPE html>",
        pickle.dumps(VALUES)[:-5],
        pickled({b"data": array(VALUES)})[:-40],
        b"\x80\xff.",
        array(VALUES).replace(struct.pack("<i", 12), struct.pack("<i", 11)) + b".",
    ]:
        with pytest.raises(ValueError, match=r"^not a readable pickle \(.+\): get it again$"):
            read_pickle(content)
