"""The mesh of devices as a user writes it: its axes and their sizes. This module does not import JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxgpt.checks import check_type, did_you_mean, short_repr
from jaxgpt.errors import ConfigError
from jaxgpt.textfile import parse_value

AXES = ("data", "fsdp", "tensor")
# The axes over which a batch is spread.
BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis of the mesh has (what the axes are for: `jaxgpt.parallel.sharding`).

    One of them may be -1: whatever the others leave.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            check_type(f"mesh.{name}", size, "int")
            if size != -1 and not 1 <= size <= 2**20:
                raise ConfigError(
                    f"mesh.{name} must be 1 or more, or -1 for what the other axes leave, not {short_repr(size)}"
                )
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
        known = [field.name for field in dataclasses.fields(cls)]
        for name in sizes:
            if name not in known:
                raise ConfigError(
                    f"{source}: unknown axis {short_repr(name)}{did_you_mean(name, known)} ({', '.join(known)})"
                )
        return cls(**sizes)

    def resolve(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) with -1 replaced, for so many devices.

        Raises:
            ConfigError: if the other axes do not divide them.
        """
        sizes = dataclasses.astuple(self)
        fixed = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and devices % fixed:
            raise ConfigError(f"a mesh of {self}: {fixed} does not divide the {devices} devices")
        data, fsdp, tensor = (devices // fixed if size == -1 else size for size in sizes)
        return data, fsdp, tensor
