#include "model_notes.h"

#include <algorithm>
#include <cstdint>

#include "handles.h"

namespace fedbpt {

namespace {

// The value of an integer key; 0 if it is missing or of another type.
uint64_t largest_of(const gguf_context * gguf, const std::string & name) {
    const int64_t key = gguf_find_key(gguf, name.c_str());
    if (key < 0) {
        return 0;
    }
    switch (gguf_get_kv_type(gguf, key)) {
        case GGUF_TYPE_UINT32:
            return gguf_get_val_u32(gguf, key);
        case GGUF_TYPE_INT32:
            return static_cast<uint64_t>(std::max(0, gguf_get_val_i32(gguf, key)));
        case GGUF_TYPE_UINT64:
            return gguf_get_val_u64(gguf, key);
        default:
            return 0;
    }
}

std::string text_of(const gguf_context * gguf, const char * name) {
    const int64_t key = gguf_find_key(gguf, name);
    return key >= 0 && gguf_get_kv_type(gguf, key) == GGUF_TYPE_STRING ? gguf_get_val_str(gguf, key) : "";
}

}  // namespace

std::vector<std::string> notes_on(const std::string & path, const llama_model * model) {
    std::vector<std::string> notes;
    const GgufPtr gguf(gguf_init_from_file(path.c_str(), { /*no_alloc =*/true, /*ctx =*/nullptr }));
    if (!gguf) {
        return notes;
    }
    const std::string architecture = text_of(gguf.get(), "general.architecture");

    const uint64_t window = largest_of(gguf.get(), architecture + ".attention.sliding_window");
    if (window > 0 && llama_model_n_swa(model) == 0 && window < static_cast<uint64_t>(llama_model_n_ctx_train(model))) {
        notes.push_back("the model has a sliding window of " + std::to_string(window) +
                        " tokens, which llama.cpp does not implement for " + architecture +
                        ": scores of longer texts differ from the reference implementation's");
    }
    if (architecture == "minimax-m3") {
        notes.push_back(
            "the model has sparse attention, which llama.cpp computes as dense attention in a shared KV cache: scores "
            "of long texts differ from the reference implementation's");
    }
    if (text_of(gguf.get(), "tokenizer.ggml.model") == "gpt2" && text_of(gguf.get(), "tokenizer.ggml.pre").empty()) {
        notes.push_back(
            "the file does not name its pre-tokenizer (tokenizer.ggml.pre): texts may be split into other tokens than "
            "in training; use a newer conversion of the model");
    }
    return notes;
}

}  // namespace fedbpt
