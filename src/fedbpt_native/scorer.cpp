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

std::string text_name(size_t i) {
    return "text " + std::to_string(i);
}

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

void Scorer::validate(const ScoreRequest & request) const {
    const Texts & texts = request.texts;

    if (texts.n == 0) {
        throw InputError("no texts to score: pass at least one token sequence");
    }
    if (request.n_candidates == 0) {
        throw InputError("no candidates to score: embeds needs at least one soft prompt");
    }
    for (size_t i = 0; i < request.n_candidates*request.n_prompt*model_->n_embd(); ++i) {
        if (!std::isfinite(request.embeds[i])) {
            throw InputError("embeds holds NaN or infinity in candidate " + std::to_string(i/(request.n_prompt*model_->n_embd())));
        }
    }
    for (size_t i = 0; i < request.n_prefix; ++i) {
        model_->check_token(request.prefix[i], "prefix token id");
    }
    if (request.label_ids && request.n_labels == 0) {
        throw InputError("label_ids is empty: name at least one token, or pass None for all");
    }
    for (size_t i = 0; i < request.n_labels; ++i) {
        model_->check_token(request.label_ids[i], "label token id");
    }

    const size_t n_before = request.n_prefix + (request.placement == Placement::front ? request.n_prompt : 0);
    for (size_t i = 0; i < texts.n; ++i) {
        const size_t length = texts.length(i);
        if (length == 0) {
            throw InputError(text_name(i) + " is empty: it needs at least one token");
        }
        if (request.placement == Placement::cue && length < request.n_prompt) {
            throw InputError(text_name(i) + " has " + std::to_string(length) + " tokens, fewer than the " + std::to_string(request.n_prompt) + " rows that stand in its cue");
        }
        if (n_before + length > static_cast<size_t>(model_->n_ctx_train())) {
            throw InputError(text_name(i) + " has " + std::to_string(length) + " tokens after " + std::to_string(n_before) + " of prefix and prompt; the model's context is " + std::to_string(model_->n_ctx_train()) + ": shorten it");
        }
        for (size_t j = 0; j < length; ++j) {
            model_->check_token(texts.begin(i)[j], "token id");
        }
    }
}

// Next fit, in the texts' order: a pack fills one ubatch (front, where the first pack carries the rows too) or the KV cells of a
// cue pack. A text longer than that is a pack of its own.
std::vector<Scorer::Pack> Scorer::pack(const ScoreRequest & request) const {
    const bool   front     = request.placement == Placement::front;
    const size_t texts_max = front ? kTextsMax : std::min<size_t>(kTextsMax, std::max<size_t>(1, kBatch/std::max<size_t>(1, request.n_prompt)));

    std::vector<Pack> packs;
    size_t used = front ? request.n_prompt : 0;

    for (size_t i = 0; i < request.texts.n; ++i) {
        const size_t length = request.texts.length(i);
        const bool fits = !packs.empty() && used + length <= (front ? kUbatch : kCueCellsMax) && packs.back().last - packs.back().first < texts_max;
        if (fits) {
            packs.back().last = i + 1;
        } else {
            used = front && packs.empty() ? request.n_prompt : 0;
            packs.push_back({ i, i + 1 });
        }
        used += length;
    }
    return packs;
}

void Scorer::ensure_context(const ScoreRequest & request, const std::vector<Pack> & packs) {
    size_t most = 0;
    for (const Pack & pack : packs) {
        most = std::max(most, static_cast<size_t>(request.texts.offsets[pack.last] - request.texts.offsets[pack.first]));
    }
    const uint32_t n_ctx = padded(request.n_prefix + request.n_prompt + most);
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

void Scorer::score(const ScoreRequest & request, float * out, const std::function<bool()> & stop) {
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

void Scorer::run(const ScoreRequest & request, float * out) {
    const std::vector<Pack> packs = pack(request);
    ensure_context(request, packs);

    const size_t n_labels = request.label_ids ? request.n_labels : model_->n_vocab();
    const size_t n_out    = request.texts.n*n_labels;
    llama_memory_t memory = llama_get_memory(ctx_.get());

    llama_memory_clear(memory, /*data =*/ false);
    llama_soft_prompt_clear(ctx_.get());

    if (request.n_prefix > 0) {
        batch_.clear();
        for (size_t i = 0; i < request.n_prefix; ++i) {
            batch_.add(request.prefix[i], static_cast<llama_pos>(i), kPrefixSeq, -1);
        }
        decode(request, nullptr);
    }

    if (request.placement == Placement::cue) {
        for (const Pack & pack : packs) {
            score_cue(request, pack, out);
        }
    } else {
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

void Scorer::add_text(const ScoreRequest & request, size_t text, llama_seq_id seq, size_t n_tokens, llama_pos pos0, bool output) {
    const llama_token * ids = request.texts.begin(text);
    for (size_t j = 0; j < n_tokens; ++j) {
        const bool last = j + 1 == n_tokens;
        batch_.add(ids[j], pos0 + static_cast<llama_pos>(j), seq, output && last ? static_cast<int32_t>(text) : -1);
    }
}

// prefix | rows | text. The rows go with the first pack's texts, as tokens of all their sequences; the other packs share
// those cells.
void Scorer::score_front(const ScoreRequest & request, const Pack & pack, size_t candidate, bool first_pack, float * out) {
    llama_memory_t memory = llama_get_memory(ctx_.get());
    const auto n_prefix = static_cast<llama_pos>(request.n_prefix);
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
        add_text(request, i, kTextSeq + static_cast<llama_seq_id>(i - pack.first), request.texts.length(i), n_prefix + n_prompt, true);
    }
    decode(request, out);

    for (const llama_seq_id seq : seqs_) {
        if (seq != kPromptSeq) {
            llama_memory_seq_rm(memory, seq, -1, -1);
        }
    }
}

// prefix | text, its last n_prompt embeddings replaced. Everything before them is computed once for all candidates.
void Scorer::score_cue(const ScoreRequest & request, const Pack & pack, float * out) {
    llama_memory_t memory = llama_get_memory(ctx_.get());
    const auto   n_prefix = static_cast<llama_pos>(request.n_prefix);
    const size_t n_labels = request.label_ids ? request.n_labels : model_->n_vocab();
    const size_t n_out    = request.texts.n*n_labels;
    const size_t n_rows   = request.n_prompt*model_->n_embd();

    // without rows each text's last token is computed anew for each candidate: something must give the logits
    const size_t n_tail = std::max<size_t>(1, request.n_prompt);

    batch_.clear();
    for (size_t i = pack.first; i < pack.last; ++i) {
        const llama_seq_id seq = kTextSeq + static_cast<llama_seq_id>(i - pack.first);
        llama_memory_seq_cp(memory, kPrefixSeq, seq, -1, -1);
        add_text(request, i, seq, request.texts.length(i) - n_tail, n_prefix, false);
    }
    if (batch_.size() > 0) {
        decode(request, nullptr);
    }

    for (size_t c = 0; c < request.n_candidates; ++c) {
        batch_.clear();
        for (size_t i = pack.first; i < pack.last; ++i) {
            const llama_seq_id  seq  = kTextSeq + static_cast<llama_seq_id>(i - pack.first);
            const size_t        head = request.texts.length(i) - n_tail;
            const llama_pos     pos0 = n_prefix + static_cast<llama_pos>(head);
            const llama_token * ids  = request.texts.begin(i) + head;

            llama_soft_prompt_set(ctx_.get(), seq, pos0, static_cast<int32_t>(request.n_prompt), request.embeds + c*n_rows);
            for (size_t j = 0; j < n_tail; ++j) {
                batch_.add(ids[j], pos0 + static_cast<llama_pos>(j), seq, j + 1 == n_tail ? static_cast<int32_t>(i) : -1);
            }
        }
        decode(request, out + c*n_out);

        for (size_t i = pack.first; i < pack.last; ++i) {
            const auto pos0 = n_prefix + static_cast<llama_pos>(request.texts.length(i) - n_tail);
            llama_memory_seq_rm(memory, kTextSeq + static_cast<llama_seq_id>(i - pack.first), pos0, -1);
        }
    }

    llama_soft_prompt_clear(ctx_.get());
    for (size_t i = pack.first; i < pack.last; ++i) {
        llama_memory_seq_rm(memory, kTextSeq + static_cast<llama_seq_id>(i - pack.first), -1, -1);
    }
}

// Runs batch_ and writes the label logits of each output token to out[output][n_labels].
void Scorer::decode(const ScoreRequest & request, float * out) {
    for (size_t begin = 0; begin < batch_.size(); begin += kBatch) {
        const size_t end = std::min(batch_.size(), begin + kBatch);

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

        for (size_t i = begin; i < end; ++i) {
            if (batch_.output(i) < 0) {
                continue;
            }
            const float * logits = llama_get_logits_ith(ctx_.get(), static_cast<int32_t>(i - begin));
            if (request.label_ids) {
                float * dst = out + batch_.output(i)*request.n_labels;
                for (size_t j = 0; j < request.n_labels; ++j) {
                    dst[j] = logits[request.label_ids[j]];
                }
            } else {
                const size_t n_vocab = model_->n_vocab();
                std::copy(logits, logits + n_vocab, out + batch_.output(i)*n_vocab);
            }
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
