"""The mesh of devices as a user writes it: its axes and their sizes. This module does not import JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxgpt.checks import did_you_mean, short_repr
from jaxgpt.errors import ConfigError
from jaxgpt.fields import check, documented, setting
from jaxgpt.textfile import parse_value

AXES = ("data", "fsdp", "tensor")
# The axes over which a batch is spread.
BATCH = ("data", "fsdp")


_SIZE: dict[str, Any] = {
    "low": 1,
    "high": 2**20,
    "also": -1,
    "words": "1 or more, or -1 for what the other axes leave",
}


@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices on each axis of the mesh (`jaxgpt.parallel.sharding` says what lies where)."""

    data: int = setting(1, **_SIZE, help="Devices that each hold a replica of the model and take a share of the batch.")
    fsdp: int = setting(
        1,
        **_SIZE,
        help="Devices that also take shares of the batch; parameters and optimizer state are spread over them and "
        "gathered for use.",
    )
    tensor: int = setting(
        1, **_SIZE, help="Devices that split the attention heads, the feed-forward columns and the vocabulary."
    )

    def __post_init__(self):
        check(self, prefix="mesh.")
        if list(dataclasses.astuple(self)).count(-1) > 1:
            raise ConfigError(f"only one axis of a mesh can be -1, not those of {self}")

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Reads "fsdp=16,tensor=4".

        Raises:
            ConfigError: for anything else.
        """
        sizes: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, equals, size = part.strip().partition("=")
            if not equals or name in sizes:
                raise ConfigError(f"a mesh is written like data=2,fsdp=4,tensor=2, not {text!r}")
            sizes[name] = parse_value(size)
        return cls.from_dict(sizes, "--mesh")

    @classmethod
    def from_dict(cls, sizes: Mapping[str, Any], source: str) -> MeshConfig:
        """Builds one from plain values; unknown axes are errors that name `source`."""
        for name in sizes:
            if name not in AXES:
                raise ConfigError(
                    f"{source}: unknown axis {short_repr(name)}{did_you_mean(name, AXES)} ({', '.join(AXES)})"
                )
        return cls(**sizes)

    def resolve(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) with -1 replaced, for this many devices.

        Raises:
            ConfigError: if the other axes do not divide them.
        """
        sizes = dataclasses.astuple(self)
        fixed = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and devices % fixed:
            raise ConfigError(f"a mesh of {self}: {fixed} does not divide the {devices} devices")
        data, fsdp, tensor = (devices // fixed if size == -1 else size for size in sizes)
        return data, fsdp, tensor
