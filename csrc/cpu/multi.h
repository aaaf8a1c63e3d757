// Many adapters in one batch, over the kernels of one.
#pragma once
#include "../params.h"

namespace lk::cpu {

void multi_route(const Route& p);
void multi_lowrank_down(const MultiDown& p);
void multi_add_lowrank(const MultiAdd& p);
void multi_lowrank_grad(const MultiGrad& p);

}  // namespace lk::cpu
