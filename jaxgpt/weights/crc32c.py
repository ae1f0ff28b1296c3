"""CRC-32C (Castagnoli), the checksum in TensorFlow's files, at several GB/s in NumPy. Source: RFC 3720, appendix B.4.

A CRC is the remainder of the message, as a polynomial over GF(2), divided by

    P = x^32 + x^28 + x^27 + x^26 + x^25 + x^23 + x^22 + x^20 + x^19 + x^18 + x^14 + x^13 + x^11 + x^10 + x^9 + x^8
        + x^6 + 1

A table takes one step per byte. Here, most of the work is done by a multiple of P that has only four terms,
x^A + x^B + x^C + 1, found by search. Over GF(2) a square of a sum is the sum of the squares, so P also divides
x^64A + x^64B + x^64C + 1: a 64-bit word of the message may be replaced by adding it, which is XOR, to the words A - B,
A - C and A further on. No word depends on the A - B - 1 before it, so as many are replaced at once.
"""

from __future__ import annotations

import functools

import numpy as np

A, B, C = 5321, 3574, 2491
# P without x^32. Bit 31 is that of x^0, as the lowest bit of a byte is the first of the message.
POLYNOMIAL = 0x82F63B78
# A CRC starts from a remainder of 32 ones instead of 0. From 0, these bytes lead there.
_START = b"\x54\x64\x1f\x64"
_CHUNK = 2**20


def crc32c(data: bytes | np.ndarray) -> int:
    """The CRC-32C of bytes, or of an array of uint8 [N]. Needs a few MB beside them."""
    data = np.frombuffer(data, np.uint8)
    odd = data.size % 8
    first = _START + data[:odd].tobytes()
    state = np.zeros(8 * A, np.uint8)  # zeros before a message do not change the remainder
    state[-len(first) :] = np.frombuffer(first, np.uint8)
    state = _folded(state, data[odd:], np.uint64)
    state = _folded(np.zeros(A, np.uint8), state, np.uint8)
    bits = np.unpackbits(state, bitorder="little")
    return int(np.bitwise_xor.reduce(_remainders() * bits)) ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """The CRC as TensorFlow stores it, so that the CRC of data with CRCs in it is not degenerate."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _folded(state: np.ndarray, data: np.ndarray, unit: type[np.unsignedinteger]) -> np.ndarray:
    """Bytes of A units that leave the same remainder as the A units of `state`, followed by those of `data`."""
    for begin in range(0, data.size, _CHUNK):
        piece = data[begin : begin + _CHUNK]
        work = np.concatenate([state, piece]).view(unit)
        count = work.size - A
        for i in range(0, count, A - B):
            replaced = work[i : min(i + A - B, count)]
            for distance in (A - B, A - C, A):
                work[i + distance : i + distance + replaced.size] ^= replaced
        state = work[count:].view(np.uint8)
    return state


@functools.cache
def _remainders() -> np.ndarray:
    """What each bit of A bytes alone would leave as the remainder."""
    remainders = [POLYNOMIAL]  # of the last bit, times x^32, because a CRC divides the message times x^32
    for _ in range(8 * A - 1):
        last = remainders[-1]
        remainders.append((last >> 1) ^ (POLYNOMIAL if last & 1 else 0))
    return np.array(remainders[::-1], np.uint32)
