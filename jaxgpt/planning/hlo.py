"""Counts the bytes that a compiled program moves to and from memory and between chips, from XLA's text of it.

The text is parsed because no library provides these counts: `compiled.cost_analysis()` counts the body of a loop
once, does not distinguish HBM from on-chip memory, and has no entry for collectives; `jax.experimental.roofline` reads
the jaxpr, before XLA fuses and partitions it, and also counts the body of a loop once. Here a loop body counts once
per iteration, and only arrays in the chip's main memory (HBM) count. What collectives read and write there does not
count, because the links limit them; what kernels do is counted in `traced.py`. The text comes from `compiled.as_text()`
on TPU: an array's layout ends in S(n) if the array is in a memory other than HBM, and a collective that overlaps with
other work appears in several fusions with the same channel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Bytes that each of n chips puts on the wire per byte of its operand, on rings with half of it in each direction.
# Source: the collectives of "How to Scale Your Model", part 3 (https://jax-ml.github.io/scaling-book/sharding).
WIRE: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


class Collective(NamedTuple):
    """One collective: the bytes that each chip puts on the wire, and the ids of one of the groups that take part."""

    kind: str
    wire_bytes: float
    group: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes per chip: read from and written to HBM, and sent, by channel."""

    hbm_bytes: float = 0
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.hbm_bytes + other.hbm_bytes, self.collectives | other.collectives)

    def times(self, n: float) -> Traffic:
        """The traffic of n runs."""
        sent = {channel: c._replace(wire_bytes=n * c.wire_bytes) for channel, c in self.collectives.items()}
        return Traffic(n * self.hbm_bytes, sent)


class _Op(NamedTuple):
    name: str
    type: str
    code: str
    operands: list[str]
    rest: str  # attributes
    root: bool


_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
# Operations without traffic: names for other results, and the ends of operations that are counted at their start.
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "custom-call")
_SLICES = ("dynamic-slice", "slice", "gather")


class Program:
    """A program's text, parsed."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Op]] = {}
        ops: dict[str, _Op] = {}
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
                ops = self.computations[head[2]] = {}
                if head[1]:
                    self.entry = head[2]
            elif op := _parse(line):
                ops[op.name] = op

    @functools.cache  # noqa: B019  (a program lives no longer than the plan)
    def traffic(self, computation: str | None = None) -> Traffic:
        """The traffic of one run of a computation; default: the whole program."""
        total = Traffic()
        for op in self.computations[computation or self.entry].values():
            total = total + self._traffic_of(computation or self.entry, op)
        return total

    def _traffic_of(self, computation: str, op: _Op) -> Traffic:
        ops = self.computations[computation]
        kind = op.code.removesuffix("-start")
        if op.code == "while":
            return self.traffic(_called(op, "body")).times(self._trips(op))
        if op.code == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
            names = (
                re.findall(r"%([\w.\-]+)", branches[1])
                if branches
                else re.findall(r"_computation=%([\w.\-]+)", op.rest)
            )
            return _mean_of_working([self.traffic(name) for name in names])
        if op.code == "call":
            return self.traffic(_called(op))
        if op.code in _FREE or op.code.endswith("-done"):
            return Traffic()
        if op.code == "fusion":
            called = _called(op)
            sent = self._sent_within(called)
            if op.name.startswith("async-collective") or called.startswith("all-reduce-scatter"):
                return Traffic(0, sent)
            read = sum(self._read(called, i, ops[name].type) for i, name in enumerate(op.operands))
            return Traffic(read + self._written(called, _root(self.computations[called]), op.type), sent)
        operand_bytes = sum(_bytes(ops[name].type) for name in op.operands)
        if kind in COLLECTIVES:
            sent = {_channel(op): self._collective(op, kind, sum(_bytes(ops[n].type, hbm=False) for n in op.operands))}
            return Traffic(0, sent)
        if op.code == "copy-start":  # its result names both ends
            return Traffic(_bytes(op.type))
        if kind in _SLICES:
            result = list(_arrays(op.type))[1] if op.code.endswith("-start") else op.type  # [0] is the operand
            return Traffic(_bytes(result) + min(_bytes(ops[op.operands[0]].type), _bytes(result, hbm=False)))
        if op.code == "dynamic-update-slice":
            return Traffic(2 * _bytes(ops[op.operands[1]].type))
        return Traffic(operand_bytes + _bytes(op.type))

    def _trips(self, loop: _Op) -> int:
        """Number of iterations of a counted loop. Its condition compares an element of its state with a constant; its
        body adds constants to that element, more than 1 if XLA has unrolled the loop. Counters start at 0."""
        condition, body = (self.computations[_called(loop, part)] for part in ("condition", "body"))
        limit = max((value for op in condition.values() if (value := _constant(op)) is not None), default=1)
        index = next((op.rest for op in condition.values() if op.code == "get-tuple-element"), "index=0")
        root, step = _root(body), 0
        place = int(index.partition("index=")[2].partition(",")[0])
        counter = body[root.operands[place]] if root.code == "tuple" else root
        while counter.code == "add":
            before, added = (body[name] for name in counter.operands)
            step += _constant(added) or 0
            counter = before
        return max(1, limit // max(1, step))

    def _sent_within(self, computation: str) -> dict[str, Collective]:
        ops, sent = self.computations[computation], {}
        for op in ops.values():
            if op.code in COLLECTIVES:
                # In these fusions each chip keeps only its part of an all-reduce.
                kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else op.code
                sent[_channel(op)] = self._collective(
                    op, kind, sum(_bytes(ops[n].type, hbm=False) for n in op.operands)
                )
            elif op.code == "fusion":
                sent |= self._sent_within(_called(op))
        return sent

    def _collective(self, op: _Op, kind: str, operand_bytes: float) -> Collective:
        group = _group(op.rest)
        return Collective(kind, WIRE[kind](len(group)) * operand_bytes, group)

    def _read(self, computation: str, index: int, type: str) -> float:
        """Bytes of its operand `index` that a fused computation reads."""
        if not (whole := _bytes(type)):
            return 0
        ops = self.computations[computation]
        (parameter,) = (op for op in ops.values() if op.code == "parameter" and op.rest.startswith(f"({index})"))
        return min(whole, self._read_by_users(computation, parameter.name, whole))

    def _read_by_users(self, computation: str, name: str, whole: float) -> float:
        read = 0.0
        for op in self.computations[computation].values():
            if name not in op.operands or op.code in ("tuple", "custom-call", *COLLECTIVES):
                continue  # these pass the operand through without reading it
            if op.code in _SLICES:
                read += _bytes(op.type, hbm=False)
            elif op.code == "bitcast":
                read += self._read_by_users(computation, op.name, whole)
            elif op.code == "fusion":
                called = _called(op)
                read += sum(self._read(called, i, f"u8[{whole:.0f}]") for i, n in enumerate(op.operands) if n == name)
            elif op.code != "dynamic-update-slice" or op.operands[0] != name:
                read += whole
        return read

    def _written(self, computation: str, op: _Op, type: str) -> float:
        """Bytes that a fused computation writes for its result `op`; `type` says to which memory."""
        ops = self.computations[computation]
        if op.code == "tuple":
            parts = list(_arrays(type))
            return sum(self._written(computation, ops[n], part) for n, part in zip(op.operands, parts, strict=False))
        if not (whole := _bytes(type)) or op.code in ("parameter", *COLLECTIVES):
            return 0
        if op.code == "dynamic-update-slice":
            return min(whole, _bytes(ops[op.operands[1]].type, hbm=False))
        if op.code == "bitcast":
            return self._written(computation, ops[op.operands[0]], type)
        if op.code == "fusion":
            called = _called(op)
            return self._written(called, _root(self.computations[called]), type)
        return whole


def _mean_of_working(branches: list[Traffic]) -> Traffic:
    """The mean over the branches of a conditional that do anything: dense and banded layers alternate, and decoding
    either makes a step or does nothing."""
    most = max(branch.hbm_bytes for branch in branches)
    working = [branch for branch in branches if branch.hbm_bytes >= most / 1000]
    return functools.reduce(Traffic.__add__, working).times(1 / len(working))


def _parse(line: str) -> _Op | None:
    head = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if head is None:
        return None
    text = re.sub(r"/\*index=\d+\*/", "", line[head.end() :])
    end = _closing(text) + 1 if text[0] == "(" else text.index(" ")
    code, _, rest = text[end:].strip().partition("(")
    rest = "(" + rest
    inside = rest[: _closing(rest) + 1]
    return _Op(head[2], text[:end], code, re.findall(r"%([\w.\-]+)", inside), rest, bool(head[1]))


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced: {text:.80}")


def _arrays(type: str) -> Iterator[str]:
    return (found[0] for found in _ARRAY.finditer(type))


def _bytes(type: str, hbm: bool = True) -> float:
    """Bytes of the arrays of a type: those in HBM, or with `hbm=False` all of them."""
    total = 0.0
    for name, bits, shape, layout in _ARRAY.findall(type):
        if not (hbm and "S(" in layout):
            size = int(bits or 8 * (name == "pred")) / 8
            total += size * math.prod(int(n) for n in shape.split(",") if n)
    return total


def _called(op: _Op, attribute: str = "calls|to_apply") -> str:
    found = re.search(rf"(?:{attribute})=%([\w.\-]+)", op.rest)
    assert found, op
    return found[1]


def _constant(op: _Op) -> int | None:
    found = re.match(r"\((\d+)\)", op.rest) if op.code == "constant" else None
    return int(found[1]) if found else None


def _root(ops: dict[str, _Op]) -> _Op:
    return next(op for op in ops.values() if op.root)


def _channel(op: _Op) -> str:
    found = re.search(r"channel_id=(\d+)", op.rest)
    return found[1] if found else op.name


def _group(attributes: str) -> tuple[int, ...]:
    """One group of chips that communicate, parsed from any of the four notations that XLA uses."""
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", attributes):
        following = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])}
        ring = [next((a for a, b in following.items() if a != b), 0)]
        while (after := following.get(ring[-1], ring[0])) != ring[0]:
            ring.append(after)
        return tuple(ring)
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in listed[1].split(","))
    if made := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return tuple(_iota(made[3], made[4]).reshape(int(made[1]), int(made[2]))[0].tolist())
    if mesh := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", attributes
    ):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(axes.values()))
        chosen = re.findall(r"'(\w+)'", mesh[4])
        ids = ids.reshape(tuple(axes.values()))[tuple(slice(None) if name in chosen else 0 for name in axes)]
        return tuple(ids.reshape(-1).tolist())
    return (0,)


def _iota(shape: str, order: str | None) -> np.ndarray:
    dims = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids
