"""A layer's dropout is that of its seed, whoever watches its modules and however they are called."""

from contextlib import nullcontext

import pytest
import torch
from test_module_calls import inputs
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch_parity import E, H

import pyllm
from pyllm.nn import DecoderLayer, EncoderLayer

pytestmark = pytest.mark.usefixtures("one_thread")

DROPPING = {
    "TransformerEncoderLayer": lambda: pyllm.nn.TransformerEncoderLayer(E, H, 40, 0.3, batch_first=True),
    "TransformerDecoderLayer": lambda: pyllm.nn.TransformerDecoderLayer(E, H, 40, 0.3, batch_first=True),
    "TransformerEncoderLayer, own activation": lambda: pyllm.nn.TransformerEncoderLayer(
        E, H, 40, 0.3, torch.tanh, batch_first=True
    ),
    "TransformerEncoderLayer, patched": lambda: _patched(nn.TransformerEncoderLayer(E, H, 40, 0.3, batch_first=True)),
    "TransformerEncoderLayer, own dropout": lambda: _with_own_dropout(),
    "TransformerEncoderLayer, in place": lambda: _in_place(),
    "EncoderLayer": lambda: EncoderLayer(E, H, 40, dropout=0.3, activation="swiglu", norm_first=True),
    "DecoderLayer": lambda: DecoderLayer(E, H, 40, dropout=0.3),
}


def _with_own_dropout():
    layer = DROPPING["TransformerEncoderLayer"]()
    layer.dropout, layer.dropout1 = nn.Dropout(0.4), nn.Dropout(0.2)
    return layer


def _in_place():
    layer = DROPPING["TransformerEncoderLayer"]()
    layer.dropout1.inplace = layer.dropout2.inplace = True
    return layer


def _patched(model):
    pyllm.patch(model)
    return model


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_the_same_whoever_watches(name):
    layer = DROPPING[name]()
    arguments = inputs(name, grad=True)

    def found(watch):
        torch.manual_seed(3)
        with watch:
            out = layer(*arguments)
        return out, *torch.autograd.grad(out.sin().sum(), [*arguments, *layer.parameters()])

    expected = found(nullcontext())
    own = [part for part in layer.modules() if type(part) is nn.Dropout]  # which draws as torch's, being called
    if not own:
        torch.testing.assert_close(found(FlopCounterMode(display=False)), expected, rtol=1e-4, atol=1e-5)
    for part in [part for part in layer.modules() if part not in own]:
        handle = part.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(found(nullcontext()), expected, rtol=1e-4, atol=1e-5)
        handle.remove()


def test_a_checkpoint_that_nobody_watches_again():
    """What was watched in the forward is computed again in the backward by the fused kernels."""
    layer, (x,) = DROPPING["TransformerEncoderLayer"](), inputs("", grad=True)
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        with FlopCounterMode(display=False):
            out = checkpoint(layer, x, use_reentrant=True) if again else layer(x)
        found.append(torch.autograd.grad(out.sin().sum(), x) if not again else _gradient(out, x))
    torch.testing.assert_close(*found)


def _gradient(out, x):
    x.grad = None
    out.sin().sum().backward()
    return (x.grad,)


def test_dropout_of_a_distributed_tensor():
    """Whose rules are of PyTorch's operators."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        layer = pyllm.nn.TransformerEncoderLayer(E, H, 40, 0.5)
        x = torch.distributed.tensor.distribute_tensor(torch.ones(3, E), mesh)
        dropped = layer.dropout1(x).full_tensor()
        assert set(dropped.unique().tolist()) == {0.0, 2.0}
    finally:
        torch.distributed.destroy_process_group()
