"""The translation units of kernels that are templates of head_dim: setup.py writes and compiles each on its own.

A kernel's header, cuda/NAME.cuh, defines a launcher that is a template of the element type and head_dim. Its binding
sees only the declaration, and calls what is compiled here through visit_head_dim of cuda/head_dim.h.
"""

from collections.abc import Sequence

HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # others are padded, in the kernel, to the next

# (header, the element types of each unit, launchers): what takes longest to compile first.
KERNELS = (
    (
        "attention_backward",
        (("bf16", "f16"),),
        tuple(
            f"void attention_backward<{{T}}, {{D}}, {full}>(const AttentionBackward&, Stream)"
            for full in ("true", "false")
        ),
    ),
    (
        "attention_forward",
        (("bf16", "f16"),),
        tuple(f"void attention_forward<{{T}}, {{D}}, {full}>(AttentionForward, Stream)" for full in ("true", "false")),
    ),
    (
        "attention_mask_gradient",
        (("bf16", "f16"),),
        ("void attention_mask_gradient<{T}, {D}>(const MaskGradient&, Stream)",),
    ),
    (
        "attention_decode_split",
        (("float", "bf16", "f16"),),
        ("void decode_split<{T}, {D}>(const AttentionDecode&, Stream)",),
    ),
)


def instances(head_dims: Sequence[int] = HEAD_DIMS) -> dict[str, str]:
    """The name and the source of each unit, in the order in which to compile them: the longest first."""
    units = {}
    for header, types_of_units, launchers in KERNELS:
        for dim in sorted(head_dims, reverse=True):
            for types in types_of_units:
                lines = [f"template {one.format(T=element, D=dim)};" for element in types for one in launchers]
                units["_".join((header, *types, str(dim)))] = "\n".join(
                    [f'#include "cuda/{header}.cuh"', "", "namespace pyllm::cuda {", *lines, "}", ""]
                )
    return units
