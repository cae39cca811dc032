#pragma once

// Products of Q4_1 matrices with activations in Q8_1, on x86 CPUs. Upstream has neither a repacked layout nor tiles for this type and
// takes one dot product for each number of the result.
//
// A tile of rows is unpacked once for all columns. The sums of a column are taken in the same order whatever columns are beside it: a
// token gets the same bits in a batch as alone.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Called by the CPU backend after it has converted the activations in src[1] to params->wdata; the threads share the tiles. False if the
// type, the CPU or the shape is another: nothing is computed then.
bool ggml_block_matmul(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
