"""Layers of known models on padded batches: pyllm.nn against torch.nn, compiled torch.nn and Hugging Face's.

All implementations but Hugging Face's have the very same parameters. `forward` is inference, in evaluation mode without
gradient; `both` is a training step's forward and backward, `step` the same with PyTorch's fused AdamW. Positions that
are padding count neither as work nor as tokens, and get no gradient. Heads are 64 wide, feed-forward networks four
times the width, which are BERT-base's, GPT-2's, T5-base's and Llama-3.2-1B's proportions.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

import pyllm.nn
from pyllm import testing
from pyllm.benchmarks import huggingface
from pyllm.benchmarks.lengths import DISTRIBUTIONS, padding
from pyllm.benchmarks.measure import Benchmark, Call, Peer, Workload, randn
from pyllm.benchmarks.plain_block import PlainBlock
from pyllm.nn import DecoderLayer, EncoderLayer, Rotary
from pyllm.reference import statistics_type

HEAD_DIM = huggingface.HEAD_DIM
PLANS = ("all", "minimal", "recompute")  # what a layer keeps for its backward


@dataclass(frozen=True)
class Layer:
    """A layer of a known model.

    make(width, dropout, **factory) -> pyllm's; eager(pyllm's, width, dropout) -> torch's on the same parameters.
    given(pyllm's, length, padding) -> the arguments of both after the inputs. hf: of the module huggingface. weights:
    elements of all matrices over the square of the width, for one head of keys to each of queries. streams: inputs (a
    decoder layer's second one is the encoder's output), each of which is attended to.
    """

    make: Callable[..., Module]
    eager: Callable[[Module, int, float], Module]
    given: Callable[[Module, int, Tensor | None], dict]
    weights: int
    hf: Callable[..., huggingface.Made] | None = None
    streams: int = 1
    causal: bool = False
    grouped: bool = False

    def flops(self, shape, lengths: str = "full", dropout: float = 0.0) -> tuple[float, float]:
        """Matrix products of what is not padding: the weights', and two of each attention, five in its backward."""
        batch, longest, width = shape
        sizes = DISTRIBUTIONS[lengths](batch, longest)
        weights = self.weights
        if self.grouped:  # keys and values have fewer heads than queries
            weights -= 2 * (1 - _kv_heads(width) / (width // HEAD_DIM))
        products = 2 * sum(sizes) * weights * width**2
        attention = 4 * width * sum(n * n for n in sizes) * (self.streams - 0.5 * self.causal)
        return products + attention, 2 * products + 2.5 * attention

    def build(
        self, shape, dtype: torch.dtype, device: str, lengths: str = "full", dropout: float = 0.0, autocast=False
    ) -> Workload:
        batch, longest, width = shape
        dtype = torch.float32 if autocast else dtype
        factory = {"dtype": dtype, "device": device}
        ours = self.make(width, dropout, **factory)
        _off_the_kink(ours)
        theirs = self.eager(ours, width, dropout)
        modules = {"eager": theirs, "pyllm": ours} | self._planned(ours, width, dropout, factory)
        hidden = padding(DISTRIBUTIONS[lengths](batch, longest), longest, device)
        inputs = [randn(batch, longest, width, **factory) for _ in range(self.streams)]
        parameters = dict(ours.named_parameters())
        given = self.given(ours, longest, hidden)

        def precision():
            return torch.autocast(device, torch.bfloat16) if autocast else nullcontext()

        def call(module: Module) -> Tensor:
            with precision():
                return module(*inputs, **given)

        def check(backend: str | None) -> None:
            named = {f"input {i}": x for i, x in enumerate(inputs)}
            for name, module in modules.items():
                if name != "eager":
                    testing.check(partial(computed, module), named | parameters, backend)

        def computed(module: Module, **tensors: Tensor) -> Tensor:
            """A layer's output as a function of its inputs and parameters, without that of padding."""
            x = tuple(tensors[f"input {i}"] for i in range(self.streams))
            weights = {n: tensors[n] for n in parameters}
            arguments = dict(given)
            if "rotary" in given:
                arguments["rotary"] = ours.self_attn.position.tables(torch.arange(longest), statistics_type(x[0]))
            with precision():
                out = functional_call(module, weights, x, arguments)
            return out if hidden is None else out.masked_fill(hidden[..., None], 0.0)

        def hugging_face() -> Call:
            mask, memory_mask = None, None
            if hidden is not None:
                mask = memory_mask = ~hidden[:, None, None, :]
                if self.causal:
                    mask = mask & ~_causal(longest, device)
            rotary = {"rotary": given["rotary"]} if "rotary" in given else {}
            module, arguments = self.hf(ours, width, dropout, mask, **rotary)
            if self.streams == 2:
                arguments |= {"encoder_hidden_states": inputs[1], "encoder_attention_mask": memory_mask}

            def layer() -> Tensor:
                with precision():
                    out = module(inputs[0], **arguments)
                return out[0] if isinstance(out, tuple) else out

            return Peer(layer, [*inputs, *module.parameters()])

        def graphed() -> Call:
            return Peer(partial(call, pyllm.graphed(ours)), leaves, captured=partial(call, ours))

        leaves = [*inputs, *parameters.values()]
        return Workload(
            {name: partial(call, module) for name, module in modules.items()},
            leaves,
            check,
            late={"graphed": graphed} | ({"hf": hugging_face} if self.hf else {}),
            modules=tuple(modules.values()),
            used=None if hidden is None else ~hidden[..., None],
        )

    def _planned(self, ours: Module, width: int, dropout: float, factory: dict) -> dict[str, Module]:
        """The layer with the other memory plans than the default, if it has any."""
        own = next((module.save for module in ours.modules() if hasattr(module, "save")), None)
        planned = {}
        for plan in PLANS:
            if own not in (None, plan):
                planned[plan] = self.make(width, dropout, save=plan, **factory)
                planned[plan].load_state_dict(ours.state_dict(keep_vars=True), assign=True)
        return planned


def _off_the_kink(module: Module) -> None:
    """Biases of 2 and -2 before a ReLU, whose gradient jumps at 0: rounding would decide on which side a sum is."""
    for layer in module.modules():
        if getattr(layer, "activation", None) in (F.relu, "relu") and layer.linear1.bias is not None:
            with torch.no_grad():
                layer.linear1.bias.copy_(4.0 * torch.randint_like(layer.linear1.bias, 2) - 2.0)


def _kv_heads(width: int) -> int:
    return max(1, width // HEAD_DIM // 4)


# --- torch.nn's layers ---

_gelu_tanh = partial(F.gelu, approximate="tanh")


def _stack(nn, width: int, dropout: float, save: str | None = None, **options) -> Module:
    """One encoder layer in its stack, which is where padding is handled."""
    plan = {} if save is None else {"save": save}
    layer = nn.TransformerEncoderLayer(
        width, width // HEAD_DIM, 4 * width, dropout, batch_first=True, **plan, **options
    )
    packs = not layer.norm_first and layer.self_attn.num_heads % 2 == 0  # torch's, which warns where it cannot
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=packs or nn is pyllm.nn)


def _decoder(nn, width: int, dropout: float, save: str | None = None, **options) -> Module:
    plan = {} if save is None else {"save": save}
    return nn.TransformerDecoderLayer(width, width // HEAD_DIM, 4 * width, dropout, batch_first=True, **plan, **options)


def _torchs(make: Callable[..., Module], ours: Module, width: int, dropout: float) -> Module:
    theirs = make(torch.nn, width, dropout, device="meta")
    theirs.load_state_dict(ours.state_dict(keep_vars=True), assign=True)  # the very same parameters
    return theirs


def _causal(length: int, device: str | torch.device) -> Tensor:
    """(S, S), True = ignore."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _encoder_given(causal: bool, ours: Module, length: int, hidden: Tensor | None) -> dict:
    masks = {"mask": _causal(length, next(ours.parameters()).device), "is_causal": True} if causal else {}
    return {"src_key_padding_mask": hidden, **masks}


def _decoder_given(ours: Module, length: int, hidden: Tensor | None) -> dict:
    masks = {"tgt_mask": _causal(length, next(ours.parameters()).device), "tgt_is_causal": True}
    return {"tgt_key_padding_mask": hidden, "memory_key_padding_mask": hidden, **masks}


def _torch_layer(make: Callable[..., Module], given: Callable[..., dict], **options) -> Layer:
    return Layer(partial(make, pyllm.nn), partial(_torchs, make), given, **options)


# --- blocks that torch.nn has no layer for ---

_LLAMA = {"norm": "rms_norm", "norm_first": True, "norm_eps": 1e-6}
_LLAMA |= dict.fromkeys(("qkv_bias", "out_bias", "ffn_bias"), False)
_T5 = {**_LLAMA, "position": "t5", "scale": 1.0}
_LLAMA |= {"activation": "swiglu", "position": "rotary", "causal": True}


def _block(kind: type[EncoderLayer], common: dict, width: int, dropout: float, **options) -> Module:
    heads = {"num_kv_heads": _kv_heads(width)} if common["position"] == "rotary" else {}
    return kind(width, width // HEAD_DIM, 4 * width, dropout=dropout, **heads, **common, **options)


def _plain(ours: Module, width: int, dropout: float) -> Module:
    return PlainBlock(ours)


def _block_given(ours: Module, length: int, hidden: Tensor | None) -> dict:
    if isinstance(ours, DecoderLayer):
        return {"tgt_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
    given = {"src_key_padding_mask": hidden}
    if isinstance(ours.self_attn.position, Rotary):
        weight = next(ours.parameters())
        positions = torch.arange(length, device=weight.device)
        given["rotary"] = ours.self_attn.position.tables(positions, statistics_type(weight))  # once for all layers
    return given


LAYERS = {
    "bert_layer": _torch_layer(
        partial(_stack, activation="gelu"), partial(_encoder_given, False), weights=12, hf=huggingface.bert
    ),
    "gpt2_block": _torch_layer(
        partial(_stack, activation=_gelu_tanh, norm_first=True),
        partial(_encoder_given, True),
        weights=12,
        hf=huggingface.gpt2,
        causal=True,
    ),
    "decoder_layer": _torch_layer(_decoder, _decoder_given, weights=16, streams=2, causal=True),
    "t5_encoder_block": Layer(
        partial(_block, EncoderLayer, _T5), _plain, _block_given, weights=12, hf=huggingface.t5_encoder
    ),
    "t5_decoder_block": Layer(
        partial(_block, DecoderLayer, _T5),
        _plain,
        _block_given,
        weights=16,
        hf=huggingface.t5_decoder,
        streams=2,
        causal=True,
    ),
    "llama_block": Layer(
        partial(_block, EncoderLayer, _LLAMA),
        _plain,
        _block_given,
        weights=16,
        hf=huggingface.llama,
        causal=True,
        grouped=True,
    ),
}
SHAPES = {"gpt2_block": (4, 256, 1024), "llama_block": (1, 256, 2048)}


def _tokens(shape, lengths: str = "full", dropout: float = 0.0) -> int:
    return sum(DISTRIBUTIONS[lengths](*shape[:2]))


def _benchmark(name: str, layer: Layer) -> Benchmark:
    dropout = 0.0 if name == "llama_block" else 0.1
    variants = {label: {"lengths": label, "dropout": dropout} for label in DISTRIBUTIONS}
    if dropout:
        variants["full dropout 0"] = {"lengths": "full", "dropout": 0.0}
    return Benchmark(
        name=name,
        axes="batch x length x width",
        shapes=(SHAPES.get(name, (8, 256, 768)),),
        tiny=(2, 8, HEAD_DIM),
        build=layer.build,
        small=lambda shape: (2, min(shape[1], 64), min(shape[2], 4 * HEAD_DIM)),
        flops=layer.flops,
        variants=variants,
        passes=("forward", "step", "both"),
        tokens=_tokens,
        autocasts=True,
    )


BENCHMARKS = tuple(_benchmark(name, layer) for name, layer in LAYERS.items())
