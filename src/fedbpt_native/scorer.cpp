#include "scorer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "errors.h"
#include "llama-ext.h"
#include "llama-soft-prompt.h"
#include "log.h"

namespace fedbpt {

namespace {

constexpr uint32_t kUbatch      = 512;   // tokens a graph
constexpr uint32_t kBatch       = 2048;  // tokens a llama_decode
constexpr size_t   kTextsMax    = 32;    // texts a pack: bounds the n_vocab-wide logits buffers
constexpr size_t   kCueCellsMax = 1024;  // KV cells of a cue pack's texts: attention slows down with a longer KV

constexpr llama_seq_id kPrefixSeq = 0;   // what comes before everything
constexpr llama_seq_id kPromptSeq = 1;   // prefix + one candidate's rows (front)
constexpr llama_seq_id kTextSeq   = 2;   // the pack's first text

constexpr auto kStopInterval = std::chrono::milliseconds(20);

uint32_t padded(size_t n) {
    return static_cast<uint32_t>((n + 255)/256*256);
}

}  // namespace

Scorer::Scorer(std::shared_ptr<const Model> model, int32_t n_threads) : model_(std::move(model)), n_threads_(n_threads) {
    if (n_threads < 1 || n_threads > GGML_MAX_N_THREADS) {
        throw InputError("n_threads must be between 1 and " + std::to_string(GGML_MAX_N_THREADS) + ", got " + std::to_string(n_threads));
    }
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    threadpool_.reset(ggml_threadpool_new(&params));
    if (!threadpool_) {
        throw std::bad_alloc();
    }
}

void Scorer::validate(const Request & request) const {
    if (request.n_which == 0) {
        throw InputError("no texts to score: name at least one of the plan's");
    }
    if (request.n_candidates == 0) {
        throw InputError("no candidates to score: embeds needs at least one soft prompt");
    }
    for (size_t i = 0; i < request.n_which; ++i) {
        if (request.which[i] < 0 || static_cast<size_t>(request.which[i]) >= request.plan.n_texts()) {
            throw InputError("text index " + std::to_string(request.which[i]) + " is outside the plan's " + std::to_string(request.plan.n_texts()) + " texts");
        }
        request.plan.check_rows(static_cast<size_t>(request.which[i]), request.n_prompt);
    }
    const size_t n_rows = request.n_prompt*model_->n_embd();
    for (size_t i = 0; i < request.n_candidates*n_rows; ++i) {
        if (!std::isfinite(request.embeds[i])) {
            throw InputError("embeds holds NaN or infinity in candidate " + std::to_string(i/n_rows));
        }
    }
}

// Next fit, in the texts' order: a pack fills one ubatch (front, where the first pack carries the rows too) or the KV cells of a
// cue pack. A text longer than that is a pack of its own.
std::vector<Scorer::Pack> Scorer::pack(const Request & request) const {
    const bool   front      = request.plan.placement() == Placement::front;
    const size_t tokens_max = front ? kUbatch : kCueCellsMax;
    const size_t texts_max  = front ? kTextsMax : std::clamp<size_t>(kBatch/request.n_tail(), 1, kTextsMax);

    std::vector<Pack> packs;
    for (size_t i = 0; i < request.n_which; ++i) {
        const size_t length = request.length(i);
        const size_t rows   = front && packs.size() <= 1 ? request.n_prompt : 0;
        if (!packs.empty() && rows + packs.back().n_tokens + length <= tokens_max && packs.back().last - packs.back().first < texts_max) {
            packs.back().last = i + 1;
            packs.back().n_tokens += length;
        } else {
            packs.push_back({ i, i + 1, length });
        }
    }
    return packs;
}

void Scorer::ensure_context(const Request & request, const std::vector<Pack> & packs) {
    size_t most = 0;
    for (const Pack & pack : packs) {
        // in the cue each text has the prefix for itself: it is part of its saved KV
        const size_t copies = request.plan.placement() == Placement::cue ? pack.last - pack.first : 1;
        most = std::max(most, pack.n_tokens + copies*request.plan.prefix().size());
    }
    const uint32_t n_ctx = padded(request.plan.prefix().size() + request.n_prompt + most);
    if (ctx_ && n_ctx <= n_ctx_) {
        return;
    }

    llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_batch         = kBatch;
    params.n_ubatch        = kUbatch;
    params.n_seq_max       = kTextSeq + kTextsMax;
    params.n_outputs_max   = params.n_seq_max;
    params.n_threads       = n_threads_;
    params.n_threads_batch = n_threads_;
    params.kv_unified      = true;
    params.swa_full        = true;
    if (model_->is_f32()) {
        // KV as precise as the weights; flash attention would cast it to f16
        params.type_k          = GGML_TYPE_F32;
        params.type_v          = GGML_TYPE_F32;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    params.abort_callback      = on_abort;
    params.abort_callback_data = this;

    ctx_.reset();
    n_ctx_ = 0;
    take_last_error();
    ctx_.reset(llama_init_from_model(model_->get(), params));
    if (!ctx_) {
        throw std::runtime_error("cannot create a context of " + std::to_string(n_ctx) + " tokens (" + take_last_error() + "): free memory, or score shorter texts");
    }
    n_ctx_ = n_ctx;
    llama_attach_threadpool(ctx_.get(), threadpool_.get(), threadpool_.get());
}

void Scorer::score(Plan & plan, const int64_t * which, size_t n_which, const float * embeds, size_t n_candidates, size_t n_prompt, float * out, const std::function<bool()> & stop) {
    const Request request { plan, which, n_which, embeds, n_candidates, n_prompt };
    validate(request);

    std::lock_guard<std::mutex> lock(mutex_);
    interrupted_     = false;
    stop_            = &stop;
    next_stop_check_ = std::chrono::steady_clock::now() + kStopInterval;

    try {
        run(request, out);
    } catch (...) {
        stop_ = nullptr;
        reset();
        throw;
    }
    stop_ = nullptr;
}

void Scorer::reset() {
    if (ctx_) {
        // with the data: what an interrupted or overflowing pass left must not reach a later one, not even times zero
        llama_memory_clear(llama_get_memory(ctx_.get()), /*data =*/ true);
        llama_soft_prompt_clear(ctx_.get());
    }
}

void Scorer::run(const Request & request, float * out) {
    const std::vector<Pack> packs = pack(request);
    ensure_context(request, packs);

    const size_t   n_out  = request.n_out();
    llama_memory_t memory = llama_get_memory(ctx_.get());

    llama_memory_clear(memory, /*data =*/ false);
    llama_soft_prompt_clear(ctx_.get());
    llama_soft_prompt_set_labels(ctx_.get(), request.plan.label_ids().data(), static_cast<int32_t>(request.plan.label_ids().size()), request.plan.label_head());

    if (request.plan.placement() == Placement::cue) {
        request.plan.keep_for_tail(request.n_tail());
        for (const Pack & pack : packs) {
            score_cue(request, pack, out);
        }
    } else {
        decode_prefix(request.plan);
        for (size_t c = 0; c < request.n_candidates; ++c) {
            for (const Pack & pack : packs) {
                score_front(request, pack, c, &pack == &packs.front(), out + c*n_out);
            }
            llama_memory_seq_rm(memory, kPromptSeq, -1, -1);
        }
    }
    llama_soft_prompt_clear(ctx_.get());

    if (!std::all_of(out, out + request.n_candidates*n_out, [](float logit) { return std::isfinite(logit); })) {
        reset();
    }
}

void Scorer::decode_prefix(Plan & plan) {
    if (plan.prefix().empty()) {
        return;
    }
    batch_.clear();
    for (size_t i = 0; i < plan.prefix().size(); ++i) {
        batch_.add(plan.prefix()[i], static_cast<llama_pos>(i), kPrefixSeq, -1);
    }
    decode(plan, nullptr);
}

// prefix | rows | text. The rows go with the first pack's texts, as tokens of all their sequences; the other packs share
// those cells.
void Scorer::score_front(const Request & request, const Pack & pack, size_t candidate, bool first_pack, float * out) {
    llama_memory_t memory = llama_get_memory(ctx_.get());
    const auto n_prefix = static_cast<llama_pos>(request.plan.prefix().size());
    const auto n_prompt = static_cast<llama_pos>(request.n_prompt);

    seqs_.assign(1, kPromptSeq);
    for (size_t i = pack.first; i < pack.last; ++i) {
        seqs_.push_back(kTextSeq + static_cast<llama_seq_id>(i - pack.first));
    }
    for (const llama_seq_id seq : seqs_) {
        if (first_pack) {
            llama_memory_seq_cp(memory, kPrefixSeq, seq, -1, -1);
        } else if (seq != kPromptSeq) {
            llama_memory_seq_cp(memory, kPromptSeq, seq, -1, -1);
        }
    }

    batch_.clear();
    if (first_pack && n_prompt > 0) {
        const float * rows = request.embeds + candidate*request.n_prompt*model_->n_embd();
        llama_soft_prompt_set(ctx_.get(), kPromptSeq, n_prefix, n_prompt, rows);
        for (llama_pos j = 0; j < n_prompt; ++j) {
            batch_.add(/*placeholder token =*/ 0, n_prefix + j, seqs_.data(), seqs_.size(), -1);
        }
    }
    for (size_t i = pack.first; i < pack.last; ++i) {
        const size_t length = request.length(i);
        for (size_t j = 0; j < length; ++j) {
            batch_.add(request.text(i)[j], n_prefix + n_prompt + static_cast<llama_pos>(j), seqs_[1 + i - pack.first], j + 1 == length ? static_cast<int32_t>(i) : -1);
        }
    }
    decode(request.plan, out);

    for (const llama_seq_id seq : seqs_) {
        if (seq != kPromptSeq) {
            llama_memory_seq_rm(memory, seq, -1, -1);
        }
    }
}

// The KV of prefix and text i up to where the rows begin: computed alone in an empty cache, so that it is the same whatever texts
// are scored beside it.
std::vector<uint8_t> Scorer::compute_kv(const Request & request, size_t i) {
    llama_memory_t memory = llama_get_memory(ctx_.get());

    batch_.clear();
    llama_pos pos = 0;
    for (const llama_token id : request.plan.prefix()) {
        batch_.add(id, pos++, kTextSeq, -1);
    }
    for (size_t j = 0; j + request.n_tail() < request.length(i); ++j) {
        batch_.add(request.text(i)[j], pos++, kTextSeq, -1);
    }
    decode(request.plan, nullptr);

    std::vector<uint8_t> state(llama_state_seq_get_size(ctx_.get(), kTextSeq));
    state.resize(llama_state_seq_get_data(ctx_.get(), state.data(), state.size(), kTextSeq));
    llama_memory_seq_rm(memory, kTextSeq, -1, -1);
    return state;
}

// prefix | text, its last n_prompt embeddings replaced. What comes before them is computed once for all candidates, and kept.
void Scorer::score_cue(const Request & request, const Pack & pack, float * out) {
    llama_memory_t memory   = llama_get_memory(ctx_.get());
    const size_t   n_prefix = request.plan.prefix().size();
    const size_t   n_tail   = request.n_tail();
    const size_t   n_rows   = request.n_prompt*model_->n_embd();

    const auto head_of = [&](size_t i) { return n_prefix + request.length(i) - n_tail; };
    const auto seq_of  = [&](size_t i) { return kTextSeq + static_cast<llama_seq_id>(i - pack.first); };
    const auto kept    = [&](size_t i) -> const std::vector<uint8_t> & { return request.plan.kv(static_cast<size_t>(request.which[i])); };

    std::vector<std::vector<uint8_t>> passing(pack.last - pack.first);  // KV that the plan has no room for
    for (size_t i = pack.first; i < pack.last; ++i) {
        if (head_of(i) > 0 && kept(i).empty()) {
            passing[i - pack.first] = request.plan.keep_kv(static_cast<size_t>(request.which[i]), compute_kv(request, i));
        }
    }
    for (size_t i = pack.first; i < pack.last; ++i) {
        if (head_of(i) == 0) {
            continue;
        }
        const std::vector<uint8_t> & state = kept(i).empty() ? passing[i - pack.first] : kept(i);
        if (llama_state_seq_set_data(ctx_.get(), state.data(), state.size(), seq_of(i)) == 0) {
            throw std::runtime_error("a text's KV could not be restored (" + take_last_error() + "): please report this");
        }
    }

    for (size_t c = 0; c < request.n_candidates; ++c) {
        batch_.clear();
        for (size_t i = pack.first; i < pack.last; ++i) {
            const auto          pos0 = static_cast<llama_pos>(head_of(i));
            const llama_token * ids  = request.text(i) + request.length(i) - n_tail;

            llama_soft_prompt_set(ctx_.get(), seq_of(i), pos0, static_cast<int32_t>(request.n_prompt), request.embeds + c*n_rows);
            for (size_t j = 0; j < n_tail; ++j) {
                batch_.add(ids[j], pos0 + static_cast<llama_pos>(j), seq_of(i), j + 1 == n_tail ? static_cast<int32_t>(i) : -1);
            }
        }
        decode(request.plan, out + c*request.n_out());

        for (size_t i = pack.first; i < pack.last; ++i) {
            llama_memory_seq_rm(memory, seq_of(i), static_cast<llama_pos>(head_of(i)), -1);
        }
    }

    llama_soft_prompt_clear(ctx_.get());
    for (size_t i = pack.first; i < pack.last; ++i) {
        llama_memory_seq_rm(memory, seq_of(i), -1, -1);
    }
}

// Runs batch_ and writes the label logits of each output token to out[output][n_labels].
void Scorer::decode(Plan & plan, float * out) {
    plan.count_tokens(batch_.size());
    for (size_t begin = 0; begin < batch_.size(); begin += kBatch) {
        const size_t end = std::min<size_t>(batch_.size(), begin + kBatch);

        if (on_abort(this)) {
            throw ScoringInterrupted("scoring was interrupted");
        }
        take_last_error();
        const int32_t status = llama_decode(ctx_.get(), batch_.view(begin, end));
        if (status == 2) {
            throw ScoringInterrupted("scoring was interrupted");
        }
        if (status != 0) {
            throw std::runtime_error("llama_decode failed with status " + std::to_string(status) + " (" + take_last_error() + "): please report this");
        }

        if (!plan.all_labels()) {
            llama_synchronize(ctx_.get());
        }
        const size_t  n_labels = plan.n_labels();
        const float * labels   = llama_soft_prompt_label_logits(ctx_.get());
        for (size_t i = begin; i < end; ++i) {
            if (batch_.output(i) < 0) {
                continue;
            }
            const float * logits = plan.all_labels() ? llama_get_logits_ith(ctx_.get(), static_cast<int32_t>(i - begin)) : labels;
            std::copy(logits, logits + n_labels, out + static_cast<size_t>(batch_.output(i))*n_labels);
            labels += plan.all_labels() ? 0 : n_labels;
        }
    }
}

bool Scorer::on_abort(void * data) {
    auto * self = static_cast<Scorer *>(data);
    if (self->interrupted_) {
        return true;
    }
    if (self->stop_ == nullptr || !*self->stop_) {
        return false;
    }
    const auto now = std::chrono::steady_clock::now();
    if (now < self->next_stop_check_) {
        return false;
    }
    self->next_stop_check_ = now + kStopInterval;
    if ((*self->stop_)()) {
        self->interrupted_ = true;
    }
    return self->interrupted_;
}

MemoryUse Scorer::memory() const {
    std::lock_guard<std::mutex> lock(mutex_);

    MemoryUse use;
    use.weights = model_->size_bytes();
    if (ctx_) {
        for (const auto & [type, data] : llama_get_memory_breakdown(ctx_.get())) {
            use.kv += data.context;
            use.compute += data.compute;
        }
    }
    return use;
}

}  // namespace fedbpt
