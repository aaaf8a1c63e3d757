// The emulated CUDA kernels as a Python module, built by tests/test_cuda_emulated.py.
#define LK_CUDA_EMULATION
#include "../bindings/arguments.h"
#include "../cuda/kernels.h"

namespace lk::emulation {
void reseed(unsigned seed);
long launches();  // so far
}

// As in bindings/cuda.cpp, the stream comes first; here there is none.
template <class Params, class... Arguments>
static auto emulated(Params (*fill)(Arguments...), int (*run)(const Params&, void*)) {
  return [fill, run](lk::Address, Arguments... arguments) {
    if (run(fill(arguments...), nullptr)) throw std::runtime_error("the launch was refused");
  };
}

PYBIND11_MODULE(_cuda_emulated, m) {
  using namespace lk;
  m.def("seed", &emulation::reseed);
  m.def("launches", &emulation::launches);
  m.def("add_lowrank", emulated(add_lowrank_params, cuda::add_lowrank));
  m.def("lowrank_down", emulated(lowrank_down_params, cuda::lowrank_down));
  m.def("lowrank_grad", emulated(lowrank_grad_params, cuda::lowrank_grad));
  m.def("dequantize_nf4", emulated(dequantize_nf4_params, cuda::dequantize_nf4));
  m.def("quantize_nf4", emulated(quantize_nf4_params, cuda::quantize_nf4));
  m.def("nf4_linear", emulated(nf4_linear_params, cuda::nf4_linear));
  m.def("lowrank_grad_workspace", &cuda::lowrank_grad_workspace);
}
