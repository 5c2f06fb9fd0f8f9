"""Hugging Face's layers as peers, made from configurations and given the weights of pyllm's; nothing is downloaded.

Each function takes pyllm's module, the width, the dropout and the causal or padding mask that transformers' models make
(True = take part; None where its layers need none), and returns the layer and its arguments after the inputs.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

HEAD_DIM = 64

Made = tuple[Module, dict]


def _on(module: Module, weights: dict[str, Tensor], like: Module) -> Module:
    """The module with these weights, copies of them, in the mode of pyllm's."""
    first = next(like.parameters())
    module = module.to(device=first.device, dtype=first.dtype)
    module.load_state_dict({name: t.detach().clone() for name, t in weights.items()})
    return module.train(like.training)


def _pairs(weights: dict[str, Tensor], names: dict[str, str], transposed: bool = False) -> dict[str, Tensor]:
    """Weights and biases by other names; transposed: matrices as GPT-2's Conv1D has them."""
    renamed = {}
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            t = weights[f"{ours}.{kind}"]
            renamed[f"{theirs}.{kind}"] = t.T if transposed and t.dim() == 2 else t
    return renamed


def bert(ours: Module, width: int, dropout: float, mask: Tensor | None) -> Made:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(
        hidden_size=width,
        num_attention_heads=width // HEAD_DIM,
        intermediate_size=4 * width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        layer_norm_eps=1e-5,
        attn_implementation="sdpa",
    )
    w = {name.removeprefix("layers.0."): t for name, t in ours.state_dict().items()}
    names = {"self_attn.out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm"}
    names |= {"linear1": "intermediate.dense", "linear2": "output.dense", "norm2": "output.LayerNorm"}
    weights = _pairs(w, names)
    for kind in ("weight", "bias"):
        parts = w[f"self_attn.in_proj_{kind}"].chunk(3)
        weights |= {f"attention.self.{n}.{kind}": t for n, t in zip(("query", "key", "value"), parts, strict=True)}
    return _on(BertLayer(config), weights, ours), {"attention_mask": mask}


def gpt2(ours: Module, width: int, dropout: float, mask: Tensor | None) -> Made:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    config = GPT2Config(
        n_embd=width,
        n_head=width // HEAD_DIM,
        resid_pdrop=dropout,
        attn_pdrop=dropout,
        activation_function="gelu_pytorch_tanh",  # gelu_new's numbers, by PyTorch's kernel
        attn_implementation="sdpa",
    )
    w = {name.removeprefix("layers.0."): t for name, t in ours.state_dict().items()}
    w |= {f"self_attn.in_proj.{kind}": w[f"self_attn.in_proj_{kind}"] for kind in ("weight", "bias")}
    names = {"self_attn.in_proj": "attn.c_attn", "self_attn.out_proj": "attn.c_proj", "norm1": "ln_1", "norm2": "ln_2"}
    weights = _pairs(w, names | {"linear1": "mlp.c_fc", "linear2": "mlp.c_proj"}, transposed=True)
    return _on(GPT2Block(config, layer_idx=0), weights, ours), {"attention_mask": mask}


def t5(decoder: bool, ours: Module, width: int, dropout: float, mask: Tensor | None) -> Made:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Block

    config = T5Config(
        d_model=width,
        d_kv=HEAD_DIM,
        d_ff=4 * width,
        num_heads=width // HEAD_DIM,
        dropout_rate=dropout,
        is_decoder=decoder,
        attn_implementation="sdpa",
    )
    w = ours.state_dict()
    weights = {"layer.0.layer_norm.weight": w["self_attn_norm.weight"]}
    attentions = {"layer.0.SelfAttention": ("self_attn.out.weight", w["self_attn.qkv.weight"])}
    if decoder:
        weights["layer.1.layer_norm.weight"] = w["cross_attn_norm.weight"]
        joined = torch.cat([w["cross_attn.query.weight"], w["cross_attn.kv.weight"]])
        attentions["layer.1.EncDecAttention"] = ("cross_attn.out.weight", joined)
    for theirs, (out, qkv) in attentions.items():
        weights |= {f"{theirs}.{n}.weight": t for n, t in zip("qkvo", [*qkv.chunk(3), w[out]], strict=True)}
    weights["layer.0.SelfAttention.relative_attention_bias.weight"] = w["self_attn.position.weight"]
    last = f"layer.{1 + decoder}"
    weights |= {f"{last}.DenseReluDense.{n}.weight": w[f"ffn.linear{i}.weight"] for i, n in ((1, "wi"), (2, "wo"))}
    weights[f"{last}.layer_norm.weight"] = w["ffn_norm.weight"]
    block = _on(T5Block(config, has_relative_attention_bias=True, layer_idx=0), weights, ours)
    return block, {"attention_mask": mask}


def llama(ours: Module, width: int, dropout: float, mask: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Made:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    attention = ours.self_attn
    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=attention.heads,
        num_key_value_heads=attention.kv_heads,
        head_dim=HEAD_DIM,
        intermediate_size=4 * width,
        attention_dropout=dropout,
        rms_norm_eps=ours.ffn_norm.eps,
        attn_implementation="sdpa",
    )
    w = ours.state_dict()
    sizes = [HEAD_DIM * n for n in (attention.heads, attention.kv_heads, attention.kv_heads)]
    weights = {
        f"self_attn.{n}_proj.weight": t for n, t in zip("qkv", w["self_attn.qkv.weight"].split(sizes), strict=True)
    }
    gate, up = w["ffn.linear1.weight"].chunk(2)
    weights |= {
        "self_attn.o_proj.weight": w["self_attn.out.weight"],
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": w["ffn.linear2.weight"],
        "input_layernorm.weight": w["self_attn_norm.weight"],
        "post_attention_layernorm.weight": w["ffn_norm.weight"],
    }
    layer = _on(LlamaDecoderLayer(config, 0), weights, ours)
    dtype = next(ours.parameters()).dtype
    tables = tuple(torch.cat([t, t], -1)[None].to(dtype) for t in rotary)
    return layer, {"attention_mask": mask, "position_embeddings": tables}


t5_encoder: Callable[..., Made] = functools.partial(t5, False)
t5_decoder: Callable[..., Made] = functools.partial(t5, True)
