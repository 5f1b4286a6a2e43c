"""Token files: packed bits against Python integers, round trips, and damaged files."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from revq.data.tokens import bits_per_index, load_tokens, save_tokens
from revq.errors import InputError

BITS = {1: 1, 2: 1, 3: 2, 256: 8, 1000: 10, 16384: 14, 65536: 16, 262144: 18}


@pytest.mark.parametrize(("num_codes", "bits"), BITS.items())
@pytest.mark.parametrize("shape", [(3, 7), (2, 512), (1, 1), (0, 5)])
def test_round_trip_and_bits(tmp_path, num_codes, bits, shape):
    assert bits_per_index(num_codes) == bits
    rng = np.random.default_rng(num_codes + shape[1])
    indices = rng.integers(0, num_codes, shape)
    if indices.size:
        indices.flat[0], indices.flat[-1] = 0, num_codes - 1
    path = tmp_path / "tokens.safetensors"
    save_tokens(path, torch.from_numpy(indices), num_codes, names=[f"n{row}" for row in range(shape[0])], model="m")

    file = load_tokens(path)
    assert file.indices.dtype == torch.int64
    np.testing.assert_array_equal(file.indices.numpy(), indices)
    assert (file.num_codes, file.names, file.model) == (num_codes, tuple(f"n{row}" for row in range(shape[0])), "m")

    packed = load_file(path)["tokens"].numpy()
    assert packed.shape == (shape[0], -(-shape[1] * bits // 8))
    for row, sample in zip(packed, indices, strict=True):  # a row is one little-endian number in base 2**bits
        value = sum(int(index) << (bits * place) for place, index in enumerate(sample))
        assert int.from_bytes(row.tobytes(), "little") == value


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        save_tokens(tmp_path / "t", torch.tensor([[0, 4]]), 4)
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        save_tokens(tmp_path / "t", torch.tensor([[-1]]), 4)
    with pytest.raises(ValueError, match="integers"):
        save_tokens(tmp_path / "t", torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match="names"):
        save_tokens(tmp_path / "t", torch.zeros(2, 2, dtype=torch.int64), 4, names=["one"])
    assert list(tmp_path.iterdir()) == []


def test_damaged_files(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(InputError, match="no such token file"):
        load_tokens(path)
    save_tokens(path, torch.arange(12).reshape(3, 4), 12)
    whole = path.read_bytes()
    for damaged in (b"", b"not tokens at all", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"t\.safetensors: damaged"):
            load_tokens(path)
    save_file({"tokens": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="not a token file"):
        load_tokens(path)


def _write(path, packed, **changes):
    """A token file of the first format."""
    about = {"format": "revq-tokens-1", "num_tokens": 4, "num_codes": 12, "names": ["a"], "model": ""} | changes
    save_file({"tokens": packed}, path, metadata={"revq": json.dumps(about)})


def test_inconsistent_files(tmp_path):
    path = tmp_path / "t.safetensors"
    good = torch.tensor([[0x10, 0x32]], dtype=torch.uint8)
    _write(path, good)
    assert load_tokens(path).indices.tolist() == [[0, 1, 2, 3]]
    for packed, changes, message in [
        (good, {"num_tokens": 5}, "expected tokens"),
        (good, {"num_tokens": 1.5}, "not a token file"),
        (good, {"names": ["a", "b"]}, "expected tokens"),
        (good, {"num_codes": 0}, "not a token file"),
        (good, {"num_codes": 10**30}, "not a token file"),
        (good, {"names": None}, "not a token file"),
        (good, {"format": "other"}, "not a token file"),
        (good, {"format": "revq-tokens-3"}, "a newer revq wrote it"),
        (good.to(torch.int32), {}, "expected tokens"),
        (torch.tensor([[0x10, 0xF2]], dtype=torch.uint8), {}, "indices below 12 at position 3, got 15"),
    ]:
        _write(path, packed, **changes)
        with pytest.raises(InputError, match=message):
            load_tokens(path).indices.sum()


@pytest.mark.parametrize("codes", [[1, 2, 3, 16384, 5], [262144] * 3, [2**32, 1]])
def test_widths_per_position(tmp_path, codes):
    rng = np.random.default_rng(0)
    indices = np.stack([rng.integers(0, count, 9) for count in codes], axis=1)
    path = tmp_path / "tokens.safetensors"
    save_tokens(path, torch.from_numpy(indices), codes, labels=range(9))
    file = load_tokens(path)
    assert file.codes_per_position == tuple(codes) and file.labels.tolist() == list(range(9))
    np.testing.assert_array_equal(file.indices.numpy(), indices)
    widths = [max(1, (count - 1).bit_length()) for count in codes]
    packed = load_file(path)["tokens"].numpy()
    assert packed.shape == (9, -(-sum(widths) // 8)) and file.bits_per_sample == sum(widths)
    for row, sample in zip(packed, indices, strict=True):
        value, shift = 0, 0
        for index, width in zip(sample.tolist(), widths, strict=True):
            value, shift = value | index << shift, shift + width
        assert int.from_bytes(row.tobytes(), "little") == value
    with pytest.raises(ValueError, match="expected values in"):
        save_tokens(path, torch.tensor([list(codes)]), codes)
    np.testing.assert_array_equal(load_tokens(path).indices.numpy(), indices)


def test_a_dataset(tmp_path):
    indices = torch.randint(0, 1000, (50, 7), generator=torch.Generator().manual_seed(0))
    save_tokens(tmp_path / "t", indices, 1000, names=["x\udc80", "日本", *map(str, range(48))])
    file = load_tokens(tmp_path / "t")
    assert len(file) == 50 and torch.equal(file[-1], indices[-1]) and file[0].dtype == torch.int64
    assert file.names[:2] == ["x\udc80", "日本"] and len(pickle.dumps(file)) < 500
    with pytest.raises(IndexError):
        file[50]
    batches = DataLoader(file, batch_size=8, sampler=list(range(49, -1, -1)), num_workers=2)
    assert torch.equal(torch.cat([batch.clone() for batch in batches]), indices.flip(0))


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "t"
    indices = torch.randint(0, 100, (5, 7), generator=torch.Generator().manual_seed(0))
    save_tokens(path, indices, 100, names=[*"abcde"], model="m")
    whole, found = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(InputError):
            load_tokens(path).verify()
        found += 1
    assert found == -(-len(whole) // 7)
