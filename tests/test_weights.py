"""Files of tensors and settings: whole, or one error that names file, tensor and remedy."""

import errno
import os

import pytest
import torch
from torch import nn

from uniemo.files import disk
from uniemo.files.disk import ANEW, FileError, check_regular, read_json, write_file
from uniemo.files.weights import (
    WeightsError,
    check_state,
    read_tensors,
    strip_wrappers,
    write_tensors,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, dict(w=torch.ones(2, 3), b=torch.zeros(2)))
    return path


EXPECTED = dict(w=(2, 3), b=(2,))


def test_whole(path):
    assert sorted(read_tensors(path, EXPECTED)) == ["b", "w"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "tensors,said",
    [
        (dict(w=torch.ones(2, 3)), "incomplete: it lacks b"),
        (dict(w=torch.ones(3, 2), b=torch.zeros(2)), r"w has the shape \(3, 2\).*\(2, 3\)"),
        (dict(w=torch.full((2, 3), torch.nan), b=torch.zeros(2)), "w holds values.*not finite"),
        (dict(w=torch.ones(2, 3), b=torch.tensor([0, torch.inf])), "b holds values.*not finite"),
        (dict(w=torch.ones(2, 3), b=torch.zeros(2), x=torch.ones(1)), "no place for x"),
    ],
)
def test_what_is_not_whole_is_refused(path, tensors, said):
    write_tensors(path, tensors)
    with pytest.raises(WeightsError, match=f"{path.name}.*{said}.*{ANEW}"):
        read_tensors(path, EXPECTED, remedy=ANEW)


@pytest.mark.parametrize(
    "data,said",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + b"\0" * 50, "a torch file or another zip"),
        (b"\x80\x04\x95" + b"\0" * 50, "a pickle or an old torch file"),
        (b"\0" * 500, "filled with zeros"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 50, "an image"),
    ],
)
def test_other_files_are_called_by_their_name(path, data, said):
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=f"{path.name}.*{said}"):
        read_tensors(path)


def test_a_cut_file(path):
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(WeightsError, match="no whole weights"):
        read_tensors(path)


def test_pipes_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        for read in (read_json, read_tensors, check_regular):
            with pytest.raises(FileError, match="pipe|folder"):
                read(tmp_path / name)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_text("before")

    def write(part):
        part.write_text("half")
        raise error

    with pytest.raises(OSError, match=r"the disk is full: .*a\.bin.*needs 3\.0 MiB.*free") as said:
        write_file(path, write, need=3 * 2**20)
    assert said.value.errno == errno.ENOSPC
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_tensors_say_what_they_need(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "flush", full)
    with pytest.raises(OSError, match="needs 4.0 MiB"):
        write_tensors(tmp_path / "a.safetensors", dict(w=torch.zeros(2**20)))
    assert not list(tmp_path.iterdir())


def test_settings(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": "é"}', encoding="utf-8-sig")
    assert read_json(path) == {"a": "é"}
    for text, said in (("{", "no whole JSON"), ("[" * 10**5, "no whole JSON"), ("<html>", "page")):
        path.write_text(text)
        with pytest.raises(FileError, match=f"a.json.*{said}"):
            read_json(path)
    path.write_text("[1, 2, 3]")
    with pytest.raises(FileError, match="no file of this kind"):
        read_json(path, limit=5)


def test_a_module_and_its_state():
    layer = nn.Linear(2, 3)
    check_state(layer, layer.state_dict(), "a")
    with pytest.raises(WeightsError, match="a is incomplete: it lacks bias"):
        check_state(layer, dict(weight=layer.weight), "a")


def test_wrappers():
    wrapped = {"module._orig_mod.a": 1, "_orig_mod.b": 2}
    assert strip_wrappers(wrapped) == {"a": 1, "b": 2}
    assert strip_wrappers({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
