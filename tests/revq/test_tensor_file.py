"""Tensor files: what safetensors reads, by rows, with every changed byte found."""

import json
import os
import pickle
import random
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from revq.data import tensor_file
from revq.data.tensor_file import BLOCK_BYTES, TensorFile, TensorFileWriter, load_tensors, write_tensors
from revq.data.text_list import TextBuffer, TextList
from revq.errors import InputError

TENSORS = {
    "several blocks": torch.arange(3 * BLOCK_BYTES // 4 + 5, dtype=torch.int32).reshape(-1, 1),
    "one number": torch.tensor(3.5),
    "nothing": torch.zeros(0, 4),
    "transposed": torch.randn(5, 3).t(),
    "half": torch.randn(7).half(),
    "brain": torch.randn(2, 3, 4).bfloat16(),
    "flags": torch.tensor([True, False]),
    "double": torch.randn(3).double(),
    'ä"\\': torch.arange(3),
}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "t.safetensors", TENSORS, {"key": 'a "quoted" ä \\ text'})
    return tmp_path / "t.safetensors"


def test_other_programs_read_it(path):
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def test_whole_tensors_and_rows(path):
    tensors, metadata = load_tensors(path)
    assert metadata == {"key": 'a "quoted" ä \\ text'}
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    file = pickle.loads(pickle.dumps(TensorFile(path)))
    long = TENSORS["several blocks"]
    for start, stop in ((0, 0), (0, 1), (100, 2 * BLOCK_BYTES // 4 + 3), (len(long) - 1, len(long))):
        assert torch.equal(file.rows("several blocks", start, stop), long[start:stop])
    rows = np.array([0, 1, 2, 7, 7, BLOCK_BYTES // 4 - 1, BLOCK_BYTES // 4, len(long) - 1])
    assert torch.equal(file.gather("several blocks", rows), long[torch.from_numpy(rows)])
    with pytest.raises(InputError, match="expected a tensor 'missing'"):
        file.tensor("missing")


def test_streams_of_rows(tmp_path):
    values = torch.randn(1000, 3, 700)
    writer = TensorFileWriter(tmp_path / "t", max_bytes=values.numel() * 4)
    writer.begin("values", torch.float32, [3, 700])
    for piece in values.split([1, 0, 699, 300]):
        writer.append(piece)
    with pytest.raises(ValueError, match=r"rows: expected F32"):
        writer.append(values.double())
    writer.close({})
    assert torch.equal(load_tensors(tmp_path / "t")[0]["values"], values)
    assert torch.equal(load_file(tmp_path / "t")["values"], values)


def test_every_changed_byte_is_found(path, tmp_path):
    whole, rng = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 29), *(rng.randrange(header, len(whole)) for _ in range(20)), len(whole) - 1]
    changed = tmp_path / "changed"
    for place in places:
        changed.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(InputError, match="damaged"):
            load_tensors(changed)
    for damaged in (b"", whole[:7], whole[:header], whole[:-1], whole + b"\0", whole[:8] + b"[" * 5000 + whole[5008:]):
        changed.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            load_tensors(changed)


def test_a_block_is_verified_once(path, monkeypatch):
    calls = []
    monkeypatch.setattr(tensor_file.zlib, "crc32", lambda data, *start: calls.append(len(data)) or real(data, *start))
    file = TensorFile(path)
    calls.clear()
    for _ in range(3):
        file.rows("several blocks", 5, 9)
    assert calls == [BLOCK_BYTES]
    file.tensor("several blocks")
    assert len(calls) == 4


real = tensor_file.zlib.crc32


def test_a_file_that_changes_while_it_is_open(path):
    file, name = TensorFile(path), "several blocks"
    before = file.rows(name, 0, 2)
    os.utime(path)  # touched: the same bytes are read and verified again
    assert torch.equal(file.rows(name, 0, 2), before)
    data = bytearray(path.read_bytes())
    data[-len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="block"):
        file.tensor(name)
    write_tensors(path, {name: torch.zeros(3)})
    with pytest.raises(InputError, match="replaced"):
        file.rows(name, 0, 1)
    path.unlink()
    with pytest.raises(InputError, match="found nothing"):
        file.rows(name, 0, 1)


def test_files_of_others(tmp_path):
    save_file({"a": torch.arange(5)}, tmp_path / "a")
    assert load_tensors(tmp_path / "a", checksums=False)[0]["a"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match="no checksums"):
        load_tensors(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    entry = {"a": {"dtype": "I64", "shape": [5], "data_offsets": [0, 40]}}
    for header in (
        {"a": entry["a"] | {"shape": [-5]}},
        {"a": entry["a"] | {"shape": [5.0]}},
        {"a": entry["a"] | {"shape": [10**18]}},
        {"a": entry["a"] | {"dtype": "X9"}},
        {"a": entry["a"] | {"data_offsets": [8, 48]}},
        {"a": entry["a"] | {"data_offsets": [0, 10**15]}},
        {"a": {}},
        {"a": []},
        {"__metadata__": {"x": 1}, **entry},
        {"__metadata__": {"revq_checksums": "{}"}, **entry},
        {"__metadata__": {"revq_checksums": "[" * 10_000}, **entry},
        {**entry, "b": entry["a"]},
    ):
        text = json.dumps(header).encode()
        (tmp_path / "b").write_bytes(len(text).to_bytes(8, "little") + text + data[-40:])
        with pytest.raises(InputError, match="b: damaged"):
            load_tensors(tmp_path / "b", checksums=False)


def test_threads_and_many_files(tmp_path):
    """More files than a process keeps open, read by several threads at a time."""
    for number in range(40):
        write_tensors(tmp_path / f"{number}", {"a": torch.full((100,), number)})
    files = [TensorFile(tmp_path / f"{number}") for number in range(40)]
    wrong = []

    def read(seed):
        rng = random.Random(seed)
        for _ in range(200):
            number = rng.randrange(40)
            if set(files[number].rows("a", 3, 50).tolist()) != {number}:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(tensor_file._open_files) <= 8


def test_texts(tmp_path):
    texts = ["", "a", "ä\n", "日本\0", "x\udcff", "y" * 5000, *map(str, range(9000))]
    writer = TensorFileWriter(tmp_path / "t", max_bytes=1 << 20)
    TextBuffer(texts).write(writer, "names")
    TextBuffer().write(writer, "none")
    writer.close({})
    names = TextList(TensorFile(tmp_path / "t"), "names")
    assert list(names) == texts and names == texts and names[-1] == "8999" and names[3:6] == texts[3:6]
    assert names[::-1] == texts[::-1] and len(names) == len(texts) and names != texts[1:]
    assert list(TextList(TensorFile(tmp_path / "t"), "none")) == []
    with pytest.raises(IndexError):
        names[len(texts)]
    with pytest.raises(InputError, match="name: expected a text"):
        TextBuffer(["\ud800"])
