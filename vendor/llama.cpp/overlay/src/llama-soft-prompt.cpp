#include "llama-soft-prompt-graph.h"

#include "llama-arch.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml-row-attention.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <unordered_set>
#include <utility>
#include <vector>

//
// table
//

namespace {

// made by llama_soft_prompt_init_from_model, for the context that it is about to create
thread_local std::shared_ptr<llama_soft_prompt> prepared;

// whether this thread is in llama_soft_prompt_load_from_file
thread_local bool loading = false;

} // namespace

std::shared_ptr<llama_soft_prompt> llama_soft_prompt_new() {
    return prepared ? prepared : std::make_shared<llama_soft_prompt>();
}

bool llama_soft_prompt_keeps_masked_cells() {
    return prepared && prepared->keeps_masked_cells;
}

uint32_t llama_soft_prompt_text_length(const llama_cparams & cparams) {
    return cparams.soft_prompt->text_length;
}

void llama_soft_prompt::set(llama_seq_id seq_id, llama_pos pos0, int32_t n_rows, const float * rows) {
    GGML_ASSERT(seq_id >= 0 && seq_id < LLAMA_MAX_SEQ);
    GGML_ASSERT(n_rows == 0 || rows != nullptr);

    runs[seq_id] = { pos0, n_rows, rows };
    any = std::any_of(runs.begin(), runs.end(), [](const run & r) { return r.n_rows > 0; });
}

void llama_soft_prompt::clear() {
    runs      = {};
    shifts    = {};
    states_set = {};
    any       = false;
    any_shift = false;
    any_state = false;
    shifted   = true;
    resumed   = true;
}

void llama_soft_prompt::set_state(llama_seq_id seq_id, const state & given) {
    GGML_ASSERT(seq_id >= 0 && seq_id < LLAMA_MAX_SEQ);

    states_set[seq_id] = given;
    any_state = std::any_of(states_set.begin(), states_set.end(), [](const state & s) { return s.row != nullptr; });
}

const llama_soft_prompt::state * llama_soft_prompt::find_state(const llama_ubatch & ubatch, uint32_t i) const {
    for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
        const state & found = states_set[ubatch.seq_id[i][s]];
        if (found.row && found.pos == ubatch.pos[i]) {
            return &found;
        }
    }
    return nullptr;
}

int32_t llama_soft_prompt::resumes_after(const llama_ubatch & ubatch) const {
    if (!any_state || !ubatch.token || !ubatch.seq_id) {
        return -1;
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (const state * own = find_state(ubatch, i)) {
            return own->layer;
        }
    }
    return -1;
}

void llama_soft_prompt::set_shift(llama_seq_id seq_id, const shift & given) {
    GGML_ASSERT(seq_id >= 0 && seq_id < LLAMA_MAX_SEQ);
    GGML_ASSERT(given.n_layers == 0 || given.rows != nullptr);

    shifts[seq_id] = given;
    any_shift = std::any_of(shifts.begin(), shifts.end(), [](const shift & s) { return s.n_layers > 0; });
}

const llama_soft_prompt::shift * llama_soft_prompt::find_shift(const llama_ubatch & ubatch, uint32_t i) const {
    const llama_pos pos = ubatch.pos[i];

    for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
        const shift & found = shifts[ubatch.seq_id[i][s]];
        if (found.n_layers > 0 && pos >= found.pos0 && pos < found.pos1) {
            return &found;
        }
    }

    return nullptr;
}

std::vector<const llama_soft_prompt::shift *> llama_soft_prompt::shifts_of(const llama_ubatch & ubatch) const {
    std::vector<const shift *> found;
    if (!any_shift || !ubatch.token || !ubatch.seq_id) {
        return found;
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const shift * own = find_shift(ubatch, i);
        const auto same = [&](const shift * other) { return other->rows == own->rows; };
        if (own && std::none_of(found.begin(), found.end(), same)) {
            found.push_back(own);
        }
    }
    return found;
}

const float * llama_soft_prompt::find(const llama_ubatch & ubatch, uint32_t i, int64_t n_embd) const {
    const llama_pos pos = ubatch.pos[i];

    for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
        const run & r = runs[ubatch.seq_id[i][s]];
        if (pos >= r.pos0 && pos < r.pos0 + r.n_rows) {
            return r.rows + (pos - r.pos0)*n_embd;
        }
    }

    return nullptr;
}

bool llama_soft_prompt::touches(const llama_ubatch & ubatch) const {
    if (!any || !ubatch.token || !ubatch.seq_id) {
        return false;
    }

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (find(ubatch, i, 0) != nullptr) {
            return true;
        }
    }

    return false;
}

void llama_soft_prompt::set_labels(const ggml_tensor * output, const llama_token * ids, int32_t n, const float * rows) {
    this->output = output;
    labels.assign(ids, ids + n);
    head = n > 0 ? rows : nullptr;
}

bool llama_soft_prompt::take_outputs(ggml_backend_sched_t sched, const ggml_tensor * logits, int64_t n_before, int64_t n) {
    if (n > 0 && (!labels.empty() || !taps.empty())) {
        ggml_backend_sched_synchronize(sched);
    }
    take_states(n_before, n);
    return take_logits(logits, n_before, n);
}

void llama_soft_prompt::take_states(int64_t n_before, int64_t n) {
    if (n_before == 0) {
        has_states = false;
    }
    if (taps.empty() || n == 0) {
        return;
    }
    has_states = tapped != nullptr && std::find(tapped->begin(), tapped->end(), nullptr) == tapped->end();
    if (!has_states) {
        return;
    }
    const int64_t n_embd = tapped->front()->ne[0];
    const int64_t n_taps = tapped->size();
    states_taken.resize((n_before + n)*n_taps*n_embd);

    std::vector<float> layer(n*n_embd);
    for (int64_t t = 0; t < n_taps; ++t) {
        ggml_backend_tensor_get((*tapped)[t], layer.data(), 0, layer.size()*sizeof(float));
        for (int64_t i = 0; i < n; ++i) {
            std::copy_n(layer.data() + i*n_embd, n_embd, states_taken.data() + ((n_before + i)*n_taps + t)*n_embd);
        }
    }
}

bool llama_soft_prompt::take_logits(const ggml_tensor * logits, int64_t n_before, int64_t n) {
    if (labels.empty()) {
        return false;
    }
    if (logits == nullptr || n == 0) {
        return true;
    }

    const size_t n_labels = labels.size();
    taken.resize((n_before + n)*n_labels);
    float * out = taken.data() + n_before*n_labels;

    if (head != nullptr && logits->ne[0] == (int64_t) n_labels) {
        ggml_backend_tensor_get(logits, out, 0, n*n_labels*sizeof(float));
        return true;
    }

    for (int64_t i = 0; i < n; ++i) {
        for (size_t j = 0; j < n_labels; ++j) {
            ggml_backend_tensor_get(logits, out + i*n_labels + j, i*logits->nb[1] + labels[j]*logits->nb[0], sizeof(float));
        }
    }

    return true;
}

//
// graph
//

namespace {

// Shifts of a ubatch are rows of one table per layer: row 0 is zero, for the other tokens. The table has room for a power of two of
// rows, so that a graph is reused for another number of candidates.
struct shift_shape {
    int32_t  first  = 0; // layers
    int32_t  last   = 0; // exclusive; none: equal to first
    uint32_t n_rows = 0;

    explicit shift_shape(const std::vector<const llama_soft_prompt::shift *> & shifts) {
        if (shifts.empty()) {
            return;
        }
        first = shifts.front()->layer;
        for (const auto * shift : shifts) {
            first = std::min(first, shift->layer);
            last  = std::max(last, shift->layer + shift->n_layers);
        }
        for (n_rows = 2; n_rows < shifts.size() + 1;) {
            n_rows *= 2;
        }
    }

    bool operator==(const shift_shape & other) const {
        return first == other.first && last == other.last && n_rows == other.n_rows;
    }
};

// Without soft rows both tensors are null: the input then adds no node, and only prevents the reuse of its graph for a
// ubatch with soft rows or shifts, or for other taps.
class llm_graph_input_soft_prompt : public llm_graph_input_i {
public:
    llm_graph_input_soft_prompt(std::shared_ptr<llama_soft_prompt> table, float scale, const llama_ubatch & ubatch)
        : shape(table->shifts_of(ubatch)), resumes_after(table->resumes_after(ubatch)), table(std::move(table)), inv_scale(1.0f/scale), n_labels(this->table->n_labels()), has_head(this->table->label_head() != nullptr),
          text_length(this->table->text_length), taps(this->table->taps), tapped(taps.size()) {
        this->table->building = this;
    }

    ~llm_graph_input_soft_prompt() override {
        if (table->building == this) {
            table->building = nullptr;
        }
    }

    void set_input(const llama_ubatch * ubatch) override {
        table->run_taps(tapped);
        set_shifts(*ubatch);
        set_states(*ubatch);
        if (!keep) {
            return;
        }

        const int64_t  n_embd   = soft->ne[0];
        const uint32_t n_tokens = ubatch->n_tokens;

        buf_keep.assign(n_tokens, 1.0f);
        buf_soft.assign(n_tokens*n_embd, 0.0f);

        for (uint32_t i = 0; i < n_tokens; ++i) {
            const float * row = table->find(*ubatch, i, n_embd);
            if (!row) {
                continue;
            }

            buf_keep[i] = 0.0f;
            float * dst = buf_soft.data() + i*n_embd;
            for (int64_t j = 0; j < n_embd; ++j) {
                dst[j] = row[j]*inv_scale;
            }
        }

        ggml_backend_tensor_set(keep, buf_keep.data(), 0, ggml_nbytes(keep));
        ggml_backend_tensor_set(soft, buf_soft.data(), 0, ggml_nbytes(soft));
    }

    bool can_reuse(const llm_graph_params & params) override {
        const bool had  = keep != nullptr;
        const bool want = table->touches(params.ubatch);

        // the label head and the text's length are compared here too: no other input of the graph does
        return had == want && (!had || keep->ne[1] == (int64_t) params.ubatch.n_tokens) &&
            shape == shift_shape(table->shifts_of(params.ubatch)) && (!shift_ids || shift_ids->ne[0] == (int64_t) params.ubatch.n_tokens) &&
            resumes_after == table->resumes_after(params.ubatch) && (!states || states->ne[1] == (int64_t) params.ubatch.n_tokens) &&
            n_labels == table->n_labels() && has_head == (table->label_head() != nullptr) && text_length == table->text_length && taps == table->taps;
    }

    ggml_tensor * layer(const llm_graph_context & graph, ggml_tensor * cur, int il) {
        cur = resumed(graph, cur, il);
        cur = shifted(graph, cur, il);
        tap(graph, cur, il);
        return cur;
    }

    ggml_tensor * keep = nullptr; // F32 [1,      n_tokens]
    ggml_tensor * soft = nullptr; // F32 [n_embd, n_tokens]

private:
    ggml_tensor * shifted(const llm_graph_context & graph, ggml_tensor * cur, int il) {
        if (il < shape.first || il >= shape.last || cur->ne[0] != graph.n_embd) {
            return cur;
        }
        if (!shift_ids) {
            shift_ids = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I32, graph.n_tokens);
            ggml_set_name(shift_ids, "soft_prompt_shift_ids");
            ggml_set_input(shift_ids);
        }
        ggml_tensor * rows = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_F32, cur->ne[0], shape.n_rows);
        ggml_format_name(rows, "soft_prompt_shift-%d", il);
        ggml_set_input(rows);
        shift_rows.emplace_back(il, rows);

        ggml_tensor * of_tokens = ggml_get_rows(graph.ctx0, rows, shift_ids);
        if (cur->ne[1] != graph.n_tokens) { // in most architectures the last layer has dropped all tokens but the outputs
            if (!out_ids) {
                out_ids = graph.build_inp_out_ids();
            }
            of_tokens = ggml_get_rows(graph.ctx0, of_tokens, out_ids);
        }
        return ggml_add(graph.ctx0, cur, of_tokens);
    }

    // Begins the graph anew with the states: what was built so far is computed only where a later layer needs it.
    ggml_tensor * resumed(const llm_graph_context & graph, ggml_tensor * cur, int il) {
        if (il != resumes_after || cur->ne[0] != graph.n_embd || cur->ne[1] != graph.n_tokens) {
            return cur;
        }
        states = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_F32, cur->ne[0], cur->ne[1]);
        ggml_set_name(states, "soft_prompt_states");
        ggml_set_input(states);

        for (int i = 0; i < ggml_graph_n_nodes(graph.gf); ++i) {
            if (uses_cache(ggml_graph_node(graph.gf, i))) {
                left_out.insert(ggml_graph_node(graph.gf, i));
            }
        }
        resumed_graph = graph.gf;
        ggml_graph_clear(graph.gf);
        // llama.cpp writes all inputs, and so all need memory
        for (ggml_tensor * tensor = ggml_get_first_tensor(graph.ctx0); tensor; tensor = ggml_get_next_tensor(graph.ctx0, tensor)) {
            if (tensor->flags & GGML_TENSOR_FLAG_INPUT) {
                ggml_build_forward_expand(graph.gf, tensor);
            }
        }
        return states;
    }

    // Whether a node reads or writes the KV cache: when a graph is built, only the cache and the weights have memory.
    static bool uses_cache(const ggml_tensor * node) {
        for (const ggml_tensor * src : node->src) {
            const ggml_tensor * base = src && src->view_src ? src->view_src : src;
            if (base && base->buffer && ggml_backend_buffer_get_usage(base->buffer) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS) {
                return true;
            }
        }
        return false;
    }

    // A later layer that needs a node which was left out has brought it back, but not what writes to the cache beside it.
    void check_left_out() {
        for (int i = 0; resumed_graph && i < ggml_graph_n_nodes(resumed_graph); ++i) {
            reads_left_out = reads_left_out || left_out.count(ggml_graph_node(resumed_graph, i)) > 0;
        }
        resumed_graph = nullptr; // it is checked once
        left_out.clear();
    }

    void set_states(const llama_ubatch & ubatch) {
        table->shifted = table->shifted && (resumes_after >= 0) == (states != nullptr);
        if (!states) {
            return;
        }
        check_left_out();
        table->resumed = table->resumed && !reads_left_out;
        const int64_t n_embd = states->ne[0];
        buf_soft.assign(n_embd*ubatch.n_tokens, 0.0f);
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (const auto * own = table->find_state(ubatch, i)) {
                std::copy_n(own->row, n_embd, buf_soft.data() + i*n_embd);
            }
        }
        ggml_backend_tensor_set(states, buf_soft.data(), 0, ggml_nbytes(states));
    }

    void set_shifts(const llama_ubatch & ubatch) {
        table->shifted = table->shifted && (int64_t) shift_rows.size() == shape.last - shape.first;
        if (!shift_ids) {
            return;
        }
        const auto shifts = table->shifts_of(ubatch);

        buf_ids.assign(ubatch.n_tokens, 0);
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            const auto * own = table->find_shift(ubatch, i);
            for (size_t row = 0; own && row < shifts.size(); ++row) {
                if (shifts[row]->rows == own->rows) {
                    buf_ids[i] = (int32_t) row + 1;
                    break;
                }
            }
        }
        ggml_backend_tensor_set(shift_ids, buf_ids.data(), 0, ggml_nbytes(shift_ids));

        for (const auto & [il, rows] : shift_rows) {
            const int64_t n_embd = rows->ne[0];
            buf_soft.assign(n_embd*rows->ne[1], 0.0f);
            for (size_t row = 0; row < shifts.size(); ++row) {
                const int32_t at = il - shifts[row]->layer;
                if (at >= 0 && at < shifts[row]->n_layers) {
                    std::copy_n(shifts[row]->rows + at*n_embd, n_embd, buf_soft.data() + (row + 1)*n_embd);
                }
            }
            ggml_backend_tensor_set(rows, buf_soft.data(), 0, ggml_nbytes(rows));
        }
    }

    void tap(const llm_graph_context & graph, ggml_tensor * cur, int il) {
        const auto tap = std::find(taps.begin(), taps.end(), il);
        if (tap == taps.end() || graph.n_outputs == 0) {
            return;
        }
        // in most architectures the last layer has dropped all tokens but the outputs already
        if (cur->ne[1] != graph.n_outputs || graph.n_outputs == graph.n_tokens) {
            if (!out_ids) {
                out_ids = graph.build_inp_out_ids();
            }
            cur = ggml_get_rows(graph.ctx0, cur, out_ids);
        } else {
            cur = ggml_cont(graph.ctx0, cur); // a copy: the memory of an output is not reused by other tensors
        }
        ggml_set_output(cur);
        ggml_format_name(cur, "soft_prompt_tap-%d", il);
        ggml_build_forward_expand(graph.gf, cur);
        tapped[tap - taps.begin()] = cur;
    }

    const shift_shape shape;
    const int32_t     resumes_after; // -1: with the first layer
    const std::shared_ptr<llama_soft_prompt> table;
    const float  inv_scale;
    const size_t n_labels;
    const bool   has_head;
    const uint32_t text_length;

    const std::vector<int32_t> taps;
    std::vector<ggml_tensor *> tapped;            // F32 [n_embd, n_outputs] each
    ggml_tensor              * out_ids = nullptr; // I32 [n_outputs]

    ggml_tensor * states = nullptr; // F32 [n_embd, n_tokens]

    std::unordered_set<const ggml_tensor *> left_out; // nodes that use the KV cache
    ggml_cgraph * resumed_graph  = nullptr;           // until it is checked
    bool          reads_left_out = false;

    ggml_tensor * shift_ids = nullptr;                      // I32 [n_tokens]
    std::vector<std::pair<int, ggml_tensor *>> shift_rows;  // layer, F32 [n_embd, n_rows]

    std::vector<int32_t> buf_ids;
    std::vector<float> buf_keep;
    std::vector<float> buf_soft;
};

class llm_graph_input_label_head : public llm_graph_input_i {
public:
    llm_graph_input_label_head(std::shared_ptr<llama_soft_prompt> table, ggml_tensor * head) : table(std::move(table)), head(head) {}

    void set_input(const llama_ubatch * /*ubatch*/) override {
        ggml_backend_tensor_set(head, table->label_head(), 0, ggml_nbytes(head));
    }

    bool can_reuse(const llm_graph_params & /*params*/) override {
        return true; // llm_graph_input_soft_prompt has compared the labels
    }

private:
    const std::shared_ptr<llama_soft_prompt> table;
    ggml_tensor * head; // F32 [n_embd, n_labels]
};

// Factor applied to token embeddings after build_inp_embd's look-up; soft rows are inserted after it.
float embedding_scale(llm_arch arch, const llama_hparams & hparams) {
    switch (arch) {
        case LLM_ARCH_AFMOE:
        case LLM_ARCH_GEMMA:
        case LLM_ARCH_GEMMA2:
        case LLM_ARCH_GEMMA3:
            return std::sqrt((float) hparams.n_embd);
        default:
            return hparams.f_embedding_scale != 0.0f ? hparams.f_embedding_scale : 1.0f;
    }
}

} // namespace

ggml_tensor * llama_soft_prompt_build(
        ggml_context        * ctx0,
        llm_graph_result    * res,
        llm_arch              arch,
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_ubatch  & ubatch,
        ggml_tensor         * embd) {
    auto inp = std::make_unique<llm_graph_input_soft_prompt>(cparams.soft_prompt, embedding_scale(arch, hparams), ubatch);

    ggml_tensor * cur = embd;

    if (cparams.soft_prompt->touches(ubatch)) {
        inp->keep = ggml_new_tensor_2d(ctx0, GGML_TYPE_F32, 1, embd->ne[1]);
        ggml_set_name(inp->keep, "soft_prompt_keep");
        ggml_set_input(inp->keep);

        inp->soft = ggml_new_tensor_2d(ctx0, GGML_TYPE_F32, embd->ne[0], embd->ne[1]);
        ggml_set_name(inp->soft, "soft_prompt_rows");
        ggml_set_input(inp->soft);

        cur = ggml_add(ctx0, ggml_mul(ctx0, cur, inp->keep), inp->soft);
    }

    res->add_input(std::move(inp));

    return cur;
}

ggml_tensor * llama_soft_prompt_layer(const llm_graph_context & graph, ggml_tensor * cur, int il) {
    llm_graph_input_i * building = graph.cparams.soft_prompt->building;
    return building ? static_cast<llm_graph_input_soft_prompt *>(building)->layer(graph, cur, il) : cur;
}

ggml_tensor * llama_soft_prompt_output(ggml_context * ctx0, llm_graph_result * res, const llama_cparams & cparams, ggml_tensor * w) {
    const auto & table = cparams.soft_prompt;
    if (!table->is_output(w)) {
        return w;
    }

    ggml_tensor * head = ggml_new_tensor_2d(ctx0, GGML_TYPE_F32, w->ne[0], table->n_labels());
    ggml_set_name(head, "label_head");
    ggml_set_input(head);
    res->add_input(std::make_unique<llm_graph_input_label_head>(table, head));

    return head;
}

void llama_soft_prompt_attention(ggml_tensor * node, const llama_cparams & cparams) {
    if (cparams.soft_prompt->row_attention) {
        ggml_row_attention_request(node);
    }
}

//
// C API
//

void llama_soft_prompt_set(llama_context * ctx, llama_seq_id seq_id, llama_pos pos0, int32_t n_rows, const float * rows) {
    ctx->get_cparams().soft_prompt->set(seq_id, pos0, n_rows, rows);
}

void llama_soft_prompt_set_shift(
        llama_context * ctx, llama_seq_id seq_id, llama_pos pos0, llama_pos pos1, int32_t layer, int32_t n_layers, const float * rows) {
    ctx->get_cparams().soft_prompt->set_shift(seq_id, { pos0, pos1, layer, n_layers, rows });
}

void llama_soft_prompt_set_state(llama_context * ctx, llama_seq_id seq_id, llama_pos pos, int32_t layer, const float * row) {
    ctx->get_cparams().soft_prompt->set_state(seq_id, { pos, layer, row });
}

bool llama_soft_prompt_shifted(const llama_context * ctx) {
    return ctx->get_cparams().soft_prompt->shifted;
}

bool llama_soft_prompt_resumed(const llama_context * ctx) {
    return ctx->get_cparams().soft_prompt->resumed;
}

void llama_soft_prompt_clear(llama_context * ctx) {
    ctx->get_cparams().soft_prompt->clear();
}

void llama_soft_prompt_set_labels(llama_context * ctx, const llama_token * ids, int32_t n, const float * head) {
    ctx->get_cparams().soft_prompt->set_labels(ctx->get_model().output, ids, n, head);
}

void llama_soft_prompt_set_taps(llama_context * ctx, const int32_t * layers, int32_t n) {
    ctx->get_cparams().soft_prompt->taps.assign(layers, layers + n);
}

const float * llama_soft_prompt_states(const llama_context * ctx) {
    return ctx->get_cparams().soft_prompt->states();
}

bool llama_soft_prompt_leaves_in_file(const ggml_tensor * meta) {
    return loading && (std::strcmp(meta->name, "output.weight") == 0 || std::strcmp(meta->name, "token_embd.weight") == 0);
}

llama_model * llama_soft_prompt_load_from_file(const char * path, llama_model_params params) {
    loading = true;
    llama_model * model = llama_model_load_from_file(path, params);
    loading = false;
    return model;
}

llama_context * llama_soft_prompt_init_from_model(llama_model * model, llama_context_params params, const llama_token * ids, int32_t n, const float * head) {
    prepared = std::make_shared<llama_soft_prompt>();
    prepared->row_attention      = llama_soft_prompt_has_row_attention(model);
    prepared->keeps_masked_cells = params.swa_full;
    prepared->set_labels(model->output, ids, n, head);

    llama_context * ctx = llama_init_from_model(model, params);
    prepared.reset();
    return ctx;
}

int32_t llama_soft_prompt_head_size(const llama_model * model) {
    uint32_t size = 0;
    for (uint32_t il = 0; il < model->hparams.n_layer(); ++il) {
        size = std::gcd(size, std::gcd(model->hparams.n_embd_head_k(il), model->hparams.n_embd_head_v(il)));
    }
    return (int32_t) size;
}

bool llama_soft_prompt_has_row_attention(const llama_model * model) {
    return model->arch != LLM_ARCH_GROK; // as in llama_init_from_model
}

float llama_soft_prompt_embedding_scale(const llama_model * model) {
    return embedding_scale(model->arch, model->hparams);
}

bool llama_soft_prompt_is_f32(const llama_model * model) {
    const auto & tensors = model->tensors_by_name;
    return std::none_of(tensors.begin(), tensors.end(), [](const std::pair<std::string, ggml_tensor *> & entry) {
        return entry.first.rfind("blk.", 0) == 0 && ggml_n_dims(entry.second) > 1 && entry.second->type != GGML_TYPE_F32;
    });
}

uint32_t llama_soft_prompt_long_rope_from(const llama_model * model) {
    const auto & layers = model->layers;
    const bool   any    = std::any_of(layers.begin(), layers.end(), [](const llama_layer & layer) { return layer.rope_long != nullptr; });
    return any ? model->hparams.n_ctx_orig_yarn : 0;
}

void llama_soft_prompt_set_text_length(llama_context * ctx, uint32_t n_tokens) {
    ctx->get_cparams().soft_prompt->text_length = n_tokens;
}

const float * llama_soft_prompt_label_logits(const llama_context * ctx) {
    return ctx->get_cparams().soft_prompt->label_logits();
}

const char * llama_soft_prompt_output_tensor(const llama_model * model) {
    if (model->output == nullptr || model->output_b != nullptr || model->output_s != nullptr || model->arch == LLM_ARCH_CHAMELEON) {
        return nullptr;
    }
    return ggml_get_name(model->output);
}

void llama_soft_prompt_token_embeddings(const llama_model * model, const llama_token * ids, int32_t n, float * out) {
    const ggml_tensor * table   = model->tok_embd;
    const int64_t       n_embd  = table->ne[0];
    const size_t        n_bytes = ggml_row_size(table->type, n_embd);
    const auto        * traits  = ggml_get_type_traits(table->type);
    const float         scale   = embedding_scale(model->arch, model->hparams);

    std::vector<uint8_t> packed(n_bytes);

    for (int32_t i = 0; i < n; ++i) {
        GGML_ASSERT(ids[i] >= 0 && ids[i] < table->ne[1]);
        float * row = out + i*n_embd;

        ggml_backend_tensor_get(table, packed.data(), (size_t) ids[i]*table->nb[1], n_bytes);
        if (table->type == GGML_TYPE_F32) {
            std::memcpy(row, packed.data(), n_bytes);
        } else {
            traits->to_float(packed.data(), row, n_embd);
        }

        if (scale != 1.0f) {
            for (int64_t j = 0; j < n_embd; ++j) {
                row[j] *= scale;
            }
        }
    }
}

const char * llama_soft_prompt_refuses(const char * architecture) {
    const llm_arch arch = llm_arch_from_string(architecture);

    switch (arch) {
        case LLM_ARCH_UNKNOWN:
            return "this llama.cpp does not know it";
        case LLM_ARCH_BERT:
        case LLM_ARCH_MODERN_BERT:
        case LLM_ARCH_NOMIC_BERT:
        case LLM_ARCH_NOMIC_BERT_MOE:
        case LLM_ARCH_NEO_BERT:
        case LLM_ARCH_JINA_BERT_V2:
        case LLM_ARCH_JINA_BERT_V3:
        case LLM_ARCH_EUROBERT:
        case LLM_ARCH_GEMMA_EMBEDDING:
        case LLM_ARCH_LLAMA_EMBED:
            return "it is an encoder that makes embeddings, and scoring needs a causal decoder";
        case LLM_ARCH_T5:
        case LLM_ARCH_T5ENCODER:
            return "it has an encoder, and scoring needs a decoder-only model";
        case LLM_ARCH_CLIP:
            return "it encodes images or sound for another model";
        case LLM_ARCH_WAVTOKENIZER_DEC:
        case LLM_ARCH_QWEN3TTS:
        case LLM_ARCH_POCKETTTS:
            return "it makes sound, and scoring needs a model that continues text";
        case LLM_ARCH_GEMMA3N:
        case LLM_ARCH_GEMMA4:
        case LLM_ARCH_GEMMA4_ASSISTANT:
        case LLM_ARCH_QWEN4EXP:
            return "it looks every token up again in each layer, which a soft prompt row cannot answer";
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_GRANITE_SWITCH:
            return "it routes by token id, which a soft prompt row does not have";
        case LLM_ARCH_COGVLM:
        case LLM_ARCH_MINICPM3:
            return "it treats token and embedding input differently in a way that is not handled yet";
        case LLM_ARCH_PHIMOE:
            return "llama.cpp computes its norms and weighs its experts in another way than the model was trained with";
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_EAGLE3:
            return "it is a draft model that reads another model's states";
        default:
            break;
    }
    if (llm_arch_is_recurrent(arch) || llm_arch_is_hybrid(arch)) {
        return "its recurrent state cannot be shared between prompts as a KV cache can";
    }
    if (llm_arch_is_diffusion(arch)) {
        return "it is a diffusion model, and scoring needs a causal one";
    }
    return nullptr;
}
