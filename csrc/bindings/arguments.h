// What Python passes for a params struct, in one order for every backend: addresses as integers, strides in elements.
#pragma once
#include <pybind11/pybind11.h>

#include "../params.h"

namespace lk {

using Address = uintptr_t;  // a tensor's data_ptr(); 0 for "none"

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

inline AddLowrank add_lowrank_params(int64_t M, int64_t N, int64_t R, Address y, int y_dtype, int64_t y_row,
                                     Address u, int64_t u_row, Address v, int v_dtype, int64_t v_row, int64_t v_col,
                                     Address bias, int bias_dtype, int64_t bias_stride, float scaling, Address seed,
                                     uint32_t threshold, float dropout_scale) {
  return {M,
          N,
          R,
          {pointer(y), y_row, 1, static_cast<DType>(y_dtype)},
          {pointer(u), u_row, 1, DType::f32},
          {pointer(v), v_row, v_col, static_cast<DType>(v_dtype)},
          {pointer(bias), 0, bias_stride, static_cast<DType>(bias_dtype)},
          scaling,
          {static_cast<const int64_t*>(pointer(seed)), threshold, dropout_scale}};
}

// A Python function that fills the struct from its arguments and runs the kernel without the interpreter lock.
template <class Params, class... Arguments, class Run>
auto launcher(Params (*fill)(Arguments...), Run run) {
  return [fill, run](Arguments... arguments) {
    const Params params = fill(arguments...);
    pybind11::gil_scoped_release release;
    run(params);
  };
}

}  // namespace lk
