"""Drop-in replacements for torch.nn's modules: same constructors, parameters and semantics, on pyllm's operators."""

from pyllm.nn import functional
from pyllm.nn.attention import MultiheadAttention
from pyllm.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from pyllm.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from pyllm.nn.norm import LayerNorm, RMSNorm, Softmax
from pyllm.nn.transformer import Transformer

__all__ = [
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Softmax",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "functional",
]
