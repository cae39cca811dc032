#pragma once

// CPU attention for masks that are mostly closed: many texts and candidates share one KV cache.
//
// The result of a query row depends only on the cells that its own mask opens, in their order: not on the other rows of the batch, nor on
// where in the cache the cells lie. So a candidate gets the same bits whether it is scored alone or with others.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_ROW_ATTENTION_PARAM 15  // index into a node's op_params that no upstream operation uses

// Requests row attention for a GGML_OP_FLASH_ATTN_EXT node. Other backends, and unsupported cases, use upstream's attention.
static inline void ggml_row_attention_request(struct ggml_tensor * node) {
    node->op_params[GGML_ROW_ATTENTION_PARAM] = 1;
}

struct ggml_compute_params;

// Called by the CPU backend. False if it was not requested or is not supported (no mask, a mask per head): nothing is computed then.
bool ggml_row_attention(const struct ggml_compute_params * params, struct ggml_tensor * node);

#ifdef __cplusplus
}
#endif
