#pragma once

// Soft prompts for llama.cpp: rows that replace the input embeddings of chosen tokens. They are inserted while the graph
// is built, so they work on every backend with ADD and MUL, with any split into ubatches, and with many prompts and
// texts in one llama_decode. If no row is set, the graph is upstream's, node for node.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// From the next llama_decode on, rows[n_rows][n_embd] (row-major) replace the embeddings of sequence `seq_id` at positions
// pos0 .. pos0 + n_rows - 1. A batch still needs a valid token id at each of them; any will do. Each sequence has one run
// of rows: a second call replaces the first. The rows are not copied: keep them alive and unchanged until they are cleared
// or replaced. Rows are in the scale of llama_soft_prompt_token_embeddings. Not thread-safe with llama_decode on the same
// context.
LLAMA_API void llama_soft_prompt_set(
        struct llama_context * ctx,
                llama_seq_id   seq_id,
                   llama_pos   pos0,
                     int32_t   n_rows,
                 const float * rows);

// From the next llama_decode on, rows[n_layers][n_embd] are added to the hidden states of sequence `seq_id` at positions pos0 .. pos1 - 1:
// row i to the output of layer `layer` + i (from 0), before the next layer reads it. A token in several sequences gets the shift of the
// first of them that has one. Each sequence has one shift; n_layers = 0 removes it. Otherwise as llama_soft_prompt_set. Rows of zeros
// change no bit.
LLAMA_API void llama_soft_prompt_set_shift(
        struct llama_context * ctx,
                llama_seq_id   seq_id,
                   llama_pos   pos0,
                   llama_pos   pos1,
                     int32_t   layer,
                     int32_t   n_layers,
                 const float * rows);

// From the next llama_decode on, row[n_embd] is the output of layer `layer` (from 0, not the last) for sequence `seq_id` at position `pos`.
// The layers up to it are not computed in that ubatch, and write nothing to the KV cache; a batch still needs a valid token id. In an
// ubatch with such states, all of them must be of the same layer; tokens without one get zeros, and have no meaningful output. Each
// sequence has one state; row = NULL removes it. Otherwise as llama_soft_prompt_set.
LLAMA_API void llama_soft_prompt_set_state(
        struct llama_context * ctx,
                llama_seq_id   seq_id,
                   llama_pos   pos,
                     int32_t   layer,
                 const float * row);

// False if shifts or states were left out since llama_soft_prompt_clear, as this architecture's graph does not mark its layer outputs.
LLAMA_API bool llama_soft_prompt_shifted(const struct llama_context * ctx);

// False if since llama_soft_prompt_clear a graph that began with states has read from the KV cache for layers that it did not compute, as
// some architectures' later layers do: its results are wrong.
LLAMA_API bool llama_soft_prompt_resumed(const struct llama_context * ctx);

// Removes all rows, shifts and states.
LLAMA_API void llama_soft_prompt_clear(struct llama_context * ctx);

// llama_model_load_from_file for scoring with label heads: the output matrix stays in the mapped file, from which the rows of label
// heads are read, and is not repacked for this CPU. The whole output layer still works, but is slower.
LLAMA_API struct llama_model * llama_soft_prompt_load_from_file(const char * path, struct llama_model_params params);

// llama_init_from_model with labels (llama_soft_prompt_set_labels) from the start, so that no buffer is reserved n_vocab wide, and with
// row attention: on the CPU, the bits of a token's flash attention then depend only on its own cells, not on the rest of the batch or on
// where in the cache the cells lie (ggml-row-attention.h). With params.swa_full, cells that a sliding window has passed are neither reused
// nor left out of a sequence's state: a sequence can continue from any of its positions.
LLAMA_API struct llama_context * llama_soft_prompt_init_from_model(
          struct llama_model * model,
 struct llama_context_params   params,
           const llama_token * ids,
                     int32_t   n,
                 const float * head);

// Greatest common divisor of the sizes of a head's keys and values in all layers.
LLAMA_API int32_t llama_soft_prompt_head_size(const struct llama_model * model);

// False for models that llama.cpp never computes with flash attention, and so not with row attention.
LLAMA_API bool llama_soft_prompt_has_row_attention(const struct llama_model * model);

// Factor applied to token embeddings before the first layer. Rows are inserted after it.
LLAMA_API float llama_soft_prompt_embedding_scale(const struct llama_model * model);

// Whether all matrices of the layers are f32, whatever file type the metadata declares.
LLAMA_API bool llama_soft_prompt_is_f32(const struct llama_model * model);

// Length of a text, in tokens, above which LongRoPE's long factors replace the short ones; 0 if the model has none.
LLAMA_API uint32_t llama_soft_prompt_long_rope_from(const struct llama_model * model);

// From the next llama_decode on, use LongRoPE's factors for texts of n_tokens (the longest of a batch; all must be on the same side of
// llama_soft_prompt_long_rope_from). 0: llama.cpp's choice, by the context's size.
LLAMA_API void llama_soft_prompt_set_text_length(struct llama_context * ctx, uint32_t n_tokens);

// From the next llama_decode on, compute only the logits of tokens ids[n]: the output layer is head[n][n_embd] in place of
// the whole matrix, and no buffer is n_vocab wide. head = NULL computes the whole output layer and selects from it, with the
// same result up to rounding. n = 0 restores llama.cpp's own logits. `head` is not copied: keep it alive.
// llama_get_logits* do not return these logits: use llama_soft_prompt_label_logits.
LLAMA_API void llama_soft_prompt_set_labels(
        struct llama_context * ctx,
           const llama_token * ids,
                     int32_t   n,
                 const float * head);

// out[n_outputs][n_labels] of the last llama_decode, in the batch's order; valid until the next.
LLAMA_API const float * llama_soft_prompt_label_logits(const struct llama_context * ctx);

// From the next llama_decode on, record the hidden states of layers[n] (from 0) at the tokens with outputs: each layer's output, after
// its residual connections and before the next layer's norm. n = 0: none, and the graph is upstream's again.
LLAMA_API void llama_soft_prompt_set_taps(struct llama_context * ctx, const int32_t * layers, int32_t n);

// out[n_outputs][n][n_embd] of the last llama_decode, in the batch's order; valid until the next. NULL if this architecture's graph does
// not mark its layer outputs.
LLAMA_API const float * llama_soft_prompt_states(const struct llama_context * ctx);

// Name of the tensor that holds the rows of the output layer; NULL if rows are not sufficient for the logits, since the output layer is
// more than one matrix product (a bias, a scale per row, token ids in the graph).
LLAMA_API const char * llama_soft_prompt_output_tensor(const struct llama_model * model);

// Input embeddings out[n][n_embd] of token ids[n], as the first layer reads them, after any embedding scale. Ids must be in
// the vocabulary.
LLAMA_API void llama_soft_prompt_token_embeddings(
        const struct llama_model * model,
               const llama_token * ids,
                         int32_t   n,
                           float * out);

// NULL if soft prompts work with this architecture (its GGUF name), else the reason. Scoring needs a causal decoder whose only memory is
// a KV cache.
LLAMA_API const char * llama_soft_prompt_refuses(const char * architecture);

#ifdef __cplusplus
}
#endif
