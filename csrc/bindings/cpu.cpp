// lorakernels._cpu
#include "../cpu/kernels.h"
#include "../cpu/multi.h"
#include "../cpu/parallel.h"
#include "arguments.h"

namespace py = pybind11;
using namespace lk;

PYBIND11_MODULE(_cpu, m) {
  m.def("use_pool", [](Address pool, Address threads) { cpu::use_pool(reinterpret_cast<cpu::ParallelFor>(pool), reinterpret_cast<cpu::Threads>(threads)); });
  m.def("has_pool", &cpu::has_pool);
  m.def("isa", [] { return cpu::kernels().isa; });
  m.def("isas", [] {
    py::dict found;
    int count;
    const cpu::Kernels* kernels = cpu::compiled(&count);
    for (int i = 0; i < count; ++i) found[kernels[i].isa] = cpu::processor_has(kernels[i].isa);
    return found;
  });
  m.def("add_lowrank", launcher(add_lowrank_params, [](const AddLowrank& p) { cpu::kernels().add_lowrank(p); }));
  m.def("lowrank_down", launcher(lowrank_down_params, [](const LowrankDown& p) { cpu::kernels().lowrank_down(p); }));
  m.def("lowrank_grad", launcher(lowrank_grad_params, [](const LowrankGrad& p) { cpu::kernels().lowrank_grad(p); }));
  m.def("linear", launcher(linear_params, [](const Linear& p) { cpu::kernels().linear(p); }));
  m.def("dequantize_nf4", launcher(dequantize_nf4_params, [](const DequantizeNF4& p) { cpu::kernels().dequantize_nf4(p); }));
  m.def("quantize_nf4", launcher(quantize_nf4_params, [](const QuantizeNF4& p) { cpu::kernels().quantize_nf4(p); }));
  m.def("nf4_linear", launcher(nf4_linear_params, [](const NF4Linear& p) {
          cpu::kernels().nf4_linear(p);
          if (p.lowrank.R) cpu::kernels().add_lowrank(p.lowrank);
        }));
  m.def("nf4_product", launcher(nf4_product_params, [](const NF4Product& p) {
          cpu::kernels().nf4_product(p);
          if (p.linear.lowrank.R) cpu::kernels().add_lowrank(p.linear.lowrank);
        }));
  m.def("multi_route", launcher(route_params, cpu::multi_route));
  m.def("multi_lowrank_down", launcher(multi_down_params, cpu::multi_lowrank_down));
  m.def("multi_add_lowrank", launcher(multi_add_params, cpu::multi_add_lowrank));
  m.def("multi_lowrank_grad", launcher(multi_grad_params, cpu::multi_lowrank_grad));
}
