// pyllm._C: facts of the build and of the processor. No torch header, so that it imports where torch does not fit.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cuda/architectures.h"
#include "cuda/shared_memory.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts of pyllm's compiled part and of this processor.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = __VERSION__;
        info["torch"] = PYLLM_TORCH;
        info["instruction_sets"] = pyllm::cuda::split(PYLLM_ISAS);
        return info;
      },
      "Compiler, PyTorch release of the headers, instruction sets compiled for.");
  m.def(
      "cuda_architectures", [] { return pyllm::cuda::split(PYLLM_CUDA_ARCHITECTURES); },
      "The CUDA architectures that are in the binary: sm_XY is machine code, compute_XY is PTX.");
  m.def(
      "cuda_serves", [](int capability) { return pyllm::cuda::any_serves(PYLLM_CUDA_ARCHITECTURES, capability); },
      "Whether one of them runs on a device of this capability, 10 * major + minor.", pybind11::arg("capability"));
  m.def(
      "cuda_shared_memory", pyllm::cuda::shared_memory,
      "(kernel, head_dim, bytes of dynamic shared memory a block) of the CUDA kernels that are templates of head_dim.");
  m.def(
      "attention_tile", [] { return std::pair(pyllm::kQueryBlock, pyllm::kKeyBlock); },
      "Queries and keys of a tile of attention's scores on the CPU.");
  m.def(
      "cuda_attention_tile",
      [](int dim) { return std::pair(pyllm::cuda::forward_tile(dim, true).queries, pyllm::cuda::kKeyTile); },
      "Queries and keys of a tile of attention's scores on CUDA, forward.", pybind11::arg("head_dim"));
  m.def(
      "cpu_isa", [] { return std::string(pyllm::isa_name(pyllm::chosen_isa())); },
      "The instruction set in use: the best of this processor, or PYLLM_CPU_ISA.");
}
