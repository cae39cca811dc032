#pragma once

// Attention on the CPU where most of the mask is closed: many texts and candidates side by side in one KV cache.
//
// What a query row gets depends on the cells that its own mask opens, in their order, and on nothing else: not on the other rows of the
// batch, nor on where in the cache the cells lie. So a candidate scored in company gets the bits that it gets alone.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_ROW_ATTENTION_PARAM 15  // of a node's op_params; no operation of upstream's uses it

// Has a GGML_OP_FLASH_ATTN_EXT node computed this way on the CPU where it can be. Elsewhere, and unasked, it stays upstream's.
static inline void ggml_row_attention_request(struct ggml_tensor * node) {
    node->op_params[GGML_ROW_ATTENTION_PARAM] = 1;
}

struct ggml_compute_params;

// The CPU backend's: false where it was not requested or is not possible (no mask, a mask a head); nothing is done then.
bool ggml_row_attention(const struct ggml_compute_params * params, struct ggml_tensor * node);

#ifdef __cplusplus
}
#endif
