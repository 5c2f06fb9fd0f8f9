// The row kernels for the host model: their host functions, and what the launch arithmetic plans, for ctypes.
#include "cuda/architectures.h"
#include "cuda/norm.cuh"
#include "cuda/softmax.cuh"
#include "cuda_host/executor.h"

using namespace pyllm;

namespace {

Array array(void* data, int64_t dtype) { return {data, static_cast<DType>(dtype)}; }

cuda::Device device(int64_t processors, int64_t capability) {
  return {static_cast<int>(processors), static_cast<int>(capability)};
}

}  // namespace

// Where a pointer may have one of several dtypes, its DType comes after it.
extern "C" {

const char* norm_forward(void* x, int64_t x_dtype, void* residual, void* weight, int64_t weight_dtype, void* bias,
                         int64_t bias_dtype, void* x_bias, int64_t x_bias_dtype, void* y, void* z, int64_t z_dtype,
                         float* mean, float* rstd, const int64_t* rng, double p, double eps, int64_t rows,
                         int64_t width, int64_t processors, int64_t capability) {
  return cuda_host::reporting([&] {
    cuda::norm_forward({.x = array(x, x_dtype),
                        .residual = array(residual, z_dtype),
                        .weight = array(weight, weight_dtype),
                        .bias = array(bias, bias_dtype),
                        .x_bias = array(x_bias, x_bias_dtype),
                        .y = array(y, z_dtype),
                        .z = array(z, z_dtype),
                        .mean = mean,
                        .rstd = rstd,
                        .rng = rng,
                        .rows = rows,
                        .width = static_cast<int>(width),
                        .lanes = 0,
                        .eps = static_cast<float>(eps),
                        .dropout = Dropout(nullptr, p)},
                       device(processors, capability), nullptr);
  });
}

// partials: room for `groups` partial sums, of which norm_backward_groups tells how many there are.
const char* norm_backward(void* dy, void* dz, void* z, int64_t z_dtype, void* weight, int64_t weight_dtype, void* dx,
                          int64_t dx_dtype, void* dresidual, const float* mean, const float* rstd, const int64_t* rng,
                          double p, float* partials, int64_t rows, int64_t width, void* dweight, void* dbias,
                          int64_t dbias_dtype, void* dx_bias, int64_t dx_bias_dtype, int64_t groups, int64_t processors,
                          int64_t capability) {
  return cuda_host::reporting([&] {
    const ColumnGradients gradients{
        {array(dweight, weight_dtype), array(dbias, dbias_dtype), array(dx_bias, dx_bias_dtype)}};
    const cuda::NormBackward args{.dy = array(dy, z_dtype),
                                  .dz = array(dz, z_dtype),
                                  .z = array(z, z_dtype),
                                  .weight = array(weight, weight_dtype),
                                  .dx = array(dx, dx_dtype),
                                  .dresidual = array(dresidual, z_dtype),
                                  .mean = mean,
                                  .rstd = rstd,
                                  .rng = rng,
                                  .partials = partials,
                                  .gradients = gradients,
                                  .rows = rows,
                                  .width = static_cast<int>(width),
                                  .lanes = 0,
                                  .dropout = Dropout(nullptr, p)};
    const cuda::RowPlan plan = cuda::plan_norm_backward(args, device(processors, capability));
    if (plan.groups() > groups) throw std::runtime_error("more partial sums than there is room for");
    if (rows > 0) cuda::norm_backward(args, plan, nullptr);
    if (partials != nullptr)
      cuda::norm_column_sum({.partials = partials,
                             .gradients = gradients,
                             .count = rows > 0 ? plan.groups() : 0,
                             .width = static_cast<int>(width)},
                            nullptr);
  });
}

const char* softmax_forward(void* x, void* y, int64_t dtype, void* mask, int64_t mask_dtype, const int64_t* sizes,
                            const int64_t* strides, int64_t rank, int64_t last_stride, int64_t rows, int64_t queries,
                            int64_t width, double scale, int64_t log, int64_t processors, int64_t capability) {
  return cuda_host::reporting([&] {
    cuda::SoftmaxForward args{
        .x = array(x, dtype),
        .y = array(y, dtype),
        .mask = {.data = array(mask, mask_dtype), .last_stride = last_stride, .rank = static_cast<int>(rank)},
        .rows = rows,
        .queries = queries,
        .width = static_cast<int>(width),
        .lanes = 0,
        .scale = static_cast<float>(scale),
        .log = log != 0};
    std::copy_n(sizes, rank, args.mask.sizes);
    std::copy_n(strides, rank, args.mask.strides);
    cuda::softmax_forward(args, device(processors, capability), nullptr);
  });
}

const char* softmax_backward(void* dy, void* y, void* dx, int64_t dtype, int64_t rows, int64_t width, double scale,
                             int64_t log, int64_t processors, int64_t capability) {
  return cuda_host::reporting([&] {
    cuda::softmax_backward({.dy = array(dy, dtype),
                            .y = array(y, dtype),
                            .dx = array(dx, dtype),
                            .rows = rows,
                            .width = static_cast<int>(width),
                            .lanes = 0,
                            .scale = static_cast<float>(scale),
                            .log = log != 0},
                           device(processors, capability), nullptr);
  });
}

// {way, lanes, threads, cluster, blocks}
void plan(int64_t* out, int64_t rows, int64_t width, int64_t aligned, int64_t same_phase, int64_t chunk,
          int64_t threads, int64_t resident, int64_t processors, int64_t capability) {
  const cuda::RowLimits limits{static_cast<int>(chunk), static_cast<int>(threads), static_cast<int>(resident)};
  const cuda::RowPlan plan =
      cuda::plan_rows(rows, width, aligned != 0, same_phase != 0, limits, device(processors, capability));
  const int64_t told[] = {static_cast<int64_t>(plan.way), plan.lanes, plan.threads, plan.cluster, plan.blocks};
  std::copy_n(told, 5, out);
}

void rows_of_block(int64_t* out, int64_t block, int64_t blocks, int64_t cluster, int64_t teams) {
  const cuda::RowSteps rows = cuda::row_steps(block, blocks, static_cast<int>(cluster), static_cast<int>(teams));
  out[0] = rows.first;
  out[1] = rows.step;
}

int64_t any_serves(const char* architectures, int64_t capability) {
  return cuda::any_serves(architectures, static_cast<int>(capability));
}

}  // extern "C"
