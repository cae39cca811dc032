#pragma once

// Soft prompts for llama.cpp: rows of input embeddings that stand in place of chosen tokens' own, inserted while
// the graph is built, so that they work on every backend that has ADD and MUL, with any split into ubatches and
// with many prompts and texts in one llama_decode. With no row set, the graph is upstream's own, node for node.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// From the next llama_decode on, the tokens of sequence `seq_id` at positions pos0 .. pos0 + n_rows - 1 are embedded
// as rows[n_rows][n_embd] instead (row-major). A batch still needs a valid token id at each place; any will do.
// One run of rows a sequence: a second call replaces the first. The rows are not copied: keep them alive and unchanged until
// they are cleared or replaced. Rows are in the scale of llama_soft_prompt_token_embeddings. Not thread-safe with
// llama_decode on the same context.
LLAMA_API void llama_soft_prompt_set(
        struct llama_context * ctx,
                llama_seq_id   seq_id,
                   llama_pos   pos0,
                     int32_t   n_rows,
                 const float * rows);

LLAMA_API void llama_soft_prompt_clear(struct llama_context * ctx);

// llama_model_load_from_file for scoring with label heads: the output matrix stays in the mapped file, where a label head's rows are
// read from, and is not repacked for this CPU. The whole output layer still works, slower.
LLAMA_API struct llama_model * llama_soft_prompt_load_from_file(const char * path, struct llama_model_params params);

// llama_init_from_model, with labels (llama_soft_prompt_set_labels) from the start, so that no buffer is reserved n_vocab wide, and with
// row attention: flash attention on the CPU then gives each token what its own cells give, to the last bit, whatever is computed
// beside it and wherever in the cache its cells lie (ggml-row-attention.h). With params.swa_full a cell that a sliding window has
// passed is neither given to another token nor left out of a sequence's state: a sequence can go on from any of its positions.
LLAMA_API struct llama_context * llama_soft_prompt_init_from_model(
          struct llama_model * model,
 struct llama_context_params   params,
           const llama_token * ids,
                     int32_t   n,
                 const float * head);

// The largest number that divides all sizes of a head's keys and values.
LLAMA_API int32_t llama_soft_prompt_head_size(const struct llama_model * model);

// false for models that llama.cpp never computes with flash attention, and so not with row attention
LLAMA_API bool llama_soft_prompt_has_row_attention(const struct llama_model * model);

// What the graph multiplies token embeddings by before the first layer. Rows are given after it.
LLAMA_API float llama_soft_prompt_embedding_scale(const struct llama_model * model);

// Whether all matrices of the layers are f32, whatever the file says of itself.
LLAMA_API bool llama_soft_prompt_is_f32(const struct llama_model * model);

// The length of a text, in tokens, above which LongRoPE's long factors replace its short ones; 0 where the model has none.
LLAMA_API uint32_t llama_soft_prompt_long_rope_from(const struct llama_model * model);

// From the next llama_decode on, LongRoPE's factors are those of texts of so many tokens (the longest of a batch; which side of
// llama_soft_prompt_long_rope_from they are on must be the same for all). 0: llama.cpp's own choice, by the context's size.
LLAMA_API void llama_soft_prompt_set_text_length(struct llama_context * ctx, uint32_t n_tokens);

// From the next llama_decode on, compute the logits of tokens ids[n] alone: the output layer is head[n][n_embd] in place of
// the whole matrix, and no buffer is n_vocab wide. head = NULL computes the whole output layer and picks from it; the result
// is the same but for rounding. n = 0 goes back to llama.cpp's own logits. `head` is not copied: keep it alive.
// llama_get_logits* do not see these logits: read llama_soft_prompt_label_logits.
LLAMA_API void llama_soft_prompt_set_labels(
        struct llama_context * ctx,
           const llama_token * ids,
                     int32_t   n,
                 const float * head);

// out[n_outputs][n_labels] of the last llama_decode, in the batch's order; valid until the next.
LLAMA_API const float * llama_soft_prompt_label_logits(const struct llama_context * ctx);

// From the next llama_decode on, the states of layers[n] at the tokens that want outputs: what each layer adds up to, after its
// residual connections and before the next layer's norm (layers count from 0). n = 0: none, and the graph is upstream's again.
LLAMA_API void llama_soft_prompt_set_taps(struct llama_context * ctx, const int32_t * layers, int32_t n);

// out[n_outputs][n][n_embd] of the last llama_decode, in the batch's order; valid until the next. NULL where this architecture's graph
// does not say where a layer ends.
LLAMA_API const float * llama_soft_prompt_states(const struct llama_context * ctx);

// Where the rows of the output layer lie in the model file: the tensor's name, or NULL where the output layer is more than one
// matrix product (a bias, a scale per row, token ids in the graph), so that rows of it alone would not do.
LLAMA_API const char * llama_soft_prompt_output_tensor(const struct llama_model * model);

// The input embeddings of token ids[n], out[n][n_embd], as the first layer gets them (what Hugging Face calls
// inputs_embeds: after any embedding scale). Ids must be in the vocabulary.
LLAMA_API void llama_soft_prompt_token_embeddings(
        const struct llama_model * model,
               const llama_token * ids,
                         int32_t   n,
                           float * out);

// NULL where soft prompts work with this architecture (its GGUF name), else why they don't. Scoring needs a causal decoder whose whole
// memory is a KV cache.
LLAMA_API const char * llama_soft_prompt_refuses(const char * architecture);

#ifdef __cplusplus
}
#endif
