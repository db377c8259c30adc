// How the numbers of a kernel's tensors are stored; bfloat16 is computed with in float.
#pragma once

namespace sharpcore {

enum class Dtype { float32, float64, bfloat16 };

}  // namespace sharpcore
