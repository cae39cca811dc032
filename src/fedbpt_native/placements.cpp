// The two placements of the scorer: which tokens of which sequences go through llama_decode.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>

#include "errors.h"
#include "llama-soft-prompt.h"
#include "scorer.h"
#include "sequences.h"

namespace fedbpt {

namespace {

// Tokens that a text saves by waiting for the KV of another one of its batch, from which a pass more is worth its time.
constexpr size_t kWorthWaiting = 32;

// Relative difference of logits that is rounding.
constexpr float kSame = 0.002f;

}  // namespace

void Scorer::decode_prefix(const Request & request) {
    const Plan & plan = request.plan;
    if (plan.prefix().empty()) {
        return;
    }
    batch_.clear();
    for (size_t i = 0; i < plan.prefix().size(); ++i) {
        batch_.add(plan.prefix()[i], static_cast<llama_pos>(i), kPrefixSeq, Batch::kNone);
    }
    decode(request, nullptr);
}

// Adds all but the last token of each of text i's continuations, from `pos` on: each continuation of several tokens has
// its own one of seqs[n_branches].
void Scorer::add_continuations(const Request & request, size_t candidate, size_t i, const llama_seq_id * seqs,
                               llama_pos pos) {
    const Plan & plan = request.plan;
    const size_t text = static_cast<size_t>(request.which[i]);

    for (size_t k = 0; k < plan.n_continuations(); ++k) {
        const llama_token * ids = plan.continuation(text, k);
        const size_t length = plan.continuation_length(text, k);
        for (size_t j = 0; j + 1 < length; ++j) {
            batch_.add(ids[j], pos + static_cast<llama_pos>(j), *seqs,
                       static_cast<int64_t>(request.n_outputs() + steps_.size()));
            steps_.push_back({ request.output_of(candidate, i), k, ids[j + 1] });
        }
        seqs += length > 1;
    }
}

// prefix | rows | text | continuations. The rows are decoded with the first pack's texts, as tokens of all its
// sequences; the other packs share their cells.
void Scorer::score_front(const Request & request, const Pack & pack, const Group & group, bool first_pack,
                         float * out) {
    llama_memory_t memory = session_.memory();
    const auto n_prefix = static_cast<llama_pos>(request.plan.prefix().size());
    const auto n_prompt = static_cast<llama_pos>(request.n_prompt);
    const size_t n_branches = request.plan.n_branches();
    const auto n_seqs =
        static_cast<llama_seq_id>(1 + pack.n_texts() * n_branches);  // per candidate: the rows', then the texts'

    batch_.clear();
    steps_.clear();
    for (size_t c = group.first; c < group.last; ++c) {
        const llama_seq_id prompt = kFirstSeq + static_cast<llama_seq_id>(c - group.first) * n_seqs;

        seqs_.clear();
        for (llama_seq_id seq = prompt; seq < prompt + n_seqs; ++seq) {
            seqs_.push_back(seq);
            if (first_pack) {
                llama_memory_seq_cp(memory, kPrefixSeq, seq, -1, -1);
            } else if (seq != prompt) {
                llama_memory_seq_cp(memory, prompt, seq, -1, -1);
            }
        }
        if (first_pack && n_prompt > 0) {
            llama_soft_prompt_set(session_.context(), prompt, n_prefix, n_prompt, rows_of(request, c));
            for (llama_pos j = 0; j < n_prompt; ++j) {
                batch_.add(/*placeholder token =*/0, n_prefix + j, seqs_.data(), seqs_.size(), Batch::kNone);
            }
        }
        for (size_t i = pack.first; i < pack.last; ++i) {
            const size_t length = request.length(i);
            const llama_seq_id * seqs = &seqs_[1 + (i - pack.first) * n_branches];
            for (size_t j = 0; j < length; ++j) {
                batch_.add(request.text(i)[j], n_prefix + n_prompt + static_cast<llama_pos>(j), seqs, n_branches,
                           j + 1 == length ? request.output_of(c, i) : Batch::kNone);
            }
            add_continuations(request, c, i, seqs, n_prefix + n_prompt + static_cast<llama_pos>(length));
        }
    }
    decode(request, out);

    // the rows stay for the candidate's next pack
    const bool last_pack = pack.last == request.n_which;
    for (llama_seq_id s = 0; s < static_cast<llama_seq_id>(group.size()) * n_seqs; ++s) {
        if (last_pack || s % n_seqs != 0) {
            llama_memory_seq_rm(memory, kFirstSeq + s, -1, -1);
        }
    }
}

// Tokens of the prefix and text i up to where the rows begin.
std::vector<llama_token> Scorer::head_tokens(const Request & request, size_t i) const {
    std::vector<llama_token> tokens = request.plan.prefix();
    tokens.insert(tokens.end(), request.text(i), request.text(i) + request.length(i) - request.n_tail());
    return tokens;
}

// Computes the KV of one text's head by itself in an empty cache, so that it does not depend on the other texts of the
// call.
TextKvPtr Scorer::compute_alone(const Request & request, size_t i) {
    auto text = std::make_shared<TextKv>();
    text->is_long = is_long_;
    text->tokens = head_tokens(request, i);
    batch_.clear();
    for (size_t pos = 0; pos < text->tokens.size(); ++pos) {
        batch_.add(text->tokens[pos], static_cast<llama_pos>(pos), kFirstSeq, Batch::kNone);
    }
    decode(request, nullptr);
    text->state = session_.save(kFirstSeq);
    llama_memory_seq_rm(session_.memory(), kFirstSeq, -1, -1);
    return text;
}

// Computes the KV of several texts' heads, together: with row attention a token's bits do not depend on its batch. Each
// continues from the KV of a text with a common prefix, if there is one. texts[n]: the results, null where missing.
void Scorer::compute_together(const Request & request, const std::vector<size_t> & missing,
                              std::vector<TextKvPtr> & texts) {
    llama_memory_t memory = session_.memory();
    std::vector<std::pair<size_t, std::shared_ptr<TextKv>>> open;  // texts whose tokens are in the batch
    size_t n_cells = 0;                                            // that they have in the cache

    const auto flush = [&] {
        decode(request, nullptr);
        for (size_t j = 0; j < open.size(); ++j) {
            const auto & [at, text] = open[j];
            const llama_seq_id seq = kFirstSeq + static_cast<llama_seq_id>(j);
            text->state = session_.save(seq);
            llama_memory_seq_rm(memory, seq, -1, -1);
            texts_[is_long_].add(text);
            texts[at] = text;
        }
        open.clear();
        batch_.clear();
        n_cells = 0;
    };
    const auto saved_by_waiting = [&](const std::vector<llama_token> & tokens, size_t n_same) {
        size_t most = 0;
        for (const auto & [at, text] : open) {
            most = std::max(most, common_prefix(tokens, text->tokens));
        }
        return most > n_same ? most - n_same : 0;
    };

    batch_.clear();
    for (const size_t at : missing) {
        auto text = std::make_shared<TextKv>();
        text->is_long = is_long_;
        text->tokens = head_tokens(request, at);
        auto [like, n_same] = texts_[is_long_].longest(text->tokens);
        if (!open.empty() && (batch_.size() + text->tokens.size() - (like ? n_same : 0) > Session::kUbatch ||
                              saved_by_waiting(text->tokens, like ? n_same : 0) >= kWorthWaiting)) {
            flush();
            std::tie(like, n_same) = texts_[is_long_].longest(text->tokens);
        }
        if (like && n_same == text->tokens.size() && n_same == like->tokens.size()) {
            texts[at] = like;
            continue;
        }
        size_t done = 0;
        const llama_seq_id seq = kFirstSeq + static_cast<llama_seq_id>(open.size());
        if (like && n_cells + std::max(like->tokens.size(), text->tokens.size()) <= session_.n_cells()) {
            session_.restore(like->state, seq);
            llama_memory_seq_rm(memory, seq, static_cast<llama_pos>(n_same), -1);
            done = n_same;
        }
        for (size_t pos = done; pos < text->tokens.size(); ++pos) {
            batch_.add(text->tokens[pos], static_cast<llama_pos>(pos), seq, Batch::kNone);
        }
        n_cells += text->tokens.size();
        open.emplace_back(at, text);
    }
    if (!open.empty()) {
        flush();
    }
}

// Restores each text's KV up to where the rows begin into `slots` sequences, which share its cells. Missing KV is
// computed once for all candidates, and kept.
void Scorer::restore_texts(const Request & request, const Pack & pack, size_t slots) {
    llama_memory_t memory = session_.memory();

    std::vector<TextKvPtr> texts(request.n_which);
    std::vector<size_t> missing;
    for (size_t i = pack.first; i < pack.last; ++i) {
        texts[i] = request.plan.kv(static_cast<size_t>(request.which[i]));
        if (texts[i] && texts[i]->is_long != is_long_) {
            texts[i] = nullptr;
        }
        if (request.head_of(i) > 0 && !texts[i]) {
            missing.push_back(i);
        }
    }
    if (model_->has_row_attention()) {
        compute_together(request, missing, texts);
    }
    for (const size_t i : missing) {
        if (!texts[i]) {
            texts[i] = compute_alone(request, i);
        }
        request.plan.keep_kv(static_cast<size_t>(request.which[i]), texts[i]);
    }
    for (size_t i = pack.first; i < pack.last; ++i) {
        if (request.head_of(i) == 0) {
            continue;
        }
        const llama_seq_id seq = kFirstSeq + static_cast<llama_seq_id>((i - pack.first) * slots);
        session_.restore(texts[i]->state, seq);
        for (llama_seq_id slot = 1; slot < static_cast<llama_seq_id>(slots); ++slot) {
            llama_memory_seq_cp(memory, seq, seq + slot, -1, -1);
        }
    }
}

// Places the candidate's rows from `pos` on in the sequences seqs_.
void Scorer::set_prompt(const Request & request, size_t candidate, llama_pos pos) {
    const float * rows = rows_of(request, candidate);
    if (request.plan.placement() == Placement::cue) {
        llama_soft_prompt_set(session_.context(), seqs_.front(), pos, static_cast<int32_t>(request.n_prompt), rows);
        return;
    }
    const ShiftedLayers & shifted = request.plan.shifted();
    const llama_pos end = shifted.continued ? std::numeric_limits<llama_pos>::max() : pos + 1;
    for (const llama_seq_id seq : seqs_) {
        llama_soft_prompt_set_shift(session_.context(), seq, pos, end, shifted.first,
                                    request.n_prompt > 0 ? shifted.n : 0, rows);
    }
}

// Scores a group of candidates on the pack's restored texts. `resumes`: from the texts' states on.
void Scorer::score_group(const Request & request, const Pack & pack, const Group & group, size_t slots, bool resumes,
                         float * out) {
    llama_memory_t memory = session_.memory();
    const size_t n_tail = request.n_tail();
    const size_t n_branches = request.plan.n_branches();
    const auto n_embd = static_cast<size_t>(model_->n_embd());
    const auto seq_of = [&](size_t i, size_t slot) {
        return kFirstSeq + static_cast<llama_seq_id>((i - pack.first) * slots + slot);
    };

    batch_.clear();
    steps_.clear();
    states_.resize(resumes ? pack.n_texts() * group.size() * n_embd : 0);
    float * state = states_.data();
    for (size_t i = pack.first; i < pack.last; ++i) {
        const auto pos0 = static_cast<llama_pos>(request.head_of(i));
        const llama_token * ids = request.text(i) + request.length(i) - n_tail;

        for (size_t c = group.first; c < group.last; ++c) {
            seqs_.resize(n_branches);
            std::iota(seqs_.begin(), seqs_.end(), seq_of(i, (c - group.first) * n_branches));
            if (resumes) {
                const std::vector<float> & own = request.plan.state(static_cast<size_t>(request.which[i]));
                std::transform(own.begin(), own.end(), rows_of(request, c), state, std::plus<float>());
                llama_soft_prompt_set_state(session_.context(), seqs_.front(), pos0, request.plan.resumes_after(),
                                            state);
                state += n_embd;
            } else {
                set_prompt(request, c, pos0);
            }
            for (size_t j = 0; j < n_tail; ++j) {
                batch_.add(ids[j], pos0 + static_cast<llama_pos>(j), seqs_.data(), n_branches,
                           j + 1 == n_tail ? request.output_of(c, i) : Batch::kNone);
            }
            add_continuations(request, c, i, seqs_.data(), pos0 + static_cast<llama_pos>(n_tail));
        }
    }
    decode(request, out, resumes);

    for (size_t i = pack.first; i < pack.last; ++i) {
        for (size_t slot = 0; slot < group.size() * n_branches; ++slot) {
            llama_memory_seq_rm(memory, seq_of(i, slot), static_cast<llama_pos>(request.head_of(i)), -1);
        }
    }
}

// Computes the missing states of the pack's restored texts at their last tokens, after the layer that is shifted.
void Scorer::compute_states(const Request & request, const Pack & pack, size_t slots) {
    std::vector<size_t> missing;
    batch_.clear();
    steps_.clear();
    for (size_t i = pack.first; i < pack.last; ++i) {
        if (request.plan.state(static_cast<size_t>(request.which[i])).empty()) {
            const llama_seq_id seq = kFirstSeq + static_cast<llama_seq_id>((i - pack.first) * slots);
            batch_.add(request.text(i)[request.length(i) - 1], static_cast<llama_pos>(request.head_of(i)), seq,
                       Batch::kUnread);
            missing.push_back(i);
        }
    }
    if (missing.empty()) {
        return;
    }
    const int32_t layer = request.plan.resumes_after();
    llama_soft_prompt_set_taps(session_.context(), &layer, 1);
    const auto n_embd = static_cast<size_t>(model_->n_embd());
    size_t n_read = 0;
    decode(request, nullptr, false, [&](const float * states, size_t n) {
        if (states == nullptr) {
            throw UnsupportedModelError(kNoShifts);
        }
        for (size_t j = 0; j < n && n_read < missing.size(); ++j, ++n_read) {
            request.plan.keep_state(static_cast<size_t>(request.which[missing[n_read]]), states + j * n_embd);
        }
    });
    llama_soft_prompt_set_taps(session_.context(), nullptr, 0);
    for (const size_t i : missing) {
        const llama_seq_id seq = kFirstSeq + static_cast<llama_seq_id>((i - pack.first) * slots);
        llama_memory_seq_rm(session_.memory(), seq, static_cast<llama_pos>(request.head_of(i)), -1);
    }
}

// Scores a group both from the first layer on and from the states on, and notes whether both are the same up to
// rounding: an architecture whose later layers read what earlier ones wrote at this token cannot resume.
bool Scorer::resumes_alike(const Request & request, const Pack & pack, const Group & group, size_t slots, float * out) {
    score_group(request, pack, group, slots, /*resumes =*/false, out);
    session_.clear();  // what the first pass wrote must not help the second
    restore_texts(request, pack, slots);
    std::vector<float> resumed(request.n_outputs() * request.plan.n_columns());
    score_group(request, pack, group, slots, /*resumes =*/true, resumed.data());

    bool alike = llama_soft_prompt_resumed(session_.context());
    bool any_finite = false;
    for (size_t c = group.first; c < group.last; ++c) {
        for (size_t i = pack.first; i < pack.last; ++i) {
            const size_t at = static_cast<size_t>(request.output_of(c, i)) * request.plan.n_columns();
            for (size_t k = at; k < at + request.plan.n_columns(); ++k) {
                const bool finite = std::isfinite(out[k]);
                any_finite = any_finite || finite;
                alike = alike && finite == std::isfinite(resumed[k]) &&
                        (!finite || std::abs(out[k] - resumed[k]) <= kSame * (1 + std::abs(out[k])));
            }
        }
    }
    if (alike) {
        for (size_t c = group.first; c < group.last; ++c) {
            const size_t at = static_cast<size_t>(request.output_of(c, pack.first)) * request.plan.n_columns();
            std::copy_n(resumed.data() + at, pack.n_texts() * request.plan.n_columns(), out + at);
        }
    }
    if (any_finite) {  // else this says nothing
        can_resume_[static_cast<size_t>(request.plan.resumes_after())] = alike;
    }
    llama_soft_prompt_clear(session_.context());
    return alike;
}

// prefix | text, with its last n_prompt embeddings replaced or its last token shifted | continuations. Each text has a
// sequence per candidate and branch.
void Scorer::score_cue(const Request & request, const Pack & pack, size_t together, float * out) {
    llama_memory_t memory = session_.memory();
    const size_t slots = together * request.plan.n_branches();
    const auto seq_of = [&](size_t i, size_t slot) {
        return kFirstSeq + static_cast<llama_seq_id>((i - pack.first) * slots + slot);
    };

    restore_texts(request, pack, slots);
    // without row attention, a state's bits would depend on the texts beside it
    bool resumes =
        model_->has_row_attention() && request.states == nullptr && request.plan.can_resume(request.n_prompt);
    int8_t tried = 1;
    if (resumes) {
        tried = can_resume_[static_cast<size_t>(request.plan.resumes_after())];
        resumes = tried != 0;
    }
    if (resumes) {
        compute_states(request, pack, slots);
    }

    for (size_t first = 0; first < request.n_candidates; first += together) {
        const Group group{ first, std::min(first + together, request.n_candidates) };
        if (resumes && tried < 0) {
            resumes = resumes_alike(request, pack, group, slots, out);
            tried = resumes;
        } else {
            score_group(request, pack, group, slots, resumes, out);
        }
    }

    if (!request.plan.keeps_kv()) {
        for (size_t i = pack.first; i < pack.last; ++i) {
            request.plan.drop_state(static_cast<size_t>(request.which[i]));
        }
    }
    llama_soft_prompt_clear(session_.context());
    for (llama_seq_id seq = kFirstSeq; seq < seq_of(pack.last, 0); ++seq) {
        llama_memory_seq_rm(memory, seq, -1, -1);
    }
}

}  // namespace fedbpt
