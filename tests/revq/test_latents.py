"""The latent store: reads what was written, in any order, dtype and rank; finds damage; keeps what is finished."""

import json
import pickle
import resource
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from revq.data.json_text import manifest_text
from revq.data.latent_writer import LatentWriter, Source, save_latents
from revq.data.latents import LatentStore, StorePlan
from revq.errors import InputError

SHAPE = (4, 2, 2)
ROW_BYTES = 4 * 4 * 2 * 2


def plan(**changes):
    fields = {"vae": "tiny", "vae_fingerprint": "f00d", "latent_shape": SHAPE, "image_size": 64, "seed": 3}
    return StorePlan(**(fields | changes))


def latents_of(rows=23, seed=0, shape=SHAPE):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def write(folder, values, the_plan, shard_rows=5, **options):
    """A store of 23 images named 0.png, 1.png, ..."""
    row_bytes = values[0].numel() * (4 if the_plan.dtype == "float32" else 2) * len(the_plan.tensors)
    with LatentWriter(folder, the_plan, shard_bytes=shard_rows * row_bytes, **options) as writer:
        for row, value in enumerate(values):
            writer.add(Source(f"{row}.png"))
            extra = dict.fromkeys(the_plan.tensors[1:], -value[None])
            writer.append(value[None], **extra)
        return writer.finish()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [SHAPE, (3, 2, 4, 4), (64, 7), (5,)], ids=["image", "video", "sound", "vector"])
def test_rows_in_any_order(tmp_path, dtype, shape):
    values = latents_of(shape=shape)
    store = write(tmp_path / "s", values, plan(dtype=dtype, latent_shape=shape))
    expected = values.to(getattr(torch, dtype)).float()
    assert (len(store), store.shape) == (23, shape)
    assert len(list((tmp_path / "s").glob("latents-*"))) == 5
    for wanted in (range(23), [22, 0, 7, 7, 5, 4, 22], [], torch.randperm(23), np.array([9])):
        got = store.rows(wanted)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected[torch.as_tensor(list(wanted), dtype=torch.int64)])
    assert torch.equal(torch.cat(list(store.batches(4))), expected)
    assert torch.equal(store[-1], expected[22])
    for wrong in ([23], [-1], [0, 99]):
        with pytest.raises(IndexError, match="rows in"):
            store.rows(wrong)
    with pytest.raises(IndexError):
        store[23]


def test_other_programs_read_the_shards(tmp_path):
    values = latents_of(3)
    write(tmp_path / "s", values, plan(dtype="bfloat16"))
    (shard,) = (tmp_path / "s").glob("latents-*")
    assert torch.equal(load_file(shard)["latents"], values.bfloat16())


def test_more_tensors_than_latents(tmp_path):
    values = latents_of()
    store = write(tmp_path / "s", values, plan(mirrored=True, log_variances=True))
    for name in ("mirrored", "log_variances"):
        assert torch.equal(store.rows([22, 3], name), -values[[22, 3]])
    only = write(tmp_path / "only", values, plan())
    with pytest.raises(InputError, match="tensor: expected one of latents"):
        only.rows([0], "mirrored")
    with LatentWriter(tmp_path / "x", plan(mirrored=True)) as writer:
        with pytest.raises(InputError, match="mirrored: expected a tensor"):
            writer.append(values)
        with pytest.raises(InputError, match="log_variances: expected None"):
            writer.append(values, mirrored=values, log_variances=values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["only", "s"]


def test_names_labels_and_options(tmp_path):
    names = ["a/ä.png", "日本/b.jpg", "c\udc80.png", "d" * 254]
    store = save_latents(tmp_path / "s", latents_of(4), names=names, labels=[3, 1, -2, 3], options={"mine": [1, "x"]})
    assert list(store.names) == names and store.names[-1] == names[3] and store.names[1:3] == names[1:3]
    assert store.labels.tolist() == [3, 1, -2, 3] and store.plan.options == {"mine": [1, "x"]}
    assert LatentStore(tmp_path / "s").plan == store.plan
    assert save_latents(tmp_path / "other", latents_of(4)).labels is None
    for wrong, message in ({"names": ["a"]}, "names"), ({"labels": [1]}, "labels"), ({"names": ["\ud800"] * 4}, "name"):
        with pytest.raises(InputError, match=message):
            save_latents(tmp_path / "wrong", latents_of(4), **wrong)
    assert not (tmp_path / "wrong").exists() and not (tmp_path / "wrong.partial").exists()


def test_plan_and_fingerprint(tmp_path):
    store = write(tmp_path / "s", latents_of(), plan())
    assert LatentStore(tmp_path / "s").plan == store.plan == plan()
    same = write(tmp_path / "same", latents_of(), plan())
    other = write(tmp_path / "other", latents_of(seed=1), plan())
    assert store.fingerprint == same.fingerprint != other.fingerprint
    assert plan(crops=3).rows_per_source == 3
    for field, value in (
        ("dtype", "float64"),
        ("crops", -1),
        ("crops", True),
        ("latent_shape", (0, 1, 1)),
        ("latent_shape", (4.0, 2, 2)),
        ("latent_shape", ()),
        ("options", {"x": float("nan")}),
        ("options", {"x": object()}),
    ):
        with pytest.raises(InputError, match=field):
            plan(**{field: value})


def test_save_latents_in_memory(tmp_path):
    values = latents_of(6)
    store = save_latents(tmp_path / "s", values, vae="v", vae_fingerprint="x", image_size=32)
    assert torch.equal(store.rows(range(6)), values)
    assert (store.plan.vae, store.plan.vae_fingerprint, store.plan.image_size) == ("v", "x", 32)
    with pytest.raises(InputError, match="exists already"):
        save_latents(tmp_path / "s", values, vae="v", vae_fingerprint="x", image_size=32)
    with pytest.raises(InputError, match="vae was 'v' and is 'unknown'"):
        save_latents(tmp_path / "s", values)
    again = save_latents(tmp_path / "s", -values, overwrite=True)
    assert torch.equal(again.rows(range(6)), -values)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_dataset_of_two_workers(tmp_path):
    """Pickled by its path; a few descriptors for many shards."""
    values = latents_of(300)
    store = write(tmp_path / "s", values, plan(), shard_rows=1)
    assert len(pickle.dumps(store)) < 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        assert torch.equal(LatentStore(tmp_path / "s").rows(torch.arange(300).flip(0)), values.flip(0))
        loader = DataLoader(store, batch_size=7, num_workers=2)
        assert torch.equal(torch.cat([batch.clone() for batch in loader]), values)  # a batch holds a descriptor
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    pickled = pickle.dumps(store)
    save_latents(tmp_path / "s", values[:5], overwrite=True)
    with pytest.raises(InputError, match="the store has changed"):
        pickle.loads(pickled)
    with pytest.raises(InputError, match="missing"):
        store.rows([299])


def test_finished_shards_are_kept(tmp_path):
    values, folder = latents_of(), tmp_path / "s"
    with LatentWriter(folder, plan(), shard_bytes=5 * ROW_BYTES) as first:
        for row in range(12):
            first.add(Source(f"{row}.png"))
            first.append(values[row : row + 1])
    partial = tmp_path / "s.partial"
    finished = {path: path.stat().st_ino for path in partial.glob("latents-*")}
    assert len(finished) == 2 and not folder.exists()
    (partial / ".revq-0-0.tmp").write_bytes(b"cut short by a kill")
    with pytest.raises(InputError, match="unfinished"):
        LatentStore(folder)

    with LatentWriter(folder, plan(), shard_bytes=5 * ROW_BYTES) as second:
        assert sorted((shard.first, shard.length) for shard in second.known) == [("0.png", 5), ("5.png", 5)]
        for shard in sorted(second.known, key=lambda shard: shard.first):
            second.keep(shard)
        for row in range(10, 23):
            second.add(Source(f"{row}.png"))
            second.append(values[row : row + 1])
        store = second.finish()
    assert torch.equal(store.rows(range(23)), values)
    assert {folder / path.name: inode for path, inode in finished.items()}.items() <= {
        path: path.stat().st_ino for path in folder.iterdir()
    }.items()
    fresh = write(tmp_path / "fresh", values, plan())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in fresh.folder.iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "s"]


def test_another_plan_is_refused_by_name(tmp_path):
    with LatentWriter(tmp_path / "s", plan(), shard_bytes=ROW_BYTES) as first:
        for row in range(2):
            first.add(Source(f"{row}"))
            first.append(latents_of()[row : row + 1])
    with pytest.raises(InputError, match="seed was 3 and is 4"):
        LatentWriter(tmp_path / "s", plan(seed=4))
    assert len(list((tmp_path / "s.partial").glob("latents-*"))) == 1, "nothing is lost"
    with LatentWriter(tmp_path / "s", plan(seed=4), overwrite=True) as second:
        assert second.known == []
    assert list(tmp_path.iterdir()) == []


def test_two_writers(tmp_path):
    with LatentWriter(tmp_path / "s", plan()), pytest.raises(InputError, match="another process"):
        LatentWriter(tmp_path / "s", plan())
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_are_kept(tmp_path):
    for name in ("s", "s.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(InputError, match="expected a new or empty folder"):
                LatentWriter(tmp_path / "s", plan(), overwrite=overwrite)
        assert (tmp_path / name / "precious").read_text() == "mine"
        shutil.rmtree(tmp_path / name)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        LatentWriter(tmp_path / "file", plan())


def test_other_files_in_a_store_stay(tmp_path):
    folder = save_latents(tmp_path / "s", latents_of()).folder
    (folder / "README.md").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "plots" / "a.txt").write_text("mine")
    (folder / "index.json").write_text((folder / "index.json").read_text().replace("row", "low").replace("unk", "ink"))
    with pytest.raises(InputError, match="its index is damaged"):
        save_latents(folder, -latents_of())
    store = save_latents(folder, -latents_of(), overwrite=True)
    assert torch.equal(store.rows(range(23)), -latents_of())
    assert (folder / "README.md").read_text() == (folder / "plots" / "a.txt").read_text() == "mine"
    assert sum(path.suffix == ".safetensors" for path in folder.iterdir()) == 2


def test_values_that_do_not_fit(tmp_path):
    with LatentWriter(tmp_path / "s", plan(dtype="float16")) as writer:
        for value in (70000.0, float("nan"), float("inf")):
            values = latents_of()
            values[3, 0, 0, 0] = value
            with pytest.raises(InputError, match="finite numbers within float16"):
                writer.append(values)
        for wrong in (latents_of().long(), latents_of(shape=(4, 4)), latents_of(shape=(2, 2, 4))):
            with pytest.raises(InputError, match="latents: expected floats"):
                writer.append(wrong)
        with pytest.raises(InputError, match="at least one image"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found(tmp_path):
    """Missing and shortened files when a store is opened, a changed bit when its block is read first."""
    store = write(tmp_path / "s", latents_of(), plan())
    shards = sorted((tmp_path / "s").glob("latents-*"))
    for shard in shards[:2]:
        whole = shard.read_bytes()
        for damaged in (b"", whole[:40], whole[:-4], whole + b"tail"):
            shard.write_bytes(damaged)
            with pytest.raises(InputError, match=f"{shard.name}.*damaged"):
                LatentStore(tmp_path / "s")
        for place in (0, 12, 90, len(whole) // 2, len(whole) - 1):
            shard.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            for reader in (LatentStore(tmp_path / "s").rows, store.rows):  # opened before the damage, and after
                with pytest.raises(InputError, match=f"{shard.name}.*(damaged|replaced)"):
                    reader(range(23))
            with pytest.raises(InputError, match=shard.name):
                LatentStore(tmp_path / "s").verify()
        shard.write_bytes(shards[2].read_bytes())  # a whole shard, but another one
        with pytest.raises(InputError, match=r"damaged"):
            LatentStore(tmp_path / "s").rows(range(23))
        shard.write_bytes(whole)
    LatentStore(tmp_path / "s").verify()
    shards[1].unlink()
    with pytest.raises(InputError, match=f"{shards[1].name}.*missing"):
        LatentStore(tmp_path / "s")


def test_a_damaged_index_is_found(tmp_path):
    write(tmp_path / "s", latents_of(), plan())
    index = tmp_path / "s" / "index.json"
    text = index.read_text()
    values = {name: value for name, value in json.loads(text).items() if name != "checksum"}
    for changed in (
        "{",
        "[]",
        text.replace('"seed": 3', '"seed": 4'),
        text.replace('"seed": 3', '"seed": 1e999'),
        text.replace('"checksum"', '"checksun"'),
        "[" * 100_000,
        manifest_text(values | {"format": "else"}),
        manifest_text({name: value for name, value in values.items() if name != "plan"}),
        manifest_text(values | {"plan": values["plan"] | {"latent_shape": [4, 4, 1]}}),
        manifest_text(values | {"plan": values["plan"] | {"dtype": "int8"}}),
        manifest_text(values | {"shards": 3}),
        manifest_text(values | {"shards": [values["shards"][0] | {"id": "../../x"}]}),
    ):
        index.write_text(changed)
        with pytest.raises(InputError, match=r"index\.json|latents-"):
            LatentStore(tmp_path / "s").rows([0])
    index.write_text(manifest_text(values | {"format": "revq-latents-3"}))
    with pytest.raises(InputError, match="revq-latents-3: a newer revq wrote it"):
        LatentStore(tmp_path / "s")
    index.unlink()
    with pytest.raises(InputError, match=r"no index\.json"):
        LatentStore(tmp_path / "s")
    with pytest.raises(InputError, match=r"no index\.json"):
        LatentStore(tmp_path / "nowhere")
