"""Chained hashes that name KV blocks by content, equal in every process and after every restart."""

import functools
import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeAlias

BlockHash: TypeAlias = bytes

BLOCK_HASH_BYTES = 16


@functools.lru_cache(maxsize=1024)  # most requests have one of a few
def root_hash(
    model_fingerprint: str, *, adapter: str | None = None, cache_salt: str | None = None
) -> BlockHash:
    """The parent of a sequence's first block.

    Each part is length-prefixed, so no choice of salt can imitate another adapter or model, and
    an absent part differs from an empty one.
    """
    digest = blake2b(digest_size=BLOCK_HASH_BYTES, person=b"tandem-kv-root")
    for part in (model_fingerprint, adapter, cache_salt):
        encoded = b"" if part is None else part.encode()
        length = 0 if part is None else len(encoded) + 1
        digest.update(length.to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def hash_block(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """blake2b-128 over the parent's hash and the block's token ids as little-endian uint32."""
    return blake2b(parent + _uint32_bytes(token_ids), digest_size=BLOCK_HASH_BYTES).digest()


def hash_blocks(
    token_ids: Sequence[int],
    block_size: int,
    *,
    root: BlockHash,
    known: Sequence[BlockHash] = (),
) -> list[BlockHash]:
    """Hashes of all *full* blocks of `token_ids`; a partial last block has none.

    `known` are the hashes of the first blocks if the caller has them already.
    """
    hashes = list(known)
    parent = hashes[-1] if hashes else root
    data = _uint32_bytes(token_ids)
    stride = 4 * block_size
    for start in range(len(hashes) * stride, len(data) - stride + 1, stride):
        parent = blake2b(
            parent + data[start : start + stride], digest_size=BLOCK_HASH_BYTES
        ).digest()
        hashes.append(parent)
    return hashes


def _uint32_bytes(token_ids: Sequence[int]) -> bytes:
    words = array("I", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
