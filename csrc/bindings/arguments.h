// What Python passes for a params struct, in one order for every backend: addresses as integers, strides in elements.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "../nf4.h"
#include "../params.h"

namespace lk {

using Address = uintptr_t;  // a tensor's data_ptr(); 0 for "none"

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// A tensor: address (0 for none), dtype, two strides.
using Tensor = std::tuple<Address, int, int64_t, int64_t>;

inline Matrix matrix(const Tensor& t) {
  return {pointer(std::get<0>(t)), std::get<2>(t), std::get<3>(t), static_cast<DType>(std::get<1>(t))};
}

// The seed's address, the threshold and the scale.
using Drop = std::tuple<Address, uint32_t, float>;

inline Dropout dropout(const Drop& d) {
  return {static_cast<const int64_t*>(pointer(std::get<0>(d))), std::get<1>(d), std::get<2>(d)};
}

inline AddLowrank add_lowrank_params(int64_t M, int64_t N, int64_t R, Tensor y, Tensor u, Tensor v, Tensor bias,
                                     float scaling, Drop drop) {
  return {M, N, R, matrix(y), matrix(u), matrix(v), matrix(bias), scaling, dropout(drop)};
}

inline LowrankDown lowrank_down_params(int64_t M, int64_t K, Tensor x, Tensor u,
                                       const std::vector<std::tuple<Tensor, int64_t>>& parts, Drop drop) {
  LowrankDown p = {M, K, matrix(x), matrix(u), static_cast<int32_t>(parts.size()), {}, dropout(drop)};
  if (parts.size() > MAX_PARTS) throw std::invalid_argument("lowrank_down: too many A's in one call");
  int64_t column = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    p.part[i] = {matrix(std::get<0>(parts[i])), std::get<1>(parts[i]), column};
    column += p.part[i].R;
  }
  return p;
}

inline LowrankGrad lowrank_grad_params(int64_t M, int64_t N, int64_t K, int64_t R, Tensor dy, Tensor x, Tensor u, Tensor B,
                                       Tensor du, Tensor dA, Tensor dB, float scaling, Drop drop, Address workspace) {
  return {M, N, K, R, matrix(dy), matrix(x), matrix(u), matrix(B), matrix(du), matrix(dA), matrix(dB),
          scaling, dropout(drop), static_cast<float*>(pointer(workspace))};
}

inline Linear linear_params(int64_t M, int64_t N, int64_t K, Tensor x, Tensor W, Tensor y, Tensor bias) { return {M, N, K, matrix(x), matrix(W), matrix(y), matrix(bias)}; }

// packed, absmax, nested (0 for none), N, K, block_shift, nested_shift
using NF4 = std::tuple<Address, Address, Address, int64_t, int64_t, int32_t, int32_t>;

inline NF4Weight nf4_weight(const NF4& w) {
  const auto bytes = [](Address a) { return static_cast<const uint8_t*>(pointer(a)); };
  return {bytes(std::get<0>(w)), bytes(std::get<1>(w)), bytes(std::get<2>(w)), std::get<3>(w), std::get<4>(w), std::get<5>(w), std::get<6>(w)};
}

inline DequantizeNF4 dequantize_nf4_params(NF4 w, int64_t n0, int64_t k0, int64_t rows, int64_t columns, Tensor out) {
  return {nf4_weight(w), n0, k0, rows, columns, matrix(out)};
}

inline QuantizeNF4 quantize_nf4_params(Address weight, int dtype, int64_t count, int32_t block_shift, Address packed, Address absmax) {
  return {pointer(weight), static_cast<DType>(dtype), count, block_shift, static_cast<uint8_t*>(pointer(packed)), static_cast<float*>(pointer(absmax))};
}

// ... then what add_lowrank takes
inline NF4Linear nf4_linear_params(NF4 w, Tensor x, Tensor bias, int64_t M, int64_t N, int64_t R, Tensor y, Tensor u, Tensor v,
                                   Tensor lowrank_bias, float scaling, Drop drop) {
  return {nf4_weight(w), matrix(x), matrix(bias), add_lowrank_params(M, N, R, y, u, v, lowrank_bias, scaling, drop)};
}

inline NF4Product nf4_product_params(bool turned, NF4 w, Tensor x, Tensor bias, int64_t M, int64_t N, int64_t R, Tensor y, Tensor u, Tensor v,
                                     Tensor lowrank_bias, float scaling, Drop drop) {
  return {nf4_linear_params(w, x, bias, M, N, R, y, u, v, lowrank_bias, scaling, drop), turned};
}

inline Route route_params(Address ids, bool wide, int64_t M, int64_t stride, int64_t E, Address order, Address starts) {
  return {pointer(ids), wide, M, stride, E, static_cast<int64_t*>(pointer(order)), static_cast<int64_t*>(pointer(starts))};
}

// M, E, R; addresses of order, starts, ranks, pages (0 for none), the last one's stride; addresses of seed, thresholds, scaling (0 for none)
using Segmented = std::tuple<int64_t, int64_t, int64_t, Address, Address, Address, Address, int64_t, Address, Address, Address>;

inline Segments segments(const Segmented& s) {
  const auto integers = [](Address a) { return static_cast<const int64_t*>(pointer(a)); };
  return {std::get<0>(s), std::get<1>(s), std::get<2>(s), integers(std::get<3>(s)), integers(std::get<4>(s)), integers(std::get<5>(s)), integers(std::get<6>(s)),
          std::get<7>(s), integers(std::get<8>(s)), static_cast<const int32_t*>(pointer(std::get<9>(s))), static_cast<const float*>(pointer(std::get<10>(s)))};
}

// A tensor of one, and how far the next one is
using Stacked = std::tuple<Tensor, int64_t>;

inline Stack stack(const Stacked& s) { return {matrix(std::get<0>(s)), std::get<1>(s)}; }

inline MultiDown multi_down_params(Segmented s, int64_t K, int64_t parts, Tensor x, Stacked A, Tensor u) {
  if (parts > MAX_PARTS) throw std::invalid_argument("multi_lowrank_down: too many A's in one call");
  return {segments(s), K, parts, matrix(x), matrix(u), stack(A)};
}

inline MultiAdd multi_add_params(Segmented s, int64_t N, Tensor y, Tensor u, Stacked B) {
  return {segments(s), N, matrix(y), matrix(u), stack(B)};
}

inline MultiGrad multi_grad_params(Segmented s, int64_t N, int64_t K, Tensor dy, Tensor x, Tensor u, Stacked B, Tensor du, Stacked dA, Stacked dB) {
  return {segments(s), N, K, matrix(dy), matrix(x), matrix(u), matrix(du), stack(B), stack(dA), stack(dB)};
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
