// Nearest-neighbour upsampling of images by whole numbers, and its transpose, for K tangents or cotangents.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"
#include "sharpcore/isa.h"

namespace sharpcore {

// Images are [count, batch, channels, height, width]. In each sample the channels and positions lie without gaps,
// positions fastest, or channels fastest where `channels_last`. Strides count elements.
struct UpsampleNearestArguments {
    void* out;            // tangents: large images; cotangents: small ones
    const void* vectors;  // tangents: small images; cotangents: large ones
    Dtype dtype;          // of both
    bool channels_last;
    std::int64_t count, batch, channels, height, width;  // of the small images
    std::int64_t down, across;                           // a pixel of the small image has down x across of the large
    std::int64_t out_count_stride, out_batch_stride;
    std::int64_t vector_count_stride, vector_batch_stride;
    int threads;
};

}  // namespace sharpcore

// Every pixel goes to all pixels of its block.
SHARPCORE_DECLARE_KERNEL(upsample_nearest_tangent, UpsampleNearestArguments)

// Every pixel is the sum over its block.
SHARPCORE_DECLARE_KERNEL(upsample_nearest_adjoint, UpsampleNearestArguments)
