"""pyllm's blocks against Hugging Face's layers of the same architecture: outputs and all gradients, in float64."""

from collections.abc import Callable
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from conftest import TARGETS
from torch import Tensor
from torch.nn import Module
from transformers import BertConfig, GPTJConfig, GPTNeoXConfig, LlamaConfig, T5Config
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding
from transformers.models.gptj.modeling_gptj import GPTJBlock, create_sinusoidal_positions
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.t5.modeling_t5 import T5Attention, T5Block

from pyllm import use_backend
from pyllm.nn import DecoderLayer, EncoderLayer, Rotary, alibi_slopes
from pyllm.ops.relative_bias import bucket

SERVING = [t for t in TARGETS if t.values[0] != ("torch", "cpu") and t.values[0][1] == "cpu"]
B, S, E, H, D, F = 2, 21, 24, 4, 6, 40
CAUSAL = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)[None, None]

Weights = dict[str, Tensor]


@contextmanager
def all_double():
    """Hugging Face's layers convert to float32 here and there; here that name means float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.multiple(torch, float32=torch.float64, float=torch.float64):
            yield
    finally:
        torch.set_default_dtype(before)


def make(kind: type[Module], *args, **kwargs) -> Module:
    """A layer of Hugging Face's in float64, all of whose parameters, norms and biases too, are random."""
    with all_double():
        layer = kind(*args, **kwargs).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    return layer


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_parity(
    backend: str,
    ours: Module,
    theirs: Module,
    rename: Callable[[Weights], Weights],
    run_ours: Callable[..., Tensor],
    run_theirs: Callable[..., Tensor],
    *inputs: Tensor,
) -> None:
    """Outputs, gradients of inputs and parameters. rename: their tensors by name -> ours, without loss."""
    named = rename(dict(theirs.named_parameters()))
    assert sum(t.numel() for t in named.values()) == sum(t.numel() for t in theirs.parameters())
    ours.eval().load_state_dict(named, strict=True)
    with all_double():
        expected = run_theirs(*inputs)
    with use_backend(backend):
        actual = run_ours(*inputs)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, [*inputs, *theirs.parameters()], cotangent)
    of_theirs = rename(dict(zip(dict(theirs.named_parameters()), gradients[len(inputs) :], strict=True)))
    names, parameters = zip(*ours.named_parameters(), strict=True)
    found = torch.autograd.grad(actual, [*inputs, *parameters], cotangent)
    for a, e in zip(found, [*gradients[: len(inputs)], *(of_theirs[n] for n in names)], strict=True):
        torch.testing.assert_close(a, e)


def joined(theirs: Weights, pattern: str, *names: str) -> Tensor:
    return torch.cat([theirs[pattern.format(name)] for name in names])


# --- T5 ---

T5 = {
    "head_dim": 8,  # apart from d_model / heads
    "norm": "rms_norm",
    "norm_first": True,
    "norm_eps": 1e-6,
    "qkv_bias": False,
    "out_bias": False,
    "ffn_bias": False,
    "num_buckets": 8,
    "max_distance": 20,
    "scale": 1.0,
    "dtype": torch.float64,
}


def t5_config(is_decoder: bool, **options) -> T5Config:
    sizes = {"d_model": E, "d_kv": 8, "d_ff": F, "num_heads": H}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    return T5Config(**sizes, **buckets, is_decoder=is_decoder, attn_implementation="eager", **options)


def t5_weights(theirs: Weights, gated: bool = False) -> Weights:
    """Of a T5Block, by our names."""
    named, last = {}, max(int(name.split(".")[1]) for name in theirs)
    pattern = "layer.0.SelfAttention.{}.weight"
    named["self_attn.qkv.weight"] = joined(theirs, pattern, "q", "k", "v")
    named["self_attn.out.weight"] = theirs[pattern.format("o")]
    if pattern.format("relative_attention_bias") in theirs:
        named["self_attn.position.weight"] = theirs[pattern.format("relative_attention_bias")]
    named["self_attn_norm.weight"] = theirs["layer.0.layer_norm.weight"]
    if last == 2:
        pattern = "layer.1.EncDecAttention.{}.weight"
        named["cross_attn.query.weight"] = theirs[pattern.format("q")]
        named["cross_attn.kv.weight"] = joined(theirs, pattern, "k", "v")
        named["cross_attn.out.weight"] = theirs[pattern.format("o")]
        named["cross_attn_norm.weight"] = theirs["layer.1.layer_norm.weight"]
    pattern = f"layer.{last}.DenseReluDense.{{}}.weight"
    named["ffn.linear1.weight"] = joined(theirs, pattern, *(["wi_0", "wi_1"] if gated else ["wi"]))
    named["ffn.linear2.weight"] = theirs[pattern.format("wo")]
    named["ffn_norm.weight"] = theirs[f"layer.{last}.layer_norm.weight"]
    return named


@pytest.mark.parametrize("target", SERVING)
@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated"])
def test_t5_encoder_layers_share_the_table_of_the_first(gated: bool, target):
    config = t5_config(False, feed_forward_proj="gated-gelu" if gated else "relu")
    theirs = torch.nn.ModuleList([make(T5Block, config, has_relative_attention_bias=i == 0) for i in range(2)])
    activation = {"activation": "geglu_tanh" if gated else "relu"}
    ours = torch.nn.ModuleList(
        [EncoderLayer(E, H, F, position=position, **T5, **activation) for position in ("t5", "none")]
    )
    padding = torch.arange(S) >= torch.tensor([S, S - 4])[:, None]

    def run_theirs(x):
        mask = torch.zeros(B, 1, 1, S).masked_fill(padding[:, None, None], torch.finfo(torch.float64).min)
        x, bias, _ = theirs[0](x, attention_mask=mask)
        return theirs[1](x, attention_mask=mask, position_bias=bias)[0]

    def run_ours(x):
        bias = ours[0].self_attn.position()
        for layer in ours:
            x = layer(x, src_key_padding_mask=padding, relative_bias=bias)
        return x

    def rename(weights: Weights) -> Weights:
        layers = [{n[2:]: t for n, t in weights.items() if n[0] == i} for i in "01"]
        return {f"{i}.{n}": t for i, of in enumerate(layers) for n, t in t5_weights(of, gated).items()}

    assert_parity(target[0], ours, theirs, rename, run_ours, run_theirs, normal(B, S, E))


@pytest.mark.parametrize("target", SERVING)
def test_t5_decoder_layer(target):
    theirs = make(T5Block, t5_config(True), has_relative_attention_bias=True, layer_idx=0)
    ours = DecoderLayer(E, H, F, position="t5", **T5)
    padding = torch.arange(9) >= torch.tensor([9, 5])[:, None]

    def run_theirs(x, memory):
        hidden = torch.zeros(B, 1, 1, 9).masked_fill(padding[:, None, None], torch.finfo(torch.float64).min)
        masks = {"attention_mask": CAUSAL, "encoder_attention_mask": hidden}
        return theirs(x, encoder_hidden_states=memory, **masks)[0]

    def run_ours(x, memory):
        return ours(x, memory, memory_key_padding_mask=padding)

    assert_parity(target[0], ours, theirs, t5_weights, run_ours, run_theirs, normal(B, S, E), normal(B, 9, E))


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (64, 256), (10, 7)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_to_the_integer(bidirectional: bool, num_buckets: int, max_distance: int):
    distance = torch.arange(-300, 301)
    options = {"num_buckets": num_buckets, "max_distance": max_distance, "bidirectional": bidirectional}
    expected = T5Attention._relative_position_bucket(distance, **options)
    assert torch.equal(bucket(distance, **options), expected)


# --- decoders with rotary positions ---


def position_embeddings(rotary: Rotary) -> tuple[Tensor, Tensor]:
    """cos and sin (1, S, dim) as Hugging Face's layers take them."""
    return tuple(torch.cat([t, t], -1)[None] for t in rotary.tables(torch.arange(S), torch.float64))


@pytest.mark.parametrize("target", SERVING)
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "in turn"])
def test_gpt_neox_layer(parallel: bool, target):
    sizes = {"hidden_size": E, "num_attention_heads": H, "intermediate_size": F, "use_parallel_residual": parallel}
    config = GPTNeoXConfig(**sizes, attn_implementation="eager", rotary_pct=0.67, layer_norm_eps=1e-3)
    theirs = make(GPTNeoXLayer, config, 0)
    options = {"norm_first": True, "norm_eps": 1e-3, "activation": "gelu", "position": "rotary", "rotary_dim": 4}
    ours = EncoderLayer(E, H, F, parallel_residual=parallel, causal=True, dtype=torch.float64, **options)

    def rename(weights: Weights) -> Weights:
        named = {}
        for kind in ("weight", "bias"):
            qkv = weights[f"attention.query_key_value.{kind}"].unflatten(0, (H, 3, D))
            named[f"self_attn.qkv.{kind}"] = qkv.transpose(0, 1).flatten(0, 2)
            named[f"self_attn.out.{kind}"] = weights[f"attention.dense.{kind}"]
            named[f"ffn.linear1.{kind}"] = weights[f"mlp.dense_h_to_4h.{kind}"]
            named[f"ffn.linear2.{kind}"] = weights[f"mlp.dense_4h_to_h.{kind}"]
            named[f"self_attn_norm.{kind}"] = weights[f"input_layernorm.{kind}"]
            named[f"ffn_norm.{kind}"] = weights[f"post_attention_layernorm.{kind}"]
        return named

    def run_theirs(x):
        tables = position_embeddings(ours.self_attn.position)
        return theirs(x, attention_mask=CAUSAL, position_embeddings=tables)

    assert_parity(target[0], ours, theirs, rename, ours, run_theirs, normal(B, S, E))


@pytest.mark.parametrize("target", SERVING)
def test_gptj_block(target):
    sizes = {"n_embd": E, "n_head": H, "n_inner": F, "n_positions": 32, "rotary_dim": 4}
    theirs = make(GPTJBlock, GPTJConfig(**sizes, attn_implementation="eager"), 0)
    options = {"norm_first": True, "activation": "gelu_tanh", "qkv_bias": False, "out_bias": False}
    rotary = {"position": "rotary", "rotary_dim": 4, "rotary_interleaved": True}
    ours = EncoderLayer(
        E, H, F, parallel_residual=True, shared_norm=True, causal=True, dtype=torch.float64, **options, **rotary
    )
    positions = torch.stack([torch.arange(S), torch.arange(S) + 7])  # each sequence its own

    def rename(weights: Weights) -> Weights:
        named = {"self_attn.qkv.weight": joined(weights, "attn.{}_proj.weight", "q", "k", "v")}
        named["self_attn.out.weight"] = weights["attn.out_proj.weight"]
        pairs = {"ffn.linear1": "mlp.fc_in", "ffn.linear2": "mlp.fc_out", "self_attn_norm": "ln_1"}
        for mine, other in pairs.items():
            named |= {f"{mine}.{kind}": weights[f"{other}.{kind}"] for kind in ("weight", "bias")}
        return named

    def run_theirs(x):
        return theirs(x, attention_mask=CAUSAL, position_ids=positions)[0]

    def run_ours(x):
        return ours(x, positions=positions)

    assert_parity(target[0], ours, theirs, rename, run_ours, run_theirs, normal(B, S, E))


@pytest.mark.parametrize("target", SERVING)
def test_llama_layer_with_grouped_heads(target):
    sizes = {"hidden_size": E, "num_attention_heads": H, "num_key_value_heads": 2, "intermediate_size": F}
    theirs = make(LlamaDecoderLayer, LlamaConfig(**sizes, head_dim=8, attn_implementation="eager"), 0)
    options = {"head_dim": 8, "norm": "rms_norm", "norm_first": True, "norm_eps": 1e-6, "activation": "swiglu"}
    without = {"qkv_bias": False, "out_bias": False, "ffn_bias": False}
    ours = EncoderLayer(
        E, H, F, num_kv_heads=2, causal=True, position="rotary", dtype=torch.float64, **options, **without
    )

    def rename(weights: Weights) -> Weights:
        return {
            "self_attn.qkv.weight": joined(weights, "self_attn.{}_proj.weight", "q", "k", "v"),
            "self_attn.out.weight": weights["self_attn.o_proj.weight"],
            "ffn.linear1.weight": joined(weights, "mlp.{}_proj.weight", "gate", "up"),
            "ffn.linear2.weight": weights["mlp.down_proj.weight"],
            "self_attn_norm.weight": weights["input_layernorm.weight"],
            "ffn_norm.weight": weights["post_attention_layernorm.weight"],
        }

    def run_theirs(x):
        tables = position_embeddings(ours.self_attn.position)
        return theirs(x, attention_mask=CAUSAL, position_embeddings=tables)

    assert_parity(target[0], ours, theirs, rename, ours, run_theirs, normal(B, S, E))


@pytest.mark.parametrize("kind", ["llama", "neox", "gptj"])
def test_rotary_tables(kind: str):
    """The angles of Hugging Face's, in float32 as they are there."""
    positions = torch.arange(50)
    if kind == "gptj":
        sin, cos = create_sinusoidal_positions(50, 12).chunk(2, -1)
        actual = Rotary(12, interleaved=True).tables(positions)
    else:
        config, table = {
            "llama": (LlamaConfig(head_dim=12, rope_theta=500.0), LlamaRotaryEmbedding),
            "neox": (GPTNeoXConfig(hidden_size=48, num_attention_heads=2, rotary_pct=0.5), GPTNeoXRotaryEmbedding),
        }[kind]
        cos, sin = (t[0, :, :6] for t in table(config)(torch.zeros(1), positions[None]))
        actual = Rotary(12, config.rope_parameters["rope_theta"]).tables(positions)
    torch.testing.assert_close(actual, (cos, sin))


# --- encoders, slopes ---


@pytest.mark.parametrize("target", SERVING)
def test_bert_layer(target):
    sizes = {"hidden_size": E, "num_attention_heads": H, "intermediate_size": F}
    theirs = make(BertLayer, BertConfig(**sizes, attn_implementation="eager", layer_norm_eps=1e-3))
    ours = EncoderLayer(E, H, F, activation="gelu", norm_eps=1e-3, dtype=torch.float64)
    padding = torch.arange(S) >= torch.tensor([S - 6, S])[:, None]

    def rename(weights: Weights) -> Weights:
        named = {}
        pairs = {"self_attn.out": "attention.output.dense", "self_attn_norm": "attention.output.LayerNorm"}
        pairs |= {"ffn.linear1": "intermediate.dense", "ffn.linear2": "output.dense", "ffn_norm": "output.LayerNorm"}
        for kind in ("weight", "bias"):
            qkv = joined(weights, f"attention.self.{{}}.{kind}", "query", "key", "value")
            named |= {f"self_attn.qkv.{kind}": qkv}
            named |= {f"{mine}.{kind}": weights[f"{other}.{kind}"] for mine, other in pairs.items()}
        return named

    def run_theirs(x):
        mask = torch.zeros(B, 1, 1, S).masked_fill(padding[:, None, None], torch.finfo(torch.float64).min)
        return theirs(x, attention_mask=mask)

    def run_ours(x):
        return ours(x, src_key_padding_mask=padding)

    assert_parity(target[0], ours, theirs, rename, run_ours, run_theirs, normal(B, S, E))


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20])
def test_alibi_slopes_are_blooms(heads: int):
    """Bloom adds slope * j, a constant a row away from -slope * |j - i|."""
    expected = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(heads), expected[:, 0, 1])
