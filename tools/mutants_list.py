"""The faults that mutants.py plants: rare branches, boundaries, one of several keys, features together.

A fault is (file, text that the file has once, text in its place, what pytest runs in tests/); a fifth element says why
no test can find it. `python tools/mutants.py --check` tells which entries a change of the code has made stale.
"""

from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    area: str
    file: str
    old: str
    new: str
    tests: str
    survives: str = ""

    def places(self, root: Path) -> int:
        path = root / self.file
        return path.read_text().count(self.old) if path.exists() else 0

    def changed(self, text: str) -> str:
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old}  ->  {new}"


# fmt: off
CACHE = "test_generation.py -k"
CACHES = [
    ("pyllm/nn/cache.py", "if sum(missing) > len(self._free):", "if max(missing) > len(self._free):", f"{CACHE} too_few"),
    ("pyllm/nn/cache.py", "if sum(missing) > len(self._free):", "if sum(missing) > len(self._free) + 1:", f"{CACHE} too_few"),
    ("pyllm/nn/cache.py", "len(held) - count : len(held)]", ":count]", f"{CACHE} new_pages"),
    ("pyllm/nn/cache.py", "-(-(length + new) // self.page_size)", "((length + new) // self.page_size + 1)", f"{CACHE} pages_are_held"),
    ("pyllm/nn/cache.py", "self._free += self._held[i][::-1]", "self._free += []", f"{CACHE} 'pages_are_held or too_few'"),
    ("pyllm/nn/cache.py", "self._held[i] = []", "self._held[i] = self._held[i][:1]", f"{CACHE} 'pages_are_held or too_few'"),
    ("pyllm/nn/cache.py", "return not any(self._lengths)", "return not all(self._lengths)", f"{CACHE} anew"),
    ("pyllm/nn/cache.py", "if length + count > self.capacity:", "if length + count > self.slots:", f"{CACHE} step_by_step"),
    ("pyllm/nn/cache.py", "            self._lengths[i] = 0\n", "", f"{CACHE} 'pages_are_held or memory_once'"),
    ("pyllm/nn/cache.py", "            self.lengths[i] = 0\n", "", f"{CACHE} 'pages_are_held or memory_once'"),
    ("pyllm/nn/self_attention.py", '"rotary", self.position.dim, self.position.base)', '"rotary", self.position.dim)', f"{CACHE} share_a_cache"),
    ("pyllm/nn/self_attention.py", '"rotary", self.position.dim, self.position.base)', '"rotary", self.position.base)', f"{CACHE} share_a_cache"),
    ("pyllm/nn/self_attention.py", 'cache.kept(("alibi", self.heads)', 'cache.kept(("alibi",)', f"{CACHE} share_a_cache"),
    ("pyllm/nn/self_attention.py", "tables, self.position.interleaved", "tables, False", f"{CACHE} share_a_cache"),
    ("pyllm/nn/self_attention.py", "attn_mask is None and key_padding_mask is None:\n            lengths", "attn_mask is None:\n            lengths", f"{CACHE} memory_once"),
    ("pyllm/nn/self_attention.py", "kept = cache.memory[layer]\n", "kept = cache.memory[0]\n", f"{CACHE} memory_once"),
]

PACKING = [
    ("pyllm/nn/encoder.py", "0.0 < packing.share <=", "0.0 <= packing.share <=", "test_packing.py -k padding_alone"),
    ("pyllm/nn/encoder.py", "_PACKED_SHARE = 0.9", "_PACKED_SHARE = 0.95", "test_packing.py -k not_packed"),
    ("pyllm/nn/encoder.py", "and not self.self_attn.add_zero_attn", "", "test_packing.py -k more_keys"),
    ("pyllm/nn/encoder.py", "and self.self_attn.bias_k is None", "", "test_packing.py -k more_keys"),
    ("pyllm/nn/encoder.py", "(mask is None) == bool(is_causal)", "(mask is None and is_causal)", "test_packing.py -k not_packed"),
    ("pyllm/nn/encoder.py", "(mask is None) == bool(is_causal)", "(mask is not None and not is_causal)", "test_packing.py -k without_its_mask"),
    ("pyllm/nn/encoder.py", "_thread.unread is not self", "_thread.unread is None and self.training", "test_packing.py -k 'looks_at_padding or interleave or one_after'"),
    ("pyllm/nn/encoder.py", "_thread = _Thread()", "_thread = _Thread", "test_packing.py -k interleave"),
    ("pyllm/nn/encoder.py", "or has_derivative(mask)", "", "test_packing.py -k learned"),
    ("pyllm/nn/encoder.py", "mask.shape[-2:] != (src.shape[1 if batch_first else 0],) * 2 or ", "", "test_packing.py -k without_its_mask"),
    ("pyllm/nn/attention.py", "(extended or has_derivative(attn_mask))", "extended", "test_packing.py -k learned"),
    ("pyllm/nn/attention.py", "needs_grad(mask) or transformed()", "needs_grad(mask)", "test_layer_derivatives.py -k causal"),
    ("pyllm/nn/transformer.py", "memory_key_padding_mask is src_key_padding_mask", "True", "test_packing.py -k reads_what"),
    ("pyllm/nn/transformer.py", "same and is_plain(self.encoder, TransformerEncoder)", "same and isinstance(self.encoder, TransformerEncoder)", "test_packing.py -k reads_what"),
    ("pyllm/nn/transformer.py", "(self.encoder,) if own or not isinstance(self.encoder, Module) else self.encoder.modules()", "(self.encoder,)", "test_packing.py -k reads_what"),
    ("pyllm/nn/dropout.py", "return _dropped(x, dropout) if is_plain(dropout, *DROPOUT) else dropout(x)", "return dropout(x)", "test_layer_dropout.py -k whoever"),
    ("pyllm/nn/residual.py", "        if isinstance(branch, _Called):  # which may have changed y\n            source = None\n", "", "test_memory_plan.py -k branch_may"),
    ("pyllm/nn/encoder.py", "< lengths[:, None]", "<= lengths[:, None]", "test_patch.py -k over_layers"),
    ("pyllm/nn/encoder.py", "kind = F._none_or_dtype(mask)", "return mask, key_padding_mask", "test_packing.py -k gives_it"),
    ("pyllm/nn/attention.py", "if self.training else 0.0\n        qkv", "if self.training else self.dropout\n        qkv", "test_packing.py -k dropout"),
    ("pyllm/nn/attention.py", "*bounds, is_causal=is_causal, dropout_p=dropout_p)", "*bounds, is_causal=is_causal)", "test_packing.py -k 'dropout or packed_is_padded'"),
    ("pyllm/nn/attention.py", "key_padding_mask = F.pad(key_padding_mask, (0, added))", "key_padding_mask = F.pad(key_padding_mask, (0, added), value=True)", "test_layers.py -k test_attention"),
    ("pyllm/nn/attention.py", "value=1.0 if attn_mask.dtype == torch.bool else 0.0", "value=0.0", "test_layers.py -k test_attention"),
    ("pyllm/nn/attention.py", "and not (padded and (extended or has_derivative(attn_mask)))", "", "test_layers.py -k test_attention"),
    ("pyllm/nn/self_attention.py", "positions = packing.positions", "positions = torch.arange(x.shape[1], device=x.device)", "test_packing.py -k block_on_tokens"),
    ("pyllm/nn/self_attention.py", 'options["dropout_p"] = self.dropout if self.training else 0.0', 'options["dropout_p"] = self.dropout if self.training and packing is None else 0.0', "test_packing.py -k block_on_tokens"),
    ("pyllm/nn/packing.py", "positions * batch + sequences", "positions + length * sequences", "test_packing.py -k inverse"),
]

DISPATCH = [
    ("pyllm/dispatch.py", "(row.width, row.elements), reverse=True", "(row.elements, row.width), reverse=True", "test_dispatch.py -k rules_by_size"),
    ("pyllm/dispatch.py", "(row.width, row.elements), reverse=True", "(row.width, row.elements)", "test_dispatch.py -k rules_by_size"),
    ("pyllm/dispatch.py", "(row.width, row.elements), reverse=True", "row.width, reverse=True", "test_dispatch.py -k rules_by_size"),
    ("pyllm/backend.py", "tensor.shape[-1] >= width", "tensor.shape[-1] > width", "test_dispatch.py -k rules_by_size"),
    ("pyllm/backend.py", "tensor.numel() >= elements and", "tensor.numel() > elements and", "test_dispatch.py -k rules_by_size"),
    ("pyllm/backend.py", '"both" if recorded else "forward"', '"both"', "test_dispatch.py -k rules_by_size"),
    ("pyllm/explain.py", "choice.backend if choice.fused else", "choice.backend if choice.kernel else", "test_explain.py"),
    ("setup.py", "if not demand and torch.version.cuda is None", "if torch.version.cuda is None", "test_install.py -k beside"),
]

GRAPHS = [
    ("pyllm/graphs.py", "leaf.device, leaf.requires_grad)", "leaf.device)", "test_graphs.py -k anew"),
    ("pyllm/graphs.py", "(leaf.shape, leaf.dtype, leaf.device", "(leaf.shape, leaf.device", "test_graphs.py -k anew"),
    ("pyllm/graphs.py", "else (type(leaf), leaf)", "else leaf", "test_graphs.py -k anew"),
    ("pyllm/graphs.py", "_autocast_dtype(), deterministic, backend.asked())", "_autocast_dtype(), backend.asked())", "test_graphs.py -k anew"),
    ("pyllm/graphs.py", "_autocast_dtype(), deterministic, backend.asked())", "deterministic, backend.asked())", "test_graphs.py -k anew"),
    ("pyllm/graphs.py", "_autocast_dtype(), deterministic, backend.asked())", "_autocast_dtype(), deterministic)", "test_graphs.py -k anew"),
    ("pyllm/graphs.py", "modes = (torch.is_grad_enabled(), ", "modes = (", "test_graphs.py -k anew"),
    ("pyllm/graphs.py", "for module in self._modules))", "for module in self._modules[:1]))", "test_graphs.py -k anew"),
    ("pyllm/graphs.py", "key = (spec, described,", "key = (described,", "test_graphs.py -k anew"),
    ("pyllm/graphs.py", "        self._kept.move_to_end(key)\n", "", "test_graphs.py -k longest"),
    ("pyllm/graphs.py", "popitem(last=False)", "popitem()", "test_graphs.py -k longest"),
    ("pyllm/graphs.py", "if len(self._kept) > self.captures:", "if len(self._kept) >= self.captures:", "test_graphs.py -k longest"),
    ("pyllm/graphs.py", "if self._calls < WARM_UPS:", "if self._calls <= WARM_UPS:", "test_graphs.py -k step"),
]

OPERATORS = [
    ("pyllm/ops/attention.py", 'wanted["distance_bias"], torch.are_deterministic_algorithms_enabled())', 'wanted["distance_bias"], False)', "test_handed_over.py -k deterministic"),
    ("pyllm/ops/attention.py", "right = 0 if is_causal else right", "right = 0 if is_causal and window is None else right", "test_handed_over.py -k attention"),
    ("pyllm/ops/attention.py", "and call.bottom_right and call.query.shape[2] != call.key.shape[2]", "and call.bottom_right and call.query.shape[2] > call.key.shape[2]", "test_attention.py -k 'bottom-short and torch'"),
    ("pyllm/ops/attention.py", "sk - sq if call.bottom_right else 0\n    rows", "0\n    rows", "test_attention.py -k 'flops or packed'"),
    ("pyllm/ops/attention_decode.py", "if length + added > capacity:", "if length >= capacity:", "test_attention_decode.py -k wrong_arguments"),
    ("pyllm/ops/attention_decode.py", "length + added < query.shape[2]:", "length + added < query.shape[2] - 1:", "test_attention_decode.py -k wrong_arguments"),
    ("pyllm/ops/cross_entropy.py", "scale is not None and logits.dtype == torch.float16", "False", "test_cross_entropy.py -k 'float16_gradients and native'"),
    ("pyllm/ops/cross_entropy.py", "return gradient.clone() if again else gradient.detach()", "return gradient.detach()", "test_cross_entropy.py -k 'kept and native'"),
    ("pyllm/ops/cross_entropy.py", "weight = None if weight is None else weight.to(dtype).contiguous()", "weight = None if weight is None else weight.to(dtype)", "test_cross_entropy.py -k 'strided and native'"),
    ("pyllm/ops/linear_cross_entropy.py", 'hidden.dtype == torch.float16 or shard[-1]', 'shard[-1]', "test_linear_cross_entropy.py -k float16_gradients"),
    ("pyllm/ops/linear_cross_entropy_chunks.py", "return torch.where(peak == -torch.inf, 0.0, peak)", "return peak", "test_linear_cross_entropy.py -k 'split_over and native'", "Only a row whose every logit is -inf has such a peak, and its loss and gradients are NaN either way."),
    ("pyllm/ops/linear_cross_entropy_chunks.py", "torch.where(target == ignore_index, 0.0, values)", "values", "test_linear_cross_entropy.py -k 'options and native'"),
    ("pyllm/ops/linear_cross_entropy_chunks.py", "share = label_smoothing / max(classes, 1)", "share = label_smoothing", "test_linear_cross_entropy.py -k 'options and native'"),
    ("pyllm/ops/relative_bias.py", "first = (distance > 0) * num_buckets", "first = (distance >= 0) * num_buckets", "test_positions.py -k buckets"),
    ("pyllm/ops/relative_bias.py", "distance < exact", "distance <= exact", "test_positions.py -k buckets", "At distance `exact` the logarithm is 0, and both branches give bucket `exact`."),
    ("pyllm/ops/rotary.py", "turn(dy, cos, sin, interleaved, not inverse)", "turn(dy, cos, sin, interleaved, True)", "test_rotary.py -k inverse"),
    ("pyllm/ops/_autocast.py", "if given.is_meta or not torch.is_autocast_enabled(given.device.type):", "if True:", "test_autocast.py -k 'minimal and native'"),
    ("pyllm/reference.py", "return x if _narrow else x.to(statistics_type(x))", "return x", "test_derivatives.py -k 'sixteen and native'"),
    ("pyllm/ops/cross_entropy.py", "torch.where((target != options[0]).any(), scale, 0.0)", "scale", "test_cross_entropy.py -k 'nothing_counts and native'"),
    ("pyllm/ops/cross_entropy.py", "                ctx.shared = True\n", "", "test_cross_entropy.py -k 'another_graph and native'"),
    ("pyllm/ops/cross_entropy.py", "ctx.shared = options, inplace, has_saved_tensor_hooks()", "ctx.shared = options, inplace, False", "test_saved_tensors.py -k 'hooks_hold and native'"),
    ("pyllm/ops/linear_cross_entropy.py", "ctx.shared = has_saved_tensor_hooks()", "ctx.shared = False", "test_saved_tensors.py -k 'hooks_hold and native'"),
    ("pyllm/ops/cross_entropy.py", "lost = total.abs() <", "lost = total <", "test_cross_entropy.py -k 'lost_them and native'"),
    ("pyllm/ops/cross_entropy.py", "_LEAST_SHARE = 32", "_LEAST_SHARE = 0", "test_cross_entropy.py -k 'lost_them and native'"),
    ("pyllm/ops/rotary.py", "        will_change(x)\n", "", "test_saved_tensors.py -k 'autograd_sees and native'"),
    ("pyllm/ops/attention_decode.py", "will_change(key_cache, value_cache)", "will_change(key_cache)", "test_saved_tensors.py -k 'autograd_sees and native'"),
    ("pyllm/ops/_checks.py", "any(map(torch._C._get_dispatch_mode, _TRACING_MODES))", "False", "test_tracers.py -k functionalize"),
    ("pyllm/reference.py", "(distance >= -left)", "(distance > -left)", "test_reference.py -k attention"),
    ("pyllm/reference.py", "(distance <= right)", "(distance < right)", "test_reference.py -k attention"),
    ("pyllm/reference.py", "(kept if weight is None else torch.where(kept, weight[index], 0.0)).sum()", "kept.sum()", "test_reference.py -k cross_entropy"),
    ("pyllm/reference.py", "int(p * 65536 + 0.5)", "int(p * 65536)", "test_dropout_add.py -k 65536th"),
    ("pyllm/reference.py", "call.dropout_p, batch * heads, sq, sk, first_batch * heads)", "call.dropout_p, batch * heads, sq, sk, 0)", "test_attention.py -k 'varlen and native'"),
    ("pyllm/reference.py", "reach = call.distance_bias.shape[1] // 2", "reach = call.distance_bias.shape[1] // 2 - 1", "test_attention.py -k 't5 and native'"),
    ("pyllm/testing.py", "budget = max(2 * plain_error + band", "budget = max(4 * plain_error + band", "test_budget.py"),
    ("pyllm/testing.py", "plain_error = max(plain_error, error)", "plain_error = plain_error + error", "test_budget.py"),
    ("pyllm/testing.py", "nan_to_num(0.0, posinf=0.0)", "nan_to_num(0.0)", "test_budget.py"),
]

DECODE = "test_attention_decode.py -k"
TRITON = [
    ("kernels/attention_backward.py", "tl.store(p_far, 1)", "tl.store(p_far, 0)", "test_attention.py -k 'large_number and triton'"),
    ("kernels/attention_backward.py", "tl.where(far, peak, b_shift)", "peak", "test_attention.py -k 'large_number and triton'"),
    ("pyllm/reference.py", "(length * heads * dim, dim, heads * dim, 1), dtype=dtype)", "(length * heads * dim, dim, heads * dim, 1), dtype=dtype).view(x.shape)", "test_layout.py -k 'in_place and triton'"),
    ("kernels/attention_decode.py", "first = tl.maximum(total - Sn - left, 0)", "first = tl.maximum(total - Sn - left + 1, 0)", f"{DECODE} 'begin_and_end and triton'"),
    ("kernels/attention_decode.py", "tl.exp(b_lse - tl.where(peak == -INF, 0.0, peak))", "tl.exp(b_lse - peak)", f"{DECODE} 'shares and triton'"),
    ("kernels/attention_decode.py", "end = tl.minimum(start + width, total)", "end = start + width", f"{DECODE} 'begin_and_end and triton'"),
    ("kernels/attention_decode.py", "o_place = total - Sn + o_row", "o_place = total - 1 + 0 * o_row", f"{DECODE} 'few and triton'"),
    ("kernels/attention_decode.py", "o_n // pages.size, mask=m_n", "o_n // pages.size * 0 + tl.min(o_n // pages.size, 0), mask=m_n", f"{DECODE} 'begin_and_end and triton'"),
    ("kernels/attention_decode.py", "row = o_n % pages.size", "row = o_n", f"{DECODE} 'paged and triton'"),
    ("kernels/cross_entropy.py", 'shift = tl.where(top == float("-inf"), 0.0, top)', "shift = top", "test_linear_cross_entropy.py -k 'without_a_chance and triton'"),
    ("kernels/cross_entropy.py", "tl.where(a == 0.0, 0.0, tl.exp(x - shift) * a)", "tl.exp(x - shift) * a", "test_cross_entropy.py -k 'hold_anything and triton'"),
    ("kernels/cross_entropy.py", "origin = tl.where(logit - logit == 0.0, logit, 0.0)", "origin = logit", "test_cross_entropy.py -k 'without_a_chance and triton'"),
    ("kernels/cross_entropy.py", "inside = kept & (target >= 0) & (target < N)", "inside = kept & (target >= 0) & (target <= N)", "test_cross_entropy.py -k 'out_of_bounds and triton'"),
    ("kernels/cross_entropy.py", "m_target = m_rows & (target >= 0) & (target < N)", "m_target = m_rows & (target >= 0)", "test_linear_cross_entropy.py -k 'split_over and triton'"),
    ("kernels/cross_entropy.py", "if factor != 1.0:", "if factor > 1.0:", "test_cross_entropy.py -k 'incoming and triton'"),
    ("kernels/softmax.py", "if len(sizes) > 3:", "if len(sizes) > 4:", "test_softmax.py -k 'test_mask and triton'"),
    ("kernels/softmax.py", 'tl.where(y == float("-inf"), 0.0, dy), tl.exp(y)', "dy, tl.exp(y)", "test_softmax.py -k 'test_mask and triton'"),
    ("kernels/softmax.py", "sq=x.shape[-2] if is_causal else 1", "sq=x.shape[-1] if is_causal else 1", "test_softmax.py -k 'causal and triton'"),
    ("kernels/norm.py", "delta * delta * (share * first)", "delta * delta * share", "test_norm.py -k 'test_norm and triton and 65536'"),
    ("kernels/norm.py", "count = tl.minimum(N - first, BLOCK_N)", "count = tl.minimum(N, BLOCK_N)", "test_norm.py -k 'test_norm and triton and 20001'"),
    ("kernels/rotary.py", "o_rest = 2 * pairs + tl.arange", "o_rest = pairs + tl.arange", "test_rotary.py -k 'test_rotary and triton'"),
    ("kernels/attention_common.py", "return value if 0 <= value < longest else None", "return value if 0 < value < longest else None", "test_attention.py -k 'causal and triton'"),
    ("kernels/attention_common.py", "0 if slopes.shape[0] == 1 else slopes.shape[1]", "slopes.shape[1]", "test_attention.py -k 'alibi and triton'"),
    ("kernels/attention_common.py", "full_start = tl.cdiv(tl.maximum(last - left, 0), BLOCK_C) * BLOCK_C", "full_start = tl.maximum(last - left, 0) // BLOCK_C * BLOCK_C", "test_attention.py -k 'window and triton'"),
    ("kernels/attention_common.py", "end = tl.minimum(cols, tl.maximum(last + right + 1, 0))", "end = tl.minimum(cols, tl.maximum(last + right, 0))", "test_attention.py -k 'within_budget and causal-tile-and-one and triton'"),
    ("kernels/attention_common.py", "b * sizes.H + h,\n        Sq,", "h,\n        Sq,", "test_attention.py -k 'drops_the_same and triton'"),
]

NATIVE = [
    ("csrc/cpu/norm_kernel.cpp", "        mean += left;\n", "", "test_norm.py -k 'constant_row and native'"),
    ("csrc/cpu/norm_kernel.cpp", "total.value[0] -= sum * left;", "", "test_norm.py -k 'constant_row and native'"),
    ("csrc/cpu/rows.h", "(after - before) - term", "0 * term", "test_norm.py -k many_rows"),
    ("csrc/cpu/attention_passes.h", "begin == block.begin && end == block.end && end - begin <= kKeyBlock", "end - begin <= kKeyBlock", "test_attention.py -k cut_into"),
    ("csrc/cpu/vec.h", "sizeof(C) == 8 ? 709 : 88", "88", "test_activation.py -k tail"),
    ("csrc/cpu/attention_decode.cpp", "std::max<int64_t>(0, first) / kPieceUnit", "(std::max<int64_t>(0, first) + 1) / kPieceUnit", f"{DECODE} 'begin_and_end and native'"),
    ("csrc/cpu/attention_decode.cpp", "longest = std::max(longest, sequences.back().keys);", "longest = sequences.back().keys;", f"{DECODE} 't5 and native'"),
    ("csrc/cpu/attention_decode.cpp", "sequence.pieces = divided(keys, size);", "sequence.pieces = divided(keys, size) + (sequence.keys == 0);", f"{DECODE} 'shares and native'"),
    ("csrc/cpu/attention_passes.h", "any |= far[row] = size > kFarFromZero", "any |= far[row] = size < 0", "test_attention.py -k 'large_number and native'"),
    ("csrc/cpu/attention_passes.h", "rows.lse[row] = softmax.peak[row];", "", "test_attention.py -k 'large_number and native'"),
    ("csrc/cpu/attention_passes.h", "scores, !begun, out);", "scores, key == block.begin, out);", "test_attention.py -k three_tiles"),
    ("csrc/cpu/attention_passes.h", "load(softmax.total + i) * rescale + total", "load(softmax.total + i) + total", "test_attention.py -k three_tiles"),
    ("csrc/cpu/attention_passes.h", "load(out + d * kQueryBlock + i) * rescale", "load(out + d * kQueryBlock + i)", "test_attention.py -k three_tiles"),
    ("csrc/cpu/attention_tile.h", "block.begin = block.begin / kPhiloxGroup * kPhiloxGroup;", "", "test_attention.py -k native"),
    ("csrc/cpu/attention_tile.h", "same + call.left;\n    return", "same + call.left + 1;\n    return", "test_attention.py -k native"),
    ("csrc/cpu/attention_tile.h", "high < block.count - 1", "high < block.count - 2", "test_attention.py -k native"),
    ("csrc/cpu/attention_tile.h", "distance > reach_ ? reach_ :", "distance > reach_ ? -reach_ :", "test_attention.py -k native"),
    ("csrc/cpu/attention_tile.h", "block.sequence->index * mask.sequence", "block.sequence->batch * mask.sequence", "test_attention.py -k native"),
    ("csrc/cpu/attention_tile.h", "ignored[key + j]", "ignored[j]", "test_attention.py -k three_tiles"),
    ("csrc/cpu/attention_kernel.cpp", "const int64_t beyond = (args.distances - args.summed) / 2;", "const int64_t beyond = 0;", "test_attention.py -k native"),
    ("csrc/cpu/attention.cpp", ".value_scale = args.dropout.scale", ".value_scale = 1", "test_attention.py -k parts_of"),
    ("csrc/cpu/attention_decode_passes.h", "shift + call.added - 1 - call.left > key", "shift - call.left > key", "test_nan_attention.py -k 'window_of_one and native'"),
    ("csrc/cpu/attention_decode_passes.h", "at == 0 ? rescale : nullptr", "rescale", f"{DECODE} native"),
    ("csrc/cpu/attention_decode_passes.h", "const int64_t last = call.right < 0 ? keys : position + call.right + 1 - key;", "const int64_t last = call.right < 0 ? keys : position + call.right + 2 - key;", f"{DECODE} native"),
    ("csrc/cpu/attention_decode_passes.h", "shift + row % call.added, key, keys,", "shift, key, keys,", f"{DECODE} native"),
    ("csrc/cpu/attention_decode_kernel.cpp", "peak = lse[i * rows] > peak ? lse[i * rows] : peak;", "peak = lse[0];", f"{DECODE} native"),
    ("csrc/cpu/cross_entropy_kernel.cpp", "shift = shift_of(top);", "shift = top;", "test_linear_cross_entropy.py -k 'without_a_chance and native or vocabulary and native'"),
    ("csrc/cpu/cross_entropy_kernel.cpp", "if (target >= 0 && target < args.width)", "if (target >= 0 && target <= args.width)", "test_linear_cross_entropy.py -k native"),
    ("csrc/cpu/cross_entropy_kernel.cpp", "[args.shared ? 0 : row]", "[0]", "test_cross_entropy.py -k native"),
    ("csrc/cpu/cross_entropy_kernel.cpp", "k.a == 0 ? Vec<C>{} :", "false ? Vec<C>{} :", "test_nan_rows.py -k 'ignored_tokens and native'"),
    ("csrc/cpu/cross_entropy_kernel.cpp", "apart * load(weight + start + j, count)", "apart * load(weight + j, count)", "test_cross_entropy.py -k 'wide and native'"),
    ("csrc/cpu/cross_entropy_kernel.cpp", "2 * z_loss * lse", "2 * z_loss * sums.peak", "test_cross_entropy.py -k native"),
    ("csrc/cpu/softmax_kernel.cpp", "-inf - log_total : 0 * norm", "-inf : 0", "test_nan_rows.py -k 'causal and native'"),
    ("csrc/cpu/softmax_kernel.cpp", "const C added = mask[broadcast ? 0 : i];", "const C added = mask[i];", "test_softmax.py -k 'float32_mask and native'"),
    ("csrc/norm_operators.h", "mean(as_contiguous(mean)),", "mean(mean),", "test_saved_tensors.py -k 'strides and native and layer_norm'"),
    ("csrc/cpu/norm_kernel.cpp", "kept.rows + r * kept.stride, i", "kept.rows, i", "test_norm.py -k native"),
    ("csrc/cpu/activation_kernel.cpp", "parameter<C, 0>(args.bias, gated ? 2 * n : n);", "parameter<C, 0>(args.bias, n);", "test_activation.py -k native"),
    ("csrc/cpu/activation_kernel.cpp", "h <= 0 ? Vec<C>{} : h;", "h > 0 ? h : Vec<C>{};", "test_nan_rows.py -k 'activation and native'"),
    ("csrc/cpu/rows.h", "draw(dropout, row, column, n - column, kept);", "draw(dropout, row, 0, n - column, kept);", "test_dropout_add.py -k native"),
    ("csrc/cpu/rows.h", "if (row % kRows == kRows - 1 || last)", "if (row % kRows == kRows - 1)", "test_activation.py -k native"),
    ("csrc/cpu/rotary_kernel.cpp", "batch * args.table_batch_stride", "0 * args.table_batch_stride", "test_rotary.py -k native"),
    ("csrc/cpu/rotary_kernel.cpp", "if (x != y) std::memcpy", "if (x == y) std::memcpy", "test_rotary.py -k native"),
    ("csrc/cpu/attention.cpp", "|| mask.size(2) == 1 || mask.size(3) == 1", "|| mask.size(2) == 1", "test_attention.py -k 'float and native'"),
    ("csrc/cpu/attention.cpp", "longest_q = std::max(longest_q, sequence.sq);", "longest_q = sequence.sq;", "test_attention.py -k 'varlen and native'"),
    ("csrc/cpu/attention.cpp", ".left = std::min(given.left, furthest)", ".left = std::min(given.left, furthest / 2)", "test_attention.py -k 'window and native'"),
    ("csrc/cpu/cross_entropy_kernel.cpp", "const C origin = logit - logit == 0 ? logit : 0;", "const C origin = logit;", "test_cross_entropy.py -k 'without_a_chance and native'"),
    ("csrc/cpu/cross_entropy_kernel.cpp", "return peak == -kInf<C> ? 0 : peak;", "return peak;", "test_linear_cross_entropy.py -k 'without_a_chance and native'"),
    ("csrc/cpu/cross_entropy_kernel.cpp", "if (ignored || target < 0 || target >= n)", "if (ignored || target < 0 || target > n)", "test_cross_entropy.py -k 'out_of_bounds and native'"),
    ("csrc/cpu/cross_entropy_kernel.cpp", "if (inside) there = gradient(target, 1) - k.b;", "if (target > 0) there = gradient(target, 1) - k.b;", "test_cross_entropy.py -k 'native and not large'"),
    ("csrc/cpu/softmax_kernel.cpp", "terms[0] += args.log ? (p == -inf ? Vec<C>{} : g) : g * p;", "terms[0] += args.log ? g : g * p;", "test_softmax.py -k 'test_mask and native'"),
    ("csrc/cpu/softmax_kernel.cpp", "n = i + 1 < n ? i + 1 : n;", "n = i + 2 < n ? i + 1 : n;", "test_softmax.py -k 'causal and native'"),
    ("csrc/cpu/norm_kernel.cpp", "(row - begin) % kRowsPerSum != 0 && row != end", "(row - begin) % kRowsPerSum != 0", "test_norm.py -k 'native and test_norm'"),
    ("csrc/cpu/norm_kernel.cpp", "!args.rms && args.width == 1", "false", "test_norm.py -k 'native and width_one'"),
    ("csrc/cpu/rotary_kernel.cpp", "(args.inverse ? -1 : 1)", "(args.inverse && !args.interleaved ? -1 : 1)", "test_rotary.py -k 'inverse and native'"),
]

ROWS, SPLIT = "test_cuda_rows.py -k", "test_cuda_decode.py -k"
CUDA = [
    ("tests/cuda_host/executor.cpp", "first.line() != site.line() ||", "", "test_cuda_host.py -m '' -k 'barrier and two'"),
    ("tests/cuda_host/executor.cpp", "first.column() != site.column() ||", "", "test_cuda_host.py -m '' -k 'shuffle and two'"),
    ("tests/cuda_host/executor.cpp", "if (part.empty()) barrier.sites[warp] = site;", "barrier.sites[warp] = site;", "test_cuda_host.py -m '' -k 'barrier and two'"),
    ("tests/cuda_host/executor.cpp", "kAdded | (others ? kMany : cluster)", "kAdded | cluster", "test_cuda_host.py -m '' -k 'atomics and other'"),
    ("csrc/cuda/attention_scores.cuh", "packed_slot(slot, count + 1, size,", "packed_slot(slot, count, size,", "test_packed_tail.py -k host_model"),
    ("csrc/cuda/attention_scores.cuh", "last ? call.sk : load(call.cu_k + index + 1)", "load(call.cu_k + (last ? index : index + 1))", "test_packed_tail.py -k host_model"),
    ("csrc/cuda/attention_forward.cuh", "if (place.sequence == call.count) s.sk = 0;", "", "test_packed_tail.py -k host_model"),
    ("csrc/cuda/attention_backward.cuh", "if (place.sequence == call.count) keys.s.sq = 0;", "", "test_packed_tail.py -k host_model"),
    ("csrc/cuda/attention.h", "cu_q != nullptr ? 1 : 0", "cu_q != nullptr ? 0 : 0", "test_packed_tail.py -k host_model"),
    ("csrc/cpu/attention.cpp", "  zero_from(dvalue, call.key_end);\n", "", "test_packed_tail.py -k on_the_cpu"),
    ("csrc/cpu/attention.cpp", "query_end = sequences.empty() ? 0 :", "query_end = sequences.empty() ? query.size(2) :", "test_packed_tail.py -k any_sequence_on_the_cpu"),
    ("csrc/cuda/attention_scores.cuh", "return sequence_of(call, low);", "return sequence_of(call, 0);", "test_cuda_attention.py -k packed_rows"),
    ("csrc/cuda/attention_rows.cuh", ".delta = delta * share}", ".delta = delta}", "test_cuda_attention.py -k large_number"),
    ("csrc/cuda/attention_rows.cuh", "other_total * exp2_approx(other_peak - shift)", "other_total", "test_cuda_attention.py -k large_number"),
    ("csrc/cuda/attention_rows.cuh", "to_float(chunk.at[i]) * share", "to_float(chunk.at[i])", "test_cuda_attention.py -k large_number"),
    ("csrc/cuda/attention_scores.cuh", "(added < kLowestAdded ? kLowestAdded : added)", "added", "test_cuda_attention.py -k large_number"),
    ("csrc/cuda/decode_plan.h", "first = left < 0 ? 0 : total - queries - left;", "first = left < 0 ? 0 : total - queries - left + 1;", f"{SPLIT} begin_and_end"),
    ("csrc/cuda/decode_plan.h", "(units + shares - 1) / shares * unit", "units / shares * unit", f"{SPLIT} work_split"),
    ("csrc/cuda/decode_plan.h", "std::min(capacity, left + queries + kPageUnit)", "left + queries", f"{SPLIT} work_split"),
    ("csrc/cuda/attention_decode_split.cuh", "args.left >= 0 && distance < -args.left", "args.left >= 0 && distance <= -args.left", f"{SPLIT} begin_and_end"),
    ("csrc/cuda/attention_decode_split.cuh", "int64_t{sequence} * args.slopes_sequence + at.head", "at.head", f"{SPLIT} shares_are_merged"),
    ("csrc/cuda/launch.h", "device.capability >= 90", "device.capability >= 80", f"{ROWS} launch"),
    ("csrc/cuda/launch.h", "ceil_div(groups, limits.chunk) * limits.chunk", "groups", f"{ROWS} launch"),
    ("csrc/cuda/launch.h", "std::min(ceil_div(rows, plan.teams_per_block()), resident)", "std::min(ceil_div(rows, plan.teams_per_block()), int64_t{1})", f"{ROWS} launch"),
    ("csrc/cuda/launch.h", "width + (aligned ? 0 : limits.chunk - 1)", "width", f"{ROWS} launch"),
    ("csrc/cuda/softmax.cuh", "sum += args.log ? (p == -kInfinity ? 0.0f : g) : g * p;", "sum += args.log ? g : g * p;", f"{ROWS} test_mask"),
    ("csrc/cuda/softmax.cuh", "merged.strides[last] == stride * size", "merged.strides[last] == stride", f"{ROWS} overlap"),
    ("csrc/cuda/softmax.cuh", "      total *= exponential<T>(peak - shift);\n", "", f"{ROWS} 'wide_causal or widest'"),
    ("csrc/cuda/check.py", '*root.glob("csrc/*.h"), ', "", "test_check_cuda.py -k fingerprint"),
    ("csrc/cuda/architectures.h", "capability / 10 == compiled / 10 && capability >= compiled", "capability / 10 == compiled / 10", f"{ROWS} devices"),
    ("csrc/cuda/attention_plan.h", "(begin(middle) / size + middle <= slot ?", "(begin(middle) / size + middle < slot ?", "test_cuda_attention.py -k one_slot"),
    ("csrc/cuda/attention_plan.h", "packed ? length / size + count :", "packed ? length / size :", "test_cuda_attention.py -k one_slot"),
]

REPLAY = "test_replay.py -k"
REPLAYS = [
    ("pyllm/replay.py", "aligned, value is before)", "aligned, False)", f"{REPLAY} given_twice"),
    ("pyllm/replay.py", "id(value) not in self._names or value is inputs[i - 1]", "True", f"{REPLAY} given_twice"),
    ("pyllm/replay.py", "if _dispatch_keys(model).raw_repr() != keys:", "if False:", f"{REPLAY} another_kind"),
    ("pyllm/replay.py", "or _modes()", "or False", f"{REPLAY} mode_sees"),
    ("pyllm/replay.py", "or _profiled()", "or False", f"{REPLAY} profiler_sees"),
    ("pyllm/replay.py", "if not isinstance(out, Tensor):", "if False:", f"{REPLAY} looks_at_numbers"),
    ("pyllm/replay.py", "if len(self._kinds) >= KINDS:", "if False:", f"{REPLAY} room_for"),
    ("pyllm/replay.py", "elif isinstance(value, Tensor):\n                return None", "elif isinstance(value, Tensor):\n                kind.append(None)", f"{REPLAY} subclass"),
    ("kernels/attention_tiles.py", "        tuned()[entry] = tile\n    replay.forget()", "        tuned()[entry] = tile", f"{REPLAY} tiles"),
    ("pyllm/graphs.py", "self._run(_buffers(tensors))  # laid", "self._run(tuple(tensors))  # laid", "test_graphs.py -k warmed_up"),
    ("pyllm/dispatch.py", "found = found or [", "found = [", "test_dispatch.py -k architectures_estimates"),
    ("pyllm/backend.py", "    if _TAKES_REFERENCES:", "    if not _TAKES_REFERENCES:", "test_backend_setting.py -k outlives"),
]

AREAS = {
    "cache, generation": CACHES,
    "packing, masks": PACKING,
    "backend, dispatch": DISPATCH,
    "graphs": GRAPHS,
    "operators": OPERATORS,
    "Triton": TRITON,
    "replays": REPLAYS,
    "C++ on the CPU": NATIVE,
    "CUDA on the host model": CUDA,
}
FAULTS = [Fault(area, *entry) for area, entries in AREAS.items() for entry in entries]
