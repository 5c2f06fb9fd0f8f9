"""patch and unpatch: turn the torch.nn layers of a model that exists into pyllm's, and back.

Only the class of a module changes, and pyllm's classes add no state: parameters, buffers, hooks, optimizers and the
state_dict are the very same objects before and after. Nothing in torch itself is changed.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.nn import Module

from pyllm import nn
from pyllm.nn.dropout import Dropout
from pyllm.nn.plain import is_written

_NAMES = [name for name in nn.__all__ if isinstance(getattr(torch.nn, name, None), type)]  # those that torch has too
_REPLACEMENTS = {getattr(torch.nn, name): getattr(nn, name) for name in _NAMES}
_ORIGINALS = {ours: theirs for theirs, ours in _REPLACEMENTS.items()} | {Dropout: torch.nn.Dropout}
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # whose dropouts are replaced, too
_MARK = "_pyllm_patched"  # in the module's __dict__, so that copies of a patched model can be unpatched
_PACKS = "batches with padding run as their tokens alone, and padded positions are 0 (pack=False: torch.nn's values)"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Report:
    """What `patch` or `unpatch` did, by qualified name ("" is the model itself).

    replaced: name -> class the module had; left: name -> why a module of one of torch's layers stayed what it is.
    differs: name -> where a module's results are now other than torch's.
    """

    action: str
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = Counter(self.replaced.values())
        lines = [f"{self.action} {len(self.replaced)} modules" + (f", left {len(self.left)}" if self.left else "")]
        lines += [f"  {count} x {kind}" for kind, count in counts.items()]
        lines += [f"  left {name or '(the model)'}: {why}" for name, why in self.left.items()]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.differs.items()]
        return "\n".join(lines)


def patch(model: Module, *, pack: bool = True) -> Report:
    """Replaces torch.nn's layers in model by pyllm's of the same name, in place; patching twice is patching once.

    Replaced are LayerNorm, RMSNorm, Softmax, MultiheadAttention and the Transformer classes, with the Dropouts of their
    layers, where a module is exactly of that class: the report says which modules were left, and why. pack: whether a
    TransformerEncoder whose enable_nested_tensor is set may run a padded batch as its tokens alone, in training too;
    padded positions then come out as 0, where torch.nn's training computes values that nothing should read. pack=False
    computes them.
    Raises TypeError if model is not a Module.
    """
    report = Report("replaced")
    for name, module in _modules("patch", model):
        kind = type(module)
        if _MARK in module.__dict__ and kind is nn.TransformerEncoder:
            module.pack = pack
        if kind not in _ORIGINALS and isinstance(module, tuple(_REPLACEMENTS)):
            why = _unfit(module)
            if why is not None:
                report.left[name] = why
                continue
            _replace(report, name, module, _REPLACEMENTS[kind])
            if kind is torch.nn.TransformerEncoder:
                module.pack = pack
                if pack and module.enable_nested_tensor:
                    report.differs[name] = _PACKS
        if type(module) in _LAYERS:  # by now, or before
            for part, child in module.named_children():
                if part.startswith("dropout") and type(child) is torch.nn.Dropout and _unfit(child) is None:
                    _replace(report, f"{name}.{part}" if name else part, child, Dropout)
    for module in model.modules():
        if type(module) is nn.Transformer:
            module.encoder_feeds_decoder()
    return report


def unpatch(model: Module) -> Report:
    """Gives every module that `patch` replaced its torch.nn class back. Modules built as pyllm's stay as they are.

    A module whose class was changed after `patch` is left. Raises TypeError if model is not a Module.
    """
    report = Report("restored")
    for name, module in _modules("unpatch", model):
        if _MARK not in module.__dict__:
            continue
        kind = type(module)
        if kind not in _ORIGINALS:
            report.left[name] = f"its class was changed to {kind.__name__} after patch"
            continue
        del module.__dict__[_MARK]
        for setting in ("pack", "padding_is_read"):
            module.__dict__.pop(setting, None)
        module.__class__ = _ORIGINALS[kind]
        report.replaced[name] = kind.__name__
    return report


def _replace(report: Report, name: str, module: Module, kind: type[Module]) -> None:
    report.replaced[name] = type(module).__name__
    module.__class__ = kind
    module.__dict__[_MARK] = True


def _modules(function: str, model: Module):
    if not isinstance(model, Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _unfit(module: Module) -> str | None:
    """Why a module of one of torch's classes, or of a subclass, cannot be pyllm's; None if it can."""
    kind = type(module)
    if kind not in _ORIGINALS.values():
        base = next(b for b in kind.__mro__ if b in _REPLACEMENTS)
        return f"{kind.__module__}.{kind.__name__} is a subclass of torch.nn.{base.__name__}"
    if "forward" in module.__dict__:
        return f"{kind.__name__}.forward was replaced on this instance"
    if not is_written(kind):
        return f"a method of torch.nn.{kind.__name__} was replaced"
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dtype not in _DTYPES:
            return f"{kind.__name__}.{name} is {parameter.dtype}"
    return None
