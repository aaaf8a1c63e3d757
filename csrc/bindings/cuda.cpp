// lorakernels._cuda
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "../cuda/kernels.h"
#include "arguments.h"

namespace py = pybind11;
using namespace lk;

static void check(int status) {
  if (status != cudaSuccess) {
    const cudaError_t error = static_cast<cudaError_t>(status);
    throw std::runtime_error(std::string("lorakernels CUDA launch failed: ") + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
  }
}

// The stream comes first, then the arguments of the params struct.
template <class Params, class... Arguments>
static auto stream_launcher(Params (*fill)(Arguments...), int (*run)(const Params&, void*)) {
  return [fill, run](Address stream, Arguments... arguments) {
    const Params params = fill(arguments...);
    int status;
    {
      py::gil_scoped_release release;
      status = run(params, pointer(stream));
    }
    check(status);
  };
}

PYBIND11_MODULE(_cuda, m) {
  m.attr("architectures") = LK_CUDA_ARCHITECTURES;
  m.def("versions", [] {  // (runtime linked in, newest that the driver serves; 0 without a driver)
    int runtime = 0, driver = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    return py::make_tuple(runtime, driver);
  });
  m.def("add_lowrank", stream_launcher(add_lowrank_params, cuda::add_lowrank));
  m.def("lowrank_down", stream_launcher(lowrank_down_params, cuda::lowrank_down));
  m.def("lowrank_grad", stream_launcher(lowrank_grad_params, cuda::lowrank_grad));
  m.def("dequantize_nf4", stream_launcher(dequantize_nf4_params, cuda::dequantize_nf4));
  m.def("quantize_nf4", stream_launcher(quantize_nf4_params, cuda::quantize_nf4));
  m.def("nf4_linear", stream_launcher(nf4_linear_params, cuda::nf4_linear));
  m.def("lowrank_grad_workspace", &cuda::lowrank_grad_workspace);
}
