"""The shape of a KV block; two workers may exchange blocks only if theirs are equal."""

import hashlib

import msgspec

from protocol.errors import LayoutMismatchError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


class KVLayout(msgspec.Struct, frozen=True):
    """Blocks are `[num_layers, 2, num_kv_heads, block_size, head_dim]`, contiguous, K before V."""

    model_fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        values = self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim
        return values * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        return self.block_bytes // self.block_size

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(msgspec.json.encode(self), digest_size=8).hexdigest()


def check_layouts_match(ours: KVLayout, theirs: KVLayout, *, peer: str) -> None:
    """Raises LayoutMismatchError that names every field in which the two sides differ."""
    differing = [
        f"{name} is {getattr(ours, name)} here and {getattr(theirs, name)} at {peer}"
        for name in ours.__struct_fields__
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if differing:
        raise LayoutMismatchError("KV layouts differ: " + "; ".join(differing))
