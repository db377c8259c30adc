// Scaled dot-product attention with the log-sum-exp of its rows.
#pragma once

#include "sharpcore/attention_tangent.h"

namespace sharpcore {

struct AttentionForwardArguments {
    AttentionPrimal primal;  // out and lse are written
    int threads;
};

}  // namespace sharpcore

// out = softmax(scale q k^T + mask) v; a row whose scores are all -inf gives zeros and lse = -inf.
SHARPCORE_DECLARE_KERNEL(attention_forward, AttentionForwardArguments)
