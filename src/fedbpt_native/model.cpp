#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <new>
#include <unordered_set>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "backends.h"
#include "errors.h"
#include "llama-soft-prompt.h"
#include "log.h"
#include "model_file.h"
#include "model_notes.h"
#include "parts.h"

namespace fedbpt {

namespace {

constexpr size_t kTextBytesMax = 1 << 20;     // tokenisation takes about 200 bytes of memory per byte of text
constexpr llama_token kRowsResident = 16384;  // rows of the embedding table read before their pages are released

// Releases the memory of mapped files' pages; later reads get them from the page cache. Otherwise weights that were
// repacked for this CPU would be resident twice.
void release_pages(const std::vector<std::string> & paths) {
#ifdef __linux__
    std::unordered_set<std::string> targets;
    for (const std::string & path : paths) {
        std::error_code error;
        targets.insert(std::filesystem::canonical(path, error).string());
    }
    targets.erase("");  // a deleted file: anonymous memory has an empty name too

    std::ifstream maps("/proc/self/maps");
    for (std::string line; !targets.empty() && std::getline(maps, line);) {
        // begin-end perms offset device inode   path
        unsigned long begin = 0, end = 0;
        int at = 0;
        if (std::sscanf(line.c_str(), "%lx-%lx %*s %*s %*s %*s %n", &begin, &end, &at) == 2 && at > 0 &&
            targets.count(line.substr(static_cast<size_t>(at))) > 0) {
            madvise(reinterpret_cast<void *>(begin), end - begin, MADV_DONTNEED);
        }
    }
#else
    (void)paths;
#endif
}

// Progress callback: releases the pages read so far, twenty times during a load.
struct PageRelease {
    const std::vector<std::string> & paths;
    float next = 0.0f;

    static bool on_progress(float progress, void * self_) {
        auto * self = static_cast<PageRelease *>(self_);
        if (progress >= self->next) {
            self->next = progress + 0.05f;
            release_pages(self->paths);
        }
        return true;
    }
};

// Makes a ModelFileError of what llama.cpp throws on an inconsistent vocabulary.
template <typename Call>
auto with_vocabulary(const std::string & path, Call && call) {
    std::string error = "an exception of another C++ library";
    try {
        return call();
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception & thrown) {
        error = thrown.what();
    } catch (...) {  // in a wheel, llama.cpp's std::exception is another type than this module's
    }
    throw ModelFileError(path + " has an inconsistent vocabulary (" + error + "): use another file of the model");
}

}  // namespace

Model::Model(ModelPtr model, std::vector<std::string> paths, std::string architecture)
    : model_(std::move(model)),
      vocab_(llama_model_get_vocab(model_.get())),
      paths_(std::move(paths)),
      architecture_(std::move(architecture)),
      n_embd_(llama_model_n_embd(model_.get())),
      n_vocab_(llama_vocab_n_tokens(vocab_)),
      n_ctx_train_(llama_model_n_ctx_train(model_.get())),
      long_rope_from_(llama_soft_prompt_long_rope_from(model_.get())),
      notes_(notes_on(paths_.front(), model_.get())) {}

std::shared_ptr<const Model> Model::load(const std::string & any_part, int32_t n_gpu_layers, const std::string & gpu) {
    start_backends();

    if (n_gpu_layers != 0 && gpus().empty()) {
        throw InputError("n_gpu_layers is " + std::to_string(n_gpu_layers) +
                         ", but this build of fedbpt finds no GPU: set it to 0, or build with -C "
                         "cmake.define.GGML_CUDA=ON or GGML_VULKAN=ON");
    }
    if (n_gpu_layers == 0 && !gpu.empty()) {
        throw InputError("gpu is '" + gpu + "', but n_gpu_layers is 0: set n_gpu_layers too (-1: all)");
    }

    std::vector<std::string> paths = model_parts(any_part);
    const std::string & path = paths.front();
    const ModelFile file(path);
    file.check();

    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = n_gpu_layers;
    // even with n_gpu_layers 0, llama.cpp would offload large products to a GPU
    std::vector<ggml_backend_dev_t> devices = only_gpu(gpu);
    params.devices = n_gpu_layers != 0 && gpu.empty() ? nullptr : devices.data();

    take_error();
    PageRelease release{ paths };
    params.progress_callback = PageRelease::on_progress;
    params.progress_callback_user_data = &release;

    ModelPtr model(n_gpu_layers == 0 ? llama_soft_prompt_load_from_file(path.c_str(), params)
                                     : llama_model_load_from_file(path.c_str(), params));
    release_pages(paths);
    if (!model) {
        const std::string error = take_error();
        throw ModelFileError(path + " cannot be loaded (" + error + "): " + load_advice(error));
    }

    return std::shared_ptr<const Model>(new Model(std::move(model), std::move(paths), file.architecture()));
}

std::vector<llama_token> Model::tokenize(const std::string & text, int add_bos, bool parse_special) const {
    if (text.size() > kTextBytesMax) {
        throw InputError("a text of " + std::to_string(text.size()) + " bytes is too long: shorten it to " +
                         std::to_string(kTextBytesMax));
    }
    std::vector<llama_token> ids(text.size() + 2);

    const auto length = static_cast<int32_t>(text.size());
    const auto fill = [&] {
        return llama_tokenize(vocab_, text.data(), length, ids.data(), static_cast<int32_t>(ids.size()),
                              /*add_special =*/false, parse_special);
    };
    int32_t n = with_vocabulary(paths_.front(), fill);
    if (n < 0) {
        ids.resize(-static_cast<int64_t>(n));
        n = with_vocabulary(paths_.front(), fill);
    }
    ids.resize(std::max(n, 0));

    if (add_bos == 1 || (add_bos == -1 && llama_vocab_get_add_bos(vocab_))) {
        const llama_token bos = llama_vocab_bos(vocab_);
        if (bos == LLAMA_TOKEN_NULL) {
            throw InputError("this model has no BOS token: set add_bos to False or None");
        }
        ids.insert(ids.begin(), bos);
    }
    return ids;
}

std::string Model::piece(llama_token id) const {
    check_token(id, "token id");
    std::string bytes(64, '\0');
    const auto read = [&] {
        return llama_token_to_piece(vocab_, id, bytes.data(), static_cast<int32_t>(bytes.size()), /*lstrip =*/0,
                                    /*special =*/false);
    };
    int32_t n = with_vocabulary(paths_.front(), read);
    if (n < 0) {
        bytes.resize(static_cast<size_t>(-static_cast<int64_t>(n)));
        n = with_vocabulary(paths_.front(), read);
    }
    bytes.resize(static_cast<size_t>(std::max(n, 0)));
    return bytes;
}

std::string Model::chat_text(const std::vector<std::pair<std::string, std::string>> & messages) const {
    const char * chat_template = llama_model_chat_template(model_.get(), /*name =*/nullptr);
    if (chat_template == nullptr) {
        throw InputError(
            "this model has no chat template, so it was not trained to reply to messages: use completions");
    }
    std::vector<llama_chat_message> chat;
    for (const auto & [role, content] : messages) {
        chat.push_back({ role.c_str(), content.c_str() });
    }
    std::string text;
    const auto apply = [&] {
        return llama_chat_apply_template(chat_template, chat.data(), chat.size(), /*add_ass =*/true, text.data(),
                                         static_cast<int32_t>(text.size()));
    };
    const int32_t n = apply();
    if (n < 0) {
        throw InputError("llama.cpp does not know this model's chat template: use completions");
    }
    text.resize(static_cast<size_t>(n));
    apply();
    return text;
}

void Model::check_token(llama_token id, const char * what) const {
    if (id < 0 || id >= n_vocab_) {
        throw InputError(std::string(what) + " " + std::to_string(id) + " is outside the vocabulary [0, " +
                         std::to_string(n_vocab_) + "): tokenize with this model");
    }
}

void Model::token_embeddings(const llama_token * ids, size_t n, float * out) const {
    for (size_t i = 0; i < n; ++i) {
        check_token(ids[i], "token id");
    }
    llama_soft_prompt_token_embeddings(model_.get(), ids, static_cast<int32_t>(n), out);
}

std::vector<float> Model::output_rows(const std::vector<llama_token> & ids) const {
    const char * name = llama_soft_prompt_output_tensor(model_.get());
    if (name == nullptr) {
        return {};
    }
    // Read from the file: in memory the matrix may be repacked for this CPU, or on a GPU.
    GgufPtr gguf;
    int64_t index = -1;
    std::string path;
    for (auto part = paths_.begin(); index < 0 && part != paths_.end(); ++part) {
        path = *part;
        gguf = open_gguf(path);
        index = gguf_find_tensor(gguf.get(), name);
    }
    if (index < 0) {
        return {};
    }
    const ggml_type type = gguf_get_tensor_type(gguf.get(), index);
    const size_t row_size = ggml_row_size(type, n_embd_);
    if (gguf_get_tensor_size(gguf.get(), index) != row_size * static_cast<size_t>(n_vocab_)) {
        return {};
    }

    std::ifstream file(path, std::ios::binary);
    std::vector<char> packed(row_size);
    std::vector<float> rows(ids.size() * n_embd_);
    for (size_t i = 0; i < ids.size(); ++i) {
        file.seekg(static_cast<std::streamoff>(gguf_get_data_offset(gguf.get()) +
                                               gguf_get_tensor_offset(gguf.get(), index) + ids[i] * row_size));
        if (!file.read(packed.data(), static_cast<std::streamsize>(row_size))) {
            throw ModelFileError(path + " cannot be read any more: was it moved or truncated since it was loaded?");
        }
        if (type == GGML_TYPE_F32) {
            std::memcpy(rows.data() + i * n_embd_, packed.data(), row_size);
        } else {
            ggml_get_type_traits(type)->to_float(packed.data(), rows.data() + i * n_embd_, n_embd_);
        }
    }
    return rows;
}

double Model::embedding_std() const {
    std::vector<float> row(n_embd_);
    double sum = 0.0, sum_squares = 0.0;

    for (llama_token id = 0; id < n_vocab_; ++id) {
        if (id % kRowsResident == 0) {
            release_pages(paths_);
        }
        llama_soft_prompt_token_embeddings(model_.get(), &id, 1, row.data());
        for (const float value : row) {
            sum += value;
            sum_squares += static_cast<double>(value) * value;
        }
    }

    release_pages(paths_);

    const double count = static_cast<double>(n_vocab_) * n_embd_;
    const double mean = sum / count;
    return std::sqrt(std::max(0.0, sum_squares / count - mean * mean));
}

std::string Model::description() const {
    char text[256];
    llama_model_desc(model_.get(), text, sizeof(text));
    return text;
}

}  // namespace fedbpt
