"""What TPU chips and NVIDIA GPUs can do, as their vendors document it, and how they are connected: slices of a TPU pod,
and nodes of GPUs. Needs no JAX."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from jaxgpt import accounting
from jaxgpt.checks import did_you_mean
from jaxgpt.errors import ConfigError

GIB = accounting.GIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, as documented by Google.

    Attributes:
        flops: peak of matrix products in bfloat16, in operations per second.
        hbm_bytes: size of the main memory.
        hbm_bandwidth: bandwidth of the main memory, in bytes per second.
        link_bandwidth: one-way bandwidth of one link to a neighbour, in bytes per second. A torus axis has two links.
        ring: a slice's axis closes to a ring if its size is a multiple of this.
        most: number of chips in the largest slice.
        slices: slices smaller than `ring` along some axis; all others have axes that are multiples of `ring`.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    ring: int
    most: int
    slices: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GPU:
    """An NVIDIA GPU of a node in which a switch connects all of them.

    Attributes:
        flops: peak of matrix products in bfloat16, in operations per second, without sparsity.
        hbm_bytes: size of the main memory, in the decimal gigabytes of the data sheet; what is there is a little more.
        hbm_bandwidth: bandwidth of the main memory, in bytes per second.
        link_bandwidth: what it sends to others of its node through NVLink, one way, in bytes per second: half of the
            figure that NVIDIA gives.
        network_bandwidth: one-way bandwidth of its network card, in bytes per second.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# Memory and slices: https://cloud.google.com/tpu/docs/v4 (and v5e, v5p, v6e). Links: the table in "How to
# Scale Your Model", part 2, https://jax-ml.github.io/scaling-book/tpus, which agrees with the two-way totals of
# Google's pages for v5e (400 GB/s), v5p (1,200) and v6e (800).
PEAK = accounting.PEAK_FLOPS
CHIPS = {
    "v4": Chip(PEAK["TPU v4"], 32 * GIB, 1.2e12, 4.5e10, 4, 4096, _DEEP),
    "v5e": Chip(PEAK["TPU v5 lite"], 16 * GIB, 0.819e12, 5e10, 16, 256, _FLAT),
    "v5p": Chip(PEAK["TPU v5"], 95 * GIB, 2.765e12, 1e11, 4, 6144, _DEEP),
    "v6e": Chip(PEAK["TPU v6 lite"], 32 * GIB, 1.64e12, 1e11, 16, 256, _FLAT),
}

# NVIDIA's data sheets, of the modules with NVLink (SXM) and of the DGX that holds eight of them:
# - A100 80 GB: 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s; DGX A100: one ConnectX-6 of 200 Gb/s per GPU.
# - H100 SXM: 1,979 TFLOPS with sparsity, half of that without; 80 GB, 3.35 TB/s, NVLink 900 GB/s; DGX H100: one
#   ConnectX-7 of 400 Gb/s per GPU. H200 SXM: the same with 141 GB and 4.8 TB/s.
# - DGX B200: 36 PFLOPS with sparsity (HGX B200), 1,440 GB, 64 TB/s and NVLink 14.4 TB/s for all eight, one ConnectX-7
#   of 400 Gb/s per GPU.
GPUS = {
    "a100": GPU(PEAK["NVIDIA A100-SXM4-80GB"], 80 * 10**9, 2.039e12, 3e11, 2.5e10),
    "h100": GPU(PEAK["NVIDIA H100 80GB HBM3"], 80 * 10**9, 3.35e12, 4.5e11, 5e10),
    "h200": GPU(PEAK["NVIDIA H200"], 141 * 10**9, 4.8e12, 4.5e11, 5e10),
    "b200": GPU(PEAK["NVIDIA B200"], 180 * 10**9, 8e12, 9e11, 5e10),
}
NODE_SIZES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod: "v5e:4x8" is 32 chips of v5e; or `Nodes`."""

    name: str
    chip: Chip | GPU
    axes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.axes)

    @property
    def platform(self) -> str:
        """What JAX calls such devices: "tpu" or "gpu"."""
        return "gpu" if isinstance(self.chip, GPU) else "tpu"

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Reads "v5e:4x8", or for `Nodes` "h100:8" and "h100:4x8".

        Raises:
            ConfigError: for a chip or a slice that does not exist; lists those that do.
        """
        kind, _, shape = name.partition(":")
        if kind in GPUS:
            return Nodes.of(name, kind, shape)
        if kind not in CHIPS:
            known = [*CHIPS, *GPUS]
            raise ConfigError(
                f"no chip {kind!r}{did_you_mean(kind, known)} (known: {', '.join(known)}, as in v5e:4x8 or h100:8)"
            )
        chip, axes = CHIPS[kind], tuple(int(n) for n in shape.split("x") if n.isdecimal())
        rings = chip.slices is _DEEP and re.fullmatch(r"\d+x\d+x\d+", shape) and not any(n % chip.ring for n in axes)
        if shape not in chip.slices and not (rings and 0 < math.prod(axes) <= chip.most):
            more = f", or AxBxC of multiples of {chip.ring}, up to {chip.most:,} chips" if chip.slices is _DEEP else ""
            raise ConfigError(f"{kind} has no slice {shape!r} (known: {', '.join(chip.slices)}{more})")
        return cls(name, chip, axes)

    def bandwidth(self, spanned: Sequence[int]) -> float:
        """Bytes per second that a chip can send within a group that spans `spanned[i]` chips along axis i. An axis
        contributes two links if it closes to a ring and is spanned whole, and one link otherwise."""
        assert isinstance(self.chip, Chip)
        ring = self.chip.ring
        links = sum(
            2 if n == axis and n % ring == 0 else 1 for n, axis in zip(spanned, self.axes, strict=True) if n > 1
        )
        return max(1, links) * self.chip.link_bandwidth

    def mesh_bandwidth(self, mesh: tuple[int, int, int]) -> dict[str, float]:
        """Bytes per second that a chip can send along each axis of a mesh of (data, fsdp, tensor), assuming that
        tensor occupies one axis of the torus, and the others share the rest."""
        d, f, t = mesh
        axes = sorted(self.axes)
        rest = axes[1:] if t > 1 and len(axes) > 1 else axes
        spans = {"tensor": [axes[0]], "fsdp": rest if d == 1 else rest[-1:], "data": rest if f == 1 else rest[:1]}
        found = {}
        for name, axis in spans.items():
            span = [*axis, *[1] * (len(axes) - len(axis))]
            found[name] = dataclasses.replace(self, axes=tuple(span)).bandwidth(span)
        return found


class Nodes(Topology):
    """Nodes of GPUs, with the axes (nodes, GPUs per node): "h100:8" is one node of 8, and "h100:4x8" four of them."""

    @classmethod
    def of(cls, name: str, kind: str, shape: str) -> Nodes:
        """Reads the shape, "8" or "4x8".

        Raises:
            ConfigError: for a shape that is no such thing.
        """
        found = re.fullmatch(r"(?:([1-9]\d{0,5})x)?([1-9]\d{0,5})", shape)
        if found is None or int(found[2]) not in NODE_SIZES:
            sizes = ", ".join(map(str, NODE_SIZES))
            raise ConfigError(
                f"{kind} has no shape {shape!r}: expected the GPUs of one node ({sizes}), as in {kind}:8, or the "
                f"number of nodes before it, as in {kind}:4x8"
            )
        return cls(name, GPUS[kind], (int(found[1] or 1), int(found[2])))

    def bandwidth(self, spanned: Sequence[int]) -> float:
        """Bytes per second that a GPU can send within a group that spans (nodes, GPUs of each). A ring that visits all
        GPUs of a node before it leaves it crosses to the next node once, and the network cards of these GPUs share
        that: so it is as fast as NVLink or as all of these cards, whichever is less."""
        assert isinstance(self.chip, GPU)
        nodes, gpus = spanned
        network = gpus * self.chip.network_bandwidth
        return min(self.chip.link_bandwidth, network) if nodes > 1 else self.chip.link_bandwidth

    def mesh_bandwidth(self, mesh: tuple[int, int, int]) -> dict[str, float]:
        """As of a slice, where neighbours along tensor are neighbours in a node, then those along fsdp."""
        found, stride, (_, node) = {}, 1, self.axes
        for name, size in zip(("tensor", "fsdp", "data"), reversed(mesh), strict=True):
            inside = max(1, min(size, node // stride))
            found[name] = self.bandwidth((-(-size // inside), inside))
            stride *= size
        return found
