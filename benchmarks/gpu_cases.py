"""What a run on a GPU times: the cases and the peers of each of its measuring parts, those worth most first."""

from collections.abc import Callable, Sequence

from pyllm.benchmarks import exercise
from pyllm.benchmarks.catalogue import BENCHMARKS
from pyllm.benchmarks.measure import AUTOCAST, OVERHEAD_PASSES, Case

ELEMENTS = 2**26  # of a large tensor: its bytes are several times what a cache holds
TOKENS = 2**14
ROW_PEERS = ("compile", "liger", "triton")
LAYER_PEERS = ("compile", "hf", "graphed")
ATTENTION_PEERS = ("native", "triton", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex")
DECODING_PEERS = ("native", "triton")  # and eager: SDPA on the whole cache


def _norms() -> list[Case]:
    """The targets' shapes first: plain norms over widths, then with addition and dropout, fp32, and small ones."""
    planned = []
    for name in ("rms_norm", "layer_norm"):
        planned += _cases(name, [(ELEMENTS // n, n) for n in (1024, 2048, 4096, 8192, 16384)])
    for name in ("add_rms_norm", "add_layer_norm"):
        planned += _cases(name, [(ELEMENTS // 4096, 4096)])
    for name in ("rms_norm", "layer_norm"):
        planned += _cases(name, [(ELEMENTS // 4096, 4096)], dtype="fp32")
    return planned


def _softmaxes() -> list[Case]:
    planned = _cases("softmax", [(1, ELEMENTS // n, n) for n in (1024, 8192, 32768, 131072)], variants=[""])
    planned += _cases("softmax", [(16, 2048, 2048)], variants=["causal"])
    planned += _cases("log_softmax", [(1, ELEMENTS // 32768, 32768)])
    return planned + _cases("softmax", [(1, ELEMENTS // 8192, 8192)], dtype="fp32", variants=[""])


def _losses() -> list[Case]:
    planned = _cases("cross_entropy", [(4096, 32000), (4096, 128256)], directions=("forward", "both"))
    return planned + _cases("linear_cross_entropy", [(4096, 768, 32000), (8192, 4096, 128256)], directions=("both",))


def _attention(dim: int) -> Callable[[], list[Case]]:
    """Lengths from 512 to 16k of as many tokens, causal and not; the targets' lengths first."""
    shapes = [(TOKENS // n, 2048 // dim, n, dim) for n in (16384, 2048, 8192, 4096, 1024, 512)]
    return lambda: _cases("attention", shapes, variants=["causal", ""])


def _decoding() -> list[Case]:
    """One token on long caches: many sequences and one, as many key heads as heads and fewer; few keys at last."""
    shapes = [(batch, 32, kv_heads, 16384, 128) for batch in (1, 16) for kv_heads in (8, 32)]
    shapes += [(64, 16, 16, 2048, 64), (8, 16, 2, 8192, 256), (1, 32, 8, 131072, 128), (64, 32, 8, 512, 128)]
    return _cases("attention_decode", shapes)


def _layers() -> list[Case]:
    """Training steps of full size, padded batches too."""
    full = _cases("bert_layer", [(32, 512, 768)], variants=["full", "half padded", "log-normal"], directions=("both",))
    full += _cases("gpt2_block", [(32, 512, 1024)], variants=["full", "half padded"], directions=("both",))
    full += _cases("llama_block", [(4, 2048, 2048)], variants=["full"], directions=("both",))
    full += _cases("t5_encoder_block", [(32, 512, 768)], variants=["full", "half padded"], directions=("both",))
    full += _cases("t5_decoder_block", [(32, 512, 768)], variants=["full"], directions=("both",))
    return full + _cases("bert_layer", [(32, 512, 768)], AUTOCAST, ["full"], ("both", "forward"))


def few_tokens() -> list[Case]:
    """Training steps of few tokens, end to end, where launches take the time."""
    few = []
    for name, width in (("bert_layer", 768), ("gpt2_block", 1024), ("llama_block", 2048)):
        few += _cases(name, [(4, 256, width)], variants=["full"], directions=("both", "step"))
    return few


def _overhead() -> list[Case]:
    """Calls from end to end: on tiny tensors, and on the largest that count as small."""
    planned = []
    for benchmark in exercise.BENCHMARKS:
        planned += _cases(benchmark.name, [benchmark.tiny], directions=OVERHEAD_PASSES)
    for name in ("rms_norm", "layer_norm"):
        planned += _cases(name, [(1024, 1024)], directions=OVERHEAD_PASSES)
    return planned


def _cases(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: str = "bf16",
    variants: Sequence[str] | None = None,
    directions: Sequence[str] = ("forward", "backward"),
) -> list[Case]:
    benchmark = BENCHMARKS[name]
    return [
        Case(benchmark, shape, dtype, direction, variant)
        for shape in shapes
        for variant in (benchmark.variants if variants is None else variants)
        for direction in directions
        if direction in benchmark.passes or (direction == "recorded" and "both" in benchmark.passes)
    ]


# (cases, peers) by part; layers and overhead are timed end to end as well.
MEASURED: dict[str, tuple[Callable[[], list[Case]], tuple[str, ...]]] = {
    "norms": (_norms, ROW_PEERS),
    "softmaxes": (_softmaxes, ROW_PEERS),
    "losses": (_losses, ("compile", "triton", "chunked")),
    "attention_64": (_attention(64), ATTENTION_PEERS),
    "attention_128": (_attention(128), ATTENTION_PEERS),
    "attention_256": (_attention(256), ATTENTION_PEERS),
    "decoding": (_decoding, DECODING_PEERS),
    "layers": (_layers, LAYER_PEERS),
    "overhead": (_overhead, ("triton",)),
}
