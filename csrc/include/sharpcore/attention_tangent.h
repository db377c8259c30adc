// K tangents of scaled dot-product attention, sharing the primal probabilities.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"
#include "sharpcore/isa.h"

namespace sharpcore {

// A [count, batch, heads, rows, width] operand; entries of a row are adjacent. Strides count elements; that of `count`
// is 0 for an operand of the primal. Null data: an operand that carries no tangent.
struct AttentionOperand {
    const void* data;
    std::int64_t count_stride, batch_stride, head_stride, row_stride;
};

// How the entries of a mask are stored: as numbers (those of Dtype), or as bytes that are zero where a key is left out.
enum class MaskDtype { float32, float64, bfloat16, boolean };

// [batch, heads, rows, keys], added to the scores; null data: zeros. Strides of 0 where it is broadcast. Its type is
// boolean, bfloat16, or what the log-sum-exp has.
struct AttentionMask {
    const void* data;
    std::int64_t batch_stride, head_stride, row_stride, key_stride;
    MaskDtype dtype;
};

// What the tangent and its transpose know of the primal pass: out = softmax(scale q k^T + mask) v.
struct AttentionPrimal {
    AttentionOperand q;    // [batch, heads, rows, width]
    AttentionOperand k;    // [batch, heads, keys, width]
    AttentionOperand v;    // [batch, heads, keys, value_width]
    AttentionOperand out;  // [batch, heads, rows, value_width]
    const void* lse;       // [batch, heads, rows]: log-sum-exp of the scores of each row
    std::int64_t lse_batch_stride, lse_head_stride, lse_row_stride;
    AttentionMask mask;
    double scale;
    Dtype dtype;  // of every other tensor, except that the log-sum-exp of bfloat16 is float
    std::int64_t batch, heads, rows, keys, width, value_width;
};

struct AttentionTangentArguments {
    AttentionPrimal primal;
    AttentionOperand result;      // [count, batch, heads, rows, value_width]; written
    AttentionOperand dq, dk, dv;  // [count, *shape of q, k, v]
    std::int64_t count;
    int threads;
};

}  // namespace sharpcore

// result = P dv + G v - rowsum(G) out, with P = exp(scale q k^T + mask - lse), G = P * scale (dq k^T + q dk^T).
SHARPCORE_DECLARE_KERNEL(attention_tangent, AttentionTangentArguments)
