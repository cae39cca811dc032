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
    // Throws ModelFileError, UnsupportedModelError (by the file's header, before its weights are loaded), InputError
    // (GPU layers where there is no GPU, or not the one named). gpu: the name of one; empty: all that there are, with
    // n_gpu_layers 0 none. any_part: the file, or any part of a split model.
    static std::shared_ptr<const Model> load(const std::string & any_part, int32_t n_gpu_layers,
                                             const std::string & gpu = "");

    // add_bos: -1 as the model was trained, 0 no, 1 yes. Special tokens in the text are plain text, or with
    // parse_special themselves. Throws InputError for a text of more than 1 MiB, ModelFileError where the vocabulary
    // contradicts itself or has no tokens for it.
    std::vector<llama_token> tokenize(const std::string & text, int add_bos, bool parse_special = false) const;

    // The bytes that a token adds to a text, perhaps part of a character; none for special tokens. Throws InputError,
    // ModelFileError as tokenize.
    std::string piece(llama_token id) const;

    // whether a text ends with this token
    bool is_end(llama_token id) const { return llama_vocab_is_eog(vocab_, id); }

    // (role, content) messages in the model's own chat template, up to where the assistant's answer begins. Throws
    // InputError where the model has none, or one that llama.cpp does not know.
    std::string chat_text(const std::vector<std::pair<std::string, std::string>> & messages) const;

    // out[n][n_embd], in the scale of soft prompt rows. Throws InputError on an id outside the vocabulary.
    void token_embeddings(const llama_token * ids, size_t n, float * out) const;

    // Rows ids[n] of the output layer, [n][n_embd], read from the model file; empty where rows alone do not make the
    // logits (an output bias).
    std::vector<float> output_rows(const std::vector<llama_token> & ids) const;

    // over all entries of the embedding table, in the same scale
    double embedding_std() const;

    // what llama.cpp computes otherwise than the model's makers do, a sentence each
    const std::vector<std::string> & notes() const { return notes_; }

    void check_token(llama_token id, const char * what) const;

    llama_model * get() const { return model_.get(); }
    int32_t n_embd() const { return n_embd_; }
    int32_t n_vocab() const { return n_vocab_; }
    int32_t n_ctx_train() const { return n_ctx_train_; }
    uint64_t n_params() const { return llama_model_n_params(model_.get()); }
    uint64_t size_bytes() const { return llama_model_size(model_.get()); }
    // whether all matrices of its layers are
    bool is_f32() const { return llama_soft_prompt_is_f32(model_.get()); }
    // with it a token's bits do not depend on what is computed beside it; f32 models have no flash attention
    bool has_row_attention() const { return !is_f32() && llama_soft_prompt_has_row_attention(model_.get()); }

    // what token embeddings are multiplied by before the first layer; rows are given after it
    float embedding_scale() const { return llama_soft_prompt_embedding_scale(model_.get()); }

    // whether a text of so many tokens takes LongRoPE's long factors: by its own length, as in transformers
    bool is_long(size_t n_tokens) const { return long_rope_from_ > 0 && n_tokens > long_rope_from_; }
    // what llama_soft_prompt_set_text_length takes
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
