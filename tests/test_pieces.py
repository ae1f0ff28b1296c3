"""How arrays are cut to be stored, and cut to be read (jaxgpt/parallel/pieces.py); tests/test_distributed.py counts the
bytes that processes read."""

import contextlib
import math
import shutil

import jax
import numpy as np
import pytest
from helpers import exhaustive
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.errors import CheckpointError
from jaxgpt.parallel import MeshConfig, make_mesh, pieces
from jaxgpt.training.checkpoints import Checkpoints

ROWS = MeshConfig(fsdp=8), P("fsdp")
COLUMNS = MeshConfig(fsdp=8), P(None, "fsdp")
BOTH = MeshConfig(fsdp=2, tensor=4), P("fsdp", "tensor")
REPLICAS = MeshConfig(data=8), P()
HALVES = MeshConfig(data=4, tensor=2), P("tensor")
LAYOUTS = {"rows": ROWS, "columns": COLUMNS, "both": BOTH, "replicas": REPLICAS, "halves": HALVES}


def layout(mesh, spec):
    return NamedSharding(make_mesh(mesh), spec)


def like(shape, where, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout(*where))


@pytest.mark.parametrize(
    ("shape", "own", "piece", "part"),
    [
        ((1024, 2048), ROWS, (128, 2048), (128, 2048)),
        ((1024, 2048), COLUMNS, (128, 2048), (128, 2048)),
        ((1024, 2048), ROWS, (1024, 256), (1024, 256)),
        ((1024, 2048), REPLICAS, (128, 2048), (128, 2048)),
        ((1024, 2048), HALVES, (128, 2048), (128, 2048)),
        ((1024, 2048), ROWS, (512, 512), (512, 512)),  # of a mesh of (2, 4), which has no axis of the array's own mesh
        ((1024, 2048), COLUMNS, (32, 64), (1024, 256)),  # small pieces: read as it will lie
        ((1024, 2048), HALVES, (1024, 2048), (512, 2048)),  # one piece: nothing is better
        ((6, 1024, 512), COLUMNS, (6, 128, 512), (6, 128, 512)),
        ((24, 1000, 100), COLUMNS, (24, 500, 50), (24, 500, 25)),  # two devices read the same
        ((256, 1024), COLUMNS, (32, 1024), (256, 128)),  # a mebibyte: each process reads all
    ],
)
def test_an_array_is_cut_to_read_least(shape, own, piece, part):
    leaf = like(shape, own)
    cut = pieces.to_read(leaf, piece)
    assert (cut.shape, cut.dtype) == (leaf.shape, leaf.dtype)
    assert cut.sharding.shard_shape(shape) == part
    if part == leaf.sharding.shard_shape(shape):
        assert cut.sharding is leaf.sharding
    assert list(cut.sharding.mesh.devices.flat) == list(leaf.sharding.mesh.devices.flat)


def test_no_layout_would_read_less():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape = tuple(int(2 ** rng.integers(3, 11)) for _ in range(3))
        piece = tuple(int(size // 2 ** rng.integers(0, 3)) for size in shape)
        own = list(LAYOUTS.values())[rng.integers(5)]
        leaf = like(shape, own)
        if not pieces.is_shared(leaf):
            continue
        part = pieces.to_read(leaf, piece).sharding.shard_shape(shape)
        # All sizes are powers of two, so of a part and a piece one divides the other.
        reads = math.prod(map(max, part, piece))
        for i, j in ((i, j) for i in (1, 2, 4, 8) for j in (1, 2, 4, 8) if i * j <= 8):
            other = (shape[0] // i, shape[1] // j, shape[2] // (8 // (i * j)))
            assert reads <= math.prod(map(max, other, piece)), (shape, piece, own)


def test_on_one_device_arrays_are_left_as_they_are():
    leaf = jax.ShapeDtypeStruct((1024, 2048), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert pieces.to_read(leaf, (128, 2048)) is leaf
    one = like((1024, 2048), (MeshConfig(), P()))
    assert pieces.to_read(one, (128, 2048)) is one


def saved(directory, values, where):
    """The shape of the pieces that it is stored in."""
    ocp = pytest.importorskip("orbax.checkpoint")
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(1, {"x": jax.device_put(values, where)})
    metadata = ocp.StandardCheckpointHandler().metadata(directory / "1" / "state")
    return metadata.tree["x"].storage.chunk_shape


def restored(directory, values, where):
    with contextlib.closing(Checkpoints(directory, read_only=True)) as checkpoints:
        found = checkpoints.restore(1, {"x": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=where)})["x"]
    assert found.sharding == where
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("first", ["rows", *map(exhaustive, ("columns", "both", "replicas", "halves"))])
def test_an_array_is_restored_bit_for_bit_on_every_mesh(tmp_path, first):
    values = np.random.default_rng(0).random((512, 1024), np.float32)
    saved(tmp_path, values, layout(*LAYOUTS[first]))
    for where in LAYOUTS.values():
        restored(tmp_path, values, layout(*where))
    restored(tmp_path, values, jax.sharding.SingleDeviceSharding(jax.devices()[3]))


def test_large_parts_are_stored_in_pieces_and_whole_arrays_whole(tmp_path):
    values = np.ones((2053, 2048), np.float32)  # 16 MiB; a prime number of rows, as a vocabulary may have
    halves = NamedSharding(make_mesh(MeshConfig(fsdp=2)), P(None, "fsdp"))
    piece = saved(tmp_path / "halves", values, halves)
    assert pieces.PIECE // 4 < math.prod(piece) * 4 <= pieces.PIECE
    assert piece[0] == 2053
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert saved(tmp_path / "one", values, one) == values.shape
    restored(tmp_path / "one", values, halves)


def test_checkpoints_that_were_not_cut_into_pieces_are_restored(tmp_path, monkeypatch):
    values = np.random.default_rng(0).random((2048, 2048), np.float32)
    halves = NamedSharding(make_mesh(MeshConfig(fsdp=2)), P("fsdp"))
    monkeypatch.setattr(pieces, "piece_bytes", lambda leaf: None)
    assert saved(tmp_path, values, halves) == (1024, 2048)
    restored(tmp_path, values, NamedSharding(halves.mesh, P(None, "fsdp")))


def test_what_was_exchanged_is_freed():
    leaf = like((64, 64), ROWS)
    array = jax.device_put(np.ones((64, 64), np.float32), layout(*COLUMNS))
    assert pieces.laid_out(array, leaf).sharding == leaf.sharding
    assert array.is_deleted()
    array = jax.device_put(np.ones((64, 64), np.float32), leaf.sharding)
    assert pieces.laid_out(array, leaf) is array


@pytest.mark.filterwarnings("ignore")  # from orbax's threads, about files that they cannot read
@pytest.mark.parametrize("damage", ["the pieces", "their description", "a piece that another has replaced"])
def test_damage_to_what_is_exchanged_is_found(tmp_path, damage):
    values = np.random.default_rng(0).random((512, 1024), np.float32)
    saved(tmp_path, values, layout(*ROWS))
    state = tmp_path / "1" / "state"
    if damage == "the pieces":
        (data,) = (path for path in state.glob("ocdbt.process_0/d/*") if path.stat().st_size > values.nbytes / 2)
        raw = np.fromfile(data, np.uint8)
        raw[::1000] ^= 0x55
        raw.tofile(data)
    elif damage == "their description":
        (state / "_METADATA").write_text("{}")
    else:
        saved(
            tmp_path / "other", np.roll(values, 64, axis=0), layout(*ROWS)
        )  # each device's part at the next one's place
        shutil.rmtree(state)
        shutil.move(tmp_path / "other" / "1" / "state", state)
    with pytest.raises(CheckpointError, match=r"damaged: x" if "replaced" in damage else "cannot be restored"):
        restored(tmp_path, values, layout(*COLUMNS))
