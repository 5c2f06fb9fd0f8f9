"""How linear_cross_entropy goes over its logits in chunks, on the operators of either kernel backend.

`kernels` is torch.ops.pyllm or torch.ops.pyllm_triton. A chunk's logits lie in one buffer, which is used again.
"""

import torch
from torch import Tensor

from pyllm.reference import statistics_type

DEFAULT_MEMORY = 32 * 2**20
# Fewer make thin matrices, whose products are slow.
FEWEST_TOKENS = 128
# Rows of a 16-bit product that wait to be added to a float32 accumulator, where no product adds to one.
PRODUCT_ROWS = 2048


def plan(hidden: Tensor, weight: Tensor, wanted: list[bool], late: bool, budget: int | None) -> tuple[bool, int]:
    """Whether to go by tokens, rather than by vocabulary, and the bytes of working memory.

    late: the gradients cannot be made in the forward. Raises ValueError for a budget that is too small.
    """
    n, classes = hidden.shape[0], weight.shape[0]
    fixed_tokens, token = _fixed(weight, wanted[1]), classes * hidden.itemsize
    fixed_columns, column = _fixed(hidden, wanted[0]), n * hidden.itemsize
    tokens_fit = any(wanted) and not late
    memory = max(DEFAULT_MEMORY, n * token // 8, fixed_columns + column) if budget is None else budget
    if tokens_fit and memory >= fixed_tokens + min(n, FEWEST_TOKENS) * token:
        return True, memory
    if memory >= fixed_columns + column:
        return False, memory
    if tokens_fit and memory >= fixed_tokens + token:
        return True, memory
    least = fixed_columns + column
    if tokens_fit:
        least = min(least, fixed_tokens + token)
    raise ValueError(f"linear_cross_entropy: memory_budget must be at least {least} bytes here, got {budget}")


def _fixed(accumulated: Tensor, wanted: bool) -> int:
    """Bytes, besides the logits, of accumulating a gradient (rows, D) that is not of the statistics' type."""
    if not wanted or accumulated.dtype == statistics_type(accumulated):
        return 0
    rows, width = accumulated.shape
    waiting = 0 if accumulated.is_cuda else min(rows, PRODUCT_ROWS) * accumulated.itemsize
    return width * (rows * 4 + waiting)


def _chunks(total: int, room: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of about equal chunks of a total, each element of which takes `size` of the room."""
    most = max(1, min(total, room // max(size, 1)))
    step = -(-total // -(-total // most)) if total else 1
    if 64 < step < total:  # a multiple of it keeps rows aligned
        step = min(-(-step // 64), max(most // 64, 1)) * 64
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


class _Accumulator:
    """A gradient that is summed in the statistics' type."""

    def __init__(self, like: Tensor):
        self.dtype = like.dtype
        self.total = like.new_zeros(like.shape, dtype=statistics_type(like))

    def add(self, a: Tensor, b: Tensor) -> None:
        """total += a b."""
        if self.total.dtype == a.dtype:
            self.total.addmm_(a, b)
        elif a.is_cuda:
            torch.addmm(self.total, a, b, self.total.dtype, out=self.total)
        else:
            for start in range(0, a.shape[0], PRODUCT_ROWS):
                part = slice(start, start + PRODUCT_ROWS)
                self.total[part] += a[part] @ b

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


@torch.no_grad()
def by_tokens(
    kernels, hidden, weight, target, bias, scale, ignore_index, label_smoothing, z_loss, wanted, memory
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, classes = hidden.shape[0], weight.shape[0]
    statistics = statistics_type(hidden)
    loss = hidden.new_empty(n, dtype=statistics)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else hidden.new_empty(0)
    dweight = _Accumulator(weight) if wanted[1] else None
    dbias = hidden.new_zeros(classes if wanted[2] else 0, dtype=statistics)
    parts = _chunks(n, memory - _fixed(weight, wanted[1]), classes * hidden.itemsize)
    buffer = hidden.new_empty((parts[0][1] if parts else 0, classes))
    for start, stop in parts:
        rows = hidden[start:stop]
        logits = _product(rows, weight, bias, buffer[: stop - start])
        loss[start:stop] = kernels.cross_entropy_inplace_fwd(
            logits, target[start:stop], None, scale, ignore_index, label_smoothing, z_loss
        )
        if wanted[0]:
            torch.mm(logits, weight, out=dhidden[start:stop])
        if wanted[1]:
            dweight.add(logits.t(), rows)
        if wanted[2]:
            dbias += logits.sum(0, dtype=statistics)
    del buffer
    return loss, dhidden, dweight.result() if wanted[1] else hidden.new_empty(0), dbias.to(hidden.dtype)


def _pieces(hidden: Tensor, weight: Tensor, bias: Tensor | None, room: int):
    """(slice of the vocabulary, its logits (N, width)), one after the other in the same memory."""
    n = hidden.shape[0]
    parts = _chunks(weight.shape[0], room, n * hidden.itemsize)
    buffer = hidden.new_empty(n * parts[0][1] if parts else 0)
    for start, stop in parts:
        part = slice(start, stop)
        logits = buffer[: n * (stop - start)].view(n, stop - start)
        yield part, _product(hidden, weight[part], None if bias is None else bias[part], logits)


@torch.no_grad()
def statistics_by_vocabulary(kernels, hidden, weight, target, bias, first, memory) -> Tensor:
    statistics = hidden.new_zeros((4, hidden.shape[0]), dtype=statistics_type(hidden))
    statistics[0] = -torch.inf
    for part, logits in _pieces(hidden, weight, bias, memory):
        kernels.cross_entropy_shard_fwd(statistics, logits, target, first + part.start)
    return statistics


@torch.no_grad()
def gradients_by_vocabulary(
    kernels,
    dloss,
    statistics,
    hidden,
    weight,
    target,
    bias,
    ignore_index,
    label_smoothing,
    z_loss,
    classes,
    first,
    wanted,
    memory,
) -> tuple[Tensor, Tensor, Tensor]:
    coefficients = _coefficients(dloss, statistics, target, ignore_index, label_smoothing, z_loss, classes)
    dhidden = _Accumulator(hidden) if wanted[0] else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else hidden.new_empty(0)
    dbias = bias.new_empty(bias.shape) if wanted[2] else hidden.new_empty(0)
    for part, logits in _pieces(hidden, weight, bias, memory - _fixed(hidden, wanted[0])):
        kernels.cross_entropy_shard_bwd(logits, coefficients, target, first + part.start)
        if wanted[0]:
            dhidden.add(logits, weight[part])
        if wanted[1]:
            torch.mm(logits.t(), hidden, out=dweight[part])
        if wanted[2]:
            dbias[part] = logits.sum(0, dtype=coefficients.dtype)
    return dhidden.result() if wanted[0] else hidden.new_empty(0), dweight, dbias


def shift(peak: Tensor) -> Tensor:
    """What is subtracted in exponentials: the largest logit, or 0 where that is -inf."""
    return torch.where(peak == -torch.inf, 0.0, peak)


@torch.no_grad()
def losses(kernels, statistics, target, ignore_index, label_smoothing, z_loss, classes) -> Tensor:
    peak, total, logit, logits = statistics
    log_total = total.log()
    loss = (1 - label_smoothing) * (log_total - (logit - peak))
    if label_smoothing:
        loss = loss + label_smoothing * (peak + log_total - logits / classes)
    if z_loss:
        loss = loss + z_loss * (peak + log_total).square()
    return _where_counted(loss, target, ignore_index, classes)


def _coefficients(dloss, statistics, target, ignore_index, label_smoothing, z_loss, classes) -> Tensor:
    """(4, N): shift, a, b, c of cross_entropy_shard_bwd."""
    peak, total = statistics[:2]
    rows = dloss.expand(peak.shape)
    a = rows / total
    if z_loss:
        a = a * (1 + 2 * z_loss * (peak + total.log()))
    factors = (_where_counted(f, target, ignore_index, classes) for f in (a, (1 - label_smoothing) * rows))
    share = label_smoothing / max(classes, 1)
    return torch.stack([shift(peak), *factors, _where_counted(share * rows, target, ignore_index, classes)])


def _where_counted(values: Tensor, target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """The values; 0 where the target is ignored, NaN where it is out of bounds."""
    values = torch.where((target >= 0) & (target < classes), values, torch.nan)
    return torch.where(target == ignore_index, 0.0, values)
