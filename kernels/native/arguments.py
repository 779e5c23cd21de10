"""The argument structures of the C functions, field by field as the C sources declare them.

One pointer to a structure is several times cheaper to pass through ctypes than its fields are.
"""

from ctypes import Structure, c_double, c_int64, c_void_p
from typing import ClassVar


def _fields(**kinds: str) -> list[tuple[str, type]]:
    """`pointers="a b", sizes="c"` in declaration order."""
    types: dict[str, type] = {"pointers": c_void_p, "sizes": c_int64, "numbers": c_double}
    return [(name, types[kind]) for kind, names in kinds.items() for name in names.split()]


class RmsNormArgs(Structure):
    """rows.c: struct rms_norm_args."""

    _fields_: ClassVar = _fields(
        pointers="x weight out",
        sizes="outer inner n outer_stride inner_stride num_threads",
        numbers="eps",
    )


class AddRmsNormArgs(Structure):
    """rows.c: struct add_rms_norm_args."""

    _fields_: ClassVar = _fields(
        pointers="x residual weight", sizes="rows n num_threads", numbers="eps"
    )


class SiluAndMulArgs(Structure):
    """rows.c: struct silu_and_mul_args."""

    _fields_: ClassVar = _fields(pointers="gate_up out", sizes="rows n num_threads")


class RopeArgs(Structure):
    """rows.c: struct rope_args."""

    _fields_: ClassVar = _fields(
        pointers="q k v pool cos_sin positions slots",
        sizes="num_tokens num_heads num_kv_heads head_dim half block_size "
        "q_stride k_stride v_stride cos_sin_stride block_stride kv_format turns num_threads",
        numbers="k_scale v_scale",
    )


class PackWeightArgs(Structure):
    """linear_bf16.c: struct pack_weight_args."""

    _fields_: ClassVar = _fields(
        pointers="weight packed", sizes="in_features out_features num_threads"
    )


class PackedRowsArgs(Structure):
    """linear_bf16.c: struct packed_rows_args."""

    _fields_: ClassVar = _fields(
        pointers="packed rows out", sizes="num_rows in_features out_features num_threads"
    )


class LinearArgs(Structure):
    """linear_bf16.c: struct linear_args."""

    _fields_: ClassVar = _fields(
        pointers="weight bias x out",
        sizes="num_tokens in_features out_features x_stride num_threads",
    )


class PagedAttentionArgs(Structure):
    """attention.c: struct paged_attention_args."""

    _fields_: ClassVar = _fields(
        pointers="q out pool query_starts kv_lens block_tables",
        sizes="num_seqs max_blocks num_heads num_kv_heads head_dim block_size "
        "q_stride block_stride window max_kv_len kv_format num_threads",
        numbers="scale softcap v_scale",
    )


class FilterWeightsArgs(Structure):
    """sampling.c: struct filter_weights_args."""

    _fields_: ClassVar = _fields(pointers="weights top_k top_p min_p", sizes="rows n num_threads")


class PenalizeArgs(Structure):
    """sampling.c: struct penalize_args."""

    _fields_: ClassVar = _fields(
        pointers="scores places slots output_counts in_prompt repetition presence frequency",
        sizes="rows n score_stride num_threads",
    )


class RuleOutArgs(Structure):
    """sampling.c: struct rule_out_args."""

    _fields_: ClassVar = _fields(
        pointers="scores places allowed", sizes="rows n words score_stride num_threads"
    )
