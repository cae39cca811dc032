#include "trace.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "backends.h"
#include "batch.h"
#include "errors.h"
#include "log.h"

namespace fedbpt {

namespace {

constexpr uint32_t kTokensMax = 64;  // per decode, and so per ubatch
constexpr uint32_t kCells = 256;     // KV cells: llama.cpp's minimum

// The tensor's name, without the name that ggml gives an unnamed tensor by its place in the graph: node_12, leaf_3,
// "node_12 (view)".
std::string own_name(const ggml_tensor * tensor) {
    const std::string name = tensor->name;
    if (name.rfind("node_", 0) != 0 && name.rfind("leaf_", 0) != 0) {
        return name;
    }
    const size_t end = std::min(name.find_first_not_of("0123456789", 5), name.size());
    return end > 5 && (end == name.size() || name[end] == ' ') ? name.substr(std::min(end + 1, name.size())) : name;
}

std::string hex(uint32_t word) {
    char text[9];
    std::snprintf(text, sizeof(text), "%x", static_cast<unsigned>(word));
    return text;
}

template <typename Iterator, typename ToText>
std::string joined(Iterator first, Iterator last, ToText to_text) {
    std::string text;
    for (Iterator it = first; it != last; ++it) {
        text += (it == first ? "" : ",") + to_text(*it);
    }
    return text;
}

// "f32 [64,5]", with strides if it is not contiguous
std::string shape(const ggml_tensor * tensor) {
    const auto number = [](auto n) { return std::to_string(n); };

    std::string text = std::string(ggml_type_name(tensor->type)) + " [" +
                       joined(tensor->ne, tensor->ne + ggml_n_dims(tensor), number) + "]";
    if (!ggml_is_contiguous(tensor)) {
        text += " nb=" + joined(tensor->nb, tensor->nb + GGML_MAX_DIMS, number);
    }
    return text;
}

std::string params(const ggml_tensor * node) {
    uint32_t words[GGML_MAX_OP_PARAMS / sizeof(uint32_t)];
    std::memcpy(words, node->op_params, sizeof(words));

    const uint32_t * end = std::end(words);
    while (end != words && end[-1] == 0) {
        --end;
    }
    return end == words ? "" : " {" + joined(static_cast<const uint32_t *>(words), end, hex) + "}";
}

}  // namespace

GraphTrace::GraphTrace(const std::string & path, bool flash_attention) {
    start_backends();
    take_error();

    ggml_backend_dev_t no_devices[] = { nullptr };

    llama_model_params model_params = llama_model_default_params();
    model_params.devices = no_devices;
    model_params.n_gpu_layers = 0;
    model_params.use_extra_bufts =
        false;  // no weights repacked for this CPU: upstream's AMX code crashes if built by GCC 12
    model_.reset(llama_model_load_from_file(path.c_str(), model_params));
    if (!model_) {
        throw ModelFileError(path + " cannot be loaded (" + take_error() + "): use another file");
    }

    llama_context_params params = llama_context_default_params();
    params.n_ctx = kCells;
    params.n_batch = kTokensMax;
    params.n_ubatch = kTokensMax;
    params.n_seq_max = kSeqs;
    params.n_threads = 1;
    params.n_threads_batch = 1;
    params.kv_unified = true;
    params.swa_full = true;
    params.offload_kqv = false;
    params.op_offload = false;
    params.flash_attn_type = flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = flash_attention ? GGML_TYPE_F16 : GGML_TYPE_F32;
    params.type_v = params.type_k;
    params.cb_eval = on_node;
    params.cb_eval_user_data = this;
    ctx_.reset(llama_init_from_model(model_.get(), params));
    if (!ctx_) {
        throw std::runtime_error("cannot create a context (" + take_error() + "): free memory");
    }
}

std::vector<std::string> GraphTrace::decode(const std::vector<llama_token> & tokens, llama_seq_id seq, llama_pos pos0) {
    if (tokens.empty() || tokens.size() > kTokensMax) {
        throw InputError("a trace takes from 1 to " + std::to_string(kTokensMax) + " tokens, got " +
                         std::to_string(tokens.size()));
    }
    Batch batch;
    for (size_t i = 0; i < tokens.size(); ++i) {
        batch.add(tokens[i], pos0 + static_cast<llama_pos>(i), seq, i + 1 == tokens.size() ? 0 : -1);
    }

    lines_.clear();
    labels_.clear();
    n_named_.clear();
    n_nodes_ = 0;

    take_error();
    const int32_t status = llama_decode(ctx_.get(), batch.view(0, batch.size()));
    if (status != 0) {
        throw InputError("llama_decode failed with status " + std::to_string(status) + " (" + take_error() +
                         "): use tokens of the vocabulary, at positions that follow the sequence");
    }
    return std::move(lines_);
}

// The scheduler calls this with `ask` for each node of the graph, views included, before it computes.
bool GraphTrace::on_node(ggml_tensor * node, bool ask, void * self) {
    if (ask) {
        static_cast<GraphTrace *>(self)->record(node);
    }
    return false;
}

void GraphTrace::record(const ggml_tensor * node) {
    std::string sources;
    for (const ggml_tensor * src : node->src) {
        if (src != nullptr) {
            sources += " " + source(src);
        }
    }
    const std::string label = "%" + std::to_string(n_nodes_++);
    const std::string name = own_name(node);

    labels_[node] = label;
    lines_.push_back(label + " " + ggml_op_desc(node) + " " + shape(node) + (name.empty() ? "" : " ") + name + " <-" +
                     sources + params(node));
}

std::string GraphTrace::source(const ggml_tensor * tensor) {
    const auto known = labels_.find(tensor);
    if (known != labels_.end()) {
        return known->second;
    }
    std::string name = own_name(tensor);
    if (name.empty()) {
        name = "leaf";
    }
    if (const int count = ++n_named_[name]; count > 1) {
        name += "#" + std::to_string(count);  // different masks may have the same name
    }
    lines_.push_back("LEAF " + shape(tensor) + " " + name);
    labels_[tensor] = name;
    return name;
}

}  // namespace fedbpt
