#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "handles.h"
#include "llama-soft-prompt.h"

namespace fedbpt {

// A frozen model: weights, vocabulary, token embeddings. Immutable after load, so safe to share between threads.
class Model {
public:
    // any_part: the file, or any part of a split model. gpu: name of a GPU; empty: all GPUs, or none if n_gpu_layers is
    // 0. Throws ModelFileError, UnsupportedModelError (both by the header, before weights are loaded, if possible),
    // InputError (GPU layers without a GPU, or an unknown GPU).
    static std::shared_ptr<const Model> load(const std::string & any_part, int32_t n_gpu_layers,
                                             const std::string & gpu = "");

    // add_bos: -1 as the model was trained, 0 no, 1 yes. Special tokens in the text are plain text unless
    // parse_special. Throws InputError for a text of more than 1 MiB, ModelFileError if the vocabulary is inconsistent
    // or has no tokens for the text.
    std::vector<llama_token> tokenize(const std::string & text, int add_bos, bool parse_special = false) const;

    // Bytes that a token adds to a text, possibly part of a character; empty for special tokens. Throws InputError, and
    // ModelFileError as tokenize.
    std::string piece(llama_token id) const;

    // whether the model ends its text with this token
    bool is_end(llama_token id) const { return llama_vocab_is_eog(vocab_, id); }

    // Formats (role, content) messages by the model's chat template, up to the beginning of the assistant's reply.
    // Throws InputError if the model has none, or one that llama.cpp does not know.
    std::string chat_text(const std::vector<std::pair<std::string, std::string>> & messages) const;

    // out[n][n_embd], in the scale of soft prompt rows. Throws InputError on an id outside the vocabulary.
    void token_embeddings(const llama_token * ids, size_t n, float * out) const;

    // Rows ids[n] of the output layer, [n][n_embd], read from the model file; empty if rows are not sufficient for the
    // logits (an output bias).
    std::vector<float> output_rows(const std::vector<llama_token> & ids) const;

    // standard deviation over all entries of the embedding table, in the same scale
    double embedding_std() const;

    // differences of llama.cpp from the model's reference implementation, a sentence each
    const std::vector<std::string> & notes() const { return notes_; }

    void check_token(llama_token id, const char * what) const;

    llama_model * get() const { return model_.get(); }
    int32_t n_embd() const { return n_embd_; }
    int32_t n_vocab() const { return n_vocab_; }
    int32_t n_ctx_train() const { return n_ctx_train_; }
    uint64_t n_params() const { return llama_model_n_params(model_.get()); }
    uint64_t size_bytes() const { return llama_model_size(model_.get()); }
    // whether all matrices of its layers are f32
    bool is_f32() const { return llama_soft_prompt_is_f32(model_.get()); }
    // with row attention, a token's bits do not depend on the rest of its batch; f32 models do not use flash attention
    bool has_row_attention() const { return !is_f32() && llama_soft_prompt_has_row_attention(model_.get()); }

    // factor applied to token embeddings before the first layer; soft prompt rows are inserted after it
    float embedding_scale() const { return llama_soft_prompt_embedding_scale(model_.get()); }

    // whether a text of n_tokens uses LongRoPE's long factors: decided by its own length, as in transformers
    bool is_long(size_t n_tokens) const { return long_rope_from_ > 0 && n_tokens > long_rope_from_; }
    // argument for llama_soft_prompt_set_text_length
    uint32_t rope_length(bool is_long) const { return long_rope_from_ + is_long; }
    bool fits_kv(ggml_type type) const { return llama_soft_prompt_head_size(model_.get()) % ggml_blck_size(type) == 0; }
    const std::string & architecture() const { return architecture_; }
    std::string description() const;

private:
    Model(ModelPtr model, std::vector<std::string> paths, std::string architecture);

    ModelPtr model_;
    const llama_vocab * vocab_;
    std::vector<std::string> paths_;
    std::string architecture_;
    int32_t n_embd_;
    int32_t n_vocab_;
    int32_t n_ctx_train_;
    uint32_t long_rope_from_;  // 0: none
    std::vector<std::string> notes_;
};

}  // namespace fedbpt
