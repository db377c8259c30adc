// The transpose of attention_tangent, for K cotangents sharing the primal probabilities.
#pragma once

#include "sharpcore/attention_tangent.h"

namespace sharpcore {

struct AttentionAdjointArguments {
    AttentionPrimal primal;
    AttentionOperand cotangent;               // [count, batch, heads, rows, value_width]
    AttentionOperand grad_q, grad_k, grad_v;  // [count, *shape of q, k, v]; written; null data: not wanted
    std::int64_t count;
    int threads;
};

}  // namespace sharpcore

// With P = exp(scale q k^T + mask - lse) and dS = P * (g v^T - rowsum(g * out)) for a cotangent g of out:
// grad_q = scale dS k, grad_k = scale dS^T q, grad_v = P^T g.
SHARPCORE_DECLARE_KERNEL(attention_adjoint, AttentionAdjointArguments)
