#include "scorer.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "backends.h"
#include "errors.h"
#include "llama-ext.h"
#include "llama-soft-prompt.h"
#include "log.h"
#include "log_sum_exp.h"
#include "sequences.h"

namespace fedbpt {

namespace {

constexpr size_t kTextsMax = 32;       // texts per pack
constexpr size_t kWholeMax = 32;       // outputs per llama_decode if they are n_vocab wide
constexpr size_t kCueCellsMax = 1024;  // KV cells for a cue pack's texts: attention slows down with a longer KV

constexpr uint32_t kSeqMax = 256;  // LLAMA_MAX_SEQ

// Maximum number of sequences of a pack, per candidate.
size_t sequences_max(const Plan & plan) {
    return std::max(kTextsMax, plan.n_branches());
}

}  // namespace

Scorer::Scorer(std::shared_ptr<const Model> model, int32_t n_threads, ggml_type kv_type)
    : model_(model),
      session_(std::move(model), n_threads, kv_type),
      can_resume_(static_cast<size_t>(llama_model_n_layer(model_->get())), -1) {}

void Scorer::validate(const Request & request) const {
    if (request.n_which == 0) {
        throw InputError("indices is empty: choose at least one of the plan's texts");
    }
    if (request.n_candidates == 0) {
        throw InputError("embeds has no candidates: give at least one soft prompt");
    }
    for (size_t i = 0; i < request.n_which; ++i) {
        if (request.which[i] < 0 || static_cast<size_t>(request.which[i]) >= request.plan.n_texts()) {
            throw InputError("indices must be from 0 to " + std::to_string(request.plan.n_texts() - 1) + ", got " +
                             std::to_string(request.which[i]));
        }
        request.plan.check_rows(static_cast<size_t>(request.which[i]), request.n_prompt);
    }
    const size_t n_rows = request.n_prompt * model_->n_embd();
    for (size_t i = 0; i < request.n_candidates * n_rows; ++i) {
        if (!std::isfinite(request.embeds[i])) {
            throw InputError("embeds must be finite, got NaN or infinity in candidate " + std::to_string(i / n_rows));
        }
    }
}

// Packs texts by next fit, in their order: a pack fills one ubatch (front; the first pack contains the rows too) or
// kCueCellsMax KV cells (cue). A longer text is a pack by itself.
std::vector<Scorer::Pack> Scorer::pack(const Request & request) const {
    const bool front = request.plan.placement() == Placement::front;
    const size_t tokens_max = front ? Session::kUbatch : kCueCellsMax;
    const size_t branches = sequences_max(request.plan) / request.plan.n_branches();
    const size_t texts_max = front ? branches : std::clamp<size_t>(Session::kBatch / request.n_tail(), 1, branches);

    std::vector<Pack> packs;
    for (size_t i = 0; i < request.n_which; ++i) {
        const size_t length = request.length(i);
        const size_t steps = request.n_steps(i);
        const size_t rows = front && packs.size() <= 1 ? request.n_prompt : 0;
        // in cue placement each text has its own copy of the prefix
        const size_t prefixes =
            front || packs.empty() ? 0 : (packs.back().n_texts() + 1) * request.plan.prefix().size();
        if (!packs.empty() &&
            rows + prefixes + packs.back().n_tokens + packs.back().n_steps + length + steps <= tokens_max &&
            packs.back().n_texts() < texts_max) {
            packs.back().last = i + 1;
            packs.back().n_tokens += length;
            packs.back().n_steps += steps;
        } else {
            packs.push_back({ i, i + 1, length, steps });
        }
    }
    return packs;
}

// Number of candidates per llama_decode: as many as fit one ubatch, if that does not change results; else 1.
size_t Scorer::candidates_together(const Request & request, const std::vector<Pack> & packs) const {
    // without a label head each output is n_vocab wide
    if (request.plan.label_head() == nullptr || !model_->has_row_attention()) {
        return 1;
    }
    const bool front = request.plan.placement() == Placement::front;
    if (front && packs.size() > 1) {
        return 1;  // a pack fills a ubatch by itself
    }
    size_t together = request.n_candidates;
    for (const Pack & pack : packs) {
        const size_t n_tokens = front ? request.n_prompt + pack.n_tokens : pack.n_texts() * request.n_tail();
        const size_t n_seqs = pack.n_texts() + (front ? 1 : 0);
        together = std::min({ together, (Session::kUbatch - Session::kPad) / n_tokens,
                              (kSeqMax - kFirstSeq - Session::kPad) / n_seqs });
    }
    return std::max<size_t>(together, 1);
}

void Scorer::ensure_context(const Request & request, const std::vector<Pack> & packs, size_t together) {
    const bool front = request.plan.placement() == Placement::front;

    size_t most = 0;
    for (const Pack & pack : packs) {
        // in cue placement each text has its own copy of the prefix, in its saved KV
        const size_t shared = front ? 0 : pack.n_tokens + pack.n_texts() * request.plan.prefix().size();
        const size_t own = front ? request.n_prompt + pack.n_tokens : pack.n_texts() * request.n_tail();
        most = std::max(most, shared + together * own + pack.n_steps);
    }
    const auto n_ctx = static_cast<uint32_t>(padded(request.plan.prefix().size() + most + 2 * Session::kPad,
                                                    256));  // 2 kPad: padding of outputs, and of tokens
    const uint32_t n_seq_max =
        request.plan.label_head() != nullptr
            ? kSeqMax
            : static_cast<uint32_t>(padded(kFirstSeq + 1 + sequences_max(request.plan), Session::kPad));
    if (n_seq_max > kSeqMax) {
        throw InputError(std::to_string(request.plan.n_branches()) +
                         " continuations of several tokens are too many for one text: give at most " +
                         std::to_string(kSeqMax - kFirstSeq - Session::kPad));
    }
    if (session_.is_open() && n_ctx <= session_.n_cells() && n_seq_max == n_seq_max_) {
        return;
    }
    const std::vector<llama_token> & labels = request.plan.head_ids();
    // one of another number of sequences, as for generation, may be far larger than scoring needs
    const uint32_t n_before = n_seq_max == n_seq_max_ ? session_.n_cells() : 0;
    session_.open({ std::max(n_ctx, n_before), n_seq_max, std::max<uint32_t>(n_seq_max, kWholeMax) },
                  { labels.data(), static_cast<int32_t>(labels.size()), request.plan.label_head() },
                  "free memory, or score shorter texts");
    n_seq_max_ = n_seq_max;
}

void Scorer::score(Plan & plan, const int64_t * which, size_t n_which, const float * embeds, size_t n_candidates,
                   size_t n_prompt, float * out, float * states, const std::function<bool()> & stop) {
    const Request request{ plan, which, n_which, embeds, n_candidates, n_prompt, states };
    validate(request);

    std::lock_guard<std::mutex> lock(mutex_);
    interrupted_ = false;
    const Session::Watch watch(session_, interrupted_, stop);

    try {
        run(request, out);
    } catch (...) {
        if (session_.is_open()) {
            session_.clear();
        }
        throw;
    }
}

size_t Scorer::Request::n_read(size_t i) const {
    const auto text = static_cast<size_t>(which[i]);

    size_t longest = 1;
    for (size_t k = 0; k < plan.n_continuations(); ++k) {
        longest = std::max(longest, plan.continuation_length(text, k));
    }
    return plan.prefix().size() + (plan.placement() == Placement::front ? n_prompt : 0) + length(i) + longest - 1;
}

// LongRoPE's factors depend on each text's own length, but one llama_decode uses one set: short texts are scored first,
// then long ones.
void Scorer::run(const Request & request, float * out) {
    std::vector<int64_t> which[2], places[2];
    for (size_t i = 0; i < request.n_which; ++i) {
        const bool is_long = model_->is_long(request.n_read(i));
        which[is_long].push_back(request.which[i]);
        places[is_long].push_back(static_cast<int64_t>(i));
    }
    const size_t n_columns = request.plan.n_columns();
    const size_t n_state = request.plan.n_state();

    for (const bool is_long : { false, true }) {
        is_long_ = is_long;
        if (which[is_long].size() == request.n_which) {
            run_alike(request, out);
        } else if (!which[is_long].empty()) {
            Request part{ request.plan,   which[is_long].data(), which[is_long].size(),
                          request.embeds, request.n_candidates,  request.n_prompt,
                          nullptr };
            std::vector<float> scores(part.n_outputs() * n_columns);
            std::vector<float> states(request.states != nullptr ? part.n_outputs() * n_state : 0);
            part.states = request.states != nullptr ? states.data() : nullptr;
            run_alike(part, scores.data());
            for (size_t c = 0; c < part.n_candidates; ++c) {
                for (size_t i = 0; i < part.n_which; ++i) {
                    const size_t to = c * request.n_which + static_cast<size_t>(places[is_long][i]);
                    std::copy_n(scores.data() + (c * part.n_which + i) * n_columns, n_columns, out + to * n_columns);
                    if (request.states != nullptr) {
                        std::copy_n(states.data() + (c * part.n_which + i) * n_state, n_state,
                                    request.states + to * n_state);
                    }
                }
            }
        }
    }
}

void Scorer::run_alike(const Request & request, float * out) {
    const std::vector<Pack> packs = pack(request);
    const size_t together = candidates_together(request, packs);
    ensure_context(request, packs, together);

    llama_memory_clear(session_.memory(), /*data =*/false);
    llama_soft_prompt_clear(session_.context());
    llama_soft_prompt_set_text_length(session_.context(), model_->rope_length(is_long_));
    const std::vector<llama_token> & labels = request.plan.head_ids();
    llama_soft_prompt_set_labels(session_.context(), labels.data(), static_cast<int32_t>(labels.size()),
                                 request.plan.label_head());
    const std::vector<int32_t> & layers = request.plan.layers();
    llama_soft_prompt_set_taps(session_.context(), layers.data(),
                               request.states != nullptr ? static_cast<int32_t>(layers.size()) : 0);

    if (request.plan.placement() != Placement::front) {
        request.plan.keep_for_tail(request.n_tail());
        for (const Pack & pack : packs) {
            score_cue(request, pack, together, out);
        }
    } else {
        decode_prefix(request);
        for (size_t c = 0; c < request.n_candidates; c += together) {
            const Group group{ c, std::min(c + together, request.n_candidates) };
            for (const Pack & pack : packs) {
                score_front(request, pack, group, &pack == &packs.front(), out);
            }
        }
    }
    llama_soft_prompt_clear(session_.context());

    const auto is_finite = [](float x) { return std::isfinite(x); };
    const size_t n_states = request.states != nullptr ? request.n_outputs() * request.plan.n_state() : 0;
    if (!std::all_of(out, out + request.n_outputs() * request.plan.n_columns(), is_finite) ||
        !std::all_of(request.states, request.states + n_states, is_finite)) {
        session_.clear();
    }
}

// Reads an output of the whole vocabulary: adds the log-probability of a continuation's next token, or writes the first
// tokens' log-probabilities and the labels' logits.
void Scorer::read_whole(const Request & request, int64_t output, const float * logits, float * out) const {
    const Plan & plan = request.plan;
    const auto column_of = [&](int64_t text) { return out + static_cast<size_t>(text) * plan.n_columns(); };
    const auto n_outputs = static_cast<int64_t>(request.n_outputs());
    const double log_sum = plan.n_continuations() > 0 ? log_sum_exp(logits, plan.n_vocab()) : 0.0;
    const auto log_p = [&](llama_token token) { return static_cast<float>(logits[token] - log_sum); };

    if (output >= n_outputs) {
        const Step & step = steps_[static_cast<size_t>(output - n_outputs)];
        column_of(step.output)[step.continuation] += log_p(step.token);
        return;
    }
    float * columns = column_of(output);
    const size_t text = static_cast<size_t>(request.which[static_cast<size_t>(output) % request.n_which]);
    for (size_t k = 0; k < plan.n_continuations(); ++k) {
        *columns++ = log_p(plan.continuation(text, k)[0]);  // the text's output is read before those of its steps
    }
    if (plan.all_labels()) {
        std::copy(logits, logits + plan.n_vocab(), columns);
    } else {
        std::transform(plan.label_ids().begin(), plan.label_ids().end(), columns,
                       [&](llama_token id) { return logits[id]; });
    }
}

// Runs batch_ and writes the results of each output token to out[output][n_columns]. `resumes`: only the layers after
// the plan's shifted one are computed.
void Scorer::decode(const Request & request, float * out, bool resumes, const StatesOf & take) {
    Plan & plan = request.plan;
    const int32_t n_layers = llama_model_n_layer(model_->get()) - (resumes ? plan.resumes_after() + 1 : 0);
    const bool whole = plan.whole_vocabulary();
    const size_t n_tokens = batch_.size();  // without padding
    Session::pad(batch_, /*outputs =*/true);
    for (size_t begin = 0, end = 0; begin < batch_.size(); begin = end) {
        end = batch_.end_of(begin, Session::kBatch, whole ? kWholeMax : Session::kBatch);
        plan.count_tokens(std::min(end, n_tokens) - std::min(begin, n_tokens), n_layers);
        if (!session_.decode(batch_, begin, end)) {
            throw std::runtime_error("the context has too few KV cells: please report this");
        }

        if (!llama_soft_prompt_shifted(session_.context())) {
            throw UnsupportedModelError(kNoShifts);
        }
        if (!whole) {
            llama_synchronize(session_.context());
        }
        if (take) {
            size_t n_outputs = 0;
            for (size_t i = begin; i < end; ++i) {
                n_outputs += batch_.output(i) != Batch::kNone;
            }
            take(llama_soft_prompt_states(session_.context()), n_outputs);
            continue;
        }
        const size_t n_head = plan.head_ids().size();
        const float * labels = llama_soft_prompt_label_logits(session_.context());
        const float * states = request.states != nullptr ? llama_soft_prompt_states(session_.context()) : nullptr;
        for (size_t i = begin; i < end; ++i) {
            if (batch_.output(i) >= 0 && whole) {
                read_whole(request, batch_.output(i),
                           llama_get_logits_ith(session_.context(), static_cast<int32_t>(i - begin)), out);
            } else if (batch_.output(i) >= 0) {
                std::copy_n(labels, plan.n_labels(), out + static_cast<size_t>(batch_.output(i)) * plan.n_labels());
            }
            if (batch_.output(i) == Batch::kNone) {
                continue;
            }
            if (request.states != nullptr && batch_.output(i) >= 0 &&
                batch_.output(i) < static_cast<int64_t>(request.n_outputs())) {
                if (states == nullptr) {
                    throw UnsupportedModelError(
                        "the hidden states of this model's layers cannot be read, as llama.cpp's graph does not mark "
                        "its layer outputs: use another model");
                }
                std::copy_n(states, plan.n_state(),
                            request.states + static_cast<size_t>(batch_.output(i)) * plan.n_state());
            }
            labels += n_head;
            states += states != nullptr ? plan.n_state() : 0;
        }
    }
    session_.remove_padding();
}

MemoryUse Scorer::memory() const {
    std::lock_guard<std::mutex> lock(mutex_);

    MemoryUse use;
    use.weights = model_->size_bytes();
    if (session_.is_open()) {
        for (const auto & [type, data] : llama_get_memory_breakdown(session_.context())) {
            use.kv += data.context;
            use.compute += data.compute;
            use.gpu += is_on_gpu(type) ? data.total() : 0;
        }
    }
    return use;
}

}  // namespace fedbpt
