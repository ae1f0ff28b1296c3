"""One program on many devices: the mesh, and where each parameter, batch and activation lies on it.

XLA's partitioner (GSPMD) turns the single-device program into one per device; it needs the layouts of the program's
inputs and, where it would have to guess, of a few activations. The mesh has three axes:

    data     replicas of the model, each with its part of the batch
    fsdp     parts of the batch too; parameters and optimizer state are spread over them and gathered for use
             (ZeRO-3: Rajbhandari et al. 2020)
    tensor   attention heads, feed-forward columns and vocabulary (Shoeybi et al. 2019); between the blocks, positions
             (Korthikanti et al. 2022)
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.checks import short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.errors import ConfigError
from jaxgpt.parallel.mesh import AXES, BATCH, MeshConfig

# Layouts of parameters, by the end of their path; the optimizer's copies of them have the same ends. The first rule
# that fits applies. Weights are [out, in]; a stacked layer axis comes first.
RULES: tuple[tuple[str, P], ...] = (
    # By width: the vocabulary is rarely divisible. In this order, gathering over fsdp leaves contiguous stretches.
    (r"(tok_emb|out_head|pos_emb)/weight", P(None, ("tensor", "fsdp"))),
    (r"att/qkv/weight", P(None, "tensor", "fsdp")),
    (r"ff/fc_in/weight", P("tensor", "fsdp")),
    (r"(att/out_proj|ff/fc_out)/weight", P("fsdp", "tensor")),
    (r"att/qkv/(bias|weight_scale)", P(None, "tensor")),
    (r"ff/fc_in/(bias|weight_scale)", P("tensor")),
    (r"(bias|weight_scale|scale|shift)", P()),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, over as many of the first `devices` as it needs (default: JAX's devices).

    Raises:
        ConfigError: if there are too few devices, or, with an axis of -1, if the others do not divide them; or if
            some process would have no device in it.
    """
    if not isinstance(config, MeshConfig):
        raise TypeError(f"make_mesh takes a MeshConfig, such as MeshConfig(fsdp=2), not {short_repr(config)}")
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.resolve(len(devices))
    needed = math.prod(sizes)
    if needed > len(devices):
        raise ConfigError(f"a mesh of {config} needs {needed} devices, and there are {len(devices)}")
    chosen = devices[:needed]
    missing = {device.process_index for device in devices} - {device.process_index for device in chosen}
    if missing:
        raise ConfigError(
            f"a mesh of {config} has {needed} of the {len(devices)} devices, and none of process {min(missing)}'s: "
            "use all of them (-1 for one axis), or start fewer processes"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=chosen)


def check(mesh: Mesh, config: GPTConfig, batch_size: int | None = None) -> None:
    """Raises ConfigError unless the mesh divides the model's heads and widths, and the batch if there is one."""
    tensor, fsdp, rows = mesh.shape["tensor"], mesh.shape["fsdp"], mesh.shape["data"] * mesh.shape["fsdp"]
    for axes, size, names, value in (
        ("tensor", tensor, "n_heads", config.n_heads),
        ("tensor", tensor, "ffn_dim", config.ffn_dim),
        ("fsdp", fsdp, "emb_dim", config.emb_dim),
        ("fsdp x tensor", fsdp * tensor, "emb_dim", config.emb_dim),
        ("data x fsdp", rows, "the batch of a step or micro-batch", batch_size),
    ):
        if value is not None and value % size:
            raise ConfigError(f"the mesh's {axes}={size} does not divide {names}={value}")


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The `NamedSharding` of every leaf of a tree of parameters, or of a training state around them.

    Leaves without a rule (such as counters) are on every device.

    Raises:
        ConfigError: if the mesh does not divide one of them.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _spec(name, tuple(leaf.shape), mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    for pattern, spec in RULES:
        if not fits(pattern, name):
            continue
        # Axes before those of the rule are stacked layers.
        aligned = (*(None,) * (len(shape) - len(spec)), *spec)
        for size, axes in zip(shape, aligned, strict=True):
            if size % _size(mesh, axes):
                raise ConfigError(f"the mesh's {axes}, {_size(mesh, axes)} parts, do not divide {name} {shape}")
        return P(*aligned)
    return P()


def stored_layout(name: str) -> P | None:
    """The layout of the matrix with this path, without stacked layers; None for one that has no rule."""
    return next((spec for pattern, spec in RULES if fits(pattern, name)), None)


def fits(pattern: str, name: str) -> bool:
    """Whether a rule's pattern fits the parameter with this path."""
    return re.search(rf"(^|/){pattern}$", name) is not None


def _size(mesh: Any, axes: str | Sequence[str] | None) -> int:
    """Number of parts that one or several axes make."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def abstract(tree: Any, layout: Any) -> Any:
    """The shapes and types of a tree's leaves, with the shardings of another tree like it."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, layout)


def default_device() -> Any:
    """The device on which new arrays are made."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.local_devices(backend=chosen)[0] if chosen is None or isinstance(chosen, str) else chosen


def on_host() -> Any:
    """A context manager that makes new arrays in the host's memory, if the CPU is among JAX's devices: for parameters
    that would not fit on one device before they are spread over several."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return contextlib.nullcontext()


def shard(params: Any, mesh: Mesh) -> Any:
    """Lays parameters (arrays of any kind) out over a mesh. `generate`, `evaluate` and `model.apply` find the mesh in
    the parameters and run on all of it.

    Raises:
        ConfigError: if the mesh does not divide one of them.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"shard takes parameters and a mesh, shard(params, make_mesh(MeshConfig(fsdp=2))), not {short_repr(mesh)}"
        )
    return jax.tree.map(_put, params, shardings(mesh, params))


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    # A callback, because each process holds the whole array and puts only its own devices' parts.
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that `shard` put parameters on; None if they are on one device or none."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def to_device(arrays: Any, params: Any) -> Any:
    """A tree of host arrays, ready to be passed along with `params`. On one device they are put there explicitly, so
    that `jax.transfer_guard` lets them pass; on a mesh they stay as they are, and every device gets full copies."""
    return arrays if mesh_of(params) is not None else jax.device_put(arrays)


def is_distributed(x: Array) -> bool:
    """Whether x lies on more than one device. Its type says so, traced or not, so no mesh context needs to be
    entered."""
    return jax.typeof(x).sharding.mesh.size > 1


def platform(x: Array) -> str:
    """The platform that a program containing x runs on: that of its mesh (for which a host without such devices can
    compile), or else JAX's default."""
    device = jax.typeof(x).sharding.mesh.abstract_device
    return getattr(device, "platform", None) or jax.default_backend()


# The mesh axis of an array's axis, by its letter in the array's name: `lay(h_BxTxF, "BTF")` lays out `h_BxTxF`. Two
# letters of the same mesh axis never occur in one array.
LETTERS: dict[str, str | tuple[str, ...] | None] = {
    "B": BATCH,  # rows of a batch
    "H": "tensor",  # heads
    "F": "tensor",  # columns of the feed-forward layer
    "V": "tensor",  # the vocabulary
    "P": "tensor",  # positions of the residual stream between the blocks (Korthikanti et al. 2022, section 4.2.2)
    "W": "tensor",  # the width of an embedding table, where its rows are looked up
    **dict.fromkeys("TSDKCR"),  # everything else is whole: positions, slots, widths, chunks, a table's rows
}


def lay(x: Array, letters: str) -> Array:
    """x with its axes laid out over its mesh by their letters; x itself if it is on one device.

    An axis with fewer elements than parts stays whole, and so do positions that the parts do not divide.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.size == 1 or not set(AXES) <= set(mesh.axis_names):  # a mesh of the caller's own is the caller's to lay out
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, layout(x.shape, letters, mesh)))


def gathered(weight: Array, stored: P | None) -> Array:
    """A weight as products take it: whole along "fsdp". `stored` is its layout; without one nothing changes."""
    used = None if stored is None else P(*(None if axes == "fsdp" else axes for axes in stored))
    return _constrain(weight, used)


def scattered(gradient: Array, stored: P | None) -> Array:
    """The gradient of a weight, summed over all rows of the batch, in the layout in which the weight is stored. In two
    steps, which XLA makes one reduce-scatter: left to itself, it may pass partial sums round a ring."""
    return _constrain(gathered(gradient, stored), stored)


def _constrain(x: Array, spec: P | None) -> Array:
    mesh = jax.typeof(x).sharding.mesh
    if spec is None or mesh.size == 1 or not set(AXES) <= set(mesh.axis_names):
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def layout(shape: tuple[int, ...], letters: str, mesh: Any) -> P:
    """The layout that `lay` gives an array of this shape."""

    def place(size: int, letter: str) -> str | tuple[str, ...] | None:
        parts = _size(mesh, LETTERS[letter])
        # Unequal parts of positions would be exchanged at every norm.
        return None if size < parts or (letter == "P" and size % parts) else LETTERS[letter]

    return P(*(place(*axis) for axis in zip(shape, letters, strict=True)))


def divides(x: Array, letters: str) -> bool:
    """Whether `per_device` can cut x: all its parts would be equal, or it is on one device."""
    if not is_distributed(x):
        return True
    mesh = jax.typeof(x).sharding.mesh
    if not set(AXES) <= set(mesh.axis_names):
        return False
    spec = layout(x.shape, letters, mesh)
    return not any(size % _size(mesh, part) for size, part in zip(x.shape, spec, strict=True))


def per_device(function: Callable[..., Array], letters: Sequence[str], *arrays: Array) -> Array:
    """`function(*arrays)`, for a function that XLA cannot divide, such as a kernel: each device runs it on its own part
    of the arrays, cut by their `letters` as `lay` would. The result is laid out as the first array."""
    if not is_distributed(arrays[0]):
        return function(*arrays)
    mesh = jax.typeof(arrays[0]).sharding.mesh
    parts = tuple(layout(x.shape, axes, mesh) for x, axes in zip(arrays, letters, strict=False))
    return jax.shard_map(function, mesh=mesh, in_specs=parts, out_specs=parts[0], check_vma=False)(*arrays)


def replicate(x: Array) -> Array:
    """x with a full copy on every device of its mesh."""
    if not is_distributed(x):
        return x
    return lax.with_sharding_constraint(x, NamedSharding(jax.typeof(x).sharding.mesh, P(*(None,) * x.ndim)))
