// lorakernels._cpu
#include "../cpu/kernels.h"
#include "../cpu/parallel.h"
#include "arguments.h"

namespace py = pybind11;
using namespace lk;

PYBIND11_MODULE(_cpu, m) {
  m.def("use_pool", [](Address pool) { cpu::use_pool(reinterpret_cast<cpu::ParallelFor>(pool)); });
  m.def("has_pool", &cpu::has_pool);
  m.def("isa", [] { return cpu::kernels().isa; });
  m.def("isas", [] {
    py::dict found;
    for (const char* const* name = cpu::compiled_isas(); *name; ++name) found[*name] = cpu::usable(*name);
    return found;
  });
  m.def("add_lowrank", launcher(add_lowrank_params, [](const AddLowrank& p) { cpu::kernels().add_lowrank(p); }));
}
