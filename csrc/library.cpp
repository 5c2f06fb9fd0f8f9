// Every operator's schema, and nothing else. The same schemas, on Triton, are registered by pyllm/ops.
#include <torch/csrc/stable/library.h>

// The fields of pyllm.reference.AttentionCall.
#define PYLLM_ATTENTION_CALL                                                                                     \
  "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? distance_bias, " \
  "Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? rng, float scale, float softcap, "  \
  "float dropout_p, SymInt left, SymInt right, bool bottom_right"

STABLE_TORCH_LIBRARY(pyllm, m) {
  m.def("layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm_fwd(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)");
  m.def(
      "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? x_bias, Tensor? rng,"
      " float dropout_p, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_bwd(Tensor dy, Tensor? dz, Tensor z, Tensor? weight, Tensor? bias, Tensor? x_bias, Tensor mean,"
      " Tensor rstd, Tensor? rng, float dropout_p, ScalarType x_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? x_bias, Tensor? rng, float dropout_p,"
      " float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_rms_norm_bwd(Tensor dy, Tensor? dz, Tensor z, Tensor? weight, Tensor? x_bias, Tensor rstd, Tensor? rng,"
      " float dropout_p, ScalarType x_dtype) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("softmax_fwd(Tensor x, Tensor? attn_mask, float scale, bool is_causal) -> Tensor");
  m.def("softmax_bwd(Tensor dy, Tensor y, float scale) -> Tensor");
  m.def("log_softmax_fwd(Tensor x, Tensor? attn_mask, float scale, bool is_causal) -> Tensor");
  m.def("log_softmax_bwd(Tensor dy, Tensor y, float scale) -> Tensor");
  m.def("activation_fwd(Tensor x, Tensor? up, Tensor? bias, Tensor? rng, float dropout_p, str kind) -> Tensor");
  m.def(
      "activation_bwd(Tensor dy, Tensor x, Tensor? up, Tensor? bias, Tensor? rng, float dropout_p, str kind)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("dropout_add_fwd(Tensor x, Tensor residual, Tensor? bias, Tensor? rng, float dropout_p) -> Tensor");
  m.def(
      "dropout_add_bwd(Tensor dy, Tensor? bias, Tensor? rng, float dropout_p, ScalarType x_dtype)"
      " -> (Tensor, Tensor)");
  m.def("rotary_fwd(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor");
  m.def("rotary_inplace_fwd(Tensor(a0!) x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> ()");
  m.def("attention_fwd(" PYLLM_ATTENTION_CALL ") -> (Tensor, Tensor)");
  m.def(
      "attention_bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool mask_gradient, bool bias_gradient,"
      " bool deterministic, " PYLLM_ATTENTION_CALL ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_decode_fwd(Tensor query, Tensor(a1!) key_cache, Tensor(a2!) value_cache, Tensor cache_seqlens,"
      " Tensor? block_table, Tensor? key, Tensor? value, Tensor? cos, Tensor? sin, Tensor? distance_bias,"
      " Tensor? alibi_slopes, float scale, float softcap, SymInt left, SymInt right, bool interleaved)"
      " -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor target, Tensor? weight, Tensor? scale, SymInt ignore_index,"
      " float label_smoothing, float z_loss, bool gradient) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_inplace_fwd(Tensor(a0!) logits, Tensor target, Tensor? weight, Tensor? scale, SymInt ignore_index,"
      " float label_smoothing, float z_loss) -> Tensor");
  m.def("cross_entropy_bwd(Tensor(a0!) gradient, Tensor factor) -> ()");
  m.def("cross_entropy_shard_fwd(Tensor(a0!) statistics, Tensor logits, Tensor target, SymInt first) -> ()");
  m.def("cross_entropy_shard_bwd(Tensor(a0!) logits, Tensor coefficients, Tensor target, SymInt first) -> ()");
  // Composed of those above and of matrix products, in pyllm/ops/linear_cross_entropy.py.
  m.def(
      "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? scale,"
      " SymInt ignore_index, float label_smoothing, float z_loss, bool[] wanted, SymInt memory)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_shard_fwd(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, SymInt first,"
      " SymInt memory) -> Tensor");
  m.def(
      "linear_cross_entropy_shard_loss(Tensor statistics, Tensor target, SymInt ignore_index, float label_smoothing,"
      " float z_loss, SymInt classes) -> Tensor");
  m.def(
      "linear_cross_entropy_shard_bwd(Tensor dloss, Tensor statistics, Tensor hidden, Tensor weight, Tensor target,"
      " Tensor? bias, SymInt ignore_index, float label_smoothing, float z_loss, SymInt classes, SymInt first,"
      " bool[] wanted, SymInt memory) -> (Tensor, Tensor, Tensor)");
}
