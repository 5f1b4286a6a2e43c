"""The latent store: reads what was written, in any order and dtype; detects damage; resumes writing."""

import json

import numpy as np
import pytest
import torch

from revq.data.latents import LatentStore, LatentWriter, StorePlan, save_latents, shard_name
from revq.errors import InputError

SHAPE = (4, 2, 2)
ROW_BYTES = 4 * 4 * 2 * 2


def plan(rows=23, **changes):
    fields = {"vae": "tiny", "vae_fingerprint": "f00d", "latent_shape": SHAPE, "image_size": 64, "crops": 0, "seed": 3}
    return StorePlan(**(fields | {"sources": tuple(f"{row}.png" for row in range(rows))} | changes))


def latents_of(rows=23, seed=0):
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def write(folder, values, the_plan, shard_bytes=5 * ROW_BYTES):
    writer = LatentWriter(folder, the_plan, shard_bytes=shard_bytes)
    for number, rows in writer.missing():
        writer.write(number, values[rows.start : rows.stop])
    return writer.finish()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_in_any_order(tmp_path, dtype):
    values = latents_of()
    store = write(tmp_path / "s", values, plan(dtype=dtype), shard_bytes=5 * ROW_BYTES)
    expected = values.to(getattr(torch, dtype)).float()
    assert (len(store), store.shape) == (23, SHAPE)
    assert len(list((tmp_path / "s").glob("latents-*"))) == (5 if dtype == "float32" else 3)
    for wanted in (range(23), [22, 0, 7, 7, 5, 4, 22], [], torch.randperm(23), np.array([9])):
        got = store.rows(wanted)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected[torch.as_tensor(list(wanted), dtype=torch.int64)])
    assert torch.equal(torch.cat(list(store.batches(4))), expected)
    for wrong in ([23], [-1], [0, 99]):
        with pytest.raises(IndexError, match="rows in"):
            store.rows(wrong)


def test_plan_and_fingerprint(tmp_path):
    store = write(tmp_path / "s", latents_of(), plan())
    assert LatentStore(tmp_path / "s").plan == store.plan == plan()
    same = write(tmp_path / "same", latents_of(), plan())
    other = write(tmp_path / "other", latents_of(seed=1), plan())
    assert store.fingerprint == same.fingerprint != other.fingerprint
    assert plan(crops=3).rows == 69
    for field, value in (("dtype", "float64"), ("crops", -1), ("latent_shape", (0, 1, 1)), ("sources", ())):
        with pytest.raises(InputError, match=field):
            plan(**{field: value})


def test_save_latents_in_memory(tmp_path):
    values = latents_of(6)
    store = save_latents(tmp_path / "s", values, vae="v", vae_fingerprint="x", image_size=32)
    assert torch.equal(store.rows(range(6)), values)
    assert (store.plan.vae, store.plan.vae_fingerprint, store.plan.image_size) == ("v", "x", 32)


def test_unfinished_writing_is_kept_and_resumed(tmp_path):
    values, folder = latents_of(), tmp_path / "s"
    first = LatentWriter(folder, plan(), shard_bytes=5 * ROW_BYTES)
    for number in (0, 2):
        first.write(number, values[number * 5 : number * 5 + 5])
    (tmp_path / "s.partial" / (shard_name(1) + ".tmp")).write_bytes(b"cut short by a kill")
    assert not folder.exists()
    with pytest.raises(RuntimeError, match="not written"):
        first.finish()
    with pytest.raises(InputError, match="unfinished"):
        LatentStore(folder)
    first.abandon()  # finished shards stay

    second = LatentWriter(folder, plan(), shard_bytes=5 * ROW_BYTES)
    assert [number for number, _ in second.missing()] == [1, 3, 4]
    for number, rows in list(second.missing()):
        second.write(number, values[rows.start : rows.stop])
    store = second.finish()
    assert torch.equal(store.rows(range(23)), values)
    assert store.fingerprint == write(tmp_path / "fresh", values, plan()).fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "s"]


def test_another_plan_starts_again(tmp_path):
    first = LatentWriter(tmp_path / "s", plan(), shard_bytes=5 * ROW_BYTES)
    first.write(0, latents_of()[:5])
    second = LatentWriter(tmp_path / "s", plan(seed=4), shard_bytes=5 * ROW_BYTES)
    assert [number for number, _ in second.missing()] == [0, 1, 2, 3, 4]
    second.abandon()  # nothing was finished
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_are_kept(tmp_path):
    for name in ("s", "s.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
        with pytest.raises(InputError, match="expected"):
            LatentWriter(tmp_path / "s", plan())
        assert (tmp_path / name / "precious").read_text() == "mine"
        (tmp_path / name / "precious").unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        LatentWriter(tmp_path / "file", plan())


def test_values_that_do_not_fit(tmp_path):
    writer = LatentWriter(tmp_path / "s", plan(dtype="float16"), shard_bytes=1 << 20)
    for value in (70000.0, float("nan"), float("inf")):
        values = latents_of()
        values[3, 0, 0, 0] = value
        with pytest.raises(InputError, match="finite numbers within float16"):
            writer.write(0, values)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found(tmp_path):
    write(tmp_path / "s", latents_of(), plan())
    shard, index = tmp_path / "s" / shard_name(1), tmp_path / "s" / "index.json"
    whole, text = shard.read_bytes(), index.read_text()
    for damaged in (b"", b"\xff" * 64, whole[:40], whole[:-4], whole + b"tail", whole.replace(b"F32", b"I32")):
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match="latents-00001"):
            LatentStore(tmp_path / "s")
    shard.unlink()
    with pytest.raises(InputError, match=r"latents-00001.*missing"):
        LatentStore(tmp_path / "s")
    shard.write_bytes(whole)
    changed = json.loads(text)
    for damaged in (
        "{",
        "[]",
        json.dumps(changed | {"format": "else"}),
        json.dumps({key: value for key, value in changed.items() if key != "crops"}),
        json.dumps(changed | {"crops": 2}),
        json.dumps(changed | {"latent_shape": [4, 4, 1]}),
        json.dumps(changed | {"dtype": "int8"}),
        json.dumps(changed | {"shards": 3}),
    ):
        index.write_text(damaged)
        with pytest.raises(InputError, match=r"index\.json|latents-00000"):
            LatentStore(tmp_path / "s")
    index.unlink()
    with pytest.raises(InputError, match=r"no index\.json"):
        LatentStore(tmp_path / "s")
    with pytest.raises(InputError, match=r"no index\.json"):
        LatentStore(tmp_path / "nowhere")
