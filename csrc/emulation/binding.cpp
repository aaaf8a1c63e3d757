// The emulated CUDA kernels as a Python module, built by tests/test_cuda_emulated.py.
#define LK_CUDA_EMULATION
#include "../bindings/arguments.h"
#include "../cuda/kernels.h"

namespace lk::emulation {
void reseed(unsigned seed);
}

PYBIND11_MODULE(_cuda_emulated, m) {
  using namespace lk;
  m.def("seed", &emulation::reseed);
  m.def("add_lowrank", launcher(add_lowrank_params, [](const AddLowrank& p) { cuda::add_lowrank(p, nullptr); }));
}
