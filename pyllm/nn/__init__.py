"""Drop-in replacements for torch.nn's modules, configurable blocks, and what models need around them."""

from pyllm.nn import functional
from pyllm.nn.attention import MultiheadAttention
from pyllm.nn.cache import KVCache
from pyllm.nn.decoder import DecoderLayer, TransformerDecoder, TransformerDecoderLayer
from pyllm.nn.encoder import EncoderLayer, TransformerEncoder, TransformerEncoderLayer
from pyllm.nn.loss import CrossEntropyLoss
from pyllm.nn.norm import LayerNorm, RMSNorm, Softmax
from pyllm.nn.packing import Packing, pad, unpad
from pyllm.nn.positions import LearnedPositions, RelativePositionBias, Rotary, SinusoidalPositions, alibi_slopes
from pyllm.nn.transformer import Transformer

__all__ = [
    "CrossEntropyLoss",
    "DecoderLayer",
    "EncoderLayer",
    "KVCache",
    "LayerNorm",
    "LearnedPositions",
    "MultiheadAttention",
    "Packing",
    "RMSNorm",
    "RelativePositionBias",
    "Rotary",
    "SinusoidalPositions",
    "Softmax",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "alibi_slopes",
    "functional",
    "pad",
    "unpad",
]
