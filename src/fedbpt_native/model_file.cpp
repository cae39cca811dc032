#include "model_file.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string_view>
#include <unordered_set>

#include "errors.h"
#include "llama-soft-prompt.h"
#include "parts.h"

namespace fedbpt {

namespace {

constexpr double kLayersMax = 512;      // LLAMA_MAX_LAYERS
constexpr double kExpertsMax = 1024;    // LLAMA_MAX_EXPERTS
constexpr double kWindowMax = 1 << 24;  // tokens: llama.cpp allocates a number for each, per sequence
constexpr double kContextMin = 8;       // tokens: a prompt, a text, and some to generate
constexpr double kIntMax = 2147483647;

bool contains(const std::string & text, std::initializer_list<const char *> parts) {
    return std::any_of(parts.begin(), parts.end(),
                       [&](const char * part) { return text.find(part) != std::string::npos; });
}

// Quotes text from the file, shortened, for a message.
std::string quoted(const std::string & text) {
    constexpr size_t kMost = 60;
    return "'" + (text.size() > kMost ? text.substr(0, kMost) + "..." : text) + "'";
}

std::string written(double number) {
    std::string text = std::to_string(number);
    if (text.find('.') != std::string::npos) {
        text.erase(text.find_last_not_of('0') + 1);
        text.erase(text.find_last_not_of('.') + 1);
    }
    return text;
}

}  // namespace

std::string load_advice(const std::string & error) {
    const std::string newer = std::string("a newer fedbpt (this one has llama.cpp ") + llama_version() + ")";

    if (contains(error, { "unknown pre-tokenizer", "unknown tokenizer", "unknown model architecture" })) {
        return "use " + newer + " or another file of the model";
    }
    if (contains(error, { "not within the file bounds", "unexpectedly reached end of file", "read error" })) {
        return "the file is truncated or damaged, fetch it again";
    }
    if (contains(error, { "failed to allocate", "unable to allocate", "bad_alloc", "mmap failed",
                          "Cannot allocate memory" })) {
        return "out of memory, end other programs or use a smaller model or format";
    }
    if (contains(error, { "failed to open" })) {
        return "make it readable for this user";
    }
    if (contains(error, { "GGUF split", "split file", "invalid split", "split count" })) {
        return "all parts must be in one folder under their original names, fetch them again";
    }
    if (contains(error, { "not found", "missing tensor", "wrong shape", "wrong number of tensors", "wrong type",
                          "wrong array length" })) {
        return "use " + newer + ", or another file if its conversion to GGUF is broken";
    }
    return "use another file of the model, or " + newer;
}

ModelFile::ModelFile(std::string path)
    : path_(std::move(path)),
      gguf_(open_gguf(path_)),
      architecture_(text("general.architecture")) {
    if (architecture_.empty()) {
        throw ModelFileError(
            path_ +
            " has no architecture (general.architecture), so it is not a complete language model: convert it again, or "
            "use another file");
    }
    check_size();
    // llama.cpp asserts on this setting whatever the file is used for
    check_range("block_count", 1, kLayersMax);
}

void ModelFile::check() const {
    check_kind();
    check_settings();
    check_heads();
    check_experts();
    check_vocabulary();
    check_tensors();
}

std::optional<int64_t> ModelFile::find(const std::string & key) const {
    const int64_t index = gguf_find_key(gguf_.get(), key.c_str());
    return index < 0 ? std::nullopt : std::optional(index);
}

std::string ModelFile::text(const std::string & key) const {
    const auto index = find(key);
    return index && gguf_get_kv_type(gguf_.get(), *index) == GGUF_TYPE_STRING ? gguf_get_val_str(gguf_.get(), *index)
                                                                              : "";
}

std::vector<double> ModelFile::numbers(const std::string & key) const {
    const auto index = find(key);
    if (!index) {
        return {};
    }
    const bool is_array = gguf_get_kv_type(gguf_.get(), *index) == GGUF_TYPE_ARRAY;
    const gguf_type type = is_array ? gguf_get_arr_type(gguf_.get(), *index) : gguf_get_kv_type(gguf_.get(), *index);
    if (type == GGUF_TYPE_STRING || type == GGUF_TYPE_ARRAY) {
        return {};
    }
    const void * data = is_array ? gguf_get_arr_data(gguf_.get(), *index) : gguf_get_val_data(gguf_.get(), *index);
    const size_t n = is_array ? gguf_get_arr_n(gguf_.get(), *index) : 1;

    const auto read = [&](auto zero) {
        const auto * values = static_cast<const decltype(zero) *>(data);
        return std::vector<double>(values, values + n);
    };
    switch (type) {
        case GGUF_TYPE_UINT8:
            return read(uint8_t());
        case GGUF_TYPE_BOOL:
            return read(int8_t());
        case GGUF_TYPE_INT8:
            return read(int8_t());
        case GGUF_TYPE_UINT16:
            return read(uint16_t());
        case GGUF_TYPE_INT16:
            return read(int16_t());
        case GGUF_TYPE_UINT32:
            return read(uint32_t());
        case GGUF_TYPE_INT32:
            return read(int32_t());
        case GGUF_TYPE_UINT64:
            return read(uint64_t());
        case GGUF_TYPE_INT64:
            return read(int64_t());
        case GGUF_TYPE_FLOAT32:
            return read(float());
        case GGUF_TYPE_FLOAT64:
            return read(double());
        default:
            return {};
    }
}

std::optional<double> ModelFile::number(const std::string & key) const {
    const auto index = find(key);
    if (!index || gguf_get_kv_type(gguf_.get(), *index) == GGUF_TYPE_ARRAY) {
        return std::nullopt;
    }
    const std::vector<double> found = numbers(key);
    return found.empty() ? std::nullopt : std::optional(found.front());
}

std::optional<size_t> ModelFile::length(const std::string & key) const {
    const auto index = find(key);
    return index && gguf_get_kv_type(gguf_.get(), *index) == GGUF_TYPE_ARRAY
               ? std::optional(gguf_get_arr_n(gguf_.get(), *index))
               : std::nullopt;
}

void ModelFile::throw_damaged(const std::string & what) const {
    throw ModelFileError(path_ + " is damaged: it " + what + "; fetch it again, or use another file of the model");
}

void ModelFile::throw_unsupported(const std::string & why) const {
    throw UnsupportedModelError(path_ + " does not work with soft prompts (architecture " + quoted(architecture_) +
                                "): " + why + "; use another model");
}

// Called before weights are mapped, since reading past a file's end raises a signal.
void ModelFile::check_size() const {
    uint64_t end = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf_.get()); ++i) {
        end = std::max<uint64_t>(end, gguf_get_tensor_offset(gguf_.get(), i) + gguf_get_tensor_size(gguf_.get(), i));
    }
    std::error_code error;
    const uint64_t size = std::filesystem::file_size(path_, error);
    const uint64_t need = gguf_get_data_offset(gguf_.get()) + end;
    if (!error && size < need) {
        throw ModelFileError(path_ + " is truncated, it has " + std::to_string(size) + " of " + std::to_string(need) +
                             " bytes: fetch it again");
    }
}

void ModelFile::check_kind() const {
    const std::string type = text("general.type");
    if (!type.empty() && type != "model") {
        throw UnsupportedModelError(path_ + " has general.type " + quoted(type) +
                                    ", so it is not a whole model: use the model that it belongs to");
    }
    if (const char * why = llama_soft_prompt_refuses(architecture_.c_str())) {
        throw_unsupported(why);
    }
    if (number(key("attention.causal")).value_or(1) == 0) {
        throw_unsupported("attention.causal is false, but scoring needs a causal model");
    }
    if (number(key("pooling_type")).value_or(0) != 0) {
        throw_unsupported(
            "it has a pooling_type, so it is a model for embeddings or ranking, but scoring needs a generative one");
    }
    if (gguf_get_n_tensors(gguf_.get()) == 0 && number("split.count").value_or(0) < 2) {
        throw UnsupportedModelError(path_ + " has no weights, only metadata: use the whole model");
    }
}

void ModelFile::check_range(const char * name, double least, double most) const {
    for (const double value : numbers(key(name))) {
        if (!(value >= least && value <= most)) {
            throw_damaged("has " + key(name) + " = " + written(value));
        }
    }
}

void ModelFile::check_settings() const {
    for (int64_t i = 0; i < gguf_get_n_kv(gguf_.get()); ++i) {
        const std::string name = gguf_get_key(gguf_.get(), i);
        if (name.compare(0, architecture_.size() + 1, architecture_ + ".") == 0 &&
            gguf_get_kv_type(gguf_.get(), i) == GGUF_TYPE_FLOAT32 && std::isnan(gguf_get_val_f32(gguf_.get(), i))) {
            throw_damaged("has " + quoted(name) + " = NaN");
        }
    }
    constexpr double kTiny = 1e-30, kHuge = 1e30;
    check_range("context_length", kContextMin, kIntMax);
    check_range("embedding_length", 1, kIntMax);
    check_range("attention.layer_norm_epsilon", kTiny, 1);
    check_range("attention.layer_norm_rms_epsilon", kTiny, 1);
    check_range("attention.group_norm_epsilon", kTiny, 1);
    check_range("attention.sliding_window", 0, kWindowMax);
    check_range("rope.freq_base", kTiny, kHuge);
    check_range("rope.freq_base_swa", kTiny, kHuge);
    check_range("rope.scaling.factor", 0, kHuge);
    check_range("rope.scale_linear", 0, kHuge);
    check_range("nextn_predict_layers", 0, number(key("block_count")).value_or(1) - 1);

    const std::string scaling = text(key("rope.scaling.type"));
    if (!scaling.empty() && scaling != "none" && scaling != "linear" && scaling != "yarn" && scaling != "longrope") {
        throw UnsupportedModelError(path_ + " has " + key("rope.scaling.type") + " " + quoted(scaling) +
                                    ", which this llama.cpp (" + llama_version() +
                                    ") does not support: use a newer fedbpt or another model");
    }
}

void ModelFile::check_heads() const {
    const std::vector<double> heads = numbers(key("attention.head_count"));
    std::vector<double> heads_kv = numbers(key("attention.head_count_kv"));
    const bool is_array = length(key("attention.head_count")) || length(key("attention.head_count_kv"));
    // a layer's may be 0, in models where some layers have no attention
    if (std::none_of(heads.begin(), heads.end(), [](double n) { return n >= 1; })) {
        throw_damaged("has no attention heads (" + key("attention.head_count") + ")");
    }
    for (size_t i = 0; i < std::max(heads.size(), heads_kv.size()) && !heads_kv.empty(); ++i) {
        const double n = heads[std::min(i, heads.size() - 1)];
        const double n_kv = heads_kv[std::min(i, heads_kv.size() - 1)];
        if (n_kv == 0 && is_array) {
            continue;
        }
        if (!(n_kv >= 1) || std::fmod(n, n_kv) != 0) {
            throw_damaged("has " + written(n) + " attention heads but " + written(n_kv) + " key/value heads");
        }
    }

    const double width = number(key("embedding_length")).value_or(0);
    double size = number(key("attention.key_length")).value_or(0);
    check_range("attention.key_length", 1, kIntMax);
    check_range("attention.value_length", 1, kIntMax);
    if (size == 0 && !is_array && width > 0) {
        if (std::fmod(width, heads.front()) != 0) {
            throw_damaged("has " + written(heads.front()) + " attention heads but an embedding_length of " +
                          written(width));
        }
        size = width / heads.front();
    }
    for (const char * name : { "rope.dimension_count", "rope.dimension_count_swa" }) {
        const double rotated = number(key(name)).value_or(2);
        if (!(rotated >= 2) || std::fmod(rotated, 2) != 0 ||
            (size > 0 && rotated > std::max(size, number(key("attention.key_length_swa")).value_or(0)))) {
            throw_damaged("has " + key(name) + " = " + written(rotated) +
                          (size > 0 ? " but a head size of " + written(size) : ""));
        }
    }
}

void ModelFile::check_experts() const {
    const double n = number(key("expert_count")).value_or(0);
    const std::vector<double> used = numbers(key("expert_used_count"));
    const double most = used.empty() ? 0 : *std::max_element(used.begin(), used.end());
    if (n <= 1 && architecture_.compare(0, 7, "hunyuan") == 0) {
        return;  // here llama.cpp treats one expert as none
    }
    if (n > kExpertsMax || most > n || (n > 0 && most < 1)) {
        throw_damaged("has " + written(n) + " experts but uses " + written(most) + " of them");
    }
    const double groups = number(key("expert_group_count")).value_or(0);
    const double chosen = number(key("expert_group_used_count")).value_or(0);
    if (groups > 0 && (groups >= n || (groups > 1 && (std::fmod(n, groups) != 0 || chosen < 1 || chosen >= groups)))) {
        throw_damaged("uses " + written(chosen) + " of " + written(groups) + " groups of " + written(n) + " experts");
    }
    check_range("expert_gating_func", 0, 4);
}

void ModelFile::check_vocabulary() const {
    const std::string model = text("tokenizer.ggml.model");
    if (model.empty() || model == "none" || model == "no_vocab") {
        throw UnsupportedModelError(path_ +
                                    " has no vocabulary (tokenizer.ggml.model): convert the model with its tokenizer, "
                                    "or use another file");
    }
    const auto tokens = find("tokenizer.ggml.tokens");
    if (!tokens || gguf_get_kv_type(gguf_.get(), *tokens) != GGUF_TYPE_ARRAY ||
        gguf_get_arr_type(gguf_.get(), *tokens) != GGUF_TYPE_STRING) {
        throw_damaged("has no list of tokens (tokenizer.ggml.tokens)");
    }
    const size_t n = gguf_get_arr_n(gguf_.get(), *tokens);
    if (n == 0) {
        throw_damaged("has an empty vocabulary (tokenizer.ggml.tokens)");
    }
    for (const char * name : { "tokenizer.ggml.scores", "tokenizer.ggml.token_type" }) {
        if (const auto entries = length(name); entries && *entries < n) {
            throw_damaged("has " + std::to_string(n) + " tokens but " + std::to_string(*entries) + " entries of " +
                          name);
        }
    }

    std::unordered_set<std::string_view> seen;
    seen.reserve(n);
    for (size_t i = 0; i < n; ++i) {
        const std::string_view token = gguf_get_arr_str(gguf_.get(), *tokens, i);
        if (!token.empty() && !seen.insert(token).second) {
            throw_damaged("has the token " + quoted(std::string(token)) + " twice in its vocabulary");
        }
    }

    const int64_t table = gguf_find_tensor(gguf_.get(), "token_embd.weight");
    const int64_t n_rows = table < 0 ? static_cast<int64_t>(n) : gguf_get_tensor_ne(gguf_.get(), table)[1];
    if (n_rows != static_cast<int64_t>(n)) {
        throw_damaged("has " + std::to_string(n) + " tokens but embeddings of " + std::to_string(n_rows));
    }
}

void ModelFile::check_tensors() const {
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf_.get()); ++i) {
        const ggml_type type = gguf_get_tensor_type(gguf_.get(), i);
        if (type != GGML_TYPE_F32 && ggml_get_type_traits(type)->to_float == nullptr) {
            throw_damaged("stores " + quoted(gguf_get_tensor_name(gguf_.get(), i)) + " as " + ggml_type_name(type) +
                          ", which is not a type of weights");
        }
    }
}

}  // namespace fedbpt
